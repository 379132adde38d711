"""Windows of a short convolution that some tokens enter: each memory of a mixture has its own.

In every document those tokens stand in front, in their order; where the length is split, in front
of their document's others in the same shard.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels.parallel import collectives


def after(
    x: Float[Array, "b l d"],
    counted: Bool[Array, "b l"],
    index: Int[Array, "b l"] | None,
    window: Float[Array, "b w d"],
) -> Float[Array, "b w d"]:
    """The last tokens of the last document that enter, those of ``window`` before them.

    Args:
      x: tokens.
      counted: which of them enter.
      index: ``Segments.index``, or None for one document a row.
      window: what stands before the row, of its first document; in x's dtype.
    """
    size = window.shape[1]
    last, start = _last_document(index, x.shape[0])
    if index is not None:
        counted = counted & (index == last) & (index > 0)
    count = jnp.sum(counted, axis=1, keepdims=True, dtype=jnp.int32)
    here = jnp.arange(size, dtype=jnp.int32)[None]
    line = jnp.concatenate([window, x], axis=1)
    kept = jnp.take_along_axis(line, (start + count + here)[..., None], axis=1)
    own = (count + here >= size) | (start == 0)
    return jnp.where(own[..., None], kept, jnp.zeros_like(kept))


def entering(
    x: Float[Array, "b l d"],
    counted: Bool[Array, "b l"],
    index: Int[Array, "b l"] | None,
    positions: Int[Array, "b l"] | None,
    initial: Float[Array, "b w d"],
    *,
    axis: str = collectives.AXIS,
) -> Float[Array, "b w d"]:
    """The window before this shard's first token, inside `jax.shard_map` over ``axis``.

    All shards gather the last W tokens of each other that enter: P W of them, whatever the length.

    Args:
      x, counted: of this shard.
      index, positions: those of ``Segments``, both or neither.
      initial: what stands before the row, the same on all of its shards.
    """
    size, shards, rank = initial.shape[1], collectives.axis_size(axis), jax.lax.axis_index(axis)
    last, start = _last_document(index, x.shape[0])
    fresh = opens = jnp.zeros((x.shape[0],), bool)
    if index is not None and positions is not None:
        counted = counted & (index == last) & (index > 0)
        # The first document of a row has what stands before it.
        opens = (index[:, 0] > 1) & (positions[:, 0] == 0)
        fresh = (start[:, 0] > 0) | opens
    count = jnp.sum(counted, axis=1, dtype=jnp.int32)
    tails = collectives.gather(after(x, counted, index, jnp.zeros_like(initial)), axis)
    counts, fresh = jax.lax.all_gather((count, fresh), axis)

    before = (jnp.arange(shards, dtype=jnp.int32) < rank)[:, None]
    # Documents that begin before this shard, from each shard on, and from the row's start on.
    begun = jnp.flip(jnp.cumsum(jnp.flip(fresh & before, 0), axis=0, dtype=jnp.int32), 0)
    behind = jnp.concatenate([begun, jnp.zeros_like(begun[:1])])
    place = jnp.arange(size, dtype=jnp.int32)[None, None]
    enters = before[..., None] & (place >= size - counts[..., None])
    line = collectives.join(jnp.concatenate([initial[None], tails]))
    enters = collectives.join(jnp.concatenate([jnp.ones_like(enters[:1]), enters]))
    ours = jnp.repeat(behind.T == 0, size, axis=1)
    line = jnp.where(ours[..., None], line, jnp.zeros_like(line))
    recent = jnp.argsort(enters, axis=1, stable=True)[:, shards * size :]
    window = jnp.take_along_axis(line, recent[..., None], axis=1)
    return jnp.where(opens[:, None, None], jnp.zeros_like(window), window)


def _last_document(
    index: Int[Array, "b l"] | None, rows: int
) -> tuple[Int[Array, "b 1"], Int[Array, "b 1"]]:
    """The number of each row's last document, and how many tokens stand before it."""
    if index is None:
        zero = jnp.zeros((rows, 1), jnp.int32)
        return zero, zero
    last = jnp.max(index, axis=1, keepdims=True)
    before = (index > 0) & (index < last)
    return last, jnp.sum(before, axis=1, keepdims=True, dtype=jnp.int32)
