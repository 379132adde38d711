"""The maths of one chunk of one head, on values; shared by every backend.

A chunk of C tokens has `q, k (C, K)`, `v (C, V)`, and a state `(V, K)` (transposed, so that a decay
per key is a row) that enters and one that leaves. With `E_ij` the decay between tokens j <= i,
`into_i` the one from the chunk's start to token i, `out_j` the one behind token j, and `keep` that
of the whole chunk:

    A      = (q k^T) * E                              pairs, j <= i
    o      = scale (A v + (q * into) state^T)
    state' = keep * state + v^T (k * out)

Decays come as log decays `g`: None, `(C, 1)` for one of all keys, `(C, K)` for one a key; their
sums and the masks of documents are those of `matrix_state.chunks`. Matmul operands have the dtype
of q, k and v, everything else is float32 (float64 under x64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.chunks import Documents, Summation
from pallas_kernels.matrix_state.config import Config, row_decay


def dot(x: jax.Array, y: jax.Array, contract: str) -> jax.Array:
    """`x y` ("nn"), `x y^T` ("nt") or `x^T y` ("tn") with wide sums.

    Operands of different width meet in the narrower one: a float32 state is rounded to the
    bfloat16 of the queries that read it.
    """
    dtype = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    wide = dtype == jnp.float64
    axes = (((0 if contract[0] == "t" else 1,), (1 if contract[1] == "t" else 0,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        axes,
        precision=jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float64 if wide else jnp.float32,
    )


class Decay(NamedTuple):
    """The decays of a chunk; each None where nothing decays.

    Attributes:
      levels: logarithms, see `chunks.Sums`.
      into, out: `(C, 1)` or `(C, K)`.
      keep: `(1, 1)` or `(1, K)`.
    """

    levels: Any  # list[jax.Array] | None, and who asks knows which
    into: jax.Array | None
    out: jax.Array | None
    keep: jax.Array | None


def decay(g: jax.Array | None, docs: Documents | None, summation: Summation) -> Decay:
    """`Decay` of log decays that are not clamped yet."""
    if g is None:
        return Decay(None, None, None, None)
    sums = summation.up(chunks.clamp(g, docs))
    return Decay(sums.levels, jnp.exp(sums.into), jnp.exp(sums.out), jnp.exp(sums.total))


def times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """`x * factor` in the factor's width; `x` where nothing decays."""
    return x if factor is None else x.astype(factor.dtype) * factor


