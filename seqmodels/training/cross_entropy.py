"""Softmax cross entropy over a large vocabulary, a tile of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels.parallel.mesh import mesh_grid
from seqmodels.training.task import Sums, classification_sums


def tiled_sums(
    logits: Callable[[Array], Array],
    x: Float[Array, "b l d"],
    targets: Int[Array, "b l"],
    weights: Float[Array, "b l"],
    *,
    tile: int = 1024,
) -> Sums:
    """Weighted cross entropy, and number of correct predictions, summed over all tokens.

    The logits of one tile exist at a time, forward and backward: backward computes them again.
    Memory is ``tile`` times the vocabulary instead of ``B * L`` times. On a mesh every device has
    tiles of its own tokens, and nothing but the sums moves.

    Args:
      logits: ``(tile, D) -> (tile, V)``.
      x: hidden vectors.
      targets: ids below V.
      weights: of each token in the loss; tokens of weight 0 may hold anything.
      tile: tokens in a tile, on each device.

    Raises:
      ValueError: ``tile`` is not positive.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} must be positive")
    rows, columns = mesh_grid(*targets.shape)
    tokens = targets.size // (rows * columns)
    size = min(tile, tokens)

    def cut(z: Array, *shape: int) -> Array:
        """Tiles first, and in each of them the same number of tokens of every device."""
        z = z.reshape(rows, targets.shape[0] // rows, columns, -1, *shape)
        z = jnp.swapaxes(z, 1, 2).reshape(rows, columns, tokens, *shape)
        fill = ((0, 0), (0, 0), (0, -tokens % size)) + ((0, 0),) * len(shape)
        z = jnp.pad(z, fill).reshape(rows, columns, -1, size, *shape)
        return jnp.moveaxis(z, 2, 0).reshape(-1, rows * columns * size, *shape)

    @jax.checkpoint
    def add(sums: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        hidden, targets, weights = part
        return sums + classification_sums(logits(hidden), targets, weights), None

    zero = Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
    parts = (cut(x, x.shape[-1]), cut(targets), cut(weights))
    return jax.lax.scan(add, zero, parts)[0]
