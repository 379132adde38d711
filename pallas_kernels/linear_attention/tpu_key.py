"""TPU kernels where each key of a head decays for itself.

The decay between two tokens is a product of two factors for each key, one of the queries' side
and one of the keys', that depend on the size of the aligned blocks at which the two part; see
`chunks`. Here the factors themselves are multiplied up a binary tree instead of their logarithms:
each is at most 1, nothing is divided, and a token needs one exponential a key. States are
`(V, K)`, so that the decays of keys are rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.linear_attention import tile
from pallas_kernels.linear_attention.tile import dot, only
from pallas_kernels.linear_attention.tpu_head import (
    add_up,
    chunk_begins,
    chunk_ends,
    heads_of,
    lanes,
    own,
)
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.tpu_heads import SLAB


class Factors(NamedTuple):
    """Exponentials of `chunks.Sums`; `into` scaled as outputs are."""

    levels: list[jax.Array]
    into: jax.Array
    out: jax.Array
    keep: jax.Array


def factors(a: jax.Array, scale: float, roll) -> Factors:
    """Of decays `a (C, K)` in (0, 1]; `roll` as in `chunks.by_tree`."""
    size = a.shape[0]
    token = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    levels, prefix, suffix = [], a, jnp.ones_like(a)
    for s in chunks.sizes(size):
        if s < SLAB:
            later, total = token & s != 0, prefix * suffix
            levels.append(jnp.where(later, prefix, suffix))
            prefix = prefix * jnp.where(later, roll(total, s, 0), 1.0)
            suffix = suffix * jnp.where(later, 1.0, roll(total, size - s, 0))
        else:
            first, second = _halves(prefix, s), _halves(suffix, s)
            levels.append(_joined(second[0], first[1]))
            # The whole of a half: its last token's product from the start.
            whole = [x[:, s - 1 :] for x in first]
            prefix = _joined(first[0], first[1] * whole[0])
            suffix = _joined(second[0] * whole[1], second[1])
    return Factors(levels, scale * prefix, suffix, prefix[size - 1 :])


def log_gradient(dlevels, dinto: jax.Array, dout: jax.Array, roll) -> jax.Array:
    """The gradient of `log(a)`, `(C, K)`, from those of the logarithms of `Factors`."""
    size = dinto.shape[0]
    token = jax.lax.broadcasted_iota(jnp.int32, dinto.shape, 0)
    dprefix, dsuffix = dinto, dout
    for s, level in zip(reversed(chunks.sizes(size)), reversed(dlevels), strict=True):
        if s < SLAB:
            later = token & s != 0
            dtotal = jnp.where(later, roll(dsuffix, s, 0), roll(dprefix, size - s, 0))
            dprefix = dprefix + dtotal + jnp.where(later, level, 0.0)
            dsuffix = dsuffix + dtotal + jnp.where(later, 0.0, level)
        else:
            (p0, p1), (s0, s1), (l0, l1) = (_halves(x, s) for x in (dprefix, dsuffix, level))
            dprefix = _joined(p0 + p1, p1 + s0 + l1)
            dsuffix = _joined(s0 + p1 + l0, s1 + s0)
    return dprefix


def _halves(x: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    """First and second halves of all blocks of 2s rows, `(blocks, s, N)` each."""
    x = x.reshape(-1, 2, s, x.shape[1])
    return x[:, 0], x[:, 1]


def _joined(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.stack([first, second], 1).reshape(-1, first.shape[-1])


class _Side(NamedTuple):
    """The rows of a level's queries, which are second halves, or of its keys, first halves.

    Where halves are smaller than a slab, all rows are taken; masks of pairs do the rest.
    """

    s: int
    second: bool

    def take(self, x: jax.Array) -> jax.Array:
        if self.s < SLAB:
            return x
        return _halves(x, self.s)[self.second].reshape(-1, x.shape[1])

    def put(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """`x` with these rows."""
        if self.s < SLAB:
            return rows
        first, second = _halves(x, self.s)
        rows = rows.reshape(first.shape)
        return _joined(first, rows) if self.second else _joined(rows, second)


def _both(s: int, earlier: jax.Array, later: jax.Array) -> jax.Array:
    """What the rows of both sides of a level give to its factors, `(C, K)`."""
    if s < SLAB:
        return earlier + later
    width = earlier.shape[1]
    return _joined(earlier.reshape(-1, s, width), later.reshape(-1, s, width))


class Step(NamedTuple):
    """What all heads of a step share.

    Attributes:
      mask: pairs that meet.
      level: `(C, C)` int32, how often a size of blocks doubles before the pair is in one block;
        -1 where `mask` is not.
    """

    docs: chunks.Documents | None
    mask: jax.Array
    level: jax.Array


def step_of(job, refs) -> Step:
    docs, size = None, job.tiles.chunk
    if job.segmented:
        docs = chunks.documents(*(refs[name][...] for name in ("column", "row", "entering_run")))
    row, column = chunks.order(size)
    level = sum(((row ^ column) >= s).astype(jnp.int32) for s in chunks.sizes(size))
    mask = tile.causal(size, docs)
    return Step(docs, mask, jnp.where(mask, level, -1))


class Head(NamedTuple):
    """One head in one chunk, wide."""

    q: jax.Array
    k: jax.Array
    decay: Factors
    scale: float

    def pairs(self, step: Step, dtype) -> jax.Array:
        """`A (C, C)`, scaled as outputs are."""
        on_diagonal = (self.q * self.k).sum(1, keepdims=True)
        pairs = only(step.level == 0, jnp.broadcast_to(on_diagonal, step.level.shape))
        for n, (s, factor) in enumerate(self.levels()):
            later, earlier = _Side(s, True), _Side(s, False)
            q = later.take(self.q) * later.take(factor)
            k = earlier.put(self.k, earlier.take(self.k) * earlier.take(factor))
            met = dot(q.astype(dtype), k.astype(dtype), "nt")
            kept = jnp.where(later.take(step.level) > n, met, later.take(pairs))
            pairs = later.put(pairs, kept)
        return self.scale * pairs

    def pairs_gradients(self, step: Step, dpairs, dtype):
        """`(dq, dk, dlevels)` from the gradient of `pairs`; `dlevels` of the logarithms."""
        across, across_level, dlevels = dpairs.T, step.level.T, []
        on_diagonal = self.scale * only(step.level == 0, dpairs).sum(1, keepdims=True)
        dq, dk = on_diagonal * self.k, on_diagonal * self.q
        for n, (s, factor) in enumerate(self.levels()):
            later, earlier = _Side(s, True), _Side(s, False)
            q, k = later.take(self.q), earlier.take(self.k)
            for_q, for_k = later.take(factor), earlier.take(factor)
            met_q = later.put(self.q, q * for_q).astype(dtype)
            met_k = earlier.put(self.k, k * for_k).astype(dtype)
            part = self.scale * only(later.take(step.level) == n + 1, later.take(dpairs))
            part_across = only(earlier.take(across_level) == n + 1, earlier.take(across))
            # Only tokens of second halves have a row in it, only those of first halves a column.
            into_q = for_q * dot(part.astype(dtype), met_k, "nn")
            into_k = for_k * dot((self.scale * part_across).astype(dtype), met_q, "nn")
            dq = later.put(dq, later.take(dq) + into_q)
            dk = earlier.put(dk, earlier.take(dk) + into_k)
            dlevels.append(_both(s, k * into_k, q * into_q))
        return dq, dk, dlevels

    def levels(self):
        """Sizes of half blocks, and the factors of the pairs that part there."""
        return zip(chunks.sizes(self.q.shape[0]), self.decay.levels, strict=True)

    def from_state(self, step: Step, dtype) -> jax.Array:
        """Queries as they meet the entering state."""
        return (self.q * tile.entering(self.decay.into, step.docs)).astype(dtype)

    def to_state(self, step: Step, dtype) -> jax.Array:
        """Keys as they are in the leaving state."""
        return (self.k * tile.leaving(self.decay.out, step.docs)).astype(dtype)


def head_of(job, refs, step: Step, group: int, h: int) -> Head:
    q, k = (lanes(refs[name], group, job.key_size)[...].astype(jnp.float32) for name in "qk")
    g = lanes(refs["g"], h, job.key_size)[...].astype(jnp.float32)
    a = jnp.exp(chunks.clamp(g, step.docs))
    return Head(q, k, factors(a, job.scale, compat.tpu.roll), job.scale)


def forward(job, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        state_ref[own(job)] = refs["initial"][...]

    if "states" in refs:
        refs["states"][...] = state_ref[own(job)].astype(job.dtype)
    step = step_of(job, refs)
    for group in range(job.step_groups):
        for h in heads_of(job, group):
            head = head_of(job, refs, step, group, h)
            v = lanes(refs["v"], h, job.value_size)[...]
            state = state_ref[first + h]
            o = dot(head.pairs(step, v.dtype).astype(v.dtype), v, "nn")
            from_state = dot(head.from_state(step, v.dtype), state, "nt")
            o = o + tile.entering(from_state, step.docs)
            lanes(refs["o"], h, job.value_size)[...] = o.astype(v.dtype)
            added = dot(transposed(v), head.to_state(step, v.dtype), "nn")
            state_ref[first + h] = tile.kept(state, head.decay.keep, step.docs) + added

    @pl.when(chunk_ends(job))
    def _():
        refs["final"][...] = state_ref[own(job)]


def transposed(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).T.astype(x.dtype)


def backward(job, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        dstate_ref[own(job)] = refs["dfinal"][...]

    step = step_of(job, refs)
    for group in range(job.step_groups):
        dq, dk = [], []
        for h in heads_of(job, group):
            head = head_of(job, refs, step, group, h)
            v, do = (lanes(refs[name], h, job.value_size)[...] for name in ("v", "do"))
            state, dstate = refs["states"][h], dstate_ref[first + h]
            d = _backward_head(step, head, v, state, do, dstate)
            dq.append(d.dq)
            dk.append(d.dk)
            lanes(refs["dv"], h, job.value_size)[...] = d.dv.astype(v.dtype)
            dstate_ref[first + h] = d.dstate
            g_ref, dg_ref = (lanes(refs[name], h, job.key_size) for name in ("g", "dg"))
            dg = chunks.clamp_transpose(g_ref[...].astype(jnp.float32), d.dg, step.docs)
            dg_ref[...] = dg.astype(dg_ref.dtype)
        add_up(job, refs, "dq", group, sum(dq))
        add_up(job, refs, "dk", group, sum(dk))

    @pl.when(chunk_ends(job))
    def _():
        refs["dinitial"][...] = dstate_ref[own(job)]


class _HeadGradients(NamedTuple):
    """Of one head in one chunk."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dg: jax.Array
    dstate: jax.Array


def _backward_head(step: Step, head: Head, v, state, do, dstate) -> _HeadGradients:
    docs, dtype = step.docs, v.dtype
    dpairs = only(step.mask, dot(do, v, "nt"))
    dq = tile.entering(head.decay.into * dot(do, state, "nn"), docs)
    dk = tile.leaving(head.decay.out * dot(v, dstate, "nn"), docs)
    dinto, dout = head.q * dq, head.k * dk
    dv = dot(head.pairs(step, dtype).T.astype(dtype), do, "nn")
    dv = dv + tile.leaving(dot(head.to_state(step, dtype), dstate, "nt"), docs)
    kept = tile.kept(dstate, head.decay.keep, docs)
    through = tile.kept(dstate * state.astype(dstate.dtype), head.decay.keep, docs)
    dkeep = through.sum(0, keepdims=True)
    dstate = kept + dot(transposed(do), head.from_state(step, dtype), "nn")

    dq_pairs, dk_pairs, dlevels = head.pairs_gradients(step, dpairs, dtype)
    dq, dk = dq + dq_pairs, dk + dk_pairs
    dg = log_gradient(dlevels, dinto, dout, compat.tpu.roll) + dkeep
    return _HeadGradients(dq, dk, dv, dg, dstate)
