"""TPU kernels where all keys of a head decay alike, or nothing decays.

All heads of a group share their `q k^T`. What tokens need of their heads' decays are rows and
columns made once for all heads of a step, exponentials included. States are `(K, V)`, so that no
operand of a matmul is transposed a head at a time but the pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.linear_attention import tile
from pallas_kernels.linear_attention.tile import dot, only
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.tpu_heads import SLAB, rows_shape


class Decays(NamedTuple):
    """Of the heads of a step, or of one; None where nothing decays.

    Attributes:
      slab: `(C, heads)`, from the start of its slab up to the token and with it.
      into: `(heads, C)`; 0 where a token does not see the entering state, scaled as outputs are.
      out: `(heads, C)`; 0 where a token is not in the leaving state.
      out_down: the same `(C, heads)`.
      keep: `(heads, 1)`.
    """

    slab: jax.Array | None
    into: jax.Array
    out: jax.Array
    out_down: jax.Array
    keep: jax.Array | None

    def head(self, h: int) -> Decays:
        slab = None if self.slab is None else self.slab[:, h : h + 1]
        keep = None if self.keep is None else self.keep[h : h + 1]
        out_down = self.out_down[:, h : h + 1]
        return Decays(slab, self.into[h : h + 1], self.out[h : h + 1], out_down, keep)


class Documents(NamedTuple):
    """`chunks.Documents` as it is, and with a row for each of its columns."""

    down: chunks.Documents
    across: chunks.Documents


def documents(job, refs) -> Documents | None:
    if not job.segmented:
        return None
    column, row, run = (refs[name][...] for name in ("column", "row", "entering_run"))
    down = chunks.documents(column, row, run)
    leaving_run = jnp.maximum(run, row.max(axis=1, keepdims=True))
    across = down._replace(real=row > 0, entering=row == run, leaving=row == leaving_run)
    return Documents(down, across)


def slab_sums(g: jax.Array, roll) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    """Sums of log decays `(heads, C)` over what lies between slabs of 8 tokens, and inside them.

    Nothing is subtracted; see `chunks`.

    Returns:
      before: for each slab, and for the end of the chunk, `(heads, C)`: behind token j up to the
        slab's start; 0 where j is not before it.
      inside: for each place r in a slab, `(heads, C)`: behind token j up to place r of j's own
        slab and with it; 0 where j is not before it.
      prefix: from its slab's start up to the token and with it.
      start: from the chunk's start to the token's slab.
    """
    size = g.shape[1]
    token = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
    place, slab = token & (SLAB - 1), token >> 3
    behind = [jnp.zeros_like(g)]
    for u in range(1, SLAB):
        behind.append(behind[-1] + roll(g, size - u, 1))
    inside = []
    for r in range(SLAB):
        sums = jnp.zeros_like(g)
        for m in range(r):
            sums = jnp.where(place == m, behind[r - m], sums)
        inside.append(sums)
    prefix = g
    for s in (1, 2, 4):
        prefix = prefix + jnp.where(place >= s, roll(prefix, s, 1), 0.0)
    before, start, so_far = [jnp.zeros_like(g)], jnp.zeros_like(g), jnp.zeros_like(g[:, :1])
    for n in range(size // SLAB):
        total = prefix[:, (n + 1) * SLAB - 1 : (n + 1) * SLAB]
        start = jnp.where(slab == n, so_far, start)
        later = jnp.where(slab == n, inside[-1], before[-1] + total)
        before.append(jnp.where(slab <= n, later, 0.0))
        so_far = so_far + total
    return before, inside, prefix, start


def decays(job, refs, docs: Documents | None) -> Decays:
    """Of the heads of a step; writes what is between slabs and inside them to `refs`."""
    across = None if docs is None else docs.across
    slab = keep = None
    if job.decay is None:
        into = out = jnp.ones(rows_shape(job), jnp.float32)
    else:
        g = chunks.clamp(refs["g"][...], across)
        before, inside, prefix, start = slab_sums(g, compat.tpu.roll)
        for ref, sums in ((refs["before"], before[:-1]), (refs["inside"], inside)):
            for i, x in enumerate(sums):
                ref[i] = jnp.exp(x)
        into, out, slab = jnp.exp(start + prefix), jnp.exp(before[-1]), jnp.exp(prefix).T
        keep = into[:, -1:]
        starts = job.scale * jnp.exp(start)
        for i in range(job.tiles.chunk // SLAB):
            first = starts[:, i * SLAB : i * SLAB + 1]
            refs["start"][i] = jnp.broadcast_to(first, refs["start"].shape[1:])
    into, out = tile.entering(job.scale * into, across), tile.leaving(out, across)
    return Decays(slab, into, out, out.T, keep)


def between(job, refs, decay: Decays, h: int) -> jax.Array | None:
    """The decays between tokens of one head, `(C, C)`; what is above the diagonal is finite."""
    if decay.slab is None:
        return None
    size = job.tiles.chunk
    inside = refs["inside"][:, h, :][None]
    row = jax.lax.broadcasted_iota(jnp.int32, (size // SLAB, SLAB, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, row.shape, 2) >> 3
    product = by_slab(decay.slab, refs["before"][:, h : h + 1, :])
    return jnp.where(row == column, inside, product).reshape(size, size)


def by_slab(slab: jax.Array, rows: jax.Array) -> jax.Array:
    """A column `(C, 1)` times a row of each slab, `(C / 8, 1, N) -> (C / 8, 8, N)`."""
    return slab.reshape(-1, SLAB, 1) * rows


class _Step(NamedTuple):
    """What all heads of a step share."""

    docs: Documents | None
    mask: jax.Array
    decays: Decays

    @property
    def down(self) -> chunks.Documents | None:
        return None if self.docs is None else self.docs.down


def _step(job, refs) -> _Step:
    docs, size = documents(job, refs), job.tiles.chunk
    mask = tile.causal(size, None if docs is None else docs.down)
    return _Step(docs, mask, decays(job, refs, docs))


def chunk_begins():
    """True in the first chunk that is travelled through."""
    return pl.program_id(2) == 0


def chunk_ends(job):
    return pl.program_id(2) == job.chunks - 1


def own(job):
    """The states of a step's heads among those in scratch."""
    return pl.ds(pl.program_id(3) * job.tiles.heads, job.tiles.heads)


