"""Softmax attention of some queries to some keys, as a part of that to all: forward and backward.

What a query has seen so far is an accumulator: a sum of values, the scores' maximum, and the sum of
their exponentials (Milakov & Gimelshein 2018, arXiv:1805.02867); all of them, and the gradients of
keys and values, are float32 (float64 of float64). Scores are computed for some queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checkpoint_attention import tile
from pallas_kernels.common import compat, products
from seqmodels.parallel.collectives import wide

SCORES = 2**24
"""Scores that are held at a time: 64 MB."""

_LEAST_ROWS = 64


class Seen(NamedTuple):
    """What queries have seen: ``total (B, T, H, K)``, ``maximum`` and ``weight (B, T, H)``."""

    total: Any
    maximum: Any
    weight: Any


class Queries(NamedTuple):
    """``q (B, T, H, K)`` and the documents ``(B, T)`` or None."""

    q: Any
    segments: Any


class Keys(NamedTuple):
    """``k`` and ``v (B, S, G, K)`` and the documents ``(B, S)`` or None."""

    k: Any
    v: Any
    segments: Any


def nothing_seen(q: jax.Array) -> Seen:
    """The accumulator of queries ``(.., H, K)`` that have met no keys."""
    dtype = wide(q.dtype)
    weight = jnp.zeros(q.shape[:-1], dtype)
    return Seen(
        *compat.match_vma(jnp.zeros(q.shape, dtype), jnp.full_like(weight, tile.LOW), weight, q)[:3]
    )


def result(seen: Seen) -> tuple[jax.Array, jax.Array]:
    """The output, 0 where nothing was seen, and the logarithm of the sum of exponentials."""
    o = seen.total * tile.inverse(seen.weight)[..., None]
    return o, tile.log_sum_exp(seen.maximum, seen.weight)


def see(scale: float, seen: Seen, queries: Queries, keys: Keys, *, causal: bool = False) -> Seen:
    """The accumulator after these keys, of equal documents.

    ``causal``: query t sees the keys up to number t.
    """

    def rows(part):
        seen, queries, index = part
        scores, mask = _scores(scale, queries, keys, index)
        maximum, weight, factor, p = tile.block(
            _heads_first(seen.maximum, scores), _heads_first(seen.weight, scores), scores, mask, -1
        )
        fresh = _product("bgrts,bsgk->btgrk", p, keys.v)
        total = seen.total * _tokens_first(factor)[..., None] + fresh.reshape(seen.total.shape)
        return Seen(total, _tokens_first(maximum), _tokens_first(weight))

    index = _index(queries, causal)
    return _by_rows(rows, (seen, queries, index), _block(queries, keys))


class Pullback(NamedTuple):
    """What the derivative needs of queries: cotangent ``do`` and ``o`` times it, ``lse``."""

    do: Any
    delta: Any
    lse: Any


def pull_back(
    scale: float,
    dq: jax.Array,
    dk: jax.Array,
    dv: jax.Array,
    queries: Queries,
    keys: Keys,
    back: Pullback,
    *,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients ``dq``, ``dk`` and ``dv`` with what this pair of queries and keys adds."""

    def rows(sums, part):
        dk, dv = sums
        dq, queries, index, back = part
        scores, mask = _scores(scale, queries, keys, index)
        p = tile.probabilities(scores, mask, _heads_first(back.lse, scores))
        do = _grouped(back.do, keys)
        dp = _product("btgrk,bsgk->bgrts", do, keys.v)
        ds = tile.score_gradient(p, mask, dp, _heads_first(back.delta, scores)) * scale
        dv = dv + _product("bgrts,btgrk->bsgk", p, do)
        dk = dk + _product("bgrts,btgrk->bsgk", ds, _grouped(queries.q, keys))
        fresh = _product("bgrts,bsgk->btgrk", ds, keys.k)
        return (dk, dv), dq + fresh.reshape(dq.shape)

    part = (dq, queries, _index(queries, causal), back)
    (dk, dv), dq = _scan_rows(rows, (dk, dv), part, _block(queries, keys))
    return dq, dk, dv


def _scores(scale: float, queries: Queries, keys: Keys, index):
    """``(B, G, R, T, S)``, and which of them count."""
    scores = _product("btgrk,bsgk->bgrts", _grouped(queries.q, keys), keys.k) * scale
    mask = jnp.ones((1,) * 5, bool)
    if index is not None:
        number = jnp.arange(keys.k.shape[1], dtype=jnp.int32)
        mask = index[:, None, None, :, None] >= number[None, None, None, None]
    if keys.segments is not None:
        theirs = keys.segments[:, None, None, None]
        mask = mask & (queries.segments[:, None, None, :, None] == theirs)
    return scores, mask


def _product(equation: str, x, y):
    """The float32 product; scores, which are float32, are rounded to the width of what they meet,
    except on a CPU, which has no narrower product."""

    def product(x, y):
        dtype = min(x.dtype, y.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
        exact = dtype != jnp.bfloat16
        return jnp.einsum(
            equation,
            x.astype(dtype),
            y.astype(dtype),
            precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
            preferred_element_type=wide(dtype),
        )

    return products.widened_on_cpu(product, x, y)


def _grouped(x, keys: Keys):
    """``(B, T, H, K)`` as ``(B, T, G, R, K)``."""
    return x.reshape(*x.shape[:2], keys.k.shape[2], -1, x.shape[3])


def _heads_first(x, scores):
    """``(B, T, H)`` as ``(B, G, R, T, 1)``."""
    batch, groups, repeats, length, _ = scores.shape
    return jnp.moveaxis(x.reshape(batch, length, groups, repeats), 1, 3)[..., None]


def _tokens_first(x):
    """The inverse of ``_heads_first``."""
    x = jnp.moveaxis(x[..., 0], 3, 1)
    return x.reshape(*x.shape[:2], -1)


def _index(queries: Queries, causal: bool):
    length = queries.q.shape[1]
    return jnp.arange(length, dtype=jnp.int32)[None] if causal else None


def _block(queries: Queries, keys: Keys) -> int:
    """Queries at a time."""
    batch, _, heads, _ = queries.q.shape
    return max(_LEAST_ROWS, SCORES // (batch * heads * keys.k.shape[1]))


def _by_rows(fn: Callable[[Any], Any], parts: Any, rows: int):
    """``fn(parts)``, for ``rows`` entries of axis 1 at a time."""
    _, y = _scan_rows(lambda none, part: (none, fn(part)), (), parts, rows)
    return y


def _scan_rows(fn: Callable[[Any, Any], Any], sums: Any, parts: Any, rows: int):
    """``fn(sums, parts)``, for ``rows`` entries of axis 1 at a time; ``sums`` go through."""
    length = jax.tree.leaves(parts)[0].shape[1]
    if rows >= length:
        return fn(sums, parts)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, -length % rows), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)

    def merge(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    # What is padded adds nothing to the sums: its cotangents are 0.
    sums, y = jax.lax.scan(fn, sums, jax.tree.map(split, parts))
    return sums, jax.tree.map(merge, y)
