"""TPU kernels where all keys of a head decay alike, or nothing decays.

As in `linear_attention.tpu_head`: queries and keys of a group meet once for all its heads, decays
are rows and columns made once for all heads of a step, and states are `(K, V)`. A step goes over
its heads three times: for their pairs, for the inverses, for the rest; what one pass leaves for
the next is in scratch, `(heads, C, C)` each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule import tpu_inverse
from pallas_kernels.delta_rule.tpu_inverse import corrected, finite, operand
from pallas_kernels.linear_attention import tile
from pallas_kernels.linear_attention import tpu_head as attention
from pallas_kernels.linear_attention.tile import dot, only
from pallas_kernels.linear_attention.tpu_head import (
    Decays,
    Documents,
    add_up,
    between,
    by_slab,
    chunk_begins,
    chunk_ends,
    heads_of,
    lanes,
    own,
    total,
)
from pallas_kernels.matrix_state import chunks


class _Step(NamedTuple):
    """What all heads of a step share.

    Attributes:
      mask, earlier: `(C, C)`, pairs that meet: `j <= i` and `j < i`.
      decays: with `into` not scaled.
      beta: `(C, heads)`.
    """

    docs: Documents | None
    mask: jax.Array
    earlier: jax.Array
    decays: Decays
    beta: jax.Array

    @property
    def down(self) -> chunks.Documents | None:
        return None if self.docs is None else self.docs.down

    @property
    def across(self) -> chunks.Documents | None:
        return None if self.docs is None else self.docs.across


def _step(job, refs) -> _Step:
    docs, size = attention.documents(job, refs), job.tiles.chunk
    down = None if docs is None else docs.down
    row, column = chunks.order(size)
    decays = attention.decays(job._replace(scale=1.0), refs, docs)
    earlier = chunks.within(row > column, down)
    return _Step(docs, tile.causal(size, down), earlier, decays, refs["beta"][...].T)


def _keys(job, refs, group: int) -> tuple[jax.Array, jax.Array]:
    q, k = (lanes(refs[name], group, job.key_size)[...] for name in "qk")
    return q, k


def _pairs(job, refs, step: _Step) -> None:
    """Fills `queries`, scaled as outputs are, `keys` and `inverse` of all heads."""
    for group in range(job.step_groups):
        q, k = _keys(job, refs, group)
        queries = only(step.mask, job.scale * dot(q, k, "nt"))
        keys = only(step.earlier, dot(k, k, "nt"))
        for h in heads_of(job, group):
            decay = between(job, refs, step.decays.head(h), h)
            refs["queries"][h] = tile.times(queries, decay)
            refs["keys"][h] = tile.times(keys, decay)
            refs["inverse"][h] = step.beta[:, h : h + 1] * refs["keys"][h]
    tpu_inverse.invert(refs["inverse"], job.segmented)


def _into(job, refs, decay: Decays, h: int, x: jax.Array) -> jax.Array:
    """`x (C, V)` times the decays from the chunk's start."""
    if decay.slab is None:
        return x
    return by_slab(decay.slab, refs["start"][:, h : h + 1, :]).reshape(x.shape) * x


