"""Softmax attention of packed rows: full, or in a sliding window with sinks.

On a TPU it is JAX's splash attention; elsewhere `jax.nn.dot_product_attention`, block by block, so
that a window of W keys costs O(L W) time and the scores never stand in memory all at once. A CPU
takes long rows head by head, unless a window is much shorter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch, products, symbolic
from seqmodels.layers.splash import splash

_SCORES = 2**24
"""Scores that are held at a time: 64 MB; for each row where the batch is a symbol."""

SPLASH_FROM = 128
"""Queries from which on a TPU takes splash."""

_QUERIES = 256
"""Queries of a block of all heads of a group, where one head is taken after the other."""

_PARTS = 8
"""Parts of a causal row, each against the keys up to its end; a program has each of them."""

BY_HEAD_FROM = 256
"""Queries from which on a CPU takes one head after the other."""

_BY_HEAD = "head by head"

_LEAST_BLOCK = 64
"""Queries of the smallest block; a narrower window leaves too little work for one product."""


class _Rule(NamedTuple):
    """Which keys a query sees, apart from segments."""

    causal: bool
    window: int | None
    sinks: int
    scale: float


class _Keys(NamedTuple):
    """Keys, and what tells which of them a query sees; ``order`` may be ``(1, S)``."""

    k: Array
    v: Array
    order: Array
    segments: Any  # Array | None, and who asks knows which
    positions: Any


def attend(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    q_segments: Int[Array, "b l"] | None = None,
    k_segments: Int[Array, "b s"] | None = None,
    k_positions: Int[Array, "b s"] | None = None,
) -> Float[Array, "b l h k"]:
    """``softmax(scale q k^T) v`` over the keys that each query sees; softmax in float32.

    A query and a key see each other where their segments are equal. If ``causal``, the queries are
    those of the last L keys, and a query sees no key behind its own. With ``window`` it sees the
    ``window`` last of these, its own included, and the first ``sinks`` keys of its document.

    Args:
      q: queries.
      k, v: keys and values; head h reads group ``h // (H / G)``.
      causal: whether the keys' order counts.
      window: None, or how many keys a query sees; needs ``causal``.
      sinks: keys at a document's start that stay visible; needs ``window`` and ``k_positions``.
      scale: of the scores; ``K**-0.5`` if None.
      q_segments, k_segments: the documents of queries and keys, both or neither. A key that
        nothing may see has a number that no query has.
      k_positions: of the keys in their documents, from 0; of a document the keys are in order.

    Returns:
      ``(B, L, H, K)`` in q's dtype; finite but unspecified where a query sees no key.

    Raises:
      ValueError: arguments that do not fit each other.
    """
    _check(q, k, v, causal, window, sinks, q_segments, k_segments, k_positions)
    rule = _Rule(causal, window, sinks, float(q.shape[-1] ** -0.5 if scale is None else scale))
    arrays = (q, k, v, q_segments, k_segments, k_positions)
    short = q.shape[1] < SPLASH_FROM
    return dispatch.choose(
        "attend",
        {
            "portable": functools.partial(_portable, rule),
            "splash": functools.partial(splash, **rule._asdict()),
        },
        *arrays,
        default="portable",
        tpu="splash",
        unsupported={"splash": f"{q.shape[1]} queries do not fill a block"} if short else {},
    )


def _check(q, k, v, causal, window, sinks, q_segments, k_segments, k_positions) -> None:
    if k.shape != v.shape or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attend: q {q.shape}, k {k.shape} and v {v.shape} must be (B, L, H, K) and twice "
            "(B, S, G, K) with G a divisor of H"
        )
    if causal and k.shape[1] < q.shape[1]:
        raise ValueError(
            f"attend: {q.shape[1]} causal queries need at least as many keys, got {k.shape[1]}"
        )
    if window is not None and (not causal or window < 1):
        raise ValueError(f"attend: window={window} must be positive, with causal=True")
    if sinks and (window is None or k_positions is None):
        raise ValueError(f"attend: sinks={sinks} needs a window and k_positions")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("attend: q_segments and k_segments go together; give both or neither")


def _portable(rule: _Rule, q, k, v, q_segments, k_segments, k_positions):
    batch, length, heads, _ = q.shape
    index = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    keys = _Keys(k, v, index, k_segments, k_positions)
    block = length if rule.window is None else max(rule.window, _LEAST_BLOCK)
    rows = max(_LEAST_BLOCK, _SCORES // (symbolic.known(batch, 1) * heads * k.shape[1]))
    reason = {}
    if rule.window is None:
        reason["band"] = "there is no window"
    elif length <= 2 * block:
        reason["band"] = f"{length} queries are no more than two blocks of {block}"
    if symbolic.is_symbol(batch):
        reason[_BY_HEAD] = "the batch is a symbol"
    elif length < BY_HEAD_FROM:
        reason[_BY_HEAD] = f"{length} queries are fewer than {BY_HEAD_FROM}"
    return dispatch.choose(
        "attend portable",
        {
            "all pairs": functools.partial(_blocks_of_queries, rule, rows=min(rows, length)),
            "band": functools.partial(_band, rule, block=block),
            _BY_HEAD: functools.partial(_by_head, rule),
        },
        *(q, q_segments, keys),
        default="all pairs",
        everywhere="band",
        unsupported=reason,
        **({"cpu": _BY_HEAD} if "band" in reason and _BY_HEAD not in reason else {}),
    )


def _blocks_of_queries(rule: _Rule, q, segments, keys: _Keys, rows: int):
    """Every query against every key, ``rows`` queries at a time."""
    length = q.shape[1]
    index = keys.order[:, keys.order.shape[1] - length :] if rule.causal else None

    def one(part):
        q, index, segments = part
        return _visible(rule, q, index, segments, keys)

    parts = jax.tree.map(lambda x: _split(x, rows), (q, index, segments))
    return _join(jax.lax.map(jax.checkpoint(one), parts), length)


def _by_head(rule: _Rule, q, segments, keys: _Keys):
    """Every query against the keys up to it, one head at a time: as much as a CPU's caches hold."""
    past = keys.order.shape[1] - q.shape[1]
    if not past or segments is None:
        return _heads(rule, q, segments, keys)

    def own(q, segments, keys):
        return _heads(rule, q, segments, jax.tree.map(lambda x: x[:, past:], keys))

    # An empty cache, whose keys have a number below those of all queries.
    unseen = jnp.max(keys.segments[:, :past]) < jnp.min(segments)
    return jax.lax.cond(unseen, own, functools.partial(_heads, rule), q, segments, keys)


