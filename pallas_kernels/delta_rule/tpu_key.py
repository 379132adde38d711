"""TPU kernels where each key of a head decays for itself.

Decays are those of `linear_attention.tpu_key`, and states `(V, K)`. A step goes over its heads
three times, as in `tpu_head`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule import tpu_inverse
from pallas_kernels.delta_rule.tpu_inverse import corrected, finite, operand
from pallas_kernels.linear_attention import tile
from pallas_kernels.linear_attention import tpu_key as attention
from pallas_kernels.linear_attention.tile import dot, only
from pallas_kernels.linear_attention.tpu_head import (
    add_up,
    chunk_begins,
    chunk_ends,
    heads_of,
    lanes,
    own,
)
from pallas_kernels.linear_attention.tpu_key import Head, Step, transposed
from pallas_kernels.matrix_state import chunks


def _head(job, refs, step: Step, group: int, h: int) -> Head:
    """With decays that are not scaled."""
    return attention.head_of(job._replace(scale=1.0), refs, step, group, h)


def _pairs(job, refs, step: Step, beta: jax.Array) -> None:
    """Fills `queries`, scaled as outputs are, `keys` and `inverse` of all heads."""
    for group in range(job.step_groups):
        for h in heads_of(job, group):
            head = _head(job, refs, step, group, h)
            refs["queries"][h] = head._replace(scale=job.scale).pairs(step, job.dtype)
            keys = only(step.level > 0, head._replace(q=head.k).pairs(step, job.dtype))
            refs["keys"][h] = keys
            refs["inverse"][h] = beta[:, h : h + 1] * keys
    tpu_inverse.invert(refs["inverse"], job.segmented)


def _reading(head: Head, step: Step, dtype) -> jax.Array:
    """Keys as they read the entering state."""
    return head._replace(q=head.k).from_state(step, dtype)


def forward(job, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        state_ref[own(job)] = refs["initial"][...]

    if "states" in refs:
        refs["states"][...] = state_ref[own(job)].astype(job.dtype)
    step, beta = attention.step_of(job, refs), refs["beta"][...].T
    _pairs(job, refs, step, beta)
    for group in range(job.step_groups):
        for h in heads_of(job, group):
            head = _head(job, refs, step, group, h)
            v = lanes(refs["v"], h, job.value_size)[...]
            state, docs = state_ref[first + h], step.docs
            held = tile.entering(dot(_reading(head, step, v.dtype), state, "nt"), docs)
            values = corrected(refs["inverse"][h], beta[:, h : h + 1], v, held, docs).values
            read = job.scale * dot(head.from_state(step, v.dtype), state, "nt")
            written = finite(values, job.segmented).astype(v.dtype)
            o = dot(refs["queries"][h].astype(v.dtype), written, "nn") + tile.entering(read, docs)
            if docs is not None:
                o = only(docs.real, jnp.where(values == values, o, jnp.nan))
            lanes(refs["o"], h, job.value_size)[...] = o.astype(v.dtype)
            leaving = operand(docs and docs.leaving, values).T.astype(v.dtype)
            added = dot(leaving, head.to_state(step, v.dtype), "nn")
            state_ref[first + h] = tile.kept(state, head.decay.keep, docs) + added

    @pl.when(chunk_ends(job))
    def _():
        refs["final"][...] = state_ref[own(job)]


class _HeadGradients(NamedTuple):
    """Of one head in one chunk; `dbeta` is `(C, 1)`."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbeta: jax.Array
    dg: jax.Array
    dstate: jax.Array


