"""TPU kernels where all keys of a head decay alike, or nothing decays.

As in `linear_attention.tpu_scalar_decay`: queries and keys of a group meet once for all its heads,
decays are those of `matrix_state.tpu_scalar_decay`, and states are `(K, V)`. A step goes over its
heads three times: for their scores, for the inverses, for the rest; what one pass leaves for the
next is in scratch, `(heads, C, C)` each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule import tpu_inverse
from pallas_kernels.delta_rule.tpu_inverse import finite, new_values, operand
from pallas_kernels.matrix_state import masks, tile
from pallas_kernels.matrix_state import tpu_scalar_decay as scalar_decay
from pallas_kernels.matrix_state.tile import dot, zero_where_not
from pallas_kernels.matrix_state.tpu import add_up, heads_of, lanes, total
from pallas_kernels.matrix_state.tpu_scalar_decay import Decays, StepMasks, by_slab, pair_decay


class _Step(NamedTuple):
    """What all heads of a step share.

    Attributes:
      mask, earlier: `(C, C)`, pairs that meet: `j <= i` and `j < i`.
      decays: with `from_start` not scaled.
      beta: `(C, heads)`.
    """

    docs: StepMasks | None
    mask: jax.Array
    earlier: jax.Array
    decays: Decays
    beta: jax.Array

    @property
    def down(self) -> masks.SegmentMasks | None:
        return None if self.docs is None else self.docs.down

    @property
    def across(self) -> masks.SegmentMasks | None:
        return None if self.docs is None else self.docs.across


def _step(dims, refs) -> _Step:
    docs, size = scalar_decay.segment_masks(dims, refs), dims.tiles.chunk
    down = None if docs is None else docs.down
    row, column = masks.token_indices(size)
    decays = scalar_decay.decays(dims._replace(scale=1.0), refs, docs)
    earlier = masks.within(row > column, down)
    return _Step(docs, tile.causal(size, down), earlier, decays, refs["beta"][...].T)


def _keys(dims, refs, group: int) -> tuple[jax.Array, jax.Array]:
    q, k = (lanes(refs[name], group, dims.key_size)[...] for name in "qk")
    return q, k


def _intra_chunk(dims, refs, step: _Step) -> None:
    """Fills `A_qk`, scaled as outputs are, `A_kk` and `inverse` of all heads."""
    for group in range(dims.groups_per_step):
        q, k = _keys(dims, refs, group)
        queries = zero_where_not(step.mask, dims.scale * dot(q, k, "nt"))
        keys = zero_where_not(step.earlier, dot(k, k, "nt"))
        for h in heads_of(dims, group):
            decay = pair_decay(dims, refs, step.decays.head(h), h)
            refs["A_qk"][h] = tile.apply_decay(queries, decay)
            refs["A_kk"][h] = tile.apply_decay(keys, decay)
            refs["inverse"][h] = step.beta[:, h : h + 1] * refs["A_kk"][h]
    tpu_inverse.invert(refs["inverse"], dims.tiles.solve_block, dims.segmented)


def _from_start(dims, refs, decay: Decays, h: int, x: jax.Array) -> jax.Array:
    """`x (C, V)` times the decays from the chunk's start."""
    if decay.slab is None:
        return x
    return by_slab(decay.slab, refs["start"][:, h : h + 1, :]).reshape(x.shape) * x


