"""GPU kernels (Triton lowering): one pass over the states, then all chunks in parallel.

The first kernel hands blocks `(values, keys)` of the states from chunk to chunk, in order, and
keeps the state that enters each; the second lets every chunk answer its queries. Backward does the
same against time: the gradients of the states, then of every chunk's values, then of its queries,
keys and decays. A residual is one state a chunk, in the dtype of the values.

What a chunk computes is in `tile`, here in blocks of keys and of values, so that what a program
holds stays in registers. Heads of one group read the same queries and keys; their gradients are
written a head and summed behind the kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, chunks_gpu, compat, vjp
from pallas_kernels.chunks import Documents
from pallas_kernels.chunks_gpu import BY_HALVES, Row, Span
from pallas_kernels.compat import pl
from pallas_kernels.linear_attention import tile
from pallas_kernels.linear_attention.config import Config


class Tiles(NamedTuple):
    """What a program takes at once: `chunk` tokens, `keys` and `values` wide.

    `state` is the side of a block of the states that is handed from chunk to chunk.
    """

    chunk: int
    keys: int
    values: int
    state: int


def choose_tiles(length: int, key_size: int, value_size: int, by_key: bool, narrow: bool) -> Tiles:
    """Blocks that keep the forward kernels in registers; smaller ones for float32."""
    size = chunks_gpu.block_size
    chunk = size(length, 64 if narrow and not by_key else 32)
    values = size(value_size, 128 if narrow else 64)
    return Tiles(chunk, size(key_size, 64 if narrow else 32), values, 64 if narrow else 32)


class Job(NamedTuple):
    """What is static about one call."""

    batch: int
    length: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["head", "key"] | None
    scale: float
    tiles: Tiles

    @property
    def chunks(self) -> int:
        return -(-self.length // self.tiles.chunk)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_size // self.tiles.keys)

    @property
    def value_blocks(self) -> int:
        return -(-self.value_size // self.tiles.values)

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


def _states_kernel(job: Job, refs):
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


def _state_gradients_kernel(job: Job, refs):
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


def _read_kernel(job: Job, refs, *, backward: bool):
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
        keys = _span(index, job.tiles.keys)
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
    pairs, outer = _over_blocks(job.key_blocks, block, tuple(zeros))
    if job.decay != "key":
        pairs = tile.pairs_of(pairs, one.between, mask)
    if backward:
        do = at.row.load("do", tokens, at.head, values)
        do = (job.scale * do.astype(jnp.float32)).astype(do.dtype)
        dv = tile.dot(pairs.astype(do.dtype), do, "tn") + tile.leaving(outer, docs)
        at.row.store("dv", dv, tokens, at.head, values)
    else:
        v = at.row.load("v", tokens, at.head, values)
        o = tile.dot(pairs.astype(v.dtype), v, "nn") + tile.entering(outer, docs)
        at.row.store("o", job.scale * o, tokens, at.head, values)


def _keys_kernel(job: Job, refs):
    """The gradients of a block of a chunk's queries and keys, and what it gives to the decays."""
    at = _head(job, refs, pl.program_id(0))
    keys, n = _span(pl.program_id(1), job.tiles.keys), pl.program_id(2)
    tokens = at.tokens(n)
    docs = at.row.documents(tokens, n)
    size, width = job.tiles.chunk, job.tiles.keys
    mask = tile.causal(size, docs)

    def block(index, carry):
        dpairs, dq, dk, dkeep = carry
        values = _span(index, job.tiles.values)
        v = at.row.load("v", tokens, at.head, values)
        do = at.row.load("do", tokens, at.head, values)
        do = (job.scale * do.astype(jnp.float32)).astype(do.dtype)
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
    dpairs, dq, dk, dkeep = _over_blocks(job.value_blocks, block, zeros)

    dpairs = tile.only(mask, dpairs)
    decay, between = _decays(at, tokens, keys, docs, mask)
    q = at.row.load("q", tokens, at.group, keys)
    k = at.row.load("k", tokens, at.group, keys)
    dq = tile.entering(tile.times(dq, decay.into), docs)
    dk = tile.leaving(tile.times(dk, decay.out), docs)
    dkeep = tile.kept(dkeep, decay.keep, docs)
    dinto, dout = tile.times(q, dq), tile.times(k, dk)
    if job.decay == "key":
        more_q, more_k, dlevels = tile.pairs_by_key_gradients(q, k, decay.levels, docs, dpairs)
        g = at.log_decay(tokens, keys)
        dg = tile.decay_gradient(g, dlevels, dinto, dout, dkeep, docs, BY_HALVES)
        at.row.store("dg", dg, tokens, at.head, keys)
    else:
        dscores = tile.pairs_of(dpairs, between, mask).astype(q.dtype)
        more_q, more_k = tile.dot(dscores, k, "nn"), tile.dot(dscores, q, "tn")
    if job.decay == "head":
        pairs = tile.pairs_of(tile.dot(q, k, "nt"), between, mask)
        dsums = chunks_gpu.PairSums(
            tile.only(_apart(size), dpairs * pairs),
            *(x.sum(1, keepdims=True) for x in (dinto, dout, dkeep)),
        )
        dg = chunks_gpu.pair_sums_transpose(dsums).reshape(size)
        g = at.log_decay(tokens, keys).reshape(size)
        live = docs and docs._replace(real=docs.real.reshape(size))
        dg = chunks.clamp_transpose(g, dg, live)
        at.row.store("dg", dg, tokens, at.head, pl.program_id(1))
    at.row.store("dq", dq + more_q, tokens, at.head, keys)
    at.row.store("dk", dk + more_k, tokens, at.head, keys)


def _apart(size: int) -> jax.Array:
    row, column = chunks.order(size)
    return row > column


# The calls.


