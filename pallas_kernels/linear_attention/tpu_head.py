"""TPU kernels where all keys of a head decay alike, or nothing decays.

All heads of a group share their `q k^T`. What tokens need of their heads' decays are rows and
columns made once for all heads of a step, exponentials included. States are `(K, V)`, so that no
operand of a matmul is transposed a head at a time but the pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, compat
from pallas_kernels.compat import pl
from pallas_kernels.linear_attention import tile
from pallas_kernels.linear_attention.tile import dot, only

SLAB = 8  # tokens: the rows of a register


class Lines(NamedTuple):
    """One number a token: `across (heads, C)` and `down (C, heads)`, of one head or more."""

    across: jax.Array
    down: jax.Array

    def head(self, h: int) -> Lines:
        return Lines(self.across[h : h + 1], self.down[:, h : h + 1])


class Decays(NamedTuple):
    """Of the heads of a step, or of one; None where nothing decays.

    Attributes:
      slab: `(C, heads)`, from the start of its slab up to the token and with it.
      into: 0 where a token does not see the entering state, and scaled as outputs are.
      out: 0 where a token is not in the leaving state.
      keep: `(heads, 1)`.
    """

    slab: jax.Array | None
    into: Lines
    out: Lines
    keep: jax.Array | None

    def head(self, h: int) -> Decays:
        slab = None if self.slab is None else self.slab[:, h : h + 1]
        keep = None if self.keep is None else self.keep[h : h + 1]
        return Decays(slab, self.into.head(h), self.out.head(h), keep)


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
    """Of the heads of a step; writes what is between tokens to `refs`."""
    across = None if docs is None else docs.across
    slab = keep = None
    if job.decay is None:
        into = out = jnp.ones((SLAB, job.tiles.chunk), jnp.float32)
    else:
        g = chunks.clamp(refs["g"][...], across)
        before, inside, prefix, start = slab_sums(g, compat.tpu.roll)
        for ref, sums in ((refs["before"], before[:-1]), (refs["inside"], inside)):
            for i, x in enumerate(sums):
                ref[i] = jnp.exp(x)
        into, out, slab = jnp.exp(start + prefix), jnp.exp(before[-1]), jnp.exp(prefix)
        keep = into[:, -1:]
    into, out = tile.entering(job.scale * into, across), tile.leaving(out, across)
    rows = [into, out] if slab is None else [into, out, slab]
    columns, heads = jnp.concatenate(rows).T, into.shape[0]
    return Decays(
        slab=None if slab is None else columns[:, 2 * heads :],
        into=Lines(into, columns[:, :heads]),
        out=Lines(out, columns[:, heads : 2 * heads]),
        keep=keep,
    )


def between(job, refs, decay: Decays, h: int) -> jax.Array | None:
    """The decays between tokens of one head, `(C, C)`; what is above the diagonal is finite."""
    if decay.slab is None:
        return None
    size = job.tiles.chunk
    shape = (size // SLAB, SLAB, size)
    before = refs["before"][:, h : h + 1, :]
    inside = refs["inside"][:, h, :][None]
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 2) >> 3
    product = decay.slab.reshape(*shape[:2], 1) * before
    return jnp.where(row == column, inside, product).reshape(size, size)


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
            o, after = _forward_head(step, decay, q, keys, v, pairs, state)
            lanes(refs["o"], h, job.value_size)[...] = o.astype(v.dtype)
            state_ref[first + h] = after

    @pl.when(chunk_ends(job))
    def _():
        refs["final"][...] = state_ref[own(job)]


def _forward_head(step: _Step, decay: Decays, q, keys, v, pairs, state):
    """`(o, state')`; `keys (K, C)`, `pairs` masked and scaled."""
    from_state = tile.entering(decay.into.down * dot(q, state, "nn"), step.down)
    o = dot(pairs.astype(v.dtype), v, "nn") + from_state
    added = dot((keys * decay.out.across).astype(v.dtype), v, "nn")
    return o, tile.kept(state, decay.keep, step.down) + added


class _HeadGradients(NamedTuple):
    """Of one head in one chunk.

    `dscores` is that of the unmasked `q k^T / scale`, `into` and `out` give the gradients of the
    logarithms of `Decays.into` and `out` when summed over keys, `keep (1, 1)` that of the chunk's.
    """

    dscores: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dstate: jax.Array
    keep: jax.Array
    pairs: jax.Array | None  # (1, C), of the logarithms of the decays between tokens


def backward(job, refs) -> None:
    dstate_ref, first = refs["dstate"], pl.program_id(3) * job.tiles.heads

    @pl.when(chunk_begins())
    def _():
        dstate_ref[own(job)] = refs["dfinal"][...]

    step = _step(job, refs)
    into, out, more = [], [], []
    for group in range(job.step_groups):
        q, k = (lanes(refs[name], group, job.key_size)[...] for name in "qk")
        scores = only(step.mask, job.scale * dot(q, k, "nt"))
        wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
        queries, sums = wide_q.T, list[_HeadGradients]()
        for h in heads_of(job, group):
            v, do = (lanes(refs[name], h, job.value_size)[...] for name in ("v", "do"))
            state, dstate, decay = refs["states"][h], dstate_ref[first + h], step.decays.head(h)
            decays = between(job, refs, decay, h)
            d = _backward_head(step, decay, decays, k, queries, v, scores, state, do, dstate)
            lanes(refs["dv"], h, job.value_size)[...] = d.dv.astype(v.dtype)
            dstate_ref[first + h] = d.dstate
            sums.append(d)
            if d.pairs is not None:
                into.append((wide_q * d.dq).sum(1, keepdims=True))
                out.append((wide_k * d.dk).sum(1, keepdims=True))
                more.append(d.pairs + d.keep)
        dscores = job.scale * only(step.mask, _total(d.dscores for d in sums))
        dq = dot(dscores.astype(q.dtype), k, "nn") + _total(d.dq for d in sums)
        dk = dot(dscores.T.astype(q.dtype), q, "nn") + _total(d.dk for d in sums)
        add_up(job, refs, "dq", group, dq)
        add_up(job, refs, "dk", group, dk)
    if job.decay is not None:
        _decay_gradients(refs, step, _across(into + out), more)

    @pl.when(chunk_ends(job))
    def _():
        refs["dinitial"][...] = dstate_ref[own(job)]


def _backward_head(
    step: _Step, decay: Decays, between, k, queries, v, scores, state, do, dstate
) -> _HeadGradients:
    """See `forward`; `queries (K, C)`, `do` and `dstate` are of the output and what leaves."""
    docs = step.down
    pairs = tile.times(scores, between)
    dpairs = dot(do, v, "nt")
    if docs is not None:
        dpairs = only(step.mask, dpairs)
    dscores = tile.times(dpairs, between)
    of_pairs = None
    if between is not None:
        size = scores.shape[0]
        row, column = chunks.order(size)
        # The columns j < t of (dA * A), summed; then the rows i >= t. Nothing is subtracted.
        before = (row < column).astype(jnp.float32).astype(v.dtype)
        summed = dot((dscores * scores).astype(v.dtype), before, "nn")
        of_pairs = only(step.mask, summed).sum(0, keepdims=True)
    dq = tile.entering(decay.into.down * dot(do, state, "nt"), docs)
    dk = tile.leaving(decay.out.down * dot(v, dstate, "nt"), docs)
    dv = dot(pairs.T.astype(v.dtype), do, "nn")
    dv = dv + tile.leaving(decay.out.down * dot(k, dstate, "nn"), docs)
    kept = tile.kept(dstate, decay.keep, docs)
    through = tile.kept(dstate * state.astype(dstate.dtype), decay.keep, docs)
    keep = through.sum(0, keepdims=True).sum(1, keepdims=True)
    dstate = kept + dot((queries * decay.into.across).astype(v.dtype), do, "nn")
    return _HeadGradients(dscores, dq, dk, dv, dstate, keep, of_pairs)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _across(columns: list[jax.Array]) -> jax.Array:
    """Up to 64 columns `(C, 1)` as the first rows of `(64, C)`."""
    shape = (columns[0].shape[0], 64)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    tile = jnp.zeros(shape, jnp.float32)
    for i, column in enumerate(columns):
        tile = jnp.where(lane == i, column, tile)
    return tile.T


def _decay_gradients(refs, step: _Step, ends: jax.Array, more: list[jax.Array]) -> None:
    """Of the log decays of a step's heads.

    Args:
      ends: rows, first those of the heads' `into`, then those of their `out`: gradients of the
        logarithms, to be summed over later and over earlier tokens.
      more: `(1, C)` of each head, what needs no sums.
    """
    g = refs["g"][...]
    heads, size = g.shape
    into, out = ends[:heads], ends[len(more) : len(more) + heads]
    row = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0)
    rest = jnp.zeros_like(g)
    for h, x in enumerate(more):
        rest = jnp.where(row == h, x, rest)
    token = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
    out = jnp.where(token >= 1, compat.tpu.roll(out, 1, 1), 0.0)
    for s in chunks.sizes(size):
        into = into + jnp.where(token < size - s, compat.tpu.roll(into, size - s, 1), 0.0)
        out = out + jnp.where(token >= s, compat.tpu.roll(out, s, 1), 0.0)
    across = None if step.docs is None else step.docs.across
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
