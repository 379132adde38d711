"""The maths of one chunk of one head, on values; shared by every backend.

A chunk of C tokens has `q, k (C, K)`, `v (C, V)`, and a state `(V, K)` (transposed, so that a decay
per key is a row) that enters and one that leaves. With `E_ij` the decay between tokens j <= i,
`into_i` the one from the chunk's start to token i, `out_j` the one behind token j, and `keep` that
of the whole chunk:

    A      = (q k^T) * E                              pairs, j <= i
    o      = scale (A v + (q * into) state^T)
    state' = keep * state + v^T (k * out)

Decays come as log decays `g`: None, `(C, 1)` for one of all keys, `(C, K)` for one a key; their
sums and the masks of documents are those of `pallas_kernels.chunks`. Matmul operands have the
dtype of q, k and v, everything else is float32 (float64 under x64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.chunks import Documents, Summation


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
