"""The maths of one chunk of one head, on values: what `xla` is made of.

The kernels share its ways with documents and have scores and inverses of their own: on a TPU they
are made for all heads of a step at once (`tpu_scalar_decay`, `tpu_vector_decay`, `tpu_inverse`), on
a GPU a chunk does not fit into the registers of one program (`gpu_tile`).

A chunk of C tokens is linear attention (`pallas_kernels.matrix_state.tile`, whose shapes, names
and decays these are) over new values `u (C, V)`: what each token writes, beyond what the
state already holds under its key. With `E` the decays between tokens, `from_start` those from the
chunk's start, and a state `(V, K)` that enters:

    A = beta (k k^T) * E             j < i
    u = (I + A)^-1 beta (v - (k * from_start) state^T)

(Yang et al. 2024, arXiv:2406.06484 and 2412.06464; per key, Kimi Linear, arXiv:2510.26692). With
`T = (I + A)^-1` and `du` the gradient of `u`, that of what the inverse is applied to is `T^T du`,
and `dA = -(T^T du) u^T`: nothing needs `T` applied to the keys.

The inverse is float32 whatever the operands are. With keys of norm 1 and beta <= 1 its elements are
at most 1, and those of the blocks that it is built from.

SegmentMasks are kept apart to the bit even where one overflows. A matmul over tokens has zeros
wherever two documents meet, and 0 * inf is NaN: so its right operand is made finite first. Tokens
of a document that did overflow, and all after them in it, come out as NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.matrix_state import masks
from pallas_kernels.matrix_state import tile as attention
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.decay_sums import Summation
from pallas_kernels.matrix_state.masks import SegmentMasks
from pallas_kernels.matrix_state.tile import (
    Decay,
    apply_decay,
    decayed_state,
    dot,
    where_entering,
    where_leaving,
    zero_where_not,
)


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x) < jnp.inf


def finite(x: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """`x` as the right operand of a matmul over tokens of several documents."""
    return x if docs is None else zero_where_not(_is_finite(x), x)


class Gates(NamedTuple):
    """What a chunk's tokens write and keep.

    Attributes:
      beta: `(C, 1)`, wide.
      g: log decays: None, `(C, 1)` or `(C, K)`.
      decay: of `matrix_state.tile.decay`.
      across: where one decay serves all keys, its `level_sums` as rows `(1, C)`; else None.
    """

    beta: jax.Array
    g: jax.Array | None
    decay: Decay
    across: list[jax.Array] | None

    @property
    def vector_decay(self) -> bool:
        return self.g is not None and self.g.shape[1] > 1


def gates(
    beta: jax.Array, g: jax.Array | None, docs: SegmentMasks | None, summation: Summation
) -> Gates:
    """`Gates` of a chunk whose columns can be transposed."""
    decay = attention.decay(g, docs, summation)
    one = g is not None and g.shape[1] == 1
    across = [level.T for level in decay.level_sums] if one and decay.level_sums else None
    return Gates(beta, g, decay, across)


# Pairs of tokens.


class IntraChunk(NamedTuple):
    """Scores of tokens with earlier ones, after the decay between them, `(C, C)`.

    Attributes:
      pair_decay: the decays, 0 outside of pairs; None where nothing decays or every key on its own.
      A_qk: of queries and keys, `j <= i`.
      A_kk: of keys and keys, `j < i`.
    """

    pair_decay: jax.Array | None
    A_qk: jax.Array
    A_kk: jax.Array


def intra_chunk(q: jax.Array, k: jax.Array, gates: Gates, docs: SegmentMasks | None) -> IntraChunk:
    """`IntraChunk` of a chunk of `q, k (C, K)`."""
    size, levels = q.shape[0], gates.decay.level_sums
    mask, earlier = attention.causal(size, docs), attention.strictly_causal(size, docs)
    if levels is not None and gates.vector_decay:
        A_qk, A_kk = attention.A_in_blocks((q, k), k, levels, mask)
        return IntraChunk(None, A_qk, zero_where_not(earlier, A_kk))
    pair_decay = None
    if levels is not None and gates.across is not None:
        pair_decay = attention.pair_decay(levels, gates.across, mask)
    A_qk, A_kk = (dot(x, k, "nt") for x in (q, k))
    A_qk = attention.masked_A(A_qk, pair_decay, mask)
    return IntraChunk(pair_decay, A_qk, attention.masked_A(A_kk, pair_decay, earlier))


class IntraChunkGradients(NamedTuple):
    """Gradients of what `intra_chunk` was given.

    `dlevels` are those of the sums of `g`, `more` is one of `g` itself.
    """

    dq: jax.Array
    dk: jax.Array
    dlevels: list[jax.Array] | None
    more: jax.Array | float


def intra_chunk_vjp(
    q: jax.Array,
    k: jax.Array,
    gates: Gates,
    docs: SegmentMasks | None,
    intra: IntraChunk,
    dA_qk: jax.Array,
    dA_kk: jax.Array,
) -> IntraChunkGradients:
    """From the gradients of `A_qk` and `A_kk`, which are 0 where those are."""
    levels = gates.decay.level_sums
    if levels is not None and gates.vector_decay:
        mask, given = attention.causal(q.shape[0], docs), (dA_qk, dA_kk)
        (dq, dlater), dk, dlevels = attention.A_in_blocks_vjp((q, k), k, levels, mask, given)
        return IntraChunkGradients(dq, dk + dlater, [finite(x, docs) for x in dlevels], 0.0)
    size = q.shape[0]
    mask, earlier = attention.causal(size, docs), attention.strictly_causal(size, docs)
    dA_q = attention.masked_A(dA_qk, intra.pair_decay, mask).astype(q.dtype)
    dA_k = attention.masked_A(dA_kk, intra.pair_decay, earlier).astype(q.dtype)
    dq = dot(dA_q, k, "nn")
    dk = dot(dA_q, q, "tn") + dot(dA_k, k, "nn") + dot(dA_k, k, "tn")
    if gates.g is None:
        return IntraChunkGradients(dq, dk, None, 0.0)
    dlogs = finite(dA_qk * intra.A_qk + dA_kk * intra.A_kk, docs)
    return IntraChunkGradients(dq, dk, None, attention.pair_log_decay_vjp(dlogs))


# The new values.


def inverse(lower: jax.Array, docs: SegmentMasks | None) -> jax.Array:
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
    row, column = masks.token_indices(size)
    blocks = (row == column).astype(lower.dtype)
    for s in masks.level_sizes(size):
        corner = zero_where_not(masks.parted(size, s), lower)
        if s > 1:
            joined = dot(corner, finite(blocks, docs), "nn")
            corner = _unit_product(blocks, joined, docs)
        blocks = blocks - corner
    return blocks


def _unit_product(unit: jax.Array, x: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """`unit x`, `unit` lower triangular with ones on the diagonal; NaN where `x` is not finite."""
    product = dot(unit, finite(x, docs), "nn")
    return product if docs is None else jnp.where(_is_finite(x), product, jnp.nan)


class NewValues(NamedTuple):
    """What a chunk writes, and what its gradient needs.

    Attributes:
      inverse: T, `(C, C)`.
      error: values minus what the state holds under their keys, `(C, V)`.
      u: the new values, `(C, V)`, wide.
    """

    inverse: jax.Array
    error: jax.Array
    u: jax.Array


def new_values(
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    A_kk: jax.Array,
    state: jax.Array,
    docs: SegmentMasks | None,
) -> NewValues:
    """`NewValues` of a chunk; all wide.

    Args:
      k, v: `(C, K)`, `(C, V)`.
      gates, docs: as everywhere.
      A_kk: of `IntraChunk`.
      state: that enters, `(V, K)`, wide.
    """
    retrieved = where_entering(dot(_reading(k, gates.decay), state, "nt"), docs)
    error = v.astype(gates.beta.dtype) - retrieved
    solved = inverse(gates.beta * A_kk, docs)
    u = _unit_product(solved, gates.beta * error, docs)
    return NewValues(solved, error, u if docs is None else _broken(u, docs))


def _reading(k: jax.Array, decay: Decay) -> jax.Array:
    """Keys as they read the entering state, an operand."""
    return apply_decay(k, decay.from_start).astype(k.dtype)


def _broken(u: jax.Array, docs: SegmentMasks) -> jax.Array:
    """`u`, NaN from a document's first that is not finite on."""
    broken = ~_is_finite(u).all(1, keepdims=True)
    row, column = masks.token_indices(u.shape[0])
    reach = masks.within(row >= column, docs).astype(u.dtype)
    reached = dot(reach, jnp.broadcast_to(broken.astype(u.dtype), u.shape), "nn")
    return jnp.where(reached > 0, jnp.nan, u)


