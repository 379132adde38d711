"""Values for the operands of an op, by their names: what a trained model might feed it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tools.programs import Shape, Struct, program


def values(
    operands: Mapping[str, Struct], *, seed: int = 0, document: int = 300
) -> dict[str, jax.Array]:
    """Arrays by name; what is not listed here is normal.

    Decays and memories forget in 10 to 1,000 tokens, complex ones with any phase; step sizes are
    Mamba's, 1e-3 to 0.1; keys of a delta rule have norm 1 and its beta is in (0, 1); filters of
    long convolutions fall off.

    Args:
      operands: shapes and dtypes, as `Shape.operands` has them.
      seed: of the random numbers.
      document: tokens of each document, where there are segment ids.
    """
    rng = np.random.default_rng(seed)
    norm = "beta" in operands
    return {
        name: jnp.asarray(_draw(rng, name, struct, document, norm), struct.dtype)
        for name, struct in operands.items()
    }


def arguments(
    op: Callable[..., Any], shape: Shape, mode: str = "forward+backward", **options: Any
) -> tuple[jax.Array, ...]:
    """The arrays of `program(op, shape, mode)`: with a backward pass the last is a cotangent."""
    given = values(shape.operands(), **options)
    if mode == "forward":
        return tuple(given.values())
    _, structs = program(op, shape, mode)
    cotangent = values({"cotangent": structs[-1]}, seed=1)
    return *given.values(), cotangent["cotangent"]


def _draw(
    rng: np.random.Generator, name: str, struct: Struct, document: int, norm: bool
) -> np.ndarray:
    shape = struct.shape

    def turned(modulus: np.ndarray) -> np.ndarray:
        """With any phase, where the numbers are complex."""
        if not jnp.issubdtype(struct.dtype, jnp.complexfloating):
            return modulus
        return modulus + 1j * rng.uniform(-np.pi, np.pi, shape)

    def rates() -> np.ndarray:
        return np.exp(rng.uniform(np.log(1e-3), np.log(0.1), shape))

    if name == "segment_ids":
        return np.broadcast_to(np.arange(shape[1]) // document + 1, shape)
    if name == "a":
        return np.exp(turned(-rates()))
    if name in ("log_a", "log_decay"):
        return turned(-rates())
    if name == "dt":
        return rates()
    if name == "A":
        return -np.arange(1, shape[1] + 1) * np.ones(shape)
    normal = rng.standard_normal(shape)
    if name == "beta":
        return 1 / (1 + np.exp(-normal))
    if name == "k" and norm:
        return normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    if name in ("kernel", "kernel_reverse"):
        return normal * np.exp(-np.arange(shape[1]) / 200.0)
    if jnp.issubdtype(struct.dtype, jnp.complexfloating):
        return normal + 1j * rng.standard_normal(shape)
    return normal
