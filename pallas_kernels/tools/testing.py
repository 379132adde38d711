"""What tests of kernels share: interpretation on the host, errors as ratios, awkward inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import compat

# RMSE(error) / RMSE(reference) that float32 work may show; part of the contract, never loosened.
FLOAT32_TOLERANCE = 2e-6
BFLOAT16_TOLERANCE = 5e-3
FLOAT64_TOLERANCE = 1e-13
# Largest difference that an output may show of a later token: a transform of the whole row spreads
# rounding.
FLOAT32_LOOK_AHEAD = 1e-5

# XLA's quick code generator for CPUs, as `compiler_options` of `jax.jit`: a program runs a little
# slower and compiles several times faster (a float64 oracle in 0.3 s of CPU instead of 2.3).
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):  # later the other emitters are gone, and the option with them
    QUICK["xla_cpu_use_fusion_emitters"] = False


@contextlib.contextmanager
def interpret(*, seed: int = 0) -> Iterator[None]:
    """Run every TPU and GPU kernel traced inside on the host, as strictly as Pallas can.

    TPU kernels: memory starts as NaN, reads out of bounds raise, parallel grid axes run in an
    order shuffled by `seed`, and a race between grid steps fails at the end of the context.
    """
    params = compat.tpu.InterpretParams(
        detect_races=True,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        random_seed=seed,
    )
    with compat.using_interpreter(params):
        yield
        jax.effects_barrier()
        assert not compat.race_found(), "the TPU interpreter found a race between grid steps"


def rmse_ratio(actual: Any, expected: Any) -> float:
    """`RMSE(actual - expected) / RMSE(expected)`; absolute where the reference is 0."""
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    actual, expected = np.asarray(actual).astype(wide), np.asarray(expected).astype(wide)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all(), "not finite"
    scale = np.sqrt(np.mean(np.abs(expected) ** 2))
    return float(np.sqrt(np.mean(np.abs(actual - expected) ** 2)) / (scale or 1.0))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every leaf's `rmse_ratio` within `tolerance`; the message names the leaf."""
    actual_leaves = jax.tree.leaves_with_path(actual)
    expected_leaves = jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves)
    for (path, x), y in zip(actual_leaves, expected_leaves, strict=True):
        ratio = rmse_ratio(x, y)
        assert ratio <= tolerance, f"{jax.tree_util.keystr(path)}: {ratio:.2e} > {tolerance:.0e}"


def random_ids(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Segment ids `(B, L)` int32: short and long documents, a repeated id, padding in some rows."""
    rows = []
    for row in range(batch):
        lengths: list[int] = []
        while sum(lengths) < length:
            lengths.append(int(rng.choice([1, 2, 3, 7, 20, 50])))
        ids = np.repeat(np.arange(len(lengths)) % 3 + 1, lengths)[:length]
        if row % 2 == 0 and length > 2:
            ids[length - length // 3 :] = 0
        rows.append(ids)
    return np.stack(rows).astype(np.int32)


def value_and_gradients(op: Any, *args: Any, cotangents: Any) -> dict[str, Any]:
    """Outputs of `op(*args)` and the gradients that `cotangents` of them give every array."""

    def run(*args: Any) -> tuple[Any, Any]:
        outputs, pullback = jax.vjp(op, *args)
        return outputs, pullback(jax.tree.map(jnp.asarray, cotangents))

    outputs, gradients = jax.jit(run)(*args)
    return {"outputs": outputs, "gradients": gradients}


@functools.cache
def program(op: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """`run(args, data, cotangents)`: `op` and its gradients as one jitted program.

    The same op and options give the same program, so that calls which differ in values only do not
    compile again. (Where a test replaces code, `tests/conftest.py` drops the programs.)

    Args:
      op: called as `op(*args, **data, **static)`, or `op(**args, ...)` where `args` is a dict; a
        function of a module, not one made for the call.
      **static: hashable options.

    Returns:
      A function to `{"outputs": ..., "gradients": ...}`: gradients of `args`, for `cotangents` of
      the outputs; `data` are arrays without gradients, such as segment ids.
    """
    return jax.jit(functools.partial(_run, op, static))


@functools.cache
def oracle(op: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """`program` of a sequential reference, compiled with `QUICK`."""
    return jax.jit(functools.partial(_run, op, static), compiler_options=QUICK)


def _run(op: Any, static: Any, args: Any, data: Any, cotangents: Any) -> dict[str, Any]:
    def call(args: Any) -> Any:
        if isinstance(args, dict):
            return op(**args, **data, **static)
        return op(*args, **data, **static)

    outputs, pullback = jax.vjp(call, args)
    return {"outputs": outputs, "gradients": pullback(cotangents)[0]}


def oracle_device() -> tuple[jax.Device, dict[str, Any]]:
    """Where a reference in float64 runs, the CPU if JAX has it, and options of `jax.jit` there."""
    try:
        return jax.devices("cpu")[0], {"compiler_options": QUICK}
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return jax.devices()[0], {}


def doubled(tree: Any) -> Any:
    """The arrays in double precision; inside `jax.enable_x64`."""

    def double(x: Any) -> jax.Array:
        wide = np.complex128 if np.iscomplexobj(x) else np.float64
        return jnp.asarray(np.asarray(x).astype(wide))

    return jax.tree.map(double, tree)