def lanes(ref, i: int, width: int):
    """The i-th block of lanes."""
    return ref.at[:, i * width : (i + 1) * width]


def heads_of(job, group: int) -> range:
    count = job.tiles.heads // job.step_groups
    return range(group * count, (group + 1) * count)


def forward(job, refs) -> None:
    state_ref, first = refs["state"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        state_ref[own(job)] = refs["initial"][...]

    if "states" in refs:
        refs["states"][...] = state_ref[own(job)].astype(job.dtype)
    step = _step(job, refs)
    for group in range(job.step_groups):
        q, k = (lanes(refs[name], group, job.key_size)[...] for name in "qk")
        scores = only(step.mask, job.scale * dot(q, k, "nt"))
        keys = k.astype(jnp.float32).T
        for h in heads_of(job, group):
            v = lanes(refs["v"], h, job.value_size)[...]
            state, decay = state_ref[first + h], step.decays.head(h)
            pairs = tile.times(scores, between(job, refs, decay, h))
            from_state = job.scale * dot(q, state, "nn")
            if decay.slab is not None:
                # The same as `decay.into` in columns, which it costs more to make.
                into = by_slab(decay.slab, refs["start"][:, h : h + 1, :])
                from_state = into.reshape(from_state.shape) * dot(q, state, "nn")
            o = dot(pairs.astype(v.dtype), v, "nn") + tile.entering(from_state, step.down)
            lanes(refs["o"], h, job.value_size)[...] = o.astype(v.dtype)
            added = dot((keys * decay.out).astype(v.dtype), v, "nn")
            state_ref[first + h] = tile.kept(state, decay.keep, step.down) + added

    @pl.when(chunk_ends(job))
    def _():
        refs["final"][...] = state_ref[own(job)]


class _HeadGradients(NamedTuple):
    """Of one head in one chunk.

    Attributes:
      dscores: `(C, C)`, of the unmasked `q k^T / scale`.
      dq, dk: `(K, C)`, what comes through the states.
      dv: `(C, V)`.
      dstate: `(K, V)`.
      dg: `(1, C)`, of the log decays, but for `into` and `out`.
      into, out: `(1, C)`, of the logarithms of `Decays`' ones.
    """

    dscores: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
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
    for group in range(job.step_groups):
        q, k = (lanes(refs[name], group, job.key_size)[...] for name in "qk")
        scores = only(step.mask, job.scale * dot(q, k, "nt"))
        across = q.astype(jnp.float32).T, k.astype(jnp.float32).T
        heads = heads_of(job, group)
        for h in heads:
            v, do = (lanes(refs[name], h, job.value_size)[...] for name in ("v", "do"))
            state, dstate, decay = refs["states"][h], dstate_ref[first + h], step.decays.head(h)
            pairs = between(job, refs, decay, h)
            d = _backward_head(step, decay, pairs, across, k, v, scores, state, do, dstate)
            lanes(refs["dv"], h, job.value_size)[...] = d.dv.astype(v.dtype)
            dstate_ref[first + h] = d.dstate
            each.append(d)
        sums = [total(d[i] for d in each[heads.start :]) for i in range(3)]
        dscores = job.scale * only(step.mask, sums[0])
        add_up(job, refs, "dq", group, dot(dscores.astype(q.dtype), k, "nn") + sums[1].T)
        add_up(job, refs, "dk", group, dot(dscores.T.astype(q.dtype), q, "nn") + sums[2].T)
    if job.decay is not None:
        decay_gradients(refs, step.docs, each)

    @pl.when(chunk_ends(job))
    def _():
        refs["dinitial"][...] = dstate_ref[own(job)]


def _backward_head(
    step: _Step, decay: Decays, between, across, keys, v, scores, state, do, dstate
) -> _HeadGradients:
    """`across` are queries and keys `(K, C)`, `keys` as they came; `do` and `dstate` the cotangents
    of the output and of the state that leaves.
    """
    docs, (q, k) = step.docs, across
    pairs = tile.times(scores, between)
    dpairs = dot(do, v, "nt")
    if docs is not None:
        dpairs = only(step.mask, dpairs)
    dscores = tile.times(dpairs, between)
    row, column = chunks.order(scores.shape[0])
    # The columns j < t of (dA * A), summed; then the rows i >= t. Nothing is subtracted.
    before = (row < column).astype(jnp.float32).astype(v.dtype)
    summed = dot((dscores * scores).astype(v.dtype), before, "nn")
    # Transposed, so that decays and their gradients are rows.
    dq = tile.entering(decay.into * dot(state, do, "nt"), docs and docs.across)
    dk = tile.leaving(decay.out * dot(dstate, v, "nt"), docs and docs.across)
    from_state = decay.out_down * dot(keys, dstate, "nn")
    dv = dot(pairs.T.astype(v.dtype), do, "nn") + tile.leaving(from_state, step.down)
    through = tile.kept(dstate * state.astype(dstate.dtype), decay.keep, step.down)
    keep = through.sum(0, keepdims=True).sum(1, keepdims=True)
    return _HeadGradients(
        dscores=dscores,
        dq=dq,
        dk=dk,
        dv=dv,
        dstate=tile.kept(dstate, decay.keep, step.down)
        + dot((q * decay.into).astype(v.dtype), do, "nn"),
        dg=only(step.mask, summed).sum(0, keepdims=True) + keep,
        into=(q * dq).sum(0, keepdims=True),
        out=(k * dk).sum(0, keepdims=True),
    )


def total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def decay_gradients(refs, docs: Documents | None, each: Sequence[Any]) -> None:
    """Of the log decays of a step's heads: sums over later tokens and over earlier ones.

    `each` head has the `dg`, `into` and `out` of `_HeadGradients`.
    """
    g = refs["g"][...]
    row, size = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0), g.shape[1]
    rest = into = out = jnp.zeros_like(g)
    for h, d in enumerate(each):
        rest = jnp.where(row == h, d.dg, rest)
        into = jnp.where(row == h, d.into, into)
        out = jnp.where(row == h, d.out, out)
    token, other = chunks.order(size)
    across = None if docs is None else docs.across
    # Tokens that see the entering state all come first, and those in the leaving one last: masks
    # of the sums keep documents apart.
    into = tile.entering(dot(into, (token >= other).astype(jnp.float32), "nn"), across)
    out = tile.leaving(dot(out, (token < other).astype(jnp.float32), "nn"), across)
    refs["dg"][...] = chunks.clamp_transpose(g, into + out + rest, across)


def add_up(job, refs, name: str, group: int, x) -> None:
    """The gradient of a group's queries or keys, over the parts of its heads."""
    out = lanes(refs[name], group, job.key_size)
    if job.parts == 1:
        out[...] = x.astype(out.dtype)
        return
    part, sums = pl.program_id(3), refs[f"{name}_sum"]
    x = x + jnp.where(part == 0, 0.0, sums[...])
    sums[...] = x

    @pl.when(part == job.parts - 1)
    def _():
        out[...] = x.astype(out.dtype)
