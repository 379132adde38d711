"""Which document each token belongs to, where the length of a row is split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def index_and_positions(
    ids: Int32[Array, "b l"], *, axis: str, size: int
) -> tuple[Int32[Array, "b l"], Int32[Array, "b l"]]:
    """The segment index along the whole row, and positions from the documents' starts.

    To be called inside `jax.shard_map`. The shards tell each other four numbers a row: whatever
    the length, that is all that moves.

    Args:
      ids: of this shard's tokens; 0 is padding, only at the end of a row.
      axis, size: the mesh axis that the length is split over, and its number of shards.

    Returns:
      This shard's part of ``segments.index`` and ``segments.positions`` of the row.
    """
    length = ids.shape[1]
    place = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    inside = jnp.pad(jnp.diff(ids, axis=1) != 0, ((0, 0), (1, 0)))
    last_start = jnp.max(jnp.where(inside, place, -1), axis=1)
    changes = jnp.sum(inside, axis=1, dtype=jnp.int32)
    told = jnp.stack([ids[:, 0], ids[:, -1], changes, last_start])
    first, last, changes, last_start = jnp.moveaxis(jax.lax.all_gather(told, axis), 1, 0)

    # Of every shard, ``(P, B)``: whether a document begins at its first token.
    begins = jnp.concatenate([jnp.ones_like(first[:1]), first[1:] != last[:-1]], dtype=jnp.int32)
    shard = jax.lax.broadcasted_iota(jnp.int32, first.shape, 0)
    start = jnp.where(begins != 0, shard * length, -1)
    start = jax.lax.cummax(jnp.where(last_start >= 0, shard * length + last_start, start), axis=0)
    count = jnp.cumsum(begins + changes, axis=0, dtype=jnp.int32)

    rank = jax.lax.axis_index(axis)

    def before(x: Array, edge: int) -> Array:
        """``(B, 1)``, what the shard before this one has."""
        return jnp.where(rank == 0, edge, x[jnp.maximum(rank - 1, 0)])[:, None]

    here = inside | ((place == 0) & (begins[rank] != 0)[:, None])
    index = before(count, 0) + jnp.cumsum(here, axis=1, dtype=jnp.int32)
    starts = jax.lax.cummax(jnp.where(here, rank * length + place, -1), axis=1)
    starts = jnp.maximum(starts, before(start, 0))
    real = ids != 0
    positions = rank * length + place - starts
    return jnp.where(real, index, 0), jnp.where(real, positions, 0)


def continues(index: Int32[Array, "b l"], positions: Int32[Array, "b l"], axis: str) -> Array:
    """Rows whose first token here is of the document of the token before it, or is padding.

    What is before the first shard of a row, its initial state, belongs to the first document.
    """
    begins = (index[:, 0] != 0) & (positions[:, 0] == 0) & (jax.lax.axis_index(axis) > 0)
    return ~begins
