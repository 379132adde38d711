"""Softmax attention of a shard's queries to the gathered keys and values of the whole row.

One all-gather each way, of keys and values alone, which grouped heads make small (Llama 3's context
parallelism; Sun et al., "LASP-2", 2025, for the attention layers of hybrid models). Every shard
holds all keys and values of the layer at a time; the others are in `ring`, or have exchanged heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels.layers.attention import attend
from seqmodels.parallel import collectives, validate

_HIDDEN = -1
"""The document of keys that no query sees."""


def gather(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    segments: Int[Array, "b l"] | None = None,
    positions: Int[Array, "b l"] | None = None,
    axis: str = collectives.AXIS,
) -> Float[Array, "b l h k"]:
    """``attend`` of a row whose length is split over ``axis``; inside `jax.shard_map`.

    The backward pass gathers again: no layer keeps another shard's keys. What the first shards of a
    causal row cannot see is multiplied and masked like the rest.

    Arguments, result and errors are those of ``ulysses``.
    """
    validate.attention("gather", q, k, v, segments)
    validate.window("gather", causal, window, sinks, positions)
    size = collectives.axis_size(axis)
    batch, length, groups = *k.shape[:2], k.shape[2]
    rank = jax.lax.axis_index(axis)
    # Keys end with those of this shard, as `attend` wants it of a causal row; what is behind this
    # shard comes first, hidden.
    order = (rank + 1 + jnp.arange(size, dtype=jnp.int32)) % size

    def whole(x):
        x = collectives.gather(x, axis)
        return collectives.join(x.at[order].get(mode="promise_in_bounds") if causal else x)

    k_segments = None if segments is None else whole(segments)
    if causal and size > 1:
        own = jnp.ones((batch, length), jnp.int32) if segments is None else segments
        theirs = jnp.ones((batch, size * length), jnp.int32) if k_segments is None else k_segments
        behind = jnp.repeat(order > rank, length, total_repeat_length=size * length)[None]
        segments, k_segments = own, jnp.where(behind, jnp.int32(_HIDDEN), theirs)
    k_positions = whole(positions) if sinks else None

    def attention(q, kv, segments, k_segments, k_positions):
        kv = whole(kv)
        return attend(
            q,
            kv[:, :, :groups],
            kv[:, :, groups:],
            causal=causal,
            window=window,
            sinks=sinks,
            scale=scale,
            q_segments=segments,
            k_segments=k_segments,
            k_positions=k_positions,
        )

    kv = jnp.concatenate([k, v], axis=2)
    return jax.checkpoint(attention)(q, kv, segments, k_segments, k_positions)
