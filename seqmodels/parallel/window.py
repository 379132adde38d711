"""Sliding-window attention of a shard: its neighbours' last tokens, and sinks.

What moves is the window and ``P`` times the sinks, whatever the length of the row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels.layers.attention import attend
from seqmodels.parallel import collectives, validate
from seqmodels.parallel.halo import halo_before

_HIDDEN = -1
"""The document of keys that no query sees."""


def windowed(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    segments: Int[Array, "b l"] | None = None,
    positions: Int[Array, "b l"] | None = None,
    axis: str = collectives.AXIS,
) -> Float[Array, "b l h k"]:
    """``attend`` with a window, of a row split over ``axis``; inside `jax.shard_map`.

    Arguments, result and errors are those of ``ulysses``; the window may be longer than a shard.
    """
    validate.attention("windowed", q, k, v, segments)
    validate.window("windowed", True, window, sinks, positions)
    length, groups = k.shape[1], k.shape[2]
    if segments is None:
        segments = jnp.ones(k.shape[:2], jnp.int32)
    # Before the first shard there is nothing to see.
    width = min(window - 1, (collectives.axis_size(axis) - 1) * length)
    kv = jnp.concatenate([k, v], axis=2)
    near = jnp.concatenate([halo_before(kv, width, axis=axis), kv], axis=1)
    # Zeros before the row are hidden, being of the document of padding.
    own = [segments, positions] if sinks and positions is not None else [segments]
    marks = jnp.stack(own, axis=2)
    marks = jnp.concatenate([halo_before(marks, width, axis=axis), marks], axis=1)
    if sinks:
        far, far_marks = _sinks(sinks, kv, segments, positions, width, axis)
        near = jnp.concatenate([far, near], axis=1)
        marks = jnp.concatenate([far_marks, marks], axis=1)
    return attend(
        q,
        near[:, :, :groups],
        near[:, :, groups:],
        window=window,
        sinks=sinks,
        scale=scale,
        q_segments=segments,
        k_segments=marks[..., 0],
        k_positions=marks[..., 1] if sinks else None,
    )


def _sinks(count: int, kv, segments, positions, width: int, axis: str):
    """The first ``count`` tokens of the document of this shard's first token.

    ``(B, count, ..)`` and their documents and positions ``(B, count, 2)``; those that are in this
    shard, or no more than ``width`` tokens before it, are hidden.

    Shards between a document's start and this one end in that document, so that each sends what it
    has of the sinks of the document at its end.
    """
    slot = jnp.arange(count, dtype=jnp.int32)
    mine = (segments == segments[:, -1:]) & (positions < count) & (segments > 0)
    held = mine[..., None] & (positions[..., None] == slot[None, None])  # (B, l, count)
    token = jnp.argmax(held, axis=1).astype(jnp.int32)
    there = jnp.any(held, axis=1)
    document = jnp.where(there, segments[:, -1:], jnp.int32(_HIDDEN))  # (B, count)
    documents = collectives.gather(document, axis)
    chosen = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(kv, token)
    chosen = collectives.gather(chosen, axis)  # (P, B, count, 2G, K)
    rank = jax.lax.axis_index(axis)
    shard = jnp.arange(documents.shape[0], dtype=jnp.int32)
    # At most one shard has a token of this document and position.
    found = (documents == segments[None, :, :1]) & (shard < rank)[:, None, None]
    kept = jnp.where(found[..., None, None], chosen, jnp.zeros_like(chosen))
    far = jnp.sum(kept, axis=0, dtype=kv.dtype)
    hidden = ~jnp.any(found, axis=0) | (slot[None] >= positions[:, :1] - width)
    document = jnp.where(hidden, jnp.int32(_HIDDEN), segments[:, :1])
    place = jnp.where(hidden, jnp.int32(_HIDDEN), jnp.broadcast_to(slot[None], hidden.shape))
    return far, jnp.stack([document, place], axis=2)
