"""What the programs of the GPU kernels load, compute and store.

A program sees one head of one row, or some heads of a group in turn, and blocks of its keys and
values; what a chunk computes is in `tile`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.linear_attention import tile
from pallas_kernels.matrix_state import chunks, chunks_gpu
from pallas_kernels.matrix_state.chunks import Documents
from pallas_kernels.matrix_state.chunks_gpu import BY_HALVES, Row, Span


class Tiles(NamedTuple):
    """What a program takes at once.

    Attributes:
      chunk: tokens.
      values, keys: width of what it makes, a block of values (and their gradients) or of keys.
      inner: width of the blocks that it sums over, of keys or of values.
      state: side of a block of the states that is handed from chunk to chunk.
      heads: of one group, whose gradients of queries and keys are summed by one program.
      warps: of the kernels that see one chunk.
    """

    chunk: int
    values: int
    keys: int
    inner: int
    state: int
    heads: int = 1
    warps: int = 4


class Job(NamedTuple):
    """What is static about one call."""

    batch: int
    length: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["head", "key"] | None
    dtype: Any
    scale: float
    tiles: Tiles

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.tiles.chunk)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.key_size, self.tiles.keys)

    @property
    def state_grid(self) -> tuple[int, int, int]:
        """Of the kernels that hand states on."""
        side = self.tiles.state
        blocks = pl.cdiv(self.key_size, side), pl.cdiv(self.value_size, side)
        return self.batch * self.heads, *blocks

    @property
    def value_grid(self) -> tuple[int, int, int]:
        """Of the kernels that make a block of values."""
        blocks = pl.cdiv(self.value_size, self.tiles.values)
        return self.batch * self.heads, blocks, self.chunks

    @property
    def key_grid(self) -> tuple[int, int, int]:
        """Of the kernel that makes a block of the gradients of queries and keys."""
        return self.batch * self.heads // self.tiles.heads, self.key_blocks, self.chunks

    @property
    def states(self) -> tuple[int, ...]:
        return self.batch, self.chunks, self.heads, self.value_size, self.key_size


# What a program loads of one chunk.


class _Head(NamedTuple):
    """One head of one row."""

    job: Job
    row: Row
    head: jax.Array
    group: jax.Array

    def tokens(self, chunk, **options) -> Span:
        return Span(chunk * self.job.tiles.chunk, self.job.tiles.chunk, **options)

    def log_decay(self, tokens: Span, keys: Span | None):
        """`(C, BK)`, or `(C, 1)` for all keys, float32; None where nothing decays."""
        job = self.job
        if job.decay is None:
            return None
        if job.decay == "key":
            return self.row.load("g", tokens, self.head, keys).astype(jnp.float32)
        return self.row.load("g", tokens, self.head).astype(jnp.float32)[:, None]


def _head(job: Job, refs: dict[str, Any], index) -> _Head:
    """Of the index-th pair of row and head."""
    heads = jnp.int32(job.heads)
    row, head = jax.lax.div(index, heads), jax.lax.rem(index, heads)
    group = jax.lax.div(head, jnp.int32(job.heads // job.groups))
    return _Head(job, Row(refs, row), head, group)


def _span(block, size: int) -> Span:
    return Span(block * size, size)


# The states, from chunk to chunk.


def states_kernel(job: Job, refs):
    """A block of the state before each chunk, and after the last."""
    at = _head(job, refs, pl.program_id(0))
    keys, values = (_span(pl.program_id(n), job.tiles.state) for n in (1, 2))

    def step(n, state):
        at.row.store("states", state, n, at.head, values, keys)
        # The last token first: what is behind a token is then the sum of those before it.
        tokens = at.tokens(n, backwards=True)
        docs = at.row.documents(tokens, n)
        k = at.row.load("k", tokens, at.group, keys)
        v = at.row.load("v", tokens, at.head, values)
        decay = tile.Decay(None, None, None, None)
        if job.decay is not None:
            behind = at.tokens(n, backwards=True, by=1)
            out = jnp.cumsum(_live(at, behind, keys), axis=0)
            decay = decay._replace(out=jnp.exp(out), keep=_keep(at, n, keys))
        return tile.kept(state, decay.keep, docs) + tile.added(k, v, decay, docs)

    first = at.row.load("initial", at.head, values, keys)
    final = jax.lax.fori_loop(0, job.chunks, step, first)
    at.row.store("final", final, at.head, values, keys)


def state_gradients_kernel(job: Job, refs):
    """A block of the gradient of the state behind each chunk, and of the one before the first."""
    at = _head(job, refs, pl.program_id(0))
    keys, values = (_span(pl.program_id(n), job.tiles.state) for n in (1, 2))

    def step(i, dstate):
        n = job.chunks - 1 - i
        at.row.store("dstates", dstate, n, at.head, values, keys)
        tokens = at.tokens(n)
        docs = at.row.documents(tokens, n)
        q = at.row.load("q", tokens, at.group, keys)
        do = at.row.load("do", tokens, at.head, values)
        decay = tile.Decay(None, None, None, None)
        if job.decay is not None:
            into = jnp.cumsum(_live(at, tokens, keys), axis=0)
            decay = decay._replace(into=jnp.exp(into), keep=_keep(at, n, keys))
        more = tile.state_gradient(q, do, decay, docs, job.scale)
        return tile.kept(dstate, decay.keep, docs) + more

    last = at.row.load("dfinal", at.head, values, keys)
    first = jax.lax.fori_loop(0, job.chunks, step, last)
    at.row.store("dinitial", first, at.head, values, keys)


def _live(at: _Head, tokens: Span, keys: Span | None) -> jax.Array:
    """Log decays ready to be summed."""
    g = jnp.maximum(at.log_decay(tokens, keys), chunks.MIN_LOG_DECAY)
    if "runs" not in at.row.refs:
        return g
    return tile.only((at.row.load("runs", tokens) > 0)[:, None], g)


def _keep(at: _Head, n, keys: Span) -> jax.Array:
    return jnp.exp(_live(at, at.tokens(n), keys).sum(0, keepdims=True))


# One chunk.


class _Decays(NamedTuple):
    """Of a chunk, and of a block of keys where each has its own.

    `between (C, C)` is for one decay of all keys; then the decay has no levels.
    """

    decay: tile.Decay
    between: jax.Array | None


_NO_DECAY = _Decays(tile.Decay(None, None, None, None), None)


def _decays(at: _Head, tokens: Span, keys: Span | None, docs: Documents | None, mask) -> _Decays:
    if at.job.decay is None:
        return _NO_DECAY
    if at.job.decay == "key":
        return _Decays(tile.decay(at.log_decay(tokens, keys), docs, BY_HALVES), None)
    row = _live(at, tokens, keys)
    sums = chunks_gpu.pair_sums(row, row.reshape(1, -1))
    decay = tile.Decay(None, jnp.exp(sums.into), jnp.exp(sums.out), jnp.exp(sums.total))
    return _Decays(decay, tile.only(mask, jnp.exp(sums.between)))


def _over_blocks(count: int, body, carry):
    """A loop over blocks; none around a single one."""
    if count == 1:
        return body(jnp.int32(0), carry)
    return jax.lax.fori_loop(0, count, body, carry)


def read_kernel(job: Job, refs, *, backward: bool):
    """The outputs of a chunk, or the gradients of its values.

    They are the same sums with time reversed: those over the pairs of tokens, and what a token
    reads of the state that enters, or writes to the one that leaves.
    """
    at = _head(job, refs, pl.program_id(0))
    values, n = _span(pl.program_id(1), job.tiles.values), pl.program_id(2)
    tokens = at.tokens(n)
    docs = at.row.documents(tokens, n)
    size = job.tiles.chunk
    mask = tile.causal(size, docs)
    one = _NO_DECAY if job.decay == "key" else _decays(at, tokens, None, docs, mask)

    def block(index, carry):
        pairs, outer = carry
        keys = _span(index, job.tiles.inner)
        q = at.row.load("q", tokens, at.group, keys)
        k = at.row.load("k", tokens, at.group, keys)
        decay = one.decay
        if job.decay == "key":
            decay = _decays(at, tokens, keys, docs, mask).decay
            pairs = pairs + tile.pairs_by_key(q, k, decay.levels, docs)
        else:
            pairs = pairs + tile.dot(q, k, "nt")
        name, x, factor = ("dstates", k, decay.out) if backward else ("states", q, decay.into)
        state = at.row.load(name, n, at.head, values, keys)
        return pairs, outer + tile.dot(tile.times(x, factor).astype(x.dtype), state, "nt")

    zeros = (jnp.zeros((size, s), jnp.float32) for s in (size, job.tiles.values))
    pairs, outer = _over_blocks(pl.cdiv(job.key_size, job.tiles.inner), block, tuple(zeros))
    if job.decay != "key":
        pairs = tile.pairs_of(pairs, one.between, mask)
    if backward:
        do = _scaled(job, at.row.load("do", tokens, at.head, values))
        dv = tile.dot(pairs.astype(do.dtype), do, "tn") + tile.leaving(outer, docs)
        at.row.store("dv", dv, tokens, at.head, values)
    else:
        v = at.row.load("v", tokens, at.head, values)
        o = tile.dot(pairs.astype(v.dtype), v, "nn") + tile.entering(outer, docs)
        at.row.store("o", job.scale * o, tokens, at.head, values)


def keys_kernel(job: Job, refs):
    """The gradients of a block of a chunk's queries and keys, summed over some heads of a group,
    and what each head gives to its decays."""
    part, place, n = map(pl.program_id, range(3))
    at = _head(job, refs, part * job.tiles.heads)
    keys = _span(place, job.tiles.keys)
    tokens = at.tokens(n)
    docs = at.row.documents(tokens, n)
    q = at.row.load("q", tokens, at.group, keys)
    k = at.row.load("k", tokens, at.group, keys)

    def head(index, sums):
        of_head = _head(job, refs, part * job.tiles.heads + index)
        *gradients, dg = _of_keys(of_head, n, tokens, keys, docs, q, k)
        if dg is not None:
            last = keys if job.decay == "key" else place
            at.row.store("dg", dg, tokens, of_head.head, last)
        return tuple(x + y for x, y in zip(sums, gradients, strict=True))

    zero = jnp.zeros(k.shape, jnp.float32)
    dq, dk = _over_blocks(job.tiles.heads, head, (zero, zero))
    of_row = jax.lax.div(at.head, jnp.int32(job.tiles.heads))
    at.row.store("dq", dq, tokens, of_row, keys)
    at.row.store("dk", dk, tokens, of_row, keys)


def _of_keys(at: _Head, n, tokens: Span, keys: Span, docs: Documents | None, q, k):
    """`(dq, dk, dg)` of one head; `dg` is `(C,)` of one decay of all keys, None of none."""
    job = at.job
    size, width = job.tiles.chunk, job.tiles.keys
    mask = tile.causal(size, docs)

    def block(index, carry):
        dpairs, dq, dk, dkeep = carry
        values = _span(index, job.tiles.inner)
        v = at.row.load("v", tokens, at.head, values)
        do = _scaled(job, at.row.load("do", tokens, at.head, values))
        state = at.row.load("states", n, at.head, values, keys)
        dstate = at.row.load("dstates", n, at.head, values, keys)
        if job.decay is not None:
            product = state.astype(jnp.float32) * dstate.astype(jnp.float32)
            dkeep = dkeep + product.sum(0, keepdims=True)
        dpairs = dpairs + tile.dot(do, v, "nt")
        dq = dq + tile.dot(do, state, "nn")
        return dpairs, dq, dk + tile.dot(v, dstate, "nn"), dkeep

    shapes = (size, size), (size, width), (size, width), (1, width)
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    dpairs, dq, dk, dkeep = _over_blocks(pl.cdiv(job.value_size, job.tiles.inner), block, zeros)

    dpairs = tile.only(mask, dpairs)
    decay, between = _decays(at, tokens, keys, docs, mask)
    dq = tile.entering(tile.times(dq, decay.into), docs)
    dk = tile.leaving(tile.times(dk, decay.out), docs)
    dkeep = tile.kept(dkeep, decay.keep, docs)
    dinto, dout = tile.times(q, dq), tile.times(k, dk)
    if job.decay == "key":
        more_q, more_k, dlevels = tile.pairs_by_key_gradients(q, k, decay.levels, docs, dpairs)
        g = at.log_decay(tokens, keys)
        sums = dinto, dout, dkeep
        return dq + more_q, dk + more_k, tile.decay_gradient(g, dlevels, *sums, docs, BY_HALVES)
    dg: jax.Array | None = None
    if job.decay == "head":
        pairs = tile.pairs_of(tile.dot(q, k, "nt"), between, mask)
        of_all = (x.sum(1, keepdims=True) for x in (dinto, dout, dkeep))
        dsums = chunks_gpu.PairSums(tile.only(_apart(size), dpairs * pairs), *of_all)
        dg = chunks_gpu.pair_sums_transpose(dsums).reshape(size, 1)
        dg = chunks.clamp_transpose(at.log_decay(tokens, keys), dg, docs).reshape(size)
    dscores = tile.pairs_of(dpairs, between, mask).astype(q.dtype)
    return dq + tile.dot(dscores, k, "nn"), dk + tile.dot(dscores, q, "tn"), dg


def _scaled(job: Job, do: jax.Array) -> jax.Array:
    return (job.scale * do.astype(jnp.float32)).astype(do.dtype)


def _apart(size: int) -> jax.Array:
    row, column = chunks.order(size)
    return row > column