def forward(dims, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * dims.tiles.heads
    step = _step(dims, refs)
    _intra_chunk(dims, refs, step)
    for group in range(dims.groups_per_step):
        q, k = _keys(dims, refs, group)
        across = k.astype(jnp.float32).T
        for h in heads_of(dims, group):
            v = lanes(refs["v"], h, dims.value_size)[...]
            state, decay = state_ref[first + h], step.decays.head(h)
            retrieved = _from_start(dims, refs, decay, h, dot(k, state, "nn"))
            retrieved = tile.where_entering(retrieved, step.down)
            beta = step.beta[:, h : h + 1]
            u = new_values(refs["inverse"][h], beta, v, retrieved, step.down).u
            read = dims.scale * _from_start(dims, refs, decay, h, dot(q, state, "nn"))
            v_new = finite(u, dims.segmented).astype(v.dtype)
            o = dot(refs["A_qk"][h].astype(v.dtype), v_new, "nn")
            o += tile.where_entering(read, step.down)
            if step.down is not None:
                o = zero_where_not(step.down.real, jnp.where(u == u, o, jnp.nan))
            lanes(refs["o"], h, dims.value_size)[...] = o.astype(v.dtype)
            leaving = step.down and step.down.leaving
            out = (across * decay.to_end).astype(v.dtype)
            added = dot(out, operand(leaving, u).astype(v.dtype), "nn")
            state_ref[first + h] = tile.decayed_state(state, decay.chunk_decay, step.down) + added


class _HeadGradients(NamedTuple):
    """Gradients of one head in one chunk.

    Attributes:
      dA_qk, dA_kk: `(C, C)`, of the unmasked `q k^T`, but for the scale, and `k k^T`.
      dq, dk: `(K, C)`, what comes through the states.
      dv: `(C, V)`.
      dbeta: `(C, 1)`.
      dstate: `(K, V)`.
      dg, dg_cumsum, dg_to_end: `(1, C)`, as `linear_attention.tpu_scalar_decay` has them.
    """

    dA_qk: jax.Array
    dA_kk: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbeta: jax.Array
    dstate: jax.Array
    dg: jax.Array
    dg_cumsum: jax.Array
    dg_to_end: jax.Array


def backward(dims, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * dims.tiles.heads
    step, each = _step(dims, refs), list[_HeadGradients]()
    _intra_chunk(dims, refs, step)
    for group in range(dims.groups_per_step):
        q, k = _keys(dims, refs, group)
        across = q.astype(jnp.float32).T, k.astype(jnp.float32).T
        heads = heads_of(dims, group)
        for h in heads:
            d = _backward_head(dims, refs, step, h, k, across, dstate_ref[first + h])
            lanes(refs["dv"], h, dims.value_size)[...] = d.dv.astype(q.dtype)
            dstate_ref[first + h] = d.dstate
            each.append(d)
        dA_qk, dA_kk, dq, dk = (total(d[i] for d in each[heads.start :]) for i in range(4))
        dA_qk = dims.scale * zero_where_not(step.mask, dA_qk)
        dA_kk = zero_where_not(step.earlier, dA_kk)
        add_up(dims, refs, "dq", group, dot(dA_qk.astype(q.dtype), k, "nn") + dq.T)
        dk = dk.T + dot(dA_qk.T.astype(q.dtype), q, "nn")
        add_up(dims, refs, "dk", group, dk + dot((dA_kk + dA_kk.T).astype(q.dtype), k, "nn"))
    tpu_inverse.write_columns(refs["dbeta"], [d.dbeta for d in each])
    if dims.decay is not None:
        scalar_decay.log_decay_vjp(refs, step.docs, each)


def _backward_head(dims, refs, step: _Step, h: int, keys, across, dstate) -> _HeadGradients:
    """`keys` as they came, `across` queries and keys `(K, C)`, `dstate` of the leaving state."""
    q, k = across
    v, do = (lanes(refs[name], h, dims.value_size)[...] for name in ("v", "do"))
    state, decay = refs["states"][h], step.decays.head(h)
    decays, beta = pair_decay(dims, refs, decay, h), step.beta[:, h : h + 1]
    inverse = refs["inverse"][h]
    retrieved = tile.where_entering(
        _from_start(dims, refs, decay, h, dot(keys, state, "nn")), step.down
    )
    u, error = new_values(inverse, beta, v, retrieved, step.down)
    v_new = u.astype(v.dtype)
    dA = zero_where_not(step.mask, dot(do, v_new, "nt"))
    dvalues = dot(refs["A_qk"][h].T.astype(v.dtype), do, "nn")
    dvalues += tile.where_leaving(decay.to_end_column * dot(keys, dstate, "nn"), step.down)
    # The gradient of beta * error, and of what the inverse was made from.
    if step.down is not None:
        inverse = zero_where_not(step.down.same, inverse)
    dsolved = dot(inverse.T, finite(dvalues, dims.segmented), "nn")
    dlower = zero_where_not(step.earlier, -dot(dsolved.astype(v.dtype), v_new, "nt"))
    dbeta = (dsolved * error).sum(1, keepdims=True)
    dbeta += (dlower * refs["A_kk"][h]).sum(1, keepdims=True)
    dv, dlower = beta * dsolved, beta * dlower
    # What decays between tokens: the columns j < t, summed; then the rows i >= t. Nothing is
    # subtracted.
    row, column = masks.token_indices(dims.tiles.chunk)
    before = (row < column).astype(jnp.float32).astype(v.dtype)
    dlogs = dA * refs["A_qk"][h] + dlower * refs["A_kk"][h]
    summed = zero_where_not(step.mask, dot(dlogs.astype(v.dtype), before, "nn"))
    # Transposed, so that decays and their gradients are rows.
    dretrieved = operand(step.down and step.down.entering, -dv).astype(v.dtype)
    from_start = dims.scale * decay.from_start
    dq = tile.where_entering(from_start * dot(state, do, "nt"), step.across)
    dread = tile.where_entering(decay.from_start * dot(state, dretrieved, "nt"), step.across)
    dk = tile.where_leaving(decay.to_end * dot(dstate, v_new, "nt"), step.across)
    dentering = dot((q * from_start).astype(v.dtype), do, "nn")
    dentering += dot((k * decay.from_start).astype(v.dtype), dretrieved, "nn")
    through = tile.decayed_state(dstate * state.astype(dstate.dtype), decay.chunk_decay, step.down)
    dg_last = through.sum(0, keepdims=True).sum(1, keepdims=True)
    return _HeadGradients(
        dA_qk=tile.apply_decay(dA, decays),
        dA_kk=tile.apply_decay(dlower, decays),
        dq=dq,
        dk=dread + dk,
        dv=dv,
        dbeta=dbeta,
        dstate=tile.decayed_state(dstate, decay.chunk_decay, step.down) + dentering,
        dg=summed.sum(0, keepdims=True) + dg_last,
        dg_cumsum=(q * dq + k * dread).sum(0, keepdims=True),
        dg_to_end=(k * dk).sum(0, keepdims=True),
    )