def _heads(rule: _Rule, q, segments, keys: _Keys):
    """``_by_head`` with every key: a row of the batch, and a group of heads, after the other."""
    wide = q.dtype if q.dtype == jnp.float64 else jnp.float32
    scaled = (q.astype(wide) * rule.scale).reshape(*q.shape[:2], keys.k.shape[2], -1, q.shape[3])
    k, v = (jnp.swapaxes(x.astype(wide), 1, 2) for x in (keys.k, keys.v))

    def row(one):
        q, segments, of_keys, positions, k, v = one

        def group(heads):
            q, k, v = heads
            return _group(rule, q, segments, _Keys(k, v, keys.order[0], of_keys, positions))

        return jax.lax.map(group, (q, k, v))

    q_ = jnp.swapaxes(scaled, 1, 2)
    o = jax.lax.map(row, (q_, segments, keys.segments, keys.positions, k, v))
    return jnp.swapaxes(o, 1, 2).reshape(q.shape).astype(q.dtype)


def _group(rule: _Rule, q, segments, keys: _Keys):
    """The heads ``(L, R, K)`` of a group, of one row, with ``keys.k (S, K)``."""
    length, heads, _ = q.shape
    past = keys.order.shape[0] - length
    rows = max(_LEAST_BLOCK, _QUERIES // heads)
    index = keys.order[past:] if rule.causal else None
    # Few parts, each with the keys up to its end, leave out almost half of the pairs.
    part = rows * -(-length // (rows * _PARTS)) if rule.causal else length
    parts = []
    for begin in range(0, length, part):
        end = min(begin + part, length)
        first = jax.tree.map(lambda x, end=end: x[: past + end], keys) if rule.causal else keys
        queries = jax.tree.map(lambda x, a=begin, b=end: x[None, a:b], (q, index, segments))
        blocks = jax.tree.map(lambda x: _split(x, rows)[:, 0], queries)
        o = jax.lax.map(jax.checkpoint(functools.partial(_block, rule, first)), blocks)
        parts.append(_join(o[:, None], end - begin)[0])
    return jnp.concatenate(parts)


def _block(rule: _Rule, keys: _Keys, queries):
    """``(T, R, K)`` of some queries of a group."""
    q, index, segments = queries
    seen = _mask(rule, *jax.tree.map(lambda x: x[None], (index, segments, keys)))
    scores = jnp.einsum("trk,sk->trs", q, keys.k)
    if seen is not None:
        scores = jnp.where(seen[0, :, None], scores, jnp.finfo(scores.dtype).min / 2)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("trs,sk->trk", weights, keys.v) / total


def _band(rule: _Rule, q, segments, keys: _Keys, block: int):
    """Each block of queries against its own keys, the block before, and sinks before these."""
    batch, length, heads, _ = q.shape
    past = keys.order.shape[1] - length
    index = keys.order[:, past:]

    def spans(x, fill):
        """``(n, B, 2 block, ..)``: the blocks' own keys behind as many earlier ones."""
        x = x[:, max(0, past - block) :]
        rest = [(0, 0)] * (x.ndim - 2)
        front = max(0, block - past)
        x = _split(jnp.pad(x, ((0, 0), (front, 0), *rest), constant_values=fill), block, fill)
        return jnp.concatenate([x[:-1], x[1:]], axis=2)

    # Behind every query, so that none sees the padding before the first key.
    near = _Keys(
        spans(keys.k, 0),
        spans(keys.v, 0),
        spans(keys.order, jnp.iinfo(jnp.int32).max),
        None if keys.segments is None else spans(keys.segments, -1),
        None if keys.positions is None else spans(keys.positions, 0),
    )
    if rule.sinks:
        first = past - block + block * jnp.arange(near.k.shape[0], dtype=jnp.int32)
        near = jax.tree.map(
            lambda one, two: jnp.concatenate([one, two], axis=2),
            _sinks(rule.sinks, keys, first),
            near._replace(order=jnp.broadcast_to(near.order, near.positions.shape)),
        )

    def one(part):
        q, index, segments, keys = part
        return _visible(rule, q, index, segments, keys)

    parts = jax.tree.map(lambda x: _split(x, block), (q, index, segments))
    together = max(1, _SCORES // (symbolic.known(batch, 1) * heads * block * near.k.shape[2]))
    o = jax.lax.map(jax.checkpoint(one), (*parts, near), batch_size=together)
    return _join(o, length)


def _sinks(count: int, keys: _Keys, first):
    """The first ``count`` keys of the document that runs at each key in ``first (n,)``.

    ``(n, B, count, ..)``; those at or behind ``first`` are hidden, as they are in the span.
    """
    place = jnp.where(
        keys.positions[..., None] == jnp.arange(count, dtype=jnp.int32)[None, None],
        keys.order[..., None],
        -1,
    )
    at = jnp.clip(first, 0)
    found = jax.lax.cummax(place, axis=1)[:, at]  # (B, n, count)
    rows = jnp.arange(place.shape[0], dtype=jnp.int32)[:, None, None]
    safe = jnp.maximum(found, 0)
    hidden = (found < 0) | (found >= first[None, :, None])
    index = jnp.where(hidden, jnp.iinfo(jnp.int32).max, found)
    taken = _Keys(
        keys.k[rows, safe],
        keys.v[rows, safe],
        index,
        None if keys.segments is None else keys.segments[rows, safe],
        keys.positions[rows, safe],
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), taken)


def _visible(rule: _Rule, q, index, segments, keys: _Keys):
    """Attention ``(B, T, H, K)`` of some queries to some keys."""
    mask = _mask(rule, index, segments, keys)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))[:, None]

    def attention(q_, k, v):
        with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 and float32
            o = jax.nn.dot_product_attention(q_, k, v, mask=mask, scale=rule.scale)
        return o.astype(q.dtype)

    return products.widened_on_cpu(attention, q, keys.k, keys.v)


def _mask(rule: _Rule, index, segments, keys: _Keys):
    """Which keys each query sees, ``(B, T, S)``, or None if all."""
    mask = None
    if rule.causal:
        distance = index[:, :, None] - keys.order[:, None]
        mask = distance >= 0
        if rule.window is not None:
            near = distance < rule.window
            if rule.sinks:
                near = near | (keys.positions < rule.sinks)[:, None]
            mask = mask & near
    if segments is not None:
        same = segments[:, :, None] == keys.segments[:, None]
        mask = same if mask is None else mask & same
    return mask


def _split(x, size: int, fill: int = 0):
    """``(B, L, ..)`` -> ``(n, B, size, ..)``, padded with ``fill`` at the end."""
    x = jnp.pad(
        x,
        ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)),
        constant_values=fill,
    )
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _join(x, length: int):
    """The inverse of ``_split``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
