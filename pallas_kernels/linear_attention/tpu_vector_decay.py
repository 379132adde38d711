"""TPU kernels where each key of a head decays for itself.

Decays and scores are those of `matrix_state.tpu_vector_decay`, which multiplies decays instead of
adding their logarithms; so the gradients are not `matrix_state.tile`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.matrix_state import decay_sums, tile
from pallas_kernels.matrix_state import tpu_vector_decay as vector_decay
from pallas_kernels.matrix_state.tile import dot, zero_where_not
from pallas_kernels.matrix_state.tpu import add_up, heads_of, lanes, transposed
from pallas_kernels.matrix_state.tpu_vector_decay import Head, Step


def forward(dims, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * dims.tiles.heads
    step = vector_decay.step_of(dims, refs)
    for group in range(dims.groups_per_step):
        for h in heads_of(dims, group):
            head = vector_decay.head_of(dims, refs, step, group, h)
            v = lanes(refs["v"], h, dims.value_size)[...]
            state = state_ref[first + h]
            o = dot(head.A(step, v.dtype).astype(v.dtype), v, "nn")
            from_state = dot(head.from_state(step, v.dtype), state, "nt")
            o = o + tile.where_entering(from_state, step.docs)
            lanes(refs["o"], h, dims.value_size)[...] = o.astype(v.dtype)
            added = dot(transposed(v), head.to_state(step, v.dtype), "nn")
            state_ref[first + h] = (
                tile.decayed_state(state, head.decay.chunk_decay, step.docs) + added
            )


def backward(dims, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * dims.tiles.heads
    step = vector_decay.step_of(dims, refs)
    for group in range(dims.groups_per_step):
        dq, dk = [], []
        for h in heads_of(dims, group):
            head = vector_decay.head_of(dims, refs, step, group, h)
            v, do = (lanes(refs[name], h, dims.value_size)[...] for name in ("v", "do"))
            state, dstate = refs["states"][h], dstate_ref[first + h]
            d = _backward_head(step, head, v, state, do, dstate)
            dq.append(d.dq)
            dk.append(d.dk)
            lanes(refs["dv"], h, dims.value_size)[...] = d.dv.astype(v.dtype)
            dstate_ref[first + h] = d.dstate
            g_ref, dg_ref = (lanes(refs[name], h, dims.key_size) for name in ("g", "dg"))
            dg = decay_sums.clamp_vjp(g_ref[...].astype(jnp.float32), d.dg, step.docs)
            dg_ref[...] = dg.astype(dg_ref.dtype)
        add_up(dims, refs, "dq", group, sum(dq))
        add_up(dims, refs, "dk", group, sum(dk))


class _HeadGradients(NamedTuple):
    """Gradients of one head in one chunk."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dg: jax.Array
    dstate: jax.Array


def _backward_head(step: Step, head: Head, v, state, do, dstate) -> _HeadGradients:
    docs, dtype = step.docs, v.dtype
    dA = zero_where_not(step.mask, dot(do, v, "nt"))
    dq = tile.where_entering(head.decay.from_start * dot(do, state, "nn"), docs)
    dk = tile.where_leaving(head.decay.to_end * dot(v, dstate, "nn"), docs)
    dg_cumsum, dg_to_end = head.q * dq, head.k * dk
    dv = dot(head.A(step, dtype).T.astype(dtype), do, "nn")
    dv = dv + tile.where_leaving(dot(head.to_state(step, dtype), dstate, "nt"), docs)
    kept = tile.decayed_state(dstate, head.decay.chunk_decay, docs)
    through = tile.decayed_state(dstate * state.astype(dstate.dtype), head.decay.chunk_decay, docs)
    dg_last = through.sum(0, keepdims=True)
    dstate = kept + dot(transposed(do), head.from_state(step, dtype), "nn")

    dq_pairs, dk_pairs, dlevels = head.A_vjp(step, dA, dtype)
    dq, dk = dq + dq_pairs, dk + dk_pairs
    dg = vector_decay.log_gradient(dlevels, dg_cumsum, dg_to_end, compat.tpu.roll) + dg_last
    return _HeadGradients(dq, dk, dv, dg, dstate)
