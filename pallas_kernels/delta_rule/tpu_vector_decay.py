"""TPU kernels where each key of a head decays for itself.

Decays are those of `matrix_state.tpu_vector_decay`, and states `(V, K)`. A step goes over its
heads three times, as in `tpu_scalar_decay`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule import tpu_inverse
from pallas_kernels.delta_rule.tpu_inverse import finite, new_values, operand
from pallas_kernels.matrix_state import decay_sums, tile
from pallas_kernels.matrix_state import tpu_vector_decay as vector_decay
from pallas_kernels.matrix_state.tile import dot, zero_where_not
from pallas_kernels.matrix_state.tpu import add_up, heads_of, lanes, transposed
from pallas_kernels.matrix_state.tpu_vector_decay import Head, Step


def _head(dims, refs, step: Step, group: int, h: int) -> Head:
    """With decays that are not scaled."""
    return vector_decay.head_of(dims._replace(scale=1.0), refs, step, group, h)


def _intra_chunk(dims, refs, step: Step, beta: jax.Array) -> None:
    """Fills `A_qk`, scaled as outputs are, `A_kk` and `inverse` of all heads."""
    for group in range(dims.groups_per_step):
        for h in heads_of(dims, group):
            head = _head(dims, refs, step, group, h)
            refs["A_qk"][h] = head._replace(scale=dims.scale).A(step, dims.dtype)
            keys = zero_where_not(step.level > 0, head._replace(q=head.k).A(step, dims.dtype))
            refs["A_kk"][h] = keys
            refs["inverse"][h] = beta[:, h : h + 1] * keys
    tpu_inverse.invert(refs["inverse"], dims.tiles.solve_block, dims.segmented)


def _reading(head: Head, step: Step, dtype) -> jax.Array:
    """Keys as they read the entering state."""
    return head._replace(q=head.k).from_state(step, dtype)


def forward(dims, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * dims.tiles.heads
    step, beta = vector_decay.step_of(dims, refs), refs["beta"][...].T
    _intra_chunk(dims, refs, step, beta)
    for group in range(dims.groups_per_step):
        for h in heads_of(dims, group):
            head = _head(dims, refs, step, group, h)
            v = lanes(refs["v"], h, dims.value_size)[...]
            state, docs = state_ref[first + h], step.docs
            retrieved = tile.where_entering(dot(_reading(head, step, v.dtype), state, "nt"), docs)
            u = new_values(refs["inverse"][h], beta[:, h : h + 1], v, retrieved, docs).u
            read = dims.scale * dot(head.from_state(step, v.dtype), state, "nt")
            v_new = finite(u, dims.segmented).astype(v.dtype)
            o = dot(refs["A_qk"][h].astype(v.dtype), v_new, "nn") + tile.where_entering(read, docs)
            if docs is not None:
                o = zero_where_not(docs.real, jnp.where(u == u, o, jnp.nan))
            lanes(refs["o"], h, dims.value_size)[...] = o.astype(v.dtype)
            leaving = operand(docs and docs.leaving, u).T.astype(v.dtype)
            added = dot(leaving, head.to_state(step, v.dtype), "nn")
            state_ref[first + h] = tile.decayed_state(state, head.decay.chunk_decay, docs) + added


class _HeadGradients(NamedTuple):
    """Gradients of one head in one chunk; `dbeta` is `(C, 1)`."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbeta: jax.Array
    dg: jax.Array
    dstate: jax.Array


