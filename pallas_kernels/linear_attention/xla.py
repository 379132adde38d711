"""The portable path: all chunks of all rows alike, with one short loop over their states.

Forward sums up every chunk, chains the states, and lets every chunk answer its queries. Backward
runs the same three steps against time. Chunks are taken a few at a time, so that what they hold
stays in a CPU's caches; how many rows there are makes no difference.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import symbolic
from pallas_kernels.common.backend import Backend
from pallas_kernels.matrix_state import decay_sums, masks, tile
from pallas_kernels.matrix_state.config import Config

# Measured on x86: tokens of a chunk, and numbers in the pairs of the chunks worked on together.
_CHUNK, _CHUNK_VECTOR_DECAY = 64, 32
_SCORES_AT_ONCE = 2**16


class _Rows(NamedTuple):
    """Chunks, `(N, ...)` each with N = B * chunks; None where an argument is."""

    q: Any  # (N, C, G, K)
    k: Any
    v: Any  # (N, C, G, R, V), R heads a group
    g: Any  # (N, C, G, R, 1 or K)
    segment_index: Any  # (N, C)
    entering_segment: Any  # (N,)


def _cut(config: Config, q, k, v, log_decay, segment_index) -> _Rows:
    """Chunks of the arguments, padded with tokens that change nothing."""
    length = v.shape[1]
    vector_decay = log_decay is not None and log_decay.ndim == 4
    size = config.chunk or (_CHUNK_VECTOR_DECAY if vector_decay else _CHUNK)
    size = min(size, 1 << (length - 1).bit_length())
    padding = -length % size
    heads = (q.shape[2], v.shape[2] // q.shape[2])

    def cut(x, *shape):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(-1, size, *shape)

    # Not bfloat16: a CPU has no product of some layouts of two bfloat16 matrices with wide sums.
    wide = jnp.float64 if v.dtype == jnp.float64 else jnp.float32
    q, k, v = (x.astype(wide) for x in (q, k, v))
    g = entering = None
    if log_decay is not None:
        width = 1 if log_decay.ndim == 3 else log_decay.shape[3]
        g = cut(log_decay.astype(wide), *heads, width)
    if segment_index is not None:
        segment_index = jnp.pad(segment_index, ((0, 0), (0, padding)))
        entering = masks.entering_segment(segment_index, size).reshape(-1)
        segment_index = segment_index.reshape(-1, size)
    q, k = (cut(x, *x.shape[2:]) for x in (q, k))
    return _Rows(q, k, cut(v, *heads, v.shape[3]), g, segment_index, entering)


def _uncut(x, like):
    """Chunks with heads before tokens, `(N, ..., C, width)`, as an array like `like`."""
    x = jnp.moveaxis(x, -2, 1).reshape(like.shape[0], -1, *like.shape[2:])
    return x[:, : like.shape[1]].astype(like.dtype)


def _documents(rows: _Rows) -> masks.SegmentMasks | None:
    """The masks of one chunk."""
    if rows.segment_index is None:
        return None
    run = rows.entering_segment[None, None]
    return masks.segment_masks(rows.segment_index[:, None], rows.segment_index[None], run)


def _each(fn, rows: _Rows, *more):
    """`fn` of every chunk, some at a time."""
    heads = rows.v.shape[2] * rows.v.shape[3]
    at_once = max(1, _SCORES_AT_ONCE // (heads * rows.v.shape[1] ** 2))
    # A loop over a symbolic number of chunks cannot be cut into batches and a rest.
    batch_size = at_once if symbolic.known(rows.v.shape[0], 0) else None
    return jax.lax.map(lambda xs: fn(*xs), (rows, *more), batch_size=batch_size)


def _heads(fn, rows: _Rows, *more):
    """`fn(q, k, v, g, *more)` of each head of a chunk: `more` begins with its axes `(G, R)`."""
    inner = jax.vmap(fn, in_axes=(None, None, 1, None if rows.g is None else 1, *[0] * len(more)))
    outer = jax.vmap(inner, in_axes=(1, 1, 1, None if rows.g is None else 1, *[0] * len(more)))
    return outer(rows.q, rows.k, rows.v, rows.g, *more)


def _vector_decay(g) -> bool:
    return g is not None and g.shape[-1] > 1


def _pair_decay(decay: tile.Decay, mask):
    """The decays between tokens, `(C, C)`, or None."""
    if decay.level_sums is None:
        return None
    return tile.pair_decay(decay.level_sums, [x.T for x in decay.level_sums], mask)


def _state_maps(rows: _Rows):
    """`(chunk_decay, carried, added)` of a chunk: what its state's map is."""
    docs = _documents(rows)

    def head(q, k, v, g):
        decay = tile.decay(g, docs, decay_sums.BY_HALVES)
        return decay.chunk_decay, tile.state_update(k, v, decay, docs)

    chunk_decay, added = _heads(head, rows)
    return chunk_decay, None if docs is None else docs.carried, added


def _output(config: Config, rows: _Rows, state):
    """`o (G, R, C, V)` of a chunk."""
    docs = _documents(rows)
    mask = tile.causal(rows.q.shape[0], docs)

    def head(q, k, v, g, state):
        decay = tile.decay(g, docs, decay_sums.BY_HALVES)
        if _vector_decay(g):
            (A,) = tile.A_in_blocks((q,), k, decay.level_sums, mask)
        else:
            A = tile.masked_A(tile.dot(q, k, "nt"), _pair_decay(decay, mask), mask)
        return tile.output(q, v, A, state, decay, docs, config.scale)

    o = _heads(head, rows, state)
    return o.astype(rows.v.dtype)


