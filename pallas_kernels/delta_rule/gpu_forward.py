"""The forward kernels on a GPU (Triton lowering).

1. `chunk_scaled_dot_kkt` and `solve_tril`, all chunks at once: the scores of a chunk's tokens, the
   decays to the chunk's ends (in `chunk_local_cumsum` if every key has its own), the inverse that
   corrects values.
2. `chunk_fwd_h`, a program for some values of a head, from chunk to chunk: the new values, and the
   state that enters each chunk.
3. `chunk_fwd_o`, all chunks at once: the outputs.
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
    all_keys,
    broken,
    dot,
    each_level,
    factor_at,
    finite_if,
    inverse,
    sums,
    unit_product,
)
from pallas_kernels.delta_rule.tile import finite
from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.matrix_state.gpu import (
    KernelShape,
    PairSums,
    Row,
    Span,
    block,
    each_block,
    pair_sums,
)
from pallas_kernels.matrix_state.masks import SegmentMasks
from pallas_kernels.matrix_state.tile import (
    apply_decay,
    causal,
    decayed_state,
    strictly_causal,
    where_entering,
    where_leaving,
    zero_where_not,
)


def head_sums(chunk: Chunk) -> PairSums:
    """`PairSums` of the log decays of a head, which are clamped already."""
    g = chunk.column("g")
    return pair_sums(g, g.reshape(1, chunk.dims.tiles.chunk))


def clamped(chunk: Chunk, keys: Span, docs: SegmentMasks | None) -> jax.Array:
    """Log decays of some keys, `(C, keys)`."""
    return decay_sums.clamp(chunk.of_head("g", keys).astype(jnp.float32), docs)


def add_A_vector_decay(q, k, g, carry):
    """What some keys add to `(queries, keys)`, where tokens are of one document."""

    def level(at, carry):
        apart, factor = masks.parted(q.shape[0], at), factor_at(g, at)
        left, right = ((x.astype(jnp.float32) * factor).astype(k.dtype) for x in (q, k))
        return tuple(
            total + zero_where_not(apart, dot(x, right, "nt"))
            for total, x in zip(carry, (left, right), strict=True)
        )

    A_qk, keys = each_level(q.shape[0], level, carry)
    row, column = masks.token_indices(q.shape[0])
    same = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(1, keepdims=True)
    return A_qk + zero_where_not(row == column, same), keys


def chunk_scaled_dot_kkt(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Each chunk and head, grid `(chunks, B, H)`: the squares `A_qk` and `A_kk`; and
    `from_start` and `to_end` where one decay serves all keys.
    """
    chunk = Chunk(dims, Row(refs, pl.program_id(1)), pl.program_id(2), pl.program_id(0))
    docs = chunk.documents()

    def some_keys(n, carry):
        lanes = block(n, dims.tiles.keys)
        q, k = (chunk.of_group(name, lanes) for name in ("q", "k"))
        if dims.decay == "key":
            g = clamped(chunk, lanes, docs)
            return add_A_vector_decay(q, k, g, carry)
        A_qk, keys = carry
        return A_qk + dot(q, k, "nt"), keys + dot(k, k, "nt")

    zero = jnp.zeros((dims.tiles.chunk, dims.tiles.chunk), jnp.float32)
    A_qk, keys = each_block(dims.key_blocks, some_keys, (zero, zero))
    mask, earlier = causal(dims.tiles.chunk, docs), strictly_causal(dims.tiles.chunk, docs)
    if dims.decay == "head":
        head = head_sums(chunk)
        chunk.put_column("from_start", jnp.exp(head.g_cumsum))
        chunk.put_column("to_end", jnp.exp(head.g_to_end))
        pair_decay = zero_where_not(mask, jnp.exp(head.g_between))
        A_qk, keys = A_qk * pair_decay, keys * pair_decay
    chunk.put_square("A_qk", zero_where_not(mask, A_qk))
    chunk.put_square("A_kk", zero_where_not(earlier, keys))