def backward(dims, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * dims.tiles.heads
    step, beta, dbeta = vector_decay.step_of(dims, refs), refs["beta"][...].T, []
    _intra_chunk(dims, refs, step, beta)
    for group in range(dims.groups_per_step):
        dq, dk = [], []
        for h in heads_of(dims, group):
            head = _head(dims, refs, step, group, h)
            d = _backward_head(dims, refs, step, head, h, beta[:, h : h + 1], dstate_ref[first + h])
            dq.append(d.dq)
            dk.append(d.dk)
            dbeta.append(d.dbeta)
            lanes(refs["dv"], h, dims.value_size)[...] = d.dv.astype(dims.dtype)
            dstate_ref[first + h] = d.dstate
            g_ref, dg_ref = (lanes(refs[name], h, dims.key_size) for name in ("g", "dg"))
            dg = decay_sums.clamp_vjp(g_ref[...].astype(jnp.float32), d.dg, step.docs)
            dg_ref[...] = dg.astype(dg_ref.dtype)
        add_up(dims, refs, "dq", group, sum(dq))
        add_up(dims, refs, "dk", group, sum(dk))
    tpu_inverse.write_columns(refs["dbeta"], dbeta)


def _backward_head(dims, refs, step: Step, head: Head, h: int, beta, dstate) -> _HeadGradients:
    """`dstate` of the leaving state."""
    docs, dtype = step.docs, dims.dtype
    v, do = (lanes(refs[name], h, dims.value_size)[...] for name in ("v", "do"))
    state, inverse, chunk_decay = refs["states"][h], refs["inverse"][h], head.decay.chunk_decay
    reading = _reading(head, step, dtype)
    retrieved = tile.where_entering(dot(reading, state, "nt"), docs)
    u, error = new_values(inverse, beta, v, retrieved, docs)
    v_new = u.astype(dtype)
    dA = zero_where_not(step.mask, dot(do, v_new, "nt"))
    dvalues = dot(refs["A_qk"][h].T.astype(dtype), do, "nn")
    dvalues += tile.where_leaving(dot(head.to_state(step, dtype), dstate, "nt"), docs)
    # The gradient of beta * error, and of what the inverse was made from.
    if docs is not None:
        inverse = zero_where_not(docs.same, inverse)
    dsolved = dot(inverse.T, finite(dvalues, dims.segmented), "nn")
    lowered = zero_where_not(step.level > 0, dot(dsolved.astype(dtype), v_new, "nt"))
    dbeta = (dsolved * error).sum(1, keepdims=True)
    dbeta -= (lowered * refs["A_kk"][h]).sum(1, keepdims=True)
    dv = beta * dsolved
    dretrieved = operand(docs and docs.entering, -dv)
    dq = tile.where_entering(dims.scale * head.decay.from_start * dot(do, state, "nn"), docs)
    dread = tile.where_entering(
        head.decay.from_start * dot(dretrieved.astype(dtype), state, "nn"), docs
    )
    dk = tile.where_leaving(head.decay.to_end * dot(v_new, dstate, "nn"), docs)
    dg_cumsum, dg_to_end = head.q * dq + head.k * dread, head.k * dk
    dentering = dims.scale * dot(transposed(do), head.from_state(step, dtype), "nn")
    dentering += dot(dretrieved.T.astype(dtype), reading, "nn")
    through = tile.decayed_state(dstate * state.astype(dstate.dtype), chunk_decay, docs)
    # What comes through the pairs.
    dA_q = head._replace(scale=dims.scale).A_vjp(step, dA, dtype)
    dA_k = head._replace(q=head.k, scale=-1.0).A_vjp(step, beta * lowered, dtype)
    dlevels = [x + y for x, y in zip(dA_q[2], dA_k[2], strict=True)]
    if docs is not None:  # decays are summed over tokens
        dlevels, dg_cumsum, dg_to_end = jax.tree.map(
            _zero_if_broken, (dlevels, dg_cumsum, dg_to_end)
        )
    dg = vector_decay.log_gradient(dlevels, dg_cumsum, dg_to_end, compat.tpu.roll)
    return _HeadGradients(
        dq=dq + dA_q[0],
        dk=dk + dread + dA_q[1] + dA_k[0] + dA_k[1],
        dv=dv,
        dbeta=dbeta,
        dg=dg + through.sum(0, keepdims=True),
        dstate=tile.decayed_state(dstate, chunk_decay, docs) + dentering,
    )


def _zero_if_broken(x: jax.Array) -> jax.Array:
    return zero_where_not(jnp.abs(x) < jnp.inf, x)
