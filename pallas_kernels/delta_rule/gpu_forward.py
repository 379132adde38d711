"""The forward kernels on a GPU (Triton lowering).

1. `prepare` and `invert`, all chunks at once: what tokens of a chunk have in common, the decays to
   the chunk's ends (in `reach` if every key has its own), the inverse that corrects values.
2. `walk`, a program for some values of a head, from chunk to chunk: the corrected values, and the
   state that enters each chunk.
3. `read`, all chunks at once: the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule.gpu_tile import (
    Chunk,
    Job,
    block,
    broken,
    dot,
    each_block,
    each_level,
    factor_at,
    finite_if,
    inverse,
    sums,
    unit_product,
)
from pallas_kernels.delta_rule.tile import finite
from pallas_kernels.linear_attention.tile import entering, kept, leaving, only, times
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.chunks import Documents
from pallas_kernels.matrix_state.chunks_gpu import PairSums, Row, Span, pair_sums


def masks(size: int, docs: Documents | None) -> tuple[jax.Array, jax.Array]:
    """The pairs of which queries know, and those of which keys know."""
    row, column = chunks.order(size)
    return chunks.within(row >= column, docs), chunks.within(row > column, docs)


def head_sums(chunk: Chunk) -> PairSums:
    """Of the log decays of a head, which are clamped already."""
    g = chunk.column("g")
    return pair_sums(g, g.reshape(1, chunk.job.chunk))


def clamped(chunk: Chunk, keys: Span, docs: Documents | None) -> jax.Array:
    """Log decays of some keys, `(C, keys)`."""
    return chunks.clamp(chunk.of_head("g", keys).astype(jnp.float32), docs)


def add_pairs_by_key(q, k, g, carry):
    """What some keys add to `(queries, keys)`, where tokens are of one document."""

    def level(at, carry):
        apart, factor = chunks.parted(q.shape[0], at), factor_at(g, at)
        left, right = ((x.astype(jnp.float32) * factor).astype(k.dtype) for x in (q, k))
        return tuple(
            total + only(apart, dot(x, right, "nt"))
            for total, x in zip(carry, (left, right), strict=True)
        )

    queries, keys = each_level(q.shape[0], level, carry)
    row, column = chunks.order(q.shape[0])
    same = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(1, keepdims=True)
    return queries + only(row == column, same), keys


def prepare(job: Job, refs: Mapping[str, Any]) -> None:
    """Of each chunk and head, `(chunks, B, H)`: the squares `pairs` and `keys`; and `into` and
    `out` where one decay serves all keys.
    """
    chunk = Chunk(job, Row(refs, pl.program_id(1)), pl.program_id(2), pl.program_id(0))
    docs = chunk.documents()

    def some_keys(n, carry):
        lanes = block(n, job.tiles.keys)
        q, k = (chunk.of_group(name, lanes) for name in ("q", "k"))
        if job.decay == "key":
            g = clamped(chunk, lanes, docs)
            return add_pairs_by_key(q, k, g, carry)
        queries, keys = carry
        return queries + dot(q, k, "nt"), keys + dot(k, k, "nt")

    zero = jnp.zeros((job.chunk, job.chunk), jnp.float32)
    queries, keys = each_block(job.key_blocks, some_keys, (zero, zero))
    causal, earlier = masks(job.chunk, docs)
    if job.decay == "head":
        head = head_sums(chunk)
        chunk.put_column("into", jnp.exp(head.into))
        chunk.put_column("out", jnp.exp(head.out))
        between = only(causal, jnp.exp(head.between))
        queries, keys = queries * between, keys * between
    chunk.put_square("pairs", only(causal, queries))
    chunk.put_square("keys", only(earlier, keys))


def invert(job: Job, refs: Mapping[str, Any]) -> None:
    """Of each chunk and head, `(chunks, B, H)`: the square `inverse`.

    Blocks of 32 tokens one after the other: whole chunks do not fit into registers.
    """
    row, head, index = Row(refs, pl.program_id(1)), pl.program_id(2), pl.program_id(0)
    side = min(job.chunk, 32)
    count = job.chunk // side
    spans = [block(n, side) for n in range(count)]
    docs = job.segmented

    def lower(i: int, j: int) -> jax.Array:
        beta = row.load("beta", Span(index * job.chunk + i * side, side), head)
        return beta.astype(jnp.float32)[:, None] * row.load("keys", head, index, spans[i], spans[j])

    done: dict[tuple[int, int], jax.Array] = {}
    for i in range(count):
        own = inverse(lower(i, i), docs)
        for j in range(count):
            part = own if j == i else jnp.zeros_like(own)
            if j < i:
                held = [dot(lower(i, n), finite_if(done[n, j], docs)) for n in range(j, i)]
                part = -unit_product(own, functools.reduce(jnp.add, held), docs)
            done[i, j] = part
            row.store("inverse", part, head, index, spans[i], spans[j])


def reach(job: Job, refs: Mapping[str, Any]) -> None:
    """Of each chunk and some keys, `(chunks, B, H * keys)`: `into` and `out`, each key its own."""
    head = jax.lax.div(pl.program_id(2), jnp.int32(job.key_blocks))
    keys = block(pl.program_id(2) - head * job.key_blocks, job.tiles.keys)
    chunk = Chunk(job, Row(refs, pl.program_id(1)), head, pl.program_id(0))
    g = clamped(chunk, keys, chunk.documents())
    row, column = chunks.order(job.chunk)
    chunk.put("into", jnp.exp(sums(row >= column, g)), keys)
    chunk.put("out", jnp.exp(sums(row < column, g)), keys)


def walk(job: Job, refs: Mapping[str, Any]) -> None:
    """Of some values of a head, `(values, B, H)`: `corrected` and `states`; and `final`."""
    row, head = Row(refs, pl.program_id(1)), pl.program_id(2)
    keys, values = Span(0, job.all_keys), block(pl.program_id(0), job.tiles.walked)

    def step(index, state):
        chunk = Chunk(job, row, head, index)
        docs = chunk.documents()
        chunk.put_state("states", state, keys, values)
        k = chunk.of_group("k", keys)
        held = dot(times(k, chunk.factor("into", keys)).astype(k.dtype), state.astype(k.dtype))
        error = chunk.of_head("v", values).astype(jnp.float32) - entering(held, docs)
        solved = unit_product(chunk.square("inverse"), chunk.column("beta") * error, job.segmented)
        written = broken(solved, docs).astype(k.dtype)
        chunk.put("corrected", written, values)
        keys_out = times(k, chunk.factor("out", keys)).astype(k.dtype)
        added = dot(keys_out, leaving(written, docs), "tn")
        return kept(state, chunk.keep(keys), docs) + added

    state = row.load("initial", head, keys, values)
    state = jax.lax.fori_loop(0, job.chunks, step, state)
    row.store("final", state, head, keys, values)


def from_state(chunk: Chunk, name: str, values: Span) -> jax.Array:
    """What queries ("q") or keys ("k") read of the state that enters, `(C, values)`."""
    job = chunk.job

    def some_keys(n, total):
        keys = block(n, job.tiles.keys)
        x = chunk.of_group(name, keys)
        x = times(x, chunk.factor("into", keys)).astype(x.dtype)
        return total + dot(x, chunk.state("states", keys, values))

    zero = jnp.zeros((job.chunk, values.size), jnp.float32)
    return each_block(job.key_blocks, some_keys, zero)


def read(job: Job, refs: Mapping[str, Any]) -> None:
    """Of each chunk and some values, `(chunks, B, H * values)`: `o`."""
    head = jax.lax.div(pl.program_id(2), jnp.int32(job.value_blocks))
    values = block(pl.program_id(2) - head * job.value_blocks, job.tiles.values)
    chunk = Chunk(job, Row(refs, pl.program_id(1)), head, pl.program_id(0))
    docs = chunk.documents()
    o = entering(from_state(chunk, "q", values), docs)
    written = chunk.of_head("corrected", values)
    o = job.scale * (o + dot(chunk.square("pairs"), finite(written, docs)))
    if docs is not None:
        o = only(docs.real, jnp.where(jnp.abs(written) < jnp.inf, o, jnp.nan))
    chunk.put("o", o, values)