# The chunk.


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    docs: SegmentMasks | None,
    state: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`(o (C, V), state' (V, K))` of a chunk, wide; arguments as in `new_values`."""
    decay = gates.decay
    both = intra_chunk(q, k, gates, docs)
    u = new_values(k, v, gates, both.A_kk, state, docs).u
    v_new = u.astype(v.dtype)
    o = attention.output(q, finite(v_new, docs), both.A_qk, state, decay, docs, scale)
    if docs is not None:
        o = zero_where_not(docs.real, jnp.where(_is_finite(u), o, jnp.nan))
    added = attention.state_update(k, where_leaving(v_new, docs), decay, docs)
    return o, decayed_state(state, decay.chunk_decay, docs) + added


class Gradients(NamedTuple):
    """Gradients of a chunk's arguments and of the state that enters it; wide."""

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
    docs: SegmentMasks | None,
    state: jax.Array,
    do: jax.Array,
    dstate: jax.Array,
    scale: float,
    summation: Summation,
) -> Gradients:
    """`Gradients` from those of `forward`'s outputs; `state` is the one that entered."""
    beta, g, decay, _ = gates
    both = intra_chunk(q, k, gates, docs)
    solved, error, u = new_values(k, v, gates, both.A_kk, state, docs)
    v_new = u.astype(v.dtype)
    outer = attention.gradients(q, k, v_new, both.A_qk, state, decay, docs, scale, do, dstate)
    # The gradient of beta * error, and of what the inverse was made from.
    transposed = solved if docs is None else zero_where_not(docs.same, finite(solved, docs))
    dsolved = dot(transposed, finite(outer.dv, docs), "tn")
    dlower = dot(dsolved.astype(v.dtype), v_new, "nt")
    dlower = zero_where_not(attention.strictly_causal(q.shape[0], docs), -dlower)
    dv = beta * dsolved
    dbeta = (dsolved * error).sum(1, keepdims=True) + (dlower * both.A_kk).sum(1, keepdims=True)
    inner = intra_chunk_vjp(q, k, gates, docs, both, outer.dA, beta * dlower)
    # The gradient of the keys that read the entering state, and of that state.
    dretrieved = -where_entering(dv, docs).astype(v.dtype)
    dread = where_entering(apply_decay(dot(dretrieved, state, "nn"), decay.from_start), docs)
    dentering = decayed_state(dstate, decay.chunk_decay, docs)
    dentering = dentering + attention.output_vjp_state(q, do, decay, docs, scale)
    dentering = dentering + dot(dretrieved, where_entering(_reading(k, decay), docs), "tn")
    dq, dk = outer.dq + inner.dq, outer.dk + inner.dk + dread
    if g is None:
        return Gradients(dq, dk, dv, dbeta, None, dentering)
    dg_cumsum, dg_to_end, dg_last = (
        finite(x if gates.vector_decay else x.sum(1, keepdims=True), docs)
        for x in (outer.dg_cumsum + apply_decay(k, dread), outer.dg_to_end, outer.dg_last)
    )
    dg = attention.log_decay_vjp(
        g, inner.dlevels, dg_cumsum, dg_to_end, dg_last, docs, summation, inner.more
    )
    return Gradients(dq, dk, dv, dbeta, dg, dentering)


def summary(run, config: Config, q, k, v, beta, log_decay, initial_state, segment_index):
    """`(decay, state)`, `(B, H, K, K)` and `(B, H, K, V)`; see `backend.summarize`.

    What a row does to a state is affine; its linear part is what it makes of the unit matrix when
    there is nothing to write.
    """
    _, state = run(config, q, k, v, beta, log_decay, initial_state, segment_index)
    batch, heads, key_size, _ = state.shape
    unit = jnp.eye(key_size, dtype=state.dtype)
    unit = jnp.broadcast_to(unit, (batch, heads, key_size, key_size))
    nothing = jnp.zeros((*v.shape[:3], key_size), v.dtype)
    unit, nothing, _ = compat.match_vma(unit, nothing, state)
    _, decay = run(config, q, k, nothing, beta, log_decay, unit, segment_index)
    return decay, state
