"""Softmax attention with heads exchanged for length: every shard has whole rows of some heads.

One all-to-all takes queries, keys and values there, and one takes the output back, each way with as
many bytes as the shard has (Jacobs et al., "DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels.layers.attention import attend
from seqmodels.parallel import collectives, validate


def ulysses(
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

    Every shard takes ``ceil(H / P)`` heads. Where P does not divide H the last shards have heads
    of nothing, or less than all of their work; where it does not divide G, keys and values are sent
    to each shard that has a head of their group.

    Args:
      q: this shard's queries, float32 or bfloat16.
      k, v: its keys and values, q's dtype; head h reads group ``h // (H / G)``.
      causal, window, sinks, scale: as ``attend`` has them.
      segments: number of each token's document along the whole row, as ``Segments.index``; tokens
        see their own document. None: the row is one document.
      positions: of the tokens in their documents; with sinks only.
      axis: the mesh axis that splits the length.

    Returns:
      ``(B, l, H, K)`` in q's dtype.

    Raises:
      ValueError: arrays or options that do not fit, no such axis.
    """
    validate.attention("ulysses", q, k, v, segments)
    validate.window("ulysses", causal, window, sinks, positions)
    size = collectives.axis_size(axis)
    heads, groups = q.shape[2], k.shape[2]
    per_shard = -(-heads // size)
    per_group = math.gcd(per_shard, heads // groups)  # heads of a shard that share keys
    sent = per_shard // per_group
    # The group of each of the keys' heads that are sent; what pads the heads sees any.
    source = tuple(min(per_group * i * groups // heads, groups - 1) for i in range(size * sent))
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, size * per_shard - heads), (0, 0)))
    parts = (q, _repeat(k, source), _repeat(v, source))
    by_shard = [x.reshape(*x.shape[:2], size, -1, x.shape[3]) for x in parts]
    sends = jnp.concatenate(by_shard, axis=3)
    sends = sends.reshape(*sends.shape[:2], -1, sends.shape[4])
    rows = jax.lax.all_to_all(sends, axis, split_axis=2, concat_axis=1, tiled=True)
    q, k, v = jnp.split(rows, (per_shard, per_shard + sent), axis=2)

    def whole(x):
        return None if x is None else collectives.join(collectives.gather(x, axis))

    segments = whole(segments)
    o = attend(
        q,
        k,
        v,
        causal=causal,
        window=window,
        sinks=sinks,
        scale=scale,
        q_segments=segments,
        k_segments=segments,
        k_positions=whole(positions) if sinks else None,
    )
    o = jax.lax.all_to_all(o, axis, split_axis=1, concat_axis=2, tiled=True)
    return o[:, :, :heads]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(x, source: tuple[int, ...]):
    """``x[:, :, source]``; the gradients of a head's copies are added in float32."""
    if source == tuple(range(x.shape[2])):
        return x
    return jnp.stack([x[:, :, i] for i in source], axis=2)


def _repeat_forward(x, source):
    return _repeat(x, source), x.shape[2]


def _repeat_backward(source, count, dy):
    if source == tuple(range(count)):
        return (dy,)
    terms = dy.astype(collectives.wide(dy.dtype))
    copies = [[terms[:, :, i] for i, j in enumerate(source) if j == head] for head in range(count)]
    return (jnp.stack([sum(x[1:], x[0]) for x in copies], axis=2).astype(dy.dtype),)


_repeat.defvjp(_repeat_forward, _repeat_backward)
