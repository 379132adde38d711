"""The maths of one chunk of one head, on values; shared by every backend.

A chunk of C tokens is linear attention (`pallas_kernels.linear_attention.tile`, whose shapes, names
and decays these are) over corrected values `u (C, V)`: what each token writes, beyond what the
state already holds under its key. With `E` the decays between tokens, `into` those from the chunk's
start, and a state `(V, K)` that enters:

    A = beta (k k^T) * E             j < i
    u = (I + A)^-1 beta (v - (k * into) state^T)

(Yang et al. 2024, arXiv:2406.06484 and 2412.06464; per key, Kimi Linear, arXiv:2510.26692). With
`T = (I + A)^-1` and `du` the gradient of `u`, that of what the inverse is applied to is `T^T du`,
and `dA = -(T^T du) u^T`: nothing needs `T` applied to the keys.

The inverse is float32 whatever the operands are. With keys of norm 1 and beta <= 1 its elements are
at most 1, and those of the blocks that it is built from.

Documents are kept apart to the bit even where one overflows. A matmul over tokens has zeros
wherever two documents meet, and 0 * inf is NaN: so its right operand is made finite first. Tokens
of a document that did overflow, and all behind them in it, come out as NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.chunks import Documents, Sums
from pallas_kernels.linear_attention import tile as attention
from pallas_kernels.linear_attention.tile import Decay, dot, entering, kept, leaving, only, times


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x) < jnp.inf


def finite(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x` as the right operand of a matmul over tokens of several documents."""
    return x if docs is None else only(_is_finite(x), x)


# Pairs of tokens.


class Pairs(NamedTuple):
    """What tokens have in common with earlier ones, after the decay between them, `(C, C)`.

    Attributes:
      between: the decays, 0 outside of pairs; None where nothing decays or every key on its own.
      queries: of queries and keys, `j <= i`.
      keys: of keys and keys, `j < i`.
    """

    between: jax.Array | None
    queries: jax.Array
    keys: jax.Array


def _by_key(g: jax.Array | None) -> bool:
    return g is not None and g.shape[1] > 1


def _earlier(size: int, docs: Documents | None) -> jax.Array:
    row, column = chunks.order(size)
    return chunks.within(row > column, docs)


def pairs(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array | None,
    g_row: jax.Array | None,
    decay: Decay,
    docs: Documents | None,
    roll: chunks.Roll = jnp.roll,
) -> Pairs:
    """`Pairs` of a chunk.

    Args:
      q, k: `(C, K)`.
      g: log decays: None, `(C, 1)` or `(C, K)`.
      g_row: clamped log decays `(1, C)` where there is one for all keys, else None.
      decay: `linear_attention.tile.decay(g, docs)`.
      docs: who sees whom.
      roll: see `chunks.tree`.
    """
    size = q.shape[0]
    mask = attention.causal(size, docs)
    earlier = _earlier(size, docs)
    if decay.levels is not None and _by_key(g):
        queries, keys = (attention.pairs_by_key(x, k, decay.levels, docs) for x in (q, k))
        return Pairs(None, queries, only(earlier, keys))
    between = None
    if decay.levels is not None and g_row is not None:
        across = chunks.tree(g_row, axis=1, roll=roll)
        between = attention.pair_decay(decay.levels, across[:-1], mask)
    queries, keys = (dot(x, k, "nt") for x in (q, k))
    return Pairs(
        between,
        attention.pairs_of(queries, between, mask),
        attention.pairs_of(keys, between, earlier),
    )


class PairGradients(NamedTuple):
    """Of what `pairs` was given; `levels` and `g` are as in `linear_attention.decay_gradient`."""

    dq: jax.Array
    dk: jax.Array
    dlevels: list[Sums] | None
    more_dg: jax.Array | float


