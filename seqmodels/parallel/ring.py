"""Softmax attention whose keys and values travel from shard to shard.

Every shard keeps its queries and meets the keys of all others, one shard's at a time, while the
next are on their way (Liu, Zaharia & Abbeel, "Ring Attention", 2023). The backward pass sends keys
and values round again, with their gradients behind them. Both are loops: neither memory nor the
size of the program grows with the number of shards.

Half of each shard's keys travel one way and half the other, so that a link carries half as much in
each direction. A causal row is put in zigzag, where all shards have the same work in each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import compat
from seqmodels.parallel import collectives, validate
from seqmodels.parallel.softmax_blocks import (
    Keys,
    Pullback,
    Queries,
    Seen,
    nothing_seen,
    pull_back,
    result,
    see,
)
from seqmodels.parallel.zigzag import from_zigzag, to_zigzag


class _Rule(NamedTuple):
    """What is static.

    Attributes:
      axis, size: the mesh axis and how many shards it has.
      causal: a token sees none behind it.
      scale: of the scores.
    """

    axis: str
    size: int
    causal: bool
    scale: float


def ring(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    *,
    causal: bool = True,
    scale: float | None = None,
    segments: Int[Array, "b l"] | None = None,
    balance: bool = True,
    axis: str = collectives.AXIS,
) -> Float[Array, "b l h k"]:
    """``attend`` of a row whose length is split over ``axis``; inside `jax.shard_map`.

    A pass moves ``P - 1`` times this shard's keys and values (backward: and ``P`` times their
    gradients, in float32), and holds those of two shards. Chunks of a row without a document in
    common are not multiplied.

    Args:
      q: this shard's queries, float32 or bfloat16.
      k, v: its keys and values, q's dtype; head h reads group ``h // (H / G)``.
      causal: whether a token sees none behind it.
      scale: of the scores; ``K**-0.5`` if None.
      segments: number of each token's document along the whole row, as ``Segments.index``; tokens
        see their own document. None: the row is one document.
      balance: put a causal row in zigzag, so that shards have equal work; l must then be even.
      axis: the mesh axis that splits the length.

    Returns:
      ``(B, l, H, K)`` in q's dtype. Scores, softmax and all sums are float32; gradients flow to q,
      k and v. Forward mode is not supported.

    Raises:
      ValueError: arrays that do not fit, an odd l in a causal row that is balanced, no such axis.
    """
    validate.attention("ring", q, k, v, segments)
    size = collectives.axis_size(axis)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    rule = _Rule(axis, size, causal, scale)
    zigzag = causal and balance and size > 1
    tokens = jnp.concatenate([q, k, v], axis=2)
    if zigzag:
        tokens = to_zigzag(tokens, axis=axis)
        segments = None if segments is None else to_zigzag(segments, axis=axis)
    tokens, segments = compat.match_vma(tokens, segments)
    tokens, segments = (_chunks(x, 2 if zigzag else 1) for x in (tokens, segments))
    heads, groups = q.shape[2], k.shape[2]
    q, kv = tokens[..., :heads, :], tokens[..., heads:, :]
    kv = jnp.stack([kv[..., :groups, :], kv[..., groups:, :]])
    o = _ring(rule, q, kv, segments)
    o = jnp.moveaxis(o, 0, 1).reshape(o.shape[1], -1, *o.shape[3:])
    return from_zigzag(o, axis=axis) if zigzag else o


def _chunks(x, count: int):
    """``(B, l, ..)`` as ``(count, B, l / count, ..)``."""
    if x is None:
        return None
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(rule: _Rule, q, kv, segments):
    """``(n, B, c, H, K)``, of q ``(n, B, c, H, K)``, kv ``(2, n, B, c, G, K)``, ``(n, B, c)``.

    n chunks of a shard: 2 in zigzag, otherwise 1.
    """
    return _ring_forward(rule, q, kv, segments)[0]


class _Lane(NamedTuple):
    """Keys that travel, ``distance`` shards in each step."""

    distance: int
    first: int
    last: int  # which tokens of each chunk


class _Load(NamedTuple):
    """What a lane carries: kv ``(2, n, B, c', G, K)``, documents ``(n, B, c')`` or None."""

    kv: Any
    segments: Any

    def chunk(self, i) -> Keys:
        k, v = (_pick(self.kv[j], i) for j in range(2))
        return Keys(k, v, None if self.segments is None else _pick(self.segments, i))


def _lanes(rule: _Rule, length: int) -> Sequence[_Lane]:
    # The two neighbours of a shard are one where there are two shards.
    if rule.size <= 2 or length == 1:
        return (_Lane(1, 0, length),)
    middle = length // 2
    return (_Lane(1, 0, middle), _Lane(-1, middle, length))


def _loads(lanes: Sequence[_Lane], kv, segments) -> list[_Load]:
    return [
        _Load(
            kv[:, :, :, lane.first : lane.last],
            None if segments is None else segments[:, :, lane.first : lane.last],
        )
        for lane in lanes
    ]


def _turned(rule: _Rule, lanes: Sequence[_Lane], loads: Any) -> list[Any]:
    """Each lane's load one step further on its way."""
    return [
        collectives.turn(load, lane.distance, rule.axis)
        for lane, load in zip(lanes, loads, strict=True)
    ]


def _rounds(rule: _Rule, lanes, loads, turn: Callable[[Any, Any, Any], Any], state):
    """``state = turn(state, loads, s)`` for s in 1 .. P - 1, with what came s steps.

    ``loads`` have come one step. They go on while ``turn`` works.
    """
    if rule.size == 1:
        return state

    def one(s, both):
        state, loads = both
        coming = _turned(rule, lanes, loads)
        return turn(state, loads, s), coming

    if rule.size > 2:
        state, loads = jax.lax.fori_loop(1, rule.size - 1, one, (state, loads))
    return turn(state, loads, jnp.int32(rule.size - 1))


