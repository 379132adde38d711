"""The maths of linear attention in one chunk of one head, on values.

`xla` and the GPU kernels of linear attention are made of it, and the delta rule's `tile`. The TPU
kernels share its masks and states, not its scores and gradients, as `tpu_scalar_decay` and
`tpu_vector_decay` of the families say.

A chunk of C tokens has `q, k (C, K)`, `v (C, V)`, and a state `(V, K)` (transposed, so that a decay
per key is a row) that enters and one that leaves. With `E_ij` the decay between tokens j <= i,
`from_start_i` the one from the chunk's start to token i, `to_end_j` the one after token j, and
`chunk_decay` that of the whole chunk:

    A      = (q k^T) * E                              pairs, j <= i
    o      = scale (A v + (q * from_start) state^T)
    state' = chunk_decay * state + v^T (k * to_end)

Decays come as log decays `g`: None, `(C, 1)` for one of all keys, `(C, K)` for one a key; their
sums are those of `decay_sums`, the masks of documents those of `masks`. Matmul operands have the
dtype of q, k and v, everything else is float32 (float64 under x64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.matrix_state.decay_sums import Summation
from pallas_kernels.matrix_state.masks import SegmentMasks


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
      level_sums: logarithms, see `decay_sums.DecaySums`.
      from_start, to_end: `(C, 1)` or `(C, K)`, exponentials of `g_cumsum` and `g_to_end`.
      chunk_decay: `(1, 1)` or `(1, K)`, that of `g_last`.
    """

    level_sums: Any  # list[jax.Array] | None, and who asks knows which
    from_start: jax.Array | None
    to_end: jax.Array | None
    chunk_decay: jax.Array | None


def decay(g: jax.Array | None, docs: SegmentMasks | None, summation: Summation) -> Decay:
    """`Decay` of log decays that are not clamped yet."""
    if g is None:
        return Decay(None, None, None, None)
    sums = summation.cumsum(decay_sums.clamp(g, docs))
    return Decay(
        sums.level_sums, jnp.exp(sums.g_cumsum), jnp.exp(sums.g_to_end), jnp.exp(sums.g_last)
    )


