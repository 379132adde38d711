"""What the programs of the GPU kernels load, compute and store.

A program sees one head of one row, or some heads of a group in turn, and blocks of its keys and
values; what a chunk computes is in `matrix_state.tile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.matrix_state import decay_sums, tile
from pallas_kernels.matrix_state import gpu as matrix_gpu
from pallas_kernels.matrix_state.gpu import SUMMATION, Row, Span, block, each_block, scaled
from pallas_kernels.matrix_state.masks import SegmentMasks


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


class KernelShape(matrix_gpu.KernelShape):
    """What is static about one call, and the grids of its kernels."""

    __slots__ = ()

    @property
    def state_grid(self) -> tuple[int, int, int]:
        """Grid of the kernels that hand states on."""
        side = self.tiles.state
        blocks = pl.cdiv(self.key_size, side), pl.cdiv(self.value_size, side)
        return self.batch * self.heads, *blocks

    @property
    def value_grid(self) -> tuple[int, int, int]:
        """Grid of the kernels that make a block of values."""
        return self.batch * self.heads, self.value_blocks, self.chunks

    @property
    def key_grid(self) -> tuple[int, int, int]:
        """Grid of the kernel that makes a block of the gradients of queries and keys."""
        return self.batch * self.heads // self.tiles.heads, self.key_blocks, self.chunks

    @property
    def states(self) -> tuple[int, ...]:
        return self.batch, self.chunks, self.heads, self.value_size, self.key_size


# What a program loads of one chunk.


class _Head(NamedTuple):
    """One head of one row."""

    dims: KernelShape
    row: Row
    head: jax.Array
    group: jax.Array

    def tokens(self, chunk, **options) -> Span:
        return Span(chunk * self.dims.tiles.chunk, self.dims.tiles.chunk, **options)

    def log_decay(self, tokens: Span, keys: Span | None):
        """`(C, BK)`, or `(C, 1)` for all keys, float32; None where nothing decays."""
        dims = self.dims
        if dims.decay is None:
            return None
        if dims.decay == "key":
            return self.row.load("g", tokens, self.head, keys).astype(jnp.float32)
        return self.row.load("g", tokens, self.head).astype(jnp.float32)[:, None]


def _head(dims: KernelShape, refs: dict[str, Any], index) -> _Head:
    """The index-th pair of row and head."""
    heads = jnp.int32(dims.heads)
    row, head = jax.lax.div(index, heads), jax.lax.rem(index, heads)
    group = jax.lax.div(head, jnp.int32(dims.heads // dims.groups))
    return _Head(dims, Row(refs, row), head, group)


# The states, from chunk to chunk.


def chunk_fwd_h(dims: KernelShape, refs):
    """A block of the state before each chunk, and after the last."""
    at = _head(dims, refs, pl.program_id(0))
    keys, values = (block(pl.program_id(n), dims.tiles.state) for n in (1, 2))

    def step(n, state):
        at.row.store("states", state, n, at.head, values, keys)
        # The last token first: what is after a token is then the sum of those before it.
        tokens = at.tokens(n, backwards=True)
        docs = at.row.documents(tokens, n)
        k = at.row.load("k", tokens, at.group, keys)
        v = at.row.load("v", tokens, at.head, values)
        decay = tile.Decay(None, None, None, None)
        if dims.decay is not None:
            after = at.tokens(n, backwards=True, by=1)
            g_to_end = jnp.cumsum(_live(at, after, keys), axis=0)
            decay = decay._replace(to_end=jnp.exp(g_to_end), chunk_decay=_chunk_decay(at, n, keys))
        return tile.decayed_state(state, decay.chunk_decay, docs) + tile.state_update(
            k, v, decay, docs
        )

    first = at.row.load("initial", at.head, values, keys)
    final = jax.lax.fori_loop(0, dims.chunks, step, first)
    at.row.store("final", final, at.head, values, keys)


def chunk_bwd_dh(dims: KernelShape, refs):
    """A block of the gradient of the state after each chunk, and of the one before the first."""
    at = _head(dims, refs, pl.program_id(0))
    keys, values = (block(pl.program_id(n), dims.tiles.state) for n in (1, 2))

    def step(i, dstate):
        n = dims.chunks - 1 - i
        at.row.store("dstates", dstate, n, at.head, values, keys)
        tokens = at.tokens(n)
        docs = at.row.documents(tokens, n)
        q = at.row.load("q", tokens, at.group, keys)
        do = at.row.load("do", tokens, at.head, values)
        decay = tile.Decay(None, None, None, None)
        if dims.decay is not None:
            from_start = jnp.cumsum(_live(at, tokens, keys), axis=0)
            decay = decay._replace(
                from_start=jnp.exp(from_start), chunk_decay=_chunk_decay(at, n, keys)
            )
        more = tile.output_vjp_state(q, do, decay, docs, dims.scale)
        return tile.decayed_state(dstate, decay.chunk_decay, docs) + more

    last = at.row.load("dfinal", at.head, values, keys)
    first = jax.lax.fori_loop(0, dims.chunks, step, last)
    at.row.store("dinitial", first, at.head, values, keys)


def _live(at: _Head, tokens: Span, keys: Span | None) -> jax.Array:
    """Log decays ready to be summed."""
    g = jnp.maximum(at.log_decay(tokens, keys), decay_sums.MIN_LOG_DECAY)
    if "segment_index" not in at.row.refs:
        return g
    return tile.zero_where_not((at.row.load("segment_index", tokens) > 0)[:, None], g)


def _chunk_decay(at: _Head, n, keys: Span) -> jax.Array:
    return jnp.exp(_live(at, at.tokens(n), keys).sum(0, keepdims=True))


# One chunk.


class _Decays(NamedTuple):
    """The decays of a chunk, and of a block of keys where each has its own.

    `pair_decay (C, C)` is for one decay of all keys; then the decay has no levels.
    """

    decay: tile.Decay
    pair_decay: jax.Array | None


_NO_DECAY = _Decays(tile.Decay(None, None, None, None), None)


def _decays(at: _Head, tokens: Span, keys: Span | None, docs: SegmentMasks | None, mask) -> _Decays:
    if at.dims.decay is None:
        return _NO_DECAY
    if at.dims.decay == "key":
        return _Decays(tile.decay(at.log_decay(tokens, keys), docs, SUMMATION), None)
    row = _live(at, tokens, keys)
    sums = matrix_gpu.pair_sums(row, row.reshape(1, -1))
    decay = tile.Decay(None, jnp.exp(sums.g_cumsum), jnp.exp(sums.g_to_end), jnp.exp(sums.g_last))
    return _Decays(decay, tile.zero_where_not(mask, jnp.exp(sums.g_between)))


def chunk_fwd_o_or_bwd_dv(dims: KernelShape, refs, *, backward: bool):
    """The outputs of a chunk, or the gradients of its values.

    They are the same sums with time reversed: those over the pairs of tokens, and what a token
    reads of the state that enters, or writes to the one that leaves.
    """
    at = _head(dims, refs, pl.program_id(0))
    values, n = block(pl.program_id(1), dims.tiles.values), pl.program_id(2)
    tokens = at.tokens(n)
    docs = at.row.documents(tokens, n)
    size = dims.tiles.chunk
    mask = tile.causal(size, docs)
    one = _NO_DECAY if dims.decay == "key" else _decays(at, tokens, None, docs, mask)

    def some(index, carry):
        A, outer = carry
        keys = block(index, dims.tiles.inner)
        q = at.row.load("q", tokens, at.group, keys)
        k = at.row.load("k", tokens, at.group, keys)
        decay = one.decay
        if dims.decay == "key":
            decay = _decays(at, tokens, keys, docs, mask).decay
            A = A + tile.A_vector_decay(q, k, decay.level_sums, docs)
        else:
            A = A + tile.dot(q, k, "nt")
        name, x, factor = (
            ("dstates", k, decay.to_end) if backward else ("states", q, decay.from_start)
        )
        state = at.row.load(name, n, at.head, values, keys)
        return A, outer + tile.dot(tile.apply_decay(x, factor).astype(x.dtype), state, "nt")

    zeros = (jnp.zeros((size, s), jnp.float32) for s in (size, dims.tiles.values))
    A, outer = each_block(pl.cdiv(dims.key_size, dims.tiles.inner), some, tuple(zeros))
    if dims.decay != "key":
        A = tile.masked_A(A, one.pair_decay, mask)
    if backward:
        do = scaled(dims, at.row.load("do", tokens, at.head, values))
        dv = tile.dot(A.astype(do.dtype), do, "tn") + tile.where_leaving(outer, docs)
        at.row.store("dv", dv, tokens, at.head, values)
    else:
        v = at.row.load("v", tokens, at.head, values)
        o = tile.dot(A.astype(v.dtype), v, "nn") + tile.where_entering(outer, docs)
        at.row.store("o", dims.scale * o, tokens, at.head, values)


def chunk_bwd_dqkg(dims: KernelShape, refs):
    """The gradients of a block of a chunk's queries and keys, summed over some heads of a group,
    and what each head gives to its decays."""
    head_block, place, n = map(pl.program_id, range(3))
    at = _head(dims, refs, head_block * dims.tiles.heads)
    keys = block(place, dims.tiles.keys)
    tokens = at.tokens(n)
    docs = at.row.documents(tokens, n)
    q = at.row.load("q", tokens, at.group, keys)
    k = at.row.load("k", tokens, at.group, keys)

    def head(index, sums):
        of_head = _head(dims, refs, head_block * dims.tiles.heads + index)
        *gradients, dg = _of_keys(of_head, n, tokens, keys, docs, q, k)
        if dg is not None:
            last = keys if dims.decay == "key" else place
            at.row.store("dg", dg, tokens, of_head.head, last)
        return tuple(x + y for x, y in zip(sums, gradients, strict=True))

    zero = jnp.zeros(k.shape, jnp.float32)
    dq, dk = each_block(dims.tiles.heads, head, (zero, zero))
    of_row = jax.lax.div(at.head, jnp.int32(dims.tiles.heads))
    at.row.store("dq", dq, tokens, of_row, keys)
    at.row.store("dk", dk, tokens, of_row, keys)


def _of_keys(at: _Head, n, tokens: Span, keys: Span, docs: SegmentMasks | None, q, k):
    """`(dq, dk, dg)` of one head; `dg` is `(C,)` of one decay of all keys, None of none."""
    dims = at.dims
    size, width = dims.tiles.chunk, dims.tiles.keys
    mask = tile.causal(size, docs)

    def some(index, carry):
        dA, dq, dk, dg_last = carry
        values = block(index, dims.tiles.inner)
        v = at.row.load("v", tokens, at.head, values)
        do = scaled(dims, at.row.load("do", tokens, at.head, values))
        state = at.row.load("states", n, at.head, values, keys)
        dstate = at.row.load("dstates", n, at.head, values, keys)
        if dims.decay is not None:
            product = state.astype(jnp.float32) * dstate.astype(jnp.float32)
            dg_last = dg_last + product.sum(0, keepdims=True)
        dA = dA + tile.dot(do, v, "nt")
        dq = dq + tile.dot(do, state, "nn")
        return dA, dq, dk + tile.dot(v, dstate, "nn"), dg_last

    shapes = (size, size), (size, width), (size, width), (1, width)
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    dA, dq, dk, dg_last = each_block(pl.cdiv(dims.value_size, dims.tiles.inner), some, zeros)

    dA = tile.zero_where_not(mask, dA)
    decay, pair_decay = _decays(at, tokens, keys, docs, mask)
    dq = tile.where_entering(tile.apply_decay(dq, decay.from_start), docs)
    dk = tile.where_leaving(tile.apply_decay(dk, decay.to_end), docs)
    dg_last = tile.decayed_state(dg_last, decay.chunk_decay, docs)
    dg_cumsum, dg_to_end = tile.apply_decay(q, dq), tile.apply_decay(k, dk)
    if dims.decay == "key":
        more_q, more_k, dlevels = tile.A_vector_decay_vjp(q, k, decay.level_sums, docs, dA)
        g = at.log_decay(tokens, keys)
        sums = dg_cumsum, dg_to_end, dg_last
        return dq + more_q, dk + more_k, tile.log_decay_vjp(g, dlevels, *sums, docs, SUMMATION)
    dg: jax.Array | None = None
    if dims.decay == "head":
        A = tile.masked_A(tile.dot(q, k, "nt"), pair_decay, mask)
        of_all = (x.sum(1, keepdims=True) for x in (dg_cumsum, dg_to_end, dg_last))
        dsums = matrix_gpu.PairSums(
            tile.zero_where_not(tile.strictly_causal(size, None), dA * A), *of_all
        )
        dg = matrix_gpu.pair_sums_vjp(dsums).reshape(size, 1)
        dg = decay_sums.clamp_vjp(at.log_decay(tokens, keys), dg, docs).reshape(size)
    dscores = tile.masked_A(dA, pair_decay, mask).astype(q.dtype)
    return dq + tile.dot(dscores, k, "nn"), dk + tile.dot(dscores, q, "tn"), dg
