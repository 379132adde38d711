"""The checkpoints of other shards, for `pallas_kernels.checkpoint_attention` (RAT, SCOUT).

Of every ``interval`` tokens one key and one value are gathered: ``1 / interval`` of what attention
to all tokens would gather.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels.parallel import collectives, validate


class Earlier(NamedTuple):
    """Arguments of ``checkpoint_attention`` that continue a shard's first document.

    Attributes:
      past_k, past_v: ``(B, N, G, K)`` and ``(B, N, G, V)``, its checkpoints before this shard, the
        first ones valid.
      past_length: ``(B,)`` int32, how many are.
      offset: ``(B,)`` int32, the position of the shard's first token in its document.
    """

    past_k: jax.Array
    past_v: jax.Array
    past_length: jax.Array
    offset: jax.Array


def earlier_checkpoints(
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g v"],
    *,
    interval: int,
    segments: Int[Array, "b l"] | None = None,
    positions: Int[Array, "b l"] | None = None,
    past: tuple[Array, Array, Array] | None = None,
    axis: str = collectives.AXIS,
) -> Earlier:
    """What the tokens of this shard see of the shards before it; inside `jax.shard_map`.

        earlier = earlier_checkpoints(k, v, interval=n, segments=index, positions=positions)
        o = checkpoint_attention(q, k, v, interval=n, segment_ids=index, **earlier._asdict())

    Args:
      k, v: this shard's keys and values; float32 or bfloat16.
      interval: every how many tokens of a document there is a checkpoint, the last of them.
      segments: number of each token's document along the whole row, as ``Segments.index``; 0 is
        padding. None: the row is one document.
      positions: of the tokens in their documents, from the document's start wherever that is; None
        for a row of one document that starts with it.
      past: checkpoints of the row's first document before the row, ``past_k (B, n, G, K)``,
        ``past_v`` and ``past_length (B,)`` as ``checkpoint_attention`` takes them, the same on all
        shards; ``positions`` then count from before the row.
      axis: the mesh axis that splits the length.

    Returns:
      ``N = P ceil(l / interval)`` checkpoints, and those of ``past``. Gradients flow to k, v and
      the past.

    Raises:
      ValueError: arrays that do not fit, an ``interval`` below 1, no such axis.
    """
    _check(k, v, interval, segments, positions, past)
    batch, length = k.shape[:2]
    size = collectives.axis_size(axis)
    if positions is None:
        positions = jnp.broadcast_to(collectives.token_index(length, axis), (batch, length))
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    # Of one document they are `interval` apart, and the first of the next still further.
    count = -(-length // interval)
    marked = ((positions + 1) % interval == 0) & (segments > 0)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    token = jnp.sort(jnp.where(marked, index, length), axis=1)[:, :count]
    valid = token < length
    token = jnp.minimum(token, length - 1)
    document = jnp.where(valid, jnp.take_along_axis(segments, token, axis=1), jnp.int32(-1))
    documents = collectives.join(collectives.gather(document, axis))  # (B, P count)
    shards = jnp.repeat(jnp.arange(size, dtype=jnp.int32), count, total_repeat_length=size * count)
    first = segments[:, :1]
    seen = (documents == first) & (shards < jax.lax.axis_index(axis))[None]
    before_k, before_v = None, None
    if past is not None:
        before_k, before_v, held = past
        slot = jnp.arange(before_k.shape[1], dtype=jnp.int32)[None]
        seen = jnp.concatenate([(slot < held[:, None]) & (first == 1), seen], axis=1)
    order = jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)

    def in_order(x, old):
        x = collectives.join(collectives.gather(_rows(x, token), axis))
        return _rows(x if old is None else jnp.concatenate([old, x], axis=1), order)

    past_length = jnp.sum(seen, axis=1, dtype=jnp.int32)
    return Earlier(in_order(k, before_k), in_order(v, before_v), past_length, positions[:, 0])


def _check(k, v, interval: int, segments, positions, past) -> None:
    if interval < 1:
        raise ValueError(f"earlier_checkpoints: interval must be at least 1, got {interval}")
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        raise ValueError(
            f"earlier_checkpoints: k and v must be (B, l, G, K) and (B, l, G, V) of one dtype, got "
            f"{k.shape} {k.dtype} and {v.shape} {v.dtype}"
        )
    for name, x in (("segments", segments), ("positions", positions)):
        validate.same_tokens("earlier_checkpoints", name, x, "k", k)
    if segments is not None and positions is None:
        raise ValueError("earlier_checkpoints: segments need positions, got positions=None")


def _rows(x, index):
    """Rows of ``x (B, N, ..)`` at ``index (B, M)``."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)