def backward(job, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        dstate_ref[own(job)] = refs["dfinal"][...]

    step, beta, dbeta = attention.step_of(job, refs), refs["beta"][...].T, []
    _pairs(job, refs, step, beta)
    for group in range(job.step_groups):
        dq, dk = [], []
        for h in heads_of(job, group):
            head = _head(job, refs, step, group, h)
            d = _backward_head(job, refs, step, head, h, beta[:, h : h + 1], dstate_ref[first + h])
            dq.append(d.dq)
            dk.append(d.dk)
            dbeta.append(d.dbeta)
            lanes(refs["dv"], h, job.value_size)[...] = d.dv.astype(job.dtype)
            dstate_ref[first + h] = d.dstate
            g_ref, dg_ref = (lanes(refs[name], h, job.key_size) for name in ("g", "dg"))
            dg = chunks.clamp_transpose(g_ref[...].astype(jnp.float32), d.dg, step.docs)
            dg_ref[...] = dg.astype(dg_ref.dtype)
        add_up(job, refs, "dq", group, sum(dq))
        add_up(job, refs, "dk", group, sum(dk))
    tpu_inverse.write_columns(refs["dbeta"], dbeta)

    @pl.when(chunk_ends(job))
    def _():
        refs["dinitial"][...] = dstate_ref[own(job)]


def _backward_head(job, refs, step: Step, head: Head, h: int, beta, dstate) -> _HeadGradients:
    """`dstate` of the leaving state."""
    docs, dtype = step.docs, job.dtype
    v, do = (lanes(refs[name], h, job.value_size)[...] for name in ("v", "do"))
    state, inverse, keep = refs["states"][h], refs["inverse"][h], head.decay.keep
    reading = _reading(head, step, dtype)
    held = tile.entering(dot(reading, state, "nt"), docs)
    values, error = corrected(inverse, beta, v, held, docs)
    written = values.astype(dtype)
    dpairs = only(step.mask, dot(do, written, "nt"))
    dvalues = dot(refs["queries"][h].T.astype(dtype), do, "nn")
    dvalues += tile.leaving(dot(head.to_state(step, dtype), dstate, "nt"), docs)
    # Of beta * error, and of what the inverse was made from.
    if docs is not None:
        inverse = only(docs.same, inverse)
    dwritten = dot(inverse.T, finite(dvalues, job.segmented), "nn")
    lowered = only(step.level > 0, dot(dwritten.astype(dtype), written, "nt"))
    dbeta = (dwritten * error).sum(1, keepdims=True)
    dbeta -= (lowered * refs["keys"][h]).sum(1, keepdims=True)
    dv = beta * dwritten
    dheld = operand(docs and docs.entering, -dv)
    dq = tile.entering(job.scale * head.decay.into * dot(do, state, "nn"), docs)
    dread = tile.entering(head.decay.into * dot(dheld.astype(dtype), state, "nn"), docs)
    dk = tile.leaving(head.decay.out * dot(written, dstate, "nn"), docs)
    dinto, dout = head.q * dq + head.k * dread, head.k * dk
    dentering = job.scale * dot(transposed(do), head.from_state(step, dtype), "nn")
    dentering += dot(dheld.T.astype(dtype), reading, "nn")
    through = tile.kept(dstate * state.astype(dstate.dtype), keep, docs)
    # What comes through the pairs.
    of_queries = head._replace(scale=job.scale).pairs_gradients(step, dpairs, dtype)
    of_keys = head._replace(q=head.k, scale=-1.0).pairs_gradients(step, beta * lowered, dtype)
    dlevels = [x + y for x, y in zip(of_queries[2], of_keys[2], strict=True)]
    if docs is not None:  # decays are summed over tokens
        dlevels, dinto, dout = jax.tree.map(_zero_if_broken, (dlevels, dinto, dout))
    dg = attention.log_gradient(dlevels, dinto, dout, compat.tpu.roll)
    return _HeadGradients(
        dq=dq + of_queries[0],
        dk=dk + dread + of_queries[1] + of_keys[0] + of_keys[1],
        dv=dv,
        dbeta=dbeta,
        dg=dg + through.sum(0, keepdims=True),
        dstate=tile.kept(dstate, keep, docs) + dentering,
    )


def _zero_if_broken(x: jax.Array) -> jax.Array:
    return only(jnp.abs(x) < jnp.inf, x)