def only(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def entering(x: jax.Array, docs: Documents | None) -> jax.Array:
    """Rows of `x` whose token sees the entering state."""
    return x if docs is None else only(docs.entering, x)


def leaving(x: jax.Array, docs: Documents | None) -> jax.Array:
    """Rows of `x` whose token is in the leaving state."""
    return x if docs is None else only(docs.leaving, x)


def kept(state: jax.Array, keep: jax.Array | None, docs: Documents | None) -> jax.Array:
    """What is left at the end of the chunk of the state that entered it."""
    state = times(state, keep)
    return state if docs is None else only(docs.keeps, state)


# Pairs of tokens, for one decay of all keys.


def causal(size: int, docs: Documents | None) -> jax.Array:
    row, column = chunks.order(size)
    return chunks.within(row >= column, docs)


def pair_decay(down: list[jax.Array], across: list[jax.Array], mask: jax.Array) -> jax.Array:
    """`E (C, C)` where `mask`, else 0.

    Args:
      down, across: `chunks.Sums.levels` of `(C, 1)`, and the same as `(1, C)`.
      mask: `causal`.
    """
    size = mask.shape[0]
    logs = jnp.zeros(mask.shape, down[0].dtype)
    for s, column, row in zip(chunks.sizes(size), down, across, strict=True):
        logs = jnp.where(chunks.parted(size, s), column + row, logs)
    return only(mask, jnp.exp(logs))


def pairs_of(scores: jax.Array, between: jax.Array | None, mask: jax.Array) -> jax.Array:
    """`A (C, C)` from `q k^T` and the decays between tokens, None where nothing decays."""
    return only(mask, scores if between is None else scores * between)


def pairs_gradient(dpairs: jax.Array, pairs: jax.Array) -> jax.Array:
    """What the decays between pairs give to each `g_t`: the sum over `i >= t > j`, `(C, 1)`.

    A matmul and a sum; nothing is subtracted.
    """
    size = pairs.shape[0]
    row, column = chunks.order(size)
    behind = (column >= row).astype(pairs.dtype)
    # The rows i >= t of (dA * A), summed; then the columns j < t.
    summed = dot(behind, chunks.visible(dpairs * pairs), "nn")
    return only(column < row, summed).sum(1, keepdims=True)


# Pairs of tokens, for one decay a key.


def _parts(levels: list[jax.Array], docs: Documents | None):
    """The pairs that part at each size of blocks, and each token's factor in their decay."""
    size = levels[0].shape[0]
    for s, level in zip(chunks.sizes(size), levels, strict=True):
        yield chunks.within(chunks.parted(size, s), docs), jnp.exp(level)


def pairs_by_key(q, k, levels: list[jax.Array], docs: Documents | None) -> jax.Array:
    """`A (C, C)`: one matmul for each size of the blocks at which pairs part."""
    row, column = chunks.order(q.shape[0])
    wide = levels[0].dtype
    same_token = (q.astype(wide) * k.astype(wide)).sum(1, keepdims=True)
    pairs = only(chunks.within(row == column, docs), jnp.broadcast_to(same_token, row.shape))
    for mask, factor in _parts(levels, docs):
        decayed = dot(times(q, factor).astype(q.dtype), times(k, factor).astype(k.dtype), "nt")
        pairs = jnp.where(mask, decayed, pairs)
    return pairs


def pairs_by_key_gradients(q, k, levels: list[jax.Array], docs: Documents | None, dpairs):
    """`(dq, dk, dlevels)` from the gradient of `pairs_by_key`."""
    row, column = chunks.order(q.shape[0])
    on_diagonal = only(chunks.within(row == column, docs), dpairs).sum(1, keepdims=True)
    dq, dk = times(k, on_diagonal), times(q, on_diagonal)
    dlevels = []
    for mask, factor in _parts(levels, docs):
        part = only(mask, dpairs).astype(q.dtype)
        # Only tokens of second halves have a row in it, only those of first halves a column.
        into_q = factor * dot(part, times(k, factor).astype(k.dtype), "nn")
        into_k = factor * dot(part, times(q, factor).astype(q.dtype), "tn")
        dq, dk = dq + into_q, dk + into_k
        dlevels.append(times(q, into_q) + times(k, into_k))
    return dq, dk, dlevels


# The same for a portable path, whose matmuls may be of any size: the pairs that part at blocks of s
# tokens are those of second with first halves, so only halves are decayed and multiplied.


def _wide(*arrays: jax.Array) -> list[jax.Array]:
    """In float32 (float64 of float64)."""
    wide = jnp.float64 if arrays[0].dtype == jnp.float64 else jnp.float32
    return [x.astype(wide) for x in arrays]


def _dots(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """`dot` of each block, over one axis of each operand."""
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )


class _Halves(NamedTuple):
    """Operands of the pairs that part at blocks of s tokens, after their decay, `(n, s, K)`.

    Attributes:
      later: the rows' second halves, one kind behind the other, `(n, kinds s, K)`.
      earlier: the keys' first halves.
      factors: of first and second halves.
    """

    later: jax.Array
    earlier: jax.Array
    factors: tuple[jax.Array, jax.Array]


def _halves(rows: Sequence[jax.Array], k: jax.Array, level: jax.Array, s: int) -> _Halves:
    first, second = chunks.halves(jnp.exp(level), s)
    later = jnp.concatenate([chunks.halves(row, s)[1] * second for row in rows], axis=1)
    return _Halves(later, chunks.halves(k, s)[0] * first, (first, second))


def pairs_in_blocks(
    rows: Sequence[jax.Array], k: jax.Array, levels: list[jax.Array], mask: jax.Array
) -> list[jax.Array]:
    """`pairs_by_key` of each of `rows (C, K)` with `k`, wide; 0 outside of `mask (C, C)`."""
    size = k.shape[0]
    k, *rows = _wide(k, *rows)
    found = [(row * k).sum(1).reshape(size, 1, 1) for row in rows]
    for s, level in zip(chunks.sizes(size), levels, strict=True):
        later, earlier, _ = _halves(rows, k, level, s)
        corners = jnp.split(_dots(later, earlier, (2, 2)), len(rows), axis=1)
        found = [_with_corner(x, corner) for x, corner in zip(found, corners, strict=True)]
    return [only(mask, x[0]) for x in found]


def _with_corner(blocks: jax.Array, corner: jax.Array) -> jax.Array:
    """`(2n, s, s)` and what is below, `(n, s, s)`, as `(n, 2s, 2s)` with zeros above."""
    first, second = blocks[0::2], blocks[1::2]
    upper = jnp.concatenate([first, jnp.zeros_like(corner)], axis=2)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=2)], axis=1)


