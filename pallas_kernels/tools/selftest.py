"""Every op against its sequential reference, as it runs on this machine, in seconds."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tools import operands, testing

BATCH, LENGTH = 2, 96


class SelfTest(NamedTuple):
    """What came out of one op.

    Attributes:
      name: of the op.
      forward, gradients: the largest `RMSE(error) / RMSE(reference)` of an output, and of the
        gradient of an operand; None where there is an error.
      seconds: compiling included.
      error: why it could not be run, or what was not finite.
    """

    name: str
    forward: float | None
    gradients: float | None
    seconds: float
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Both ratios are within the tolerance of float32."""
        found = (self.forward, self.gradients)
        return all(ratio is not None and ratio <= testing.FLOAT32_TOLERANCE for ratio in found)


def check(name: str) -> SelfTest:
    """Runs an op forward and backward on the default device, over packed documents where it can.

    The reference runs in float64, on the CPU where JAX has one.
    """
    start = time.perf_counter()
    args = operands.arrays(name, BATCH, LENGTH)
    forward: float | None = None
    gradients: float | None = None
    error = None
    try:
        cotangents = _cotangents(name, args)
        actual = jax.device_get(_program(name, None)(args, cotangents))
        expected = _expected(name, args, cotangents)
        forward, gradients = (_largest(a, b) for a, b in zip(actual, expected, strict=True))
    except Exception as problem:  # whatever a compiler or a driver raises is the answer
        error = " ".join(str(problem).split()) or type(problem).__name__
    seconds = time.perf_counter() - start
    return SelfTest(name, forward, gradients, seconds, error)


def _program(name: str, implementation: str | None, **options: Any) -> Any:
    """`(outputs, gradients)` of `(operands, cotangents)`, jitted with these options."""
    run = operands.call(name, implementation, length=LENGTH)

    def both(args: Any, cotangents: Any) -> tuple[Any, Any]:
        outputs, pullback = jax.vjp(run, args)
        return outputs, pullback(cotangents)[0]

    return jax.jit(both, **options)


def _cotangents(name: str, args: Any) -> Any:
    """Random numbers like the outputs."""
    rng = np.random.default_rng(1)

    def draw(x: Any) -> np.ndarray:
        y = rng.standard_normal(x.shape)
        y = y + 1j * rng.standard_normal(x.shape) if jnp.iscomplexobj(x) else y
        return y.astype(x.dtype)

    return jax.tree.map(draw, jax.eval_shape(operands.call(name, length=LENGTH), args))


def _expected(name: str, args: Any, cotangents: Any) -> Any:
    device, options = testing.oracle_device()
    with jax.enable_x64(True), jax.default_device(device):
        oracle = _program(name, "reference", **options)
        return jax.device_get(oracle(testing.doubled(args), testing.doubled(cotangents)))


def _largest(actual: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(testing.rmse_ratio(a, b) for a, b in pairs)