def apply_decay(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """`x * factor` in the factor's width; `x` where nothing decays."""
    return x if factor is None else x.astype(factor.dtype) * factor


def zero_where_not(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where `mask`, else 0."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def where_entering(x: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """Rows of `x` whose token sees the entering state."""
    return x if docs is None else zero_where_not(docs.entering, x)


def where_leaving(x: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """Rows of `x` whose token is in the leaving state."""
    return x if docs is None else zero_where_not(docs.leaving, x)


def decayed_state(
    state: jax.Array, chunk_decay: jax.Array | None, docs: SegmentMasks | None
) -> jax.Array:
    """What is left at the end of the chunk of the state that entered it."""
    state = apply_decay(state, chunk_decay)
    return state if docs is None else zero_where_not(docs.carried, state)


# Pairs of tokens, for one decay of all keys.


def causal(size: int, docs: SegmentMasks | None) -> jax.Array:
    """`(C, C)` bool: the pairs `j <= i` of one document."""
    row, column = masks.token_indices(size)
    return masks.within(row >= column, docs)


def strictly_causal(size: int, docs: SegmentMasks | None) -> jax.Array:
    """`(C, C)` bool: the pairs `j < i` of one document."""
    row, column = masks.token_indices(size)
    return masks.within(row > column, docs)


def pair_decay(down: list[jax.Array], across: list[jax.Array], mask: jax.Array) -> jax.Array:
    """`E (C, C)` where `mask`, else 0.

    Args:
      down, across: `level_sums` of `(C, 1)`, and the same as `(1, C)`.
      mask: `causal`.
    """
    size = mask.shape[0]
    logs = jnp.zeros(mask.shape, down[0].dtype)
    for s, column, row in zip(masks.level_sizes(size), down, across, strict=True):
        logs = jnp.where(masks.parted(size, s), column + row, logs)
    return zero_where_not(mask, jnp.exp(logs))


def masked_A(scores: jax.Array, pair_decay: jax.Array | None, mask: jax.Array) -> jax.Array:
    """`A (C, C)` from `q k^T` and the decays between tokens, None where nothing decays."""
    return zero_where_not(mask, scores if pair_decay is None else scores * pair_decay)


def pair_log_decay_vjp(dlogs: jax.Array) -> jax.Array:
    """What the decays between pairs give to each `g_t`: the sum over `i >= t > j`, `(C, 1)`.

    A matmul and a sum; nothing is subtracted. `dlogs (C, C)` is finite, `dA * A`.
    """
    row, column = masks.token_indices(dlogs.shape[0])
    after = (column >= row).astype(dlogs.dtype)
    # The rows i >= t, summed; then the columns j < t.
    return zero_where_not(column < row, dot(after, dlogs, "nn")).sum(1, keepdims=True)


# Pairs of tokens, for one decay a key.


def _levels(levels: list[jax.Array], docs: SegmentMasks | None):
    """The pairs that part at each size of blocks, and each token's factor in their decay."""
    size = levels[0].shape[0]
    for s, level in zip(masks.level_sizes(size), levels, strict=True):
        yield masks.within(masks.parted(size, s), docs), jnp.exp(level)


def A_vector_decay(q, k, levels: list[jax.Array], docs: SegmentMasks | None) -> jax.Array:
    """`A (C, C)`: one matmul for each size of the blocks at which pairs part.

    Of whole chunks, for kernels that cannot cut them into halves.
    """
    row, column = masks.token_indices(q.shape[0])
    wide = levels[0].dtype
    same_token = (q.astype(wide) * k.astype(wide)).sum(1, keepdims=True)
    A = zero_where_not(masks.within(row == column, docs), jnp.broadcast_to(same_token, row.shape))
    for mask, factor in _levels(levels, docs):
        decayed = dot(
            apply_decay(q, factor).astype(q.dtype), apply_decay(k, factor).astype(k.dtype), "nt"
        )
        A = jnp.where(mask, decayed, A)
    return A


def A_vector_decay_vjp(q, k, levels: list[jax.Array], docs: SegmentMasks | None, dA):
    """`(dq, dk, dlevels)` from the gradient of `A_vector_decay`."""
    row, column = masks.token_indices(q.shape[0])
    on_diagonal = zero_where_not(masks.within(row == column, docs), dA).sum(1, keepdims=True)
    dq, dk = apply_decay(k, on_diagonal), apply_decay(q, on_diagonal)
    dlevels = []
    for mask, factor in _levels(levels, docs):
        part = zero_where_not(mask, dA).astype(q.dtype)
        # Only tokens of second halves have a row in it, only those of first halves a column.
        from_k = factor * dot(part, apply_decay(k, factor).astype(k.dtype), "nn")
        from_q = factor * dot(part, apply_decay(q, factor).astype(q.dtype), "tn")
        dq, dk = dq + from_k, dk + from_q
        dlevels.append(apply_decay(q, from_k) + apply_decay(k, from_q))
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
      later: the rows' second halves, one kind after the other, `(n, kinds s, K)`.
      earlier: the keys' first halves.
      factors: of first and second halves.
    """

    later: jax.Array
    earlier: jax.Array
    factors: tuple[jax.Array, jax.Array]


def _halves(rows: Sequence[jax.Array], k: jax.Array, level: jax.Array, s: int) -> _Halves:
    first, second = decay_sums.halves(jnp.exp(level), s)
    later = jnp.concatenate([decay_sums.halves(row, s)[1] * second for row in rows], axis=1)
    return _Halves(later, decay_sums.halves(k, s)[0] * first, (first, second))


def A_in_blocks(
    rows: Sequence[jax.Array], k: jax.Array, levels: list[jax.Array], mask: jax.Array
) -> list[jax.Array]:
    """`A_vector_decay` of each of `rows (C, K)` with `k`, wide; 0 outside of `mask (C, C)`."""
    size = k.shape[0]
    k, *rows = _wide(k, *rows)
    found = [(row * k).sum(1).reshape(size, 1, 1) for row in rows]
    for s, level in zip(masks.level_sizes(size), levels, strict=True):
        later, earlier, _ = _halves(rows, k, level, s)
        corners = jnp.split(_dots(later, earlier, (2, 2)), len(rows), axis=1)
        found = [_with_corner(x, corner) for x, corner in zip(found, corners, strict=True)]
    return [zero_where_not(mask, x[0]) for x in found]


def _with_corner(blocks: jax.Array, corner: jax.Array) -> jax.Array:
    """`(2n, s, s)` and what is below, `(n, s, s)`, as `(n, 2s, 2s)` with zeros above."""
    first, second = blocks[0::2], blocks[1::2]
    upper = jnp.concatenate([first, jnp.zeros_like(corner)], axis=2)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=2)], axis=1)


def A_in_blocks_vjp(
    rows: Sequence[jax.Array],
    k: jax.Array,
    levels: list[jax.Array],
    mask: jax.Array,
    dA: Sequence[jax.Array],
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """`(drows, dk, dlevels)` from the gradients of `A_in_blocks`."""
    size = k.shape[0]
    k, *rows = _wide(k, *rows)
    left = [zero_where_not(mask, x)[None] for x in dA]
    drows, dk, dlevels = [jnp.zeros_like(row) for row in rows], jnp.zeros_like(k), []
    for s, level in reversed(list(zip(masks.level_sizes(size), levels, strict=True))):
        later, earlier, (first, second) = _halves(rows, k, level, s)
        corners = jnp.concatenate([x[:, s:, :s] for x in left], axis=1)
        left = [jnp.stack([x[:, :s, :s], x[:, s:, s:]], 1).reshape(-1, s, s) for x in left]
        from_keys = jnp.split(_dots(corners, earlier, (2, 1)), len(rows), axis=1)
        from_keys = [second * x for x in from_keys]
        from_rows = first * _dots(corners, later, (1, 1))
        drows = [
            d + decay_sums.joined(jnp.zeros_like(x), x)
            for d, x in zip(drows, from_keys, strict=True)
        ]
        dk = dk + decay_sums.joined(from_rows, jnp.zeros_like(from_rows))
        dlater = [decay_sums.halves(row, s)[1] * x for row, x in zip(rows, from_keys, strict=True)]
        dlevels.append(
            decay_sums.joined(decay_sums.halves(k, s)[0] * from_rows, sum(dlater[1:], dlater[0]))
        )
    own = [x.reshape(size, 1) for x in left]
    drows = [d + k * x for d, x in zip(drows, own, strict=True)]
    return drows, dk + sum(row * x for row, x in zip(rows, own, strict=True)), dlevels[::-1]


# The chunk, given its pairs.


def output(q, v, A, state, decay: Decay, docs: SegmentMasks | None, scale: float) -> jax.Array:
    """`o (C, V)`, wide."""
    inside = dot(A.astype(v.dtype), v, "nn")
    from_state = dot(apply_decay(q, decay.from_start).astype(q.dtype), state, "nt")
    return scale * (inside + where_entering(from_state, docs))


def state_update(k, v, decay: Decay, docs: SegmentMasks | None) -> jax.Array:
    """`state' - chunk_decay * state`, `(V, K)`."""
    return dot(v, where_leaving(apply_decay(k, decay.to_end).astype(k.dtype), docs), "tn")


def output_vjp_state(q, do, decay: Decay, docs: SegmentMasks | None, scale: float) -> jax.Array:
    """What the chunk's outputs give to the state that enters it, `(V, K)`."""
    return scale * dot(
        do, where_entering(apply_decay(q, decay.from_start).astype(q.dtype), docs), "tn"
    )


class Gradients(NamedTuple):
    """Gradients of one chunk, but for what comes through its scores `A`; wide.

    `dg_cumsum, dg_to_end (C, K)` and `dg_last (1, K)` are the gradients of the logarithms of the
    decays, to be summed over the keys where one decay serves all.
    """

    dA: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dg_cumsum: jax.Array
    dg_to_end: jax.Array
    dg_last: jax.Array


def gradients(
    q, k, v, A, state, decay: Decay, docs: SegmentMasks | None, scale: float, do, dstate
) -> Gradients:
    """`Gradients` from the cotangents of the output and of the state that leaves, `(V, K)`."""
    do = (scale * do).astype(v.dtype)
    dA = zero_where_not(causal(q.shape[0], docs), dot(do, v, "nt"))
    dq = where_entering(apply_decay(dot(do, state, "nn"), decay.from_start), docs)
    dk = where_leaving(apply_decay(dot(v, dstate, "nn"), decay.to_end), docs)
    dv = dot(A.astype(v.dtype), do, "tn")
    dv = dv + where_leaving(dot(apply_decay(k, decay.to_end).astype(k.dtype), dstate, "nt"), docs)
    dg_last = decayed_state(state * dstate, decay.chunk_decay, docs).sum(0, keepdims=True)
    return Gradients(dA, dq, dk, dv, apply_decay(q, dq), apply_decay(k, dk), dg_last)


def log_decay_vjp(
    g: jax.Array,
    dlevels: list[jax.Array] | None,
    dg_cumsum: jax.Array,
    dg_to_end: jax.Array,
    dg_last: jax.Array,
    docs: SegmentMasks | None,
    summation: Summation,
    more: jax.Array | float = 0.0,
) -> jax.Array:
    """The gradient of `g` from those of the sums made of it, and `more` that needs no sums."""
    dlevels = dlevels or [jnp.zeros_like(dg_cumsum)] * len(masks.level_sizes(g.shape[0]))
    dg = summation.cumsum_vjp(decay_sums.DecaySums(dlevels, dg_cumsum, dg_to_end, dg_last)) + more
    return decay_sums.clamp_vjp(g, dg, docs)