def pairs_in_blocks_gradients(
    rows: Sequence[jax.Array],
    k: jax.Array,
    levels: list[jax.Array],
    mask: jax.Array,
    dpairs: Sequence[jax.Array],
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """`(drows, dk, dlevels)` from the gradients of `pairs_in_blocks`."""
    size = k.shape[0]
    k, *rows = _wide(k, *rows)
    left = [only(mask, x)[None] for x in dpairs]
    drows, dk, dlevels = [jnp.zeros_like(row) for row in rows], jnp.zeros_like(k), []
    for s, level in reversed(list(zip(chunks.sizes(size), levels, strict=True))):
        later, earlier, (first, second) = _halves(rows, k, level, s)
        corners = jnp.concatenate([x[:, s:, :s] for x in left], axis=1)
        left = [jnp.stack([x[:, :s, :s], x[:, s:, s:]], 1).reshape(-1, s, s) for x in left]
        into_rows = jnp.split(_dots(corners, earlier, (2, 1)), len(rows), axis=1)
        into_rows = [second * x for x in into_rows]
        into_k = first * _dots(corners, later, (1, 1))
        drows = [
            d + chunks.joined(jnp.zeros_like(x), x) for d, x in zip(drows, into_rows, strict=True)
        ]
        dk = dk + chunks.joined(into_k, jnp.zeros_like(into_k))
        dlater = [chunks.halves(row, s)[1] * x for row, x in zip(rows, into_rows, strict=True)]
        dlevels.append(chunks.joined(chunks.halves(k, s)[0] * into_k, sum(dlater[1:], dlater[0])))
    own = [x.reshape(size, 1) for x in left]
    drows = [d + k * x for d, x in zip(drows, own, strict=True)]
    return drows, dk + sum(row * x for row, x in zip(rows, own, strict=True)), dlevels[::-1]


# The chunk, given its pairs.


def output(q, v, pairs, state, decay: Decay, docs: Documents | None, scale: float) -> jax.Array:
    """`o (C, V)`, wide."""
    inside = dot(pairs.astype(v.dtype), v, "nn")
    from_state = dot(times(q, decay.into).astype(q.dtype), state, "nt")
    return scale * (inside + entering(from_state, docs))


def added(k, v, decay: Decay, docs: Documents | None) -> jax.Array:
    """`state' - keep * state`, `(V, K)`."""
    return dot(v, leaving(times(k, decay.out).astype(k.dtype), docs), "tn")


def state_gradient(q, do, decay: Decay, docs: Documents | None, scale: float) -> jax.Array:
    """What the chunk's outputs give to the state that enters it, `(V, K)`."""
    return scale * dot(do, entering(times(q, decay.into).astype(q.dtype), docs), "tn")


class Gradients(NamedTuple):
    """Of one chunk, but for what comes through its pairs; wide.

    `dinto, dout (C, K)` and `dkeep (1, K)` are the gradients of the logarithms of the decays, to
    be summed over the keys where one decay serves all.
    """

    dpairs: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dinto: jax.Array
    dout: jax.Array
    dkeep: jax.Array


def gradients(
    q, k, v, pairs, state, decay: Decay, docs: Documents | None, scale: float, do, dstate
) -> Gradients:
    """`Gradients` from the cotangents of the output and of the state that leaves, `(V, K)`."""
    do = (scale * do).astype(v.dtype)
    dpairs = only(causal(q.shape[0], docs), dot(do, v, "nt"))
    dq = entering(times(dot(do, state, "nn"), decay.into), docs)
    dk = leaving(times(dot(v, dstate, "nn"), decay.out), docs)
    dv = dot(pairs.astype(v.dtype), do, "tn")
    dv = dv + leaving(dot(times(k, decay.out).astype(k.dtype), dstate, "nt"), docs)
    dkeep = kept(state * dstate, decay.keep, docs).sum(0, keepdims=True)
    return Gradients(dpairs, dq, dk, dv, times(q, dq), times(k, dk), dkeep)


def decay_gradient(
    g: jax.Array,
    dlevels: list[jax.Array] | None,
    dinto: jax.Array,
    dout: jax.Array,
    dkeep: jax.Array,
    docs: Documents | None,
    summation: Summation,
    more: jax.Array | float = 0.0,
) -> jax.Array:
    """The gradient of `g` from those of the sums made of it, and `more` that needs no sums."""
    dlevels = dlevels or [jnp.zeros_like(dinto)] * len(chunks.sizes(g.shape[0]))
    dg = summation.down(chunks.Sums(dlevels, dinto, dout, dkeep)) + more
    return chunks.clamp_transpose(g, dg, docs)


def summary(run, config: Config, q, k, v, log_decay, initial_state, runs):
    """`(decay, state)`, `(B, H, K or 1, 1)` and `(B, H, K, V)`; see `backend.summarize`."""
    _, state = run(config, q, k, v, log_decay, initial_state, runs)
    return row_decay(log_decay, runs, state), state
