"""The order of tokens in which shards of a causal row have the same work.

A row is cut into 2 P chunks. In its order shard i has chunks 2i and 2i + 1, in zigzag i and
2P - 1 - i: one early, which sees little, and one late, which sees much. Each way is two
permutations of half a shard, so that nothing but attention need know of zigzag, which a recurrence
cannot have (Zhu, ring-flash-attention, 2024; Brandon et al., "Striped Attention", 2023, for the
imbalance).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from seqmodels.parallel import collectives


def to_zigzag(
    x: Shaped[Array, "b l *d"], *, axis: str = collectives.AXIS
) -> Shaped[Array, "b l *d"]:
    """Chunks r and 2P - 1 - r for shard r, of a row in its order; inside `jax.shard_map`.

    Raises:
      ValueError: an odd number of tokens in a shard.
    """
    even, odd = _routes(x, axis)
    first, second = jnp.split(x, 2, axis=1)
    first, second = jax.lax.ppermute(first, axis, even), jax.lax.ppermute(second, axis, odd)
    return _ordered(first, second, axis)


def from_zigzag(
    x: Shaped[Array, "b l *d"], *, axis: str = collectives.AXIS
) -> Shaped[Array, "b l *d"]:
    """The inverse of ``to_zigzag``."""
    even, odd = _routes(x, axis)
    first, second = jnp.split(x, 2, axis=1)
    first, second = jnp.split(_ordered(first, second, axis), 2, axis=1)
    first = jax.lax.ppermute(first, axis, [(there, here) for here, there in even])
    second = jax.lax.ppermute(second, axis, [(there, here) for here, there in odd])
    return jnp.concatenate([first, second], axis=1)


def _routes(x, axis: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where each shard's first chunk goes, and where its second does."""
    size = collectives.axis_size(axis)
    if x.shape[1] % 2:
        total = size * x.shape[1]
        raise ValueError(
            f"zigzag: a shard of {x.shape[1]} tokens (a row of {total} over {axis}={size}) cannot "
            f"be halved; pad rows to a multiple of {2 * size}, such as {total + size}, or use "
            "balance=False"
        )
    owner = [min(chunk, 2 * size - 1 - chunk) for chunk in range(2 * size)]
    even = [(i, owner[2 * i]) for i in range(size)]
    return even, [(i, owner[2 * i + 1]) for i in range(size)]


def _ordered(even, odd, axis: str):
    """Two chunks, exchanged on shards with an odd number: there the first chunk is an odd one."""
    swap = jax.lax.axis_index(axis) % 2 == 1
    first, second = jnp.where(swap, odd, even), jnp.where(swap, even, odd)
    return jnp.concatenate([first, second], axis=1)