def pairs_gradients(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array | None,
    decay: Decay,
    docs: Documents | None,
    pairs: Pairs,
    dqueries: jax.Array,
    dkeys: jax.Array,
) -> PairGradients:
    """From the gradients of `pairs.queries` and `pairs.keys`, which are 0 where those are."""
    if decay.levels is not None and _by_key(g):
        dq, dk, dlevels = attention.pairs_by_key_gradients(q, k, decay.levels, docs, dqueries)
        dlater, dearlier, more = attention.pairs_by_key_gradients(k, k, decay.levels, docs, dkeys)
        dlevels = [
            Sums(x.prefix + y.prefix, x.suffix + y.suffix)
            for x, y in zip(dlevels, more, strict=True)
        ]
        return PairGradients(dq, dk + dlater + dearlier, dlevels, 0.0)
    of_scores = (
        attention.pairs_of(x, pairs.between, mask).astype(q.dtype)
        for x, mask in (
            (dqueries, attention.causal(q.shape[0], docs)),
            (dkeys, _earlier(q.shape[0], docs)),
        )
    )
    dqueries_, dkeys_ = of_scores
    dq = dot(dqueries_, k, "nn")
    dk = dot(dqueries_, q, "tn") + dot(dkeys_, k, "nn") + dot(dkeys_, k, "tn")
    if g is None:
        return PairGradients(dq, dk, None, 0.0)
    dlogs = finite(dqueries * pairs.queries + dkeys * pairs.keys, docs)
    return PairGradients(dq, dk, None, _crossing(dlogs))


def _crossing(dlogs: jax.Array) -> jax.Array:
    """What pairs give to the decays between them: the sum over `i >= t > j` for each t, `(C, 1)`.

    A matmul and a sum; nothing is subtracted.
    """
    row, column = chunks.order(dlogs.shape[0])
    behind = (column >= row).astype(dlogs.dtype)
    return only(column < row, dot(behind, dlogs, "nn")).sum(1, keepdims=True)


# The corrected values.


def inverse(lower: jax.Array, docs: Documents | None, leaf: int | None = None) -> jax.Array:
    """`(I + lower)^-1` of a strictly lower triangular `(C, C)`, C a power of two.

    From the inverses of the diagonal's blocks of s tokens, those of 2s tokens:

        [L1  0 ]^-1   [   L1^-1             0   ]
        [M   L2]    = [-L2^-1 M L1^-1    L2^-1  ]

    (Powers of `lower`, as in Neumann's series, cancel catastrophically where keys repeat.)

    Args:
      lower: float32 or float64.
      docs: None, or `lower` may hold what is not finite in some documents.
      leaf: the largest block that is kept in one piece, full matmuls with masks; None for C. A
        matrix unit does not notice the zeros, a CPU does.
    """
    size = lower.shape[0]
    if leaf is not None and size > leaf:
        half = size // 2
        first = inverse(lower[:half, :half], docs, leaf)
        second = inverse(lower[half:, half:], docs, leaf)
        joined = finite(dot(lower[half:, :half], finite(first, docs), "nn"), docs)
        corner = -dot(second, joined, "nn")
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=1)
        return jnp.concatenate([above, jnp.concatenate([corner, second], axis=1)], axis=0)
    row, column = chunks.order(size)
    blocks = (row == column).astype(lower.dtype)
    for at in chunks.sizes(size):
        corner = only(chunks.parted(size, at), lower)
        if at > 1:
            joined = finite(dot(corner, finite(blocks, docs), "nn"), docs)
            corner = dot(blocks, joined, "nn")
        blocks = blocks - corner
    return blocks


class Corrected(NamedTuple):
    """What a chunk writes, and what its gradient needs.

    Attributes:
      inverse: T, `(C, C)`.
      error: values minus what the state holds under their keys, `(C, V)`.
      values: u, `(C, V)`.
    """

    inverse: jax.Array
    error: jax.Array
    values: jax.Array


def corrected(
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    keys: jax.Array,
    state: jax.Array,
    decay: Decay,
    docs: Documents | None,
    leaf: int | None = None,
) -> Corrected:
    """`Corrected` of a chunk; all wide.

    Args:
      k, v: `(C, K)`, `(C, V)`.
      beta: `(C, 1)`, wide.
      keys: of `Pairs`.
      state: that enters, `(V, K)`, wide.
      decay, docs: as in `pairs`.
      leaf: as in `inverse`.
    """
    held = entering(dot(_into(k, decay), state, "nt"), docs)
    error = v.astype(beta.dtype) - held
    weighted = beta * error
    solved = inverse(beta * keys, docs, leaf)
    values = dot(solved, finite(weighted, docs), "nn")
    return Corrected(solved, error, values if docs is None else _broken(values, weighted, docs))