def _state_gradient(config: Config, rows: _Rows, do):
    """`(chunk_decay, carried, gradient)` of a chunk: its map, and what its outputs give to
    the state that enters it."""
    docs = _documents(rows)

    def head(q, k, v, g, do):
        decay = tile.decay(g, docs, decay_sums.BY_HALVES)
        return decay.chunk_decay, tile.output_vjp_state(q, do, decay, docs, config.scale)

    chunk_decay, gradient = _heads(head, rows, jnp.moveaxis(do, 0, 2))
    return chunk_decay, None if docs is None else docs.carried, gradient


def _gradients(config: Config, rows: _Rows, do, state, dstate):
    """`(dq, dk, dv, dg)` of a chunk, `(G, C, K)` and `(G, R, C, V)`."""
    docs = _documents(rows)
    mask = tile.causal(rows.q.shape[0], docs)

    summation = decay_sums.BY_HALVES

    def head(q, k, v, g, do, state, dstate):
        decay = tile.decay(g, docs, summation)
        if _vector_decay(g):
            (A,) = tile.A_in_blocks((q,), k, decay.level_sums, mask)
        else:
            scores, pair_decay = tile.dot(q, k, "nt"), _pair_decay(decay, mask)
            A = tile.masked_A(scores, pair_decay, mask)
        d = tile.gradients(q, k, v, A, state, decay, docs, config.scale, do, dstate)
        if _vector_decay(g):
            (dq,), dk, dlevels = tile.A_in_blocks_vjp((q,), k, decay.level_sums, mask, (d.dA,))
            dg = tile.log_decay_vjp(
                g, dlevels, d.dg_cumsum, d.dg_to_end, d.dg_last, docs, summation
            )
            return d.dq + dq, d.dk + dk, d.dv, dg
        dscores = tile.masked_A(d.dA, pair_decay, mask).astype(q.dtype)
        dq = d.dq + tile.dot(dscores, k, "nn")
        dk = d.dk + tile.dot(dscores, q, "tn")
        if g is None:
            return dq, dk, d.dv, None
        more = tile.pair_log_decay_vjp(decay_sums.finite_or_large(d.dA * A))
        dg_cumsum, dg_to_end, dg_last = (
            x.sum(1, keepdims=True) for x in (d.dg_cumsum, d.dg_to_end, d.dg_last)
        )
        dg = tile.log_decay_vjp(g, None, dg_cumsum, dg_to_end, dg_last, docs, summation, more)
        return dq, dk, d.dv, dg

    dq, dk, dv, dg = _heads(head, rows, jnp.moveaxis(do, 0, 2), state, dstate)
    dq, dk = (x.sum(1).astype(rows.q.dtype) for x in (dq, dk))
    return dq, dk, dv.astype(rows.v.dtype), dg


def _chain(first, chunk_decay, carried, added, *, reverse: bool):
    """The state at the near end of every chunk `(N, G, R, V, K)`, and the one after the last."""
    batch = first.shape[0]

    def by_time(x):
        return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 0)

    def step(state, chunk):
        chunk_decay, carried, added = chunk
        after = state if chunk_decay is None else chunk_decay * state
        if carried is not None:
            after = tile.zero_where_not(carried[..., None, None, :, :], after)
        return after + added, state

    xs = jax.tree.map(by_time, (chunk_decay, carried, added))
    last, near = jax.lax.scan(step, first, xs, reverse=reverse)
    return jnp.moveaxis(near, 0, 1).reshape(-1, *near.shape[2:]), last


def forward(
    config: Config, q, k, v, log_decay, initial_state, segment_index, *, return_residuals: bool
):
    """`((o, final_state), residuals)`: the arguments and the state that enters every chunk."""
    rows = _cut(config, q, k, v, log_decay, segment_index)
    grouped = (v.shape[0], *rows.v.shape[2:4], *initial_state.shape[2:])
    first = initial_state.reshape(grouped).swapaxes(-1, -2)
    states, last = _chain(first, *_each(_state_maps, rows), reverse=False)
    o = _each(functools.partial(_output, config), rows, states)
    outputs = _uncut(o, v), last.swapaxes(-1, -2).reshape(initial_state.shape)
    return outputs, (q, k, v, log_decay, segment_index, states) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """Gradients of `forward`'s arrays, in its order, from those of `(o, final_state)`."""
    q, k, v, log_decay, segment_index, states = residuals
    do, dfinal = cotangents
    rows = _cut(config, q, k, v, log_decay, segment_index)
    do = _cut(config, q, k, do, log_decay, None).v
    grouped = (v.shape[0], *rows.v.shape[2:4], *dfinal.shape[2:])
    last = dfinal.reshape(grouped).swapaxes(-1, -2)
    maps = _each(functools.partial(_state_gradient, config), rows, do)
    dstates, first = _chain(last, *maps, reverse=True)
    dq, dk, dv, dg = _each(functools.partial(_gradients, config), rows, do, states, dstates)
    dlog_decay = None if dg is None else _uncut(dg, log_decay)
    dinitial = first.swapaxes(-1, -2).reshape(dfinal.shape)
    return _uncut(dq, q), _uncut(dk, k), _uncut(dv, v), dlog_decay, dinitial, None


BACKEND = Backend(forward, backward)