def _ring_forward(rule: _Rule, q, kv, segments):
    queries = Queries(q, segments)
    lanes = _lanes(rule, q.shape[2])
    loads = _loads(lanes, kv, segments)
    if rule.size > 1:
        loads = _turned(rule, lanes, loads)  # on their way while the shard is by itself

    seen = see(
        rule.scale,
        *_folded((nothing_seen(q), queries, Keys(kv[0], kv[1], segments))),
        causal=rule.causal,
    )
    seen = _unfolded(seen, q.shape[0])

    def meet(seen: Seen, load: _Load, i, j) -> Seen:
        chunk = see(rule.scale, _pick(seen, i), _pick(queries, i), load.chunk(j))
        return _put(seen, chunk, i)

    if q.shape[0] == 2:
        seen = meet(seen, _Load(kv, segments), 1, 0)

    def turn(seen, loads, s):
        for lane, load in zip(lanes, loads, strict=True):
            for i, j, runs in _pairs(rule, queries, lane, load, s):
                met = functools.partial(meet, load=load, i=i, j=j)
                seen = met(seen) if runs is None else jax.lax.cond(runs, met, lambda x: x, seen)
        return seen

    seen = _rounds(rule, lanes, loads, turn, seen)
    o, lse = result(seen)
    # Rounded, o would be the largest error of the scores' gradients.
    return o.astype(q.dtype), (q, kv, segments, o, lse)


def _ring_backward(rule: _Rule, kept, do):
    q, kv, segments, o, lse = kept
    queries = Queries(q, segments)
    lanes = _lanes(rule, q.shape[2])
    loads = _loads(lanes, kv, segments)
    if rule.size > 1:
        loads = _turned(rule, lanes, loads)
    dtype = collectives.wide(q.dtype)
    delta = jnp.sum(do.astype(dtype) * o, axis=-1)
    back = Pullback(do, delta, lse)
    dq, dkv = compat.match_vma(jnp.zeros(q.shape, dtype), jnp.zeros(kv.shape, dtype), q)[:2]

    arrays = _folded((dq, *dkv, queries, Keys(kv[0], kv[1], segments), back))
    dq, *dkv = _unfolded(pull_back(rule.scale, *arrays, causal=rule.causal), q.shape[0])
    dkv = jnp.stack(dkv)

    def meet(sums, load: _Load, i, j):
        dq, dkv = sums
        dk, dv = (_pick(dkv[part], j) for part in range(2))
        parts = (_pick(queries, i), load.chunk(j), _pick(back, i))
        new, dk, dv = pull_back(rule.scale, _pick(dq, i), dk, dv, *parts)
        return _put(dq, new, i), jnp.stack([_put(dkv[0], dk, j), _put(dkv[1], dv, j)])

    if q.shape[0] == 2:
        dq, dkv = meet((dq, dkv), _Load(kv, segments), 1, 0)

    def turn(state, loads, s):
        dq, gradients = state
        arrived = []
        # Gradients follow the keys that they belong to.
        for lane, load, dkv in zip(lanes, loads, _turned(rule, lanes, gradients), strict=True):
            for i, j, runs in _pairs(rule, queries, lane, load, s):
                met = functools.partial(meet, load=load, i=i, j=j)
                sums = (dq, dkv)
                dq, dkv = met(sums) if runs is None else jax.lax.cond(runs, met, lambda x: x, sums)
            arrived.append(dkv)
        return dq, arrived

    gradients = [dkv[:, :, :, lane.first : lane.last] for lane in lanes]
    dq, gradients = _rounds(rule, lanes, loads, turn, (dq, gradients))
    if rule.size > 1:
        gradients = _turned(rule, lanes, gradients)  # the last step home
    return dq.astype(q.dtype), jnp.concatenate(gradients, axis=3).astype(kv.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _pairs(rule: _Rule, queries: Queries, lane: _Lane, load: _Load, s):
    """Chunks of this shard's queries and of a load's keys that meet in step ``s``.

    Triples of two indices and whether they meet at all; None: they do. In these pairs a query sees
    all keys of its document: a chunk is behind another or before it.
    """
    rank = jax.lax.axis_index(rule.axis)
    source = (rank - lane.distance * s) % rule.size
    if queries.q.shape[0] == 2:
        # The late queries see the early keys of all. Of the other pairs one is all visible: early
        # queries and keys, of a shard before this one; or late ones, of a shard behind it.
        late = (source > rank).astype(jnp.int32)
        return [(i, j, _share(queries, load, i, j)) for i, j in ((1, 0), (late, late))]
    share = _share(queries, load, 0, 0, both_ways=not rule.causal)
    if not rule.causal:
        return [(0, 0, share)]
    before = source < rank
    return [(0, 0, before if share is None else before & share)]


def _share(queries: Queries, load: _Load, i, j, *, both_ways: bool = False):
    """Whether there is a document in both chunks; None where there are no documents.

    A document that reaches from one chunk into a later one has the last token of the one and the
    first of the other.
    """
    if load.segments is None:
        return None
    mine, theirs = _pick(queries.segments, i), _pick(load.segments, j)
    share = jnp.any(theirs[:, -1] == mine[:, 0])
    if both_ways:
        share = share | jnp.any(mine[:, -1] == theirs[:, 0])
    return share


def _pick(tree: Any, i) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _put(tree: Any, part: Any, i) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, part)


def _folded(tree: Any) -> Any:
    """Chunks as rows of a batch: ``(n, B, ..)`` as ``(n B, ..)``."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _unfolded(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
