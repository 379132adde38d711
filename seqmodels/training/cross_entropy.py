"""Softmax cross entropy over a large vocabulary, a tile of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    Memory is ``tile`` times the vocabulary instead of ``B * L`` times.

    Args:
      logits: ``(tile, D) -> (tile, V)``.
      x: hidden vectors.
      targets: ids below V.
      weights: of each token in the loss; tokens of weight 0 may hold anything.
      tile: tokens in a tile.

    Raises:
      ValueError: ``tile`` is not positive.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} must be positive")
    tokens = targets.size
    fill = -tokens % min(tile, tokens)

    def cut(z: Array, *shape: int) -> Array:
        z = jnp.pad(z.reshape(tokens, *shape), ((0, fill),) + ((0, 0),) * len(shape))
        return z.reshape(-1, min(tile, tokens), *shape)

    @jax.checkpoint
    def add(sums: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        hidden, targets, weights = part
        return sums + classification_sums(logits(hidden), targets, weights), None

    zero = Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
    parts = (cut(x, x.shape[-1]), cut(targets), cut(weights))
    return jax.lax.scan(add, zero, parts)[0]
