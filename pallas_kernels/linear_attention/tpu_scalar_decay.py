"""TPU kernels where all keys of a head decay alike, or nothing decays.

All heads of a group share their `q k^T`; the decays are those of `matrix_state.tpu_scalar_decay`.
States are `(K, V)`, so that no operand of a matmul is transposed a head at a time but the scores.
So scores and gradients are not `matrix_state.tile`'s, which takes one head with states `(V, K)`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.matrix_state import masks, tile
from pallas_kernels.matrix_state import tpu_scalar_decay as scalar_decay
from pallas_kernels.matrix_state.tile import dot, zero_where_not
from pallas_kernels.matrix_state.tpu import add_up, heads_of, lanes, total
from pallas_kernels.matrix_state.tpu_scalar_decay import Decays, StepMasks, by_slab, pair_decay


class _Step(NamedTuple):
    """What all heads of a step share."""

    docs: StepMasks | None
    mask: jax.Array
    decays: Decays

    @property
    def down(self) -> masks.SegmentMasks | None:
        return None if self.docs is None else self.docs.down


def _step(dims, refs) -> _Step:
    docs, size = scalar_decay.segment_masks(dims, refs), dims.tiles.chunk
    mask = tile.causal(size, None if docs is None else docs.down)
    return _Step(docs, mask, scalar_decay.decays(dims, refs, docs))


def forward(dims, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * dims.tiles.heads
    step = _step(dims, refs)
    for group in range(dims.groups_per_step):
        q, k = (lanes(refs[name], group, dims.key_size)[...] for name in "qk")
        scores = zero_where_not(step.mask, dims.scale * dot(q, k, "nt"))
        keys = k.astype(jnp.float32).T
        for h in heads_of(dims, group):
            v = lanes(refs["v"], h, dims.value_size)[...]
            state, decay = state_ref[first + h], step.decays.head(h)
            A = tile.apply_decay(scores, pair_decay(dims, refs, decay, h))
            from_state = dims.scale * dot(q, state, "nn")
            if decay.slab is not None:
                # The same as `decay.from_start` in columns, which it costs more to make.
                from_start = by_slab(decay.slab, refs["start"][:, h : h + 1, :])
                from_state = from_start.reshape(from_state.shape) * dot(q, state, "nn")
            o = dot(A.astype(v.dtype), v, "nn") + tile.where_entering(from_state, step.down)
            lanes(refs["o"], h, dims.value_size)[...] = o.astype(v.dtype)
            added = dot((keys * decay.to_end).astype(v.dtype), v, "nn")
            state_ref[first + h] = tile.decayed_state(state, decay.chunk_decay, step.down) + added


class _HeadGradients(NamedTuple):
    """Gradients of one head in one chunk.

    Attributes:
      dscores: `(C, C)`, of the unmasked `q k^T / scale`.
      dq, dk: `(K, C)`, what comes through the states.
      dv: `(C, V)`.
      dstate: `(K, V)`.
      dg: `(1, C)`, of the log decays, but for those below.
      dg_cumsum, dg_to_end: `(1, C)`, of the logarithms of `Decays`' `from_start` and `to_end`.
    """

    dscores: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dstate: jax.Array
    dg: jax.Array
    dg_cumsum: jax.Array
    dg_to_end: jax.Array


def backward(dims, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * dims.tiles.heads
    step, each = _step(dims, refs), list[_HeadGradients]()
    for group in range(dims.groups_per_step):
        q, k = (lanes(refs[name], group, dims.key_size)[...] for name in "qk")
        scores = zero_where_not(step.mask, dims.scale * dot(q, k, "nt"))
        across = q.astype(jnp.float32).T, k.astype(jnp.float32).T
        heads = heads_of(dims, group)
        for h in heads:
            v, do = (lanes(refs[name], h, dims.value_size)[...] for name in ("v", "do"))
            state, dstate, decay = refs["states"][h], dstate_ref[first + h], step.decays.head(h)
            A = pair_decay(dims, refs, decay, h)
            d = _backward_head(step, decay, A, across, k, v, scores, state, do, dstate)
            lanes(refs["dv"], h, dims.value_size)[...] = d.dv.astype(v.dtype)
            dstate_ref[first + h] = d.dstate
            each.append(d)
        sums = [total(d[i] for d in each[heads.start :]) for i in range(3)]
        dscores = dims.scale * zero_where_not(step.mask, sums[0])
        add_up(dims, refs, "dq", group, dot(dscores.astype(q.dtype), k, "nn") + sums[1].T)
        add_up(dims, refs, "dk", group, dot(dscores.T.astype(q.dtype), q, "nn") + sums[2].T)
    if dims.decay is not None:
        scalar_decay.log_decay_vjp(refs, step.docs, each)


def _backward_head(
    step: _Step, decay: Decays, pair_decay, across, keys, v, scores, state, do, dstate
) -> _HeadGradients:
    """`across` are queries and keys `(K, C)`, `keys` as they came; `do` and `dstate` the cotangents
    of the output and of the state that leaves.
    """
    docs, (q, k) = step.docs, across
    A = tile.apply_decay(scores, pair_decay)
    dA = dot(do, v, "nt")
    if docs is not None:
        dA = zero_where_not(step.mask, dA)
    dscores = tile.apply_decay(dA, pair_decay)
    row, column = masks.token_indices(scores.shape[0])
    # The columns j < t of (dA * A), summed; then the rows i >= t. Nothing is subtracted.
    before = (row < column).astype(jnp.float32).astype(v.dtype)
    summed = dot((dscores * scores).astype(v.dtype), before, "nn")
    # Transposed, so that decays and their gradients are rows.
    dq = tile.where_entering(decay.from_start * dot(state, do, "nt"), docs and docs.across)
    dk = tile.where_leaving(decay.to_end * dot(dstate, v, "nt"), docs and docs.across)
    from_state = decay.to_end_column * dot(keys, dstate, "nn")
    dv = dot(A.T.astype(v.dtype), do, "nn") + tile.where_leaving(from_state, step.down)
    through = tile.decayed_state(dstate * state.astype(dstate.dtype), decay.chunk_decay, step.down)
    dg_last = through.sum(0, keepdims=True).sum(1, keepdims=True)
    return _HeadGradients(
        dscores=dscores,
        dq=dq,
        dk=dk,
        dv=dv,
        dstate=tile.decayed_state(dstate, decay.chunk_decay, step.down)
        + dot((q * decay.from_start).astype(v.dtype), do, "nn"),
        dg=zero_where_not(step.mask, summed).sum(0, keepdims=True) + dg_last,
        dg_cumsum=(q * dq).sum(0, keepdims=True),
        dg_to_end=(k * dk).sum(0, keepdims=True),
    )