def _into(k: jax.Array, decay: Decay) -> jax.Array:
    """Keys as they read the entering state, an operand."""
    return times(k, decay.into).astype(k.dtype)


def _broken(values: jax.Array, weighted: jax.Array, docs: Documents) -> jax.Array:
    """`values`, NaN from a document's first that is not finite on."""
    broken = ~(_is_finite(values) & _is_finite(weighted)).all(1, keepdims=True)
    row, column = chunks.order(values.shape[0])
    reach = chunks.within(row >= column, docs).astype(values.dtype)
    behind = dot(reach, jnp.broadcast_to(broken.astype(values.dtype), values.shape), "nn")
    return jnp.where(behind > 0, jnp.nan, values)


# The chunk.


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    g_row: jax.Array | None,
    docs: Documents | None,
    state: jax.Array,
    scale: float,
    leaf: int | None = None,
    roll: chunks.Roll = jnp.roll,
) -> tuple[jax.Array, jax.Array]:
    """`(o (C, V), state' (V, K))` of a chunk, wide; arguments as in `pairs` and `corrected`."""
    decay = attention.decay(g, docs, roll)
    both = pairs(q, k, g, g_row, decay, docs, roll)
    values = corrected(k, v, beta, both.keys, state, decay, docs, leaf).values
    written = values.astype(v.dtype)
    visible = finite(written, docs)
    o = attention.output(q, visible, both.queries, state, decay, docs, scale)
    if docs is not None:
        o = only(docs.real, jnp.where(_is_finite(values), o, jnp.nan))
    added = attention.added(k, leaving(written, docs), decay, docs)
    return o, kept(state, decay.keep, docs) + added


class Gradients(NamedTuple):
    """Of a chunk's arguments and of the state that enters it; wide."""

    dq: jax.Array  # (C, K)
    dk: jax.Array  # (C, K)
    dv: jax.Array  # (C, V)
    dbeta: jax.Array  # (C, 1)
    dg: jax.Array | None  # as g
    dstate: jax.Array  # (V, K)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    g_row: jax.Array | None,
    docs: Documents | None,
    state: jax.Array,
    do: jax.Array,
    dstate: jax.Array,
    scale: float,
    leaf: int | None = None,
    roll: chunks.Roll = jnp.roll,
) -> Gradients:
    """`Gradients` from those of `forward`'s outputs; `state` is the one that entered."""
    decay = attention.decay(g, docs, roll)
    both = pairs(q, k, g, g_row, decay, docs, roll)
    solved, error, values = corrected(k, v, beta, both.keys, state, decay, docs, leaf)
    written = values.astype(v.dtype)
    outer = attention.gradients(q, k, written, both.queries, state, decay, docs, scale, do, dstate)
    # d(beta error) = T^T du; a document that overflowed is not to be seen from others.
    transposed = solved if docs is None else only(docs.same, finite(solved, docs))
    dwritten = dot(transposed, finite(outer.dv, docs), "tn")
    dlower = only(_earlier(q.shape[0], docs), -dot(dwritten.astype(v.dtype), written, "nt"))
    dv = beta * dwritten
    dbeta = (dwritten * error).sum(1, keepdims=True) + (dlower * both.keys).sum(1, keepdims=True)
    inner = pairs_gradients(q, k, g, decay, docs, both, outer.dpairs, beta * dlower)
    # Of the keys that read the entering state, and of that state.
    dread = -entering(dv, docs).astype(v.dtype)
    dinto = entering(times(dot(dread, state, "nn"), decay.into), docs)
    dstate_in = kept(dstate, decay.keep, docs)
    dstate_in = dstate_in + attention.state_gradient(q, do, decay, docs, scale)
    dstate_in = dstate_in + dot(dread, entering(_into(k, decay), docs), "tn")
    dq, dk = outer.dq + inner.dq, outer.dk + inner.dk + dinto
    if g is None:
        return Gradients(dq, dk, dv, dbeta, None, dstate_in)
    sums = outer.dinto + times(k, dinto), outer.dout, outer.dkeep
    if not _by_key(g):
        sums = tuple(x.sum(1, keepdims=True) for x in sums)
    dg = attention.decay_gradient(g, inner.dlevels, *sums, docs, inner.more_dg, roll)
    return Gradients(dq, dk, dv, dbeta, dg, dstate_in)
