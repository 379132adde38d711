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

from pallas_kernels.linear_attention import tile as attention
from pallas_kernels.linear_attention.tile import Decay, dot, entering, kept, leaving, only, times
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.chunks import Documents, Summation
from pallas_kernels.matrix_state.config import Config


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x) < jnp.inf


def finite(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x` as the right operand of a matmul over tokens of several documents."""
    return x if docs is None else only(_is_finite(x), x)


class Gates(NamedTuple):
    """What a chunk's tokens write and keep.

    Attributes:
      beta: `(C, 1)`, wide.
      g: log decays: None, `(C, 1)` or `(C, K)`.
      decay: of `linear_attention.tile.decay`.
      across: where one decay serves all keys, its `levels` as rows `(1, C)`; else None.
    """

    beta: jax.Array
    g: jax.Array | None
    decay: Decay
    across: list[jax.Array] | None

    @property
    def by_key(self) -> bool:
        return self.g is not None and self.g.shape[1] > 1


def gates(
    beta: jax.Array, g: jax.Array | None, docs: Documents | None, summation: Summation
) -> Gates:
    """`Gates` of a chunk whose columns can be transposed."""
    decay = attention.decay(g, docs, summation)
    one = g is not None and g.shape[1] == 1
    across = [level.T for level in decay.levels] if one and decay.levels else None
    return Gates(beta, g, decay, across)


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


def _earlier(size: int, docs: Documents | None) -> jax.Array:
    row, column = chunks.order(size)
    return chunks.within(row > column, docs)


def pairs(q: jax.Array, k: jax.Array, gates: Gates, docs: Documents | None) -> Pairs:
    """`Pairs` of a chunk of `q, k (C, K)`."""
    size, levels = q.shape[0], gates.decay.levels
    mask, earlier = attention.causal(size, docs), _earlier(size, docs)
    if levels is not None and gates.by_key:
        queries, keys = attention.pairs_in_blocks((q, k), k, levels, mask)
        return Pairs(None, queries, only(earlier, keys))
    between = None
    if levels is not None and gates.across is not None:
        between = attention.pair_decay(levels, gates.across, mask)
    queries, keys = (dot(x, k, "nt") for x in (q, k))
    queries = attention.pairs_of(queries, between, mask)
    return Pairs(between, queries, attention.pairs_of(keys, between, earlier))


class PairGradients(NamedTuple):
    """Of what `pairs` was given: `dlevels` of the sums of `g`, and `more` of `g` itself."""

    dq: jax.Array
    dk: jax.Array
    dlevels: list[jax.Array] | None
    more: jax.Array | float


def pairs_gradients(
    q: jax.Array,
    k: jax.Array,
    gates: Gates,
    docs: Documents | None,
    pairs: Pairs,
    dqueries: jax.Array,
    dkeys: jax.Array,
) -> PairGradients:
    """From the gradients of `pairs.queries` and `pairs.keys`, which are 0 where those are."""
    levels = gates.decay.levels
    if levels is not None and gates.by_key:
        mask, given = attention.causal(q.shape[0], docs), (dqueries, dkeys)
        (dq, dlater), dk, dlevels = attention.pairs_in_blocks_gradients(
            (q, k), k, levels, mask, given
        )
        return PairGradients(dq, dk + dlater, [finite(x, docs) for x in dlevels], 0.0)
    size = q.shape[0]
    mask, earlier = attention.causal(size, docs), _earlier(size, docs)
    of_queries = attention.pairs_of(dqueries, pairs.between, mask).astype(q.dtype)
    of_keys = attention.pairs_of(dkeys, pairs.between, earlier).astype(q.dtype)
    dq = dot(of_queries, k, "nn")
    dk = dot(of_queries, q, "tn") + dot(of_keys, k, "nn") + dot(of_keys, k, "tn")
    if gates.g is None:
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


def inverse(lower: jax.Array, docs: Documents | None) -> jax.Array:
    """`(I + lower)^-1` of a strictly lower triangular `(C, C)`, C a power of two.

    From the inverses of the diagonal's blocks of s tokens, those of 2s tokens:

        [L1  0 ]^-1   [   L1^-1             0   ]
        [M   L2]    = [-L2^-1 M L1^-1    L2^-1  ]

    for all blocks at once, by full matmuls of matrices that are mostly zeros. (Powers of `lower`,
    as in Neumann's series, would cancel catastrophically where keys repeat.)

    Args:
      lower: float32 or float64.
      docs: None, or `lower` may hold what is not finite in some documents.
    """
    size = lower.shape[0]
    row, column = chunks.order(size)
    blocks = (row == column).astype(lower.dtype)
    for s in chunks.sizes(size):
        corner = only(chunks.parted(size, s), lower)
        if s > 1:
            joined = dot(corner, finite(blocks, docs), "nn")
            corner = _unit_product(blocks, joined, docs)
        blocks = blocks - corner
    return blocks


def _unit_product(unit: jax.Array, x: jax.Array, docs: Documents | None) -> jax.Array:
    """`unit x`, `unit` lower triangular with ones on the diagonal; NaN where `x` is not finite."""
    product = dot(unit, finite(x, docs), "nn")
    return product if docs is None else jnp.where(_is_finite(x), product, jnp.nan)


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
    gates: Gates,
    keys: jax.Array,
    state: jax.Array,
    docs: Documents | None,
) -> Corrected:
    """`Corrected` of a chunk; all wide.

    Args:
      k, v: `(C, K)`, `(C, V)`.
      gates, docs: as everywhere.
      keys: of `Pairs`.
      state: that enters, `(V, K)`, wide.
    """
    held = entering(dot(_into(k, gates.decay), state, "nt"), docs)
    error = v.astype(gates.beta.dtype) - held
    solved = inverse(gates.beta * keys, docs)
    values = _unit_product(solved, gates.beta * error, docs)
    return Corrected(solved, error, values if docs is None else _broken(values, docs))


def _into(k: jax.Array, decay: Decay) -> jax.Array:
    """Keys as they read the entering state, an operand."""
    return times(k, decay.into).astype(k.dtype)


def _broken(values: jax.Array, docs: Documents) -> jax.Array:
    """`values`, NaN from a document's first that is not finite on."""
    broken = ~_is_finite(values).all(1, keepdims=True)
    row, column = chunks.order(values.shape[0])
    reach = chunks.within(row >= column, docs).astype(values.dtype)
    behind = dot(reach, jnp.broadcast_to(broken.astype(values.dtype), values.shape), "nn")
    return jnp.where(behind > 0, jnp.nan, values)


# The chunk.


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    docs: Documents | None,
    state: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`(o (C, V), state' (V, K))` of a chunk, wide; arguments as in `corrected`."""
    decay = gates.decay
    both = pairs(q, k, gates, docs)
    values = corrected(k, v, gates, both.keys, state, docs).values
    written = values.astype(v.dtype)
    o = attention.output(q, finite(written, docs), both.queries, state, decay, docs, scale)
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
    gates: Gates,
    docs: Documents | None,
    state: jax.Array,
    do: jax.Array,
    dstate: jax.Array,
    scale: float,
    summation: Summation,
) -> Gradients:
    """`Gradients` from those of `forward`'s outputs; `state` is the one that entered."""
    beta, g, decay, _ = gates
    both = pairs(q, k, gates, docs)
    solved, error, values = corrected(k, v, gates, both.keys, state, docs)
    written = values.astype(v.dtype)
    outer = attention.gradients(q, k, written, both.queries, state, decay, docs, scale, do, dstate)
    # Of beta * error, and of what the inverse was made from.
    transposed = solved if docs is None else only(docs.same, finite(solved, docs))
    dwritten = dot(transposed, finite(outer.dv, docs), "tn")
    dlower = dot(dwritten.astype(v.dtype), written, "nt")
    dlower = only(_earlier(q.shape[0], docs), -dlower)
    dv = beta * dwritten
    dbeta = (dwritten * error).sum(1, keepdims=True) + (dlower * both.keys).sum(1, keepdims=True)
    inner = pairs_gradients(q, k, gates, docs, both, outer.dpairs, beta * dlower)
    # Of the keys that read the entering state, and of that state.
    dheld = -entering(dv, docs).astype(v.dtype)
    dread = entering(times(dot(dheld, state, "nn"), decay.into), docs)
    dentering = kept(dstate, decay.keep, docs)
    dentering = dentering + attention.state_gradient(q, do, decay, docs, scale)
    dentering = dentering + dot(dheld, entering(_into(k, decay), docs), "tn")
    dq, dk = outer.dq + inner.dq, outer.dk + inner.dk + dread
    if g is None:
        return Gradients(dq, dk, dv, dbeta, None, dentering)
    dinto, dout, dkeep = (
        finite(x if gates.by_key else x.sum(1, keepdims=True), docs)
        for x in (outer.dinto + times(k, dread), outer.dout, outer.dkeep)
    )
    dg = attention.decay_gradient(g, inner.dlevels, dinto, dout, dkeep, docs, summation, inner.more)
    return Gradients(dq, dk, dv, dbeta, dg, dentering)


def summary(run, config: Config, q, k, v, beta, log_decay, initial_state, runs):
    """`(decay, state)`, `(B, H, K, K)` and `(B, H, K, V)`; see `backend.summarize`.

    What a row does to a state is affine; its linear part is what it makes of the unit matrix when
    there is nothing to write.
    """
    _, state = run(config, q, k, v, beta, log_decay, initial_state, runs)
    batch, heads, key_size, _ = state.shape
    unit = jnp.eye(key_size, dtype=state.dtype)
    unit = jnp.broadcast_to(unit, (batch, heads, key_size, key_size))
    nothing = jnp.zeros((*v.shape[:3], key_size), v.dtype)
    _, decay = run(config, q, k, nothing, beta, log_decay, unit, runs)
    return decay, state