def _call(kernel, job: Job, name: str, grid, operands, outputs, *, warps: int):
    """Run `kernel(job, refs)` on named operands, None left out; `outputs` are structs by name."""
    operands = {key: x for key, x in operands.items() if x is not None}
    names = (*operands, *outputs)

    def body(*refs):
        kernel(job, dict(zip(names, refs, strict=True)))

    flops = 2 * job.key_size * job.value_size + job.tiles.chunk * (job.key_size + job.value_size)
    out = compat.pallas_call(
        body,
        backend="gpu",
        name=f"linear_attention_{name}",
        grid=grid,
        out_shape=[compat.out_struct(*x, *operands.values()) for x in outputs.values()],
        compiler_params=compat.triton.CompilerParams(num_warps=warps, num_stages=1),
        flops=flops * job.batch * job.length * job.heads,
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))


def _job(config: Config, q, v, log_decay) -> Job:
    (batch, length, groups, key_size), (heads, value_size) = q.shape, v.shape[2:]
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    narrow = v.dtype == jnp.bfloat16
    tiles = choose_tiles(length, key_size, value_size, decay == "key", narrow)
    if config.chunk:
        tiles = tiles._replace(chunk=config.chunk)
    sizes = batch, length, groups, heads, key_size, value_size
    return Job(*sizes, decay, config.scale, tiles)


def _grids(job: Job):
    """Of the kernels of states, of values and of keys."""
    heads = job.batch * job.heads
    side = job.tiles.state
    states = heads, -(-job.key_size // side), -(-job.value_size // side)
    return states, (heads, job.value_blocks, job.chunks), (heads, job.key_blocks, job.chunks)


def _operands(job: Job, q, k, v, log_decay, runs) -> dict[str, Any]:
    entering = None
    if runs is not None:
        padding = job.chunks * job.tiles.chunk - job.length
        entering = chunks.entering_runs(jnp.pad(runs, ((0, 0), (0, padding))), job.tiles.chunk)
    return {"q": q, "k": k, "v": v, "g": log_decay, "runs": runs, "entering_run": entering}


def _forward(config: Config, q, k, v, log_decay, initial_state, runs):
    """`(o, final_state)` and the state that enters each chunk."""
    job = _job(config, q, v, log_decay)
    of_states, of_values, _ = _grids(job)
    operands = _operands(job, q, k, v, log_decay, runs)
    initial = initial_state.swapaxes(2, 3)
    passed = _call(
        _states_kernel,
        job,
        "forward_states",
        of_states,
        operands | {"q": None, "initial": initial},
        {"states": (job.states, v.dtype), "final": (initial.shape, jnp.float32)},
        warps=4,
    )
    states = passed["states"]
    read = _call(
        functools.partial(_read_kernel, backward=False),
        job,
        "forward_outputs",
        of_values,
        operands | {"states": states},
        {"o": (v.shape, v.dtype)},
        warps=4,
    )
    return read["o"], passed["final"].swapaxes(2, 3), states


def _primal(config: Config, *arrays):
    return _forward(config, *arrays)[:2]


def _keep_states(config: Config, q, k, v, log_decay, initial_state, runs):
    *outputs, states = _forward(config, q, k, v, log_decay, initial_state, runs)
    return tuple(outputs), (q, k, v, log_decay, runs, states)


def _backward(config: Config, residuals, cotangents):
    """The gradients of all arguments."""
    q, k, v, log_decay, runs, states = residuals
    do, dfinal = cotangents
    job = _job(config, q, v, log_decay)
    of_states, of_values, of_keys = _grids(job)
    operands = _operands(job, q, k, v, log_decay, runs) | {"do": do}
    dfinal = dfinal.swapaxes(2, 3)
    passed = _call(
        _state_gradients_kernel,
        job,
        "backward_states",
        of_states,
        operands | {"k": None, "v": None, "dfinal": dfinal},
        {"dstates": (job.states, v.dtype), "dinitial": (dfinal.shape, jnp.float32)},
        warps=4,
    )
    dstates = passed["dstates"]
    dv = _call(
        functools.partial(_read_kernel, backward=True),
        job,
        "backward_values",
        of_values,
        operands | {"v": None, "dstates": dstates},
        {"dv": (v.shape, v.dtype)},
        warps=4,
    )["dv"]
    alone = job.groups == job.heads
    per_head = ((*v.shape[:3], job.key_size), q.dtype if alone else jnp.float32)
    outputs = {"dq": per_head, "dk": per_head}
    if job.decay is not None:
        by_block = (*v.shape[:3], job.key_blocks)
        wide = log_decay.shape if job.decay == "key" else by_block
        outputs["dg"] = (wide, log_decay.dtype if job.decay == "key" else jnp.float32)
    out = _call(
        _keys_kernel,
        job,
        "backward_keys",
        of_keys,
        operands | {"states": states, "dstates": dstates},
        outputs,
        warps=4,
    )
    dq, dk = out["dq"], out["dk"]
    if not alone:
        grouped = (*q.shape[:3], -1, job.key_size)
        dq, dk = (x.reshape(grouped).sum(3).astype(q.dtype) for x in (dq, dk))
    dlog_decay = out.get("dg")
    if job.decay == "head":
        dlog_decay = dlog_decay.sum(3).astype(log_decay.dtype)
    return dq, dk, dv, dlog_decay, passed["dinitial"].swapaxes(2, 3), None


linear_attention = vjp.join(_primal, _keep_states, _backward)


def largest_array(q, v, log_decay) -> int:
    """Elements of the largest array that a kernel addresses."""
    job = _job(Config(1.0), q, v, log_decay)
    tokens = job.batch * job.length * job.heads
    return max(tokens * max(job.key_size, job.value_size), math.prod(job.states))