def forward(job, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        state_ref[own(job)] = refs["initial"][...]

    if "states" in refs:
        refs["states"][...] = state_ref[own(job)].astype(job.dtype)
    step = _step(job, refs)
    _pairs(job, refs, step)
    for group in range(job.step_groups):
        q, k = _keys(job, refs, group)
        across = k.astype(jnp.float32).T
        for h in heads_of(job, group):
            v = lanes(refs["v"], h, job.value_size)[...]
            state, decay = state_ref[first + h], step.decays.head(h)
            held = tile.entering(_into(job, refs, decay, h, dot(k, state, "nn")), step.down)
            beta = step.beta[:, h : h + 1]
            values = corrected(refs["inverse"][h], beta, v, held, step.down).values
            read = job.scale * _into(job, refs, decay, h, dot(q, state, "nn"))
            written = finite(values, job.segmented).astype(v.dtype)
            o = dot(refs["queries"][h].astype(v.dtype), written, "nn")
            o += tile.entering(read, step.down)
            if step.down is not None:
                o = only(step.down.real, jnp.where(values == values, o, jnp.nan))
            lanes(refs["o"], h, job.value_size)[...] = o.astype(v.dtype)
            leaving = step.down and step.down.leaving
            out = (across * decay.out).astype(v.dtype)
            added = dot(out, operand(leaving, values).astype(v.dtype), "nn")
            state_ref[first + h] = tile.kept(state, decay.keep, step.down) + added

    @pl.when(chunk_ends(job))
    def _():
        refs["final"][...] = state_ref[own(job)]


class _HeadGradients(NamedTuple):
    """Of one head in one chunk.

    Attributes:
      dqueries, dkeys: `(C, C)`, of the unmasked `q k^T`, but for the scale, and `k k^T`.
      dq, dk: `(K, C)`, what comes through the states.
      dv: `(C, V)`.
      dbeta: `(C, 1)`.
      dstate: `(K, V)`.
      dg, into, out: `(1, C)`, as `linear_attention.tpu_head` has them.
    """

    dqueries: jax.Array
    dkeys: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbeta: jax.Array
    dstate: jax.Array
    dg: jax.Array
    into: jax.Array
    out: jax.Array


def backward(job, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        dstate_ref[own(job)] = refs["dfinal"][...]

    step, each = _step(job, refs), list[_HeadGradients]()
    _pairs(job, refs, step)
    for group in range(job.step_groups):
        q, k = _keys(job, refs, group)
        across = q.astype(jnp.float32).T, k.astype(jnp.float32).T
        heads = heads_of(job, group)
        for h in heads:
            d = _backward_head(job, refs, step, h, k, across, dstate_ref[first + h])
            lanes(refs["dv"], h, job.value_size)[...] = d.dv.astype(q.dtype)
            dstate_ref[first + h] = d.dstate
            each.append(d)
        dqueries, dkeys, dq, dk = (total(d[i] for d in each[heads.start :]) for i in range(4))
        dqueries = job.scale * only(step.mask, dqueries)
        dkeys = only(step.earlier, dkeys)
        add_up(job, refs, "dq", group, dot(dqueries.astype(q.dtype), k, "nn") + dq.T)
        dk = dk.T + dot(dqueries.T.astype(q.dtype), q, "nn")
        add_up(job, refs, "dk", group, dk + dot((dkeys + dkeys.T).astype(q.dtype), k, "nn"))
    tpu_inverse.write_columns(refs["dbeta"], [d.dbeta for d in each])
    if job.decay is not None:
        attention.decay_gradients(refs, step.docs, each)

    @pl.when(chunk_ends(job))
    def _():
        refs["dinitial"][...] = dstate_ref[own(job)]


def _backward_head(job, refs, step: _Step, h: int, keys, across, dstate) -> _HeadGradients:
    """`keys` as they came, `across` queries and keys `(K, C)`, `dstate` of the leaving state."""
    q, k = across
    v, do = (lanes(refs[name], h, job.value_size)[...] for name in ("v", "do"))
    state, decay = refs["states"][h], step.decays.head(h)
    decays, beta = between(job, refs, decay, h), step.beta[:, h : h + 1]
    inverse = refs["inverse"][h]
    held = tile.entering(_into(job, refs, decay, h, dot(keys, state, "nn")), step.down)
    values, error = corrected(inverse, beta, v, held, step.down)
    written = values.astype(v.dtype)
    dpairs = only(step.mask, dot(do, written, "nt"))
    dvalues = dot(refs["queries"][h].T.astype(v.dtype), do, "nn")
    dvalues += tile.leaving(decay.out_down * dot(keys, dstate, "nn"), step.down)
    # Of beta * error, and of what the inverse was made from.
    if step.down is not None:
        inverse = only(step.down.same, inverse)
    dwritten = dot(inverse.T, finite(dvalues, job.segmented), "nn")
    dlower = only(step.earlier, -dot(dwritten.astype(v.dtype), written, "nt"))
    dbeta = (dwritten * error).sum(1, keepdims=True)
    dbeta += (dlower * refs["keys"][h]).sum(1, keepdims=True)
    dv, dlower = beta * dwritten, beta * dlower
    # What decays between tokens: the columns j < t, summed; then the rows i >= t. Nothing is
    # subtracted.
    row, column = chunks.order(job.tiles.chunk)
    before = (row < column).astype(jnp.float32).astype(v.dtype)
    dlogs = dpairs * refs["queries"][h] + dlower * refs["keys"][h]
    summed = only(step.mask, dot(dlogs.astype(v.dtype), before, "nn"))
    # Transposed, so that decays and their gradients are rows.
    dheld = operand(step.down and step.down.entering, -dv).astype(v.dtype)
    into = job.scale * decay.into
    dq = tile.entering(into * dot(state, do, "nt"), step.across)
    dread = tile.entering(decay.into * dot(state, dheld, "nt"), step.across)
    dk = tile.leaving(decay.out * dot(dstate, written, "nt"), step.across)
    dentering = dot((q * into).astype(v.dtype), do, "nn")
    dentering += dot((k * decay.into).astype(v.dtype), dheld, "nn")
    through = tile.kept(dstate * state.astype(dstate.dtype), decay.keep, step.down)
    keep = through.sum(0, keepdims=True).sum(1, keepdims=True)
    return _HeadGradients(
        dqueries=tile.times(dpairs, decays),
        dkeys=tile.times(dlower, decays),
        dq=dq,
        dk=dread + dk,
        dv=dv,
        dbeta=dbeta,
        dstate=tile.kept(dstate, decay.keep, step.down) + dentering,
        dg=summed.sum(0, keepdims=True) + keep,
        into=(q * dq + k * dread).sum(0, keepdims=True),
        out=(k * dk).sum(0, keepdims=True),
    )