def solve_tril(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Each chunk and head, grid `(chunks, B, H)`: the square `inverse`.

    Blocks of 32 tokens one after the other: whole chunks do not fit into registers.
    """
    row, head, index = Row(refs, pl.program_id(1)), pl.program_id(2), pl.program_id(0)
    side = min(dims.tiles.chunk, 32)
    count = dims.tiles.chunk // side
    spans = [block(n, side) for n in range(count)]
    docs = dims.segmented

    def lower(i: int, j: int) -> jax.Array:
        beta = row.load("beta", Span(index * dims.tiles.chunk + i * side, side), head)
        return beta.astype(jnp.float32)[:, None] * row.load("A_kk", head, index, spans[i], spans[j])

    done: dict[tuple[int, int], jax.Array] = {}
    for i in range(count):
        own = inverse(lower(i, i), docs)
        for j in range(count):
            part = own if j == i else jnp.zeros_like(own)
            if j < i:
                retrieved = [dot(lower(i, n), finite_if(done[n, j], docs)) for n in range(j, i)]
                part = -unit_product(own, functools.reduce(jnp.add, retrieved), docs)
            done[i, j] = part
            row.store("inverse", part, head, index, spans[i], spans[j])


def chunk_local_cumsum(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Each chunk and some keys, grid `(chunks, B, H * keys)`: `from_start` and `to_end`, of
    each key.
    """
    head = jax.lax.div(pl.program_id(2), jnp.int32(dims.key_blocks))
    keys = block(pl.program_id(2) - head * dims.key_blocks, dims.tiles.keys)
    chunk = Chunk(dims, Row(refs, pl.program_id(1)), head, pl.program_id(0))
    g = clamped(chunk, keys, chunk.documents())
    row, column = masks.token_indices(dims.tiles.chunk)
    chunk.put("from_start", jnp.exp(sums(row >= column, g)), keys)
    chunk.put("to_end", jnp.exp(sums(row < column, g)), keys)


def chunk_fwd_h(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Some values of a head, grid `(values, B, H)`: `v_new` and `states`; and `final`."""
    row, head = Row(refs, pl.program_id(1)), pl.program_id(2)
    keys, values = Span(0, all_keys(dims)), block(pl.program_id(0), dims.tiles.state_values)

    def step(index, state):
        chunk = Chunk(dims, row, head, index)
        docs = chunk.documents()
        chunk.put_state("states", state, keys, values)
        k = chunk.of_group("k", keys)
        retrieved = dot(
            apply_decay(k, chunk.factor("from_start", keys)).astype(k.dtype), state.astype(k.dtype)
        )
        error = chunk.of_head("v", values).astype(jnp.float32) - where_entering(retrieved, docs)
        solved = unit_product(chunk.square("inverse"), chunk.column("beta") * error, dims.segmented)
        v_new = broken(solved, docs).astype(k.dtype)
        chunk.put("v_new", v_new, values)
        keys_out = apply_decay(k, chunk.factor("to_end", keys)).astype(k.dtype)
        added = dot(keys_out, where_leaving(v_new, docs), "tn")
        return decayed_state(state, chunk.chunk_decay(keys), docs) + added

    state = row.load("initial", head, keys, values)
    state = jax.lax.fori_loop(0, dims.chunks, step, state)
    row.store("final", state, head, keys, values)


def from_state(chunk: Chunk, name: str, values: Span) -> jax.Array:
    """What queries ("q") or keys ("k") read of the state that enters, `(C, values)`."""
    dims = chunk.dims

    def some_keys(n, total):
        keys = block(n, dims.tiles.keys)
        x = chunk.of_group(name, keys)
        x = apply_decay(x, chunk.factor("from_start", keys)).astype(x.dtype)
        return total + dot(x, chunk.state("states", keys, values))

    zero = jnp.zeros((dims.tiles.chunk, values.size), jnp.float32)
    return each_block(dims.key_blocks, some_keys, zero)


def chunk_fwd_o(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Each chunk and some values, grid `(chunks, B, H * values)`: `o`."""
    head = jax.lax.div(pl.program_id(2), jnp.int32(dims.value_blocks))
    values = block(pl.program_id(2) - head * dims.value_blocks, dims.tiles.values)
    chunk = Chunk(dims, Row(refs, pl.program_id(1)), head, pl.program_id(0))
    docs = chunk.documents()
    o = where_entering(from_state(chunk, "q", values), docs)
    v_new = chunk.of_head("v_new", values)
    o = dims.scale * (o + dot(chunk.square("A_qk"), finite(v_new, docs)))
    if docs is not None:
        o = zero_where_not(docs.real, jnp.where(jnp.abs(v_new) < jnp.inf, o, jnp.nan))
    chunk.put("o", o, values)
