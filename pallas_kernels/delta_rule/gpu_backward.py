"""The backward kernels on a GPU (Triton lowering), after `gpu_forward.prepare`.

1. `retreat`, a program for some values of a head, from the last chunk to the first: the gradient of
   the state that leaves each chunk, and of what each chunk's inverse was applied to.
2. `weigh`, all chunks at once: the corrected values again, the gradients of values, of beta and of
   what tokens have in common.
3. `attribute`, all chunks and some keys at once: the gradients of queries, keys and decays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule.gpu_forward import clamped, from_state, head_sums, masks
from pallas_kernels.delta_rule.gpu_tile import (
    Chunk,
    Job,
    block,
    broken,
    dot,
    each_block,
    each_level,
    factor_at,
    factor_at_transpose,
    sums,
    unit_product,
)
from pallas_kernels.delta_rule.tile import finite
from pallas_kernels.linear_attention.tile import entering, kept, leaving, only, times
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.chunks import Documents
from pallas_kernels.matrix_state.chunks_gpu import Row, Span


def _cotangent(chunk: Chunk, values: Span) -> jax.Array:
    """Of the outputs before they are scaled, an operand."""
    do = chunk.of_head("do", values)
    return (chunk.job.scale * do.astype(jnp.float32)).astype(do.dtype)


def retreat(job: Job, refs: Mapping[str, Any]) -> None:
    """Of some values of a head, `(values, B, H)`: `dstates`, `dsolved` and `dinitial`."""
    row, head = Row(refs, pl.program_id(1)), pl.program_id(2)
    keys, values = Span(0, job.all_keys), block(pl.program_id(0), job.tiles.walked)

    def step(back, dstate):
        chunk = Chunk(job, row, head, job.chunks - 1 - back)
        docs = chunk.documents()
        chunk.put_state("dstates", dstate, keys, values)
        do, k = _cotangent(chunk, values), chunk.of_group("k", keys)
        written = times(k, chunk.factor("out", keys)).astype(k.dtype)
        dvalues = leaving(dot(written, dstate.astype(k.dtype)), docs)
        dvalues = (dvalues + dot(chunk.square("pairs"), do, "tn")).astype(k.dtype)
        solved = chunk.square("inverse")
        if docs is not None:
            solved = only(docs.same, finite(solved, docs))
        dsolved = dot(solved, finite(dvalues, docs), "tn")
        chunk.put("dsolved", dsolved, values)
        dheld = -entering(chunk.column("beta") * dsolved, docs).astype(k.dtype)
        into = chunk.factor("into", keys)
        q_into, k_into = (times(x, into).astype(k.dtype) for x in (chunk.of_group("q", keys), k))
        dstate = kept(dstate, chunk.keep(keys), docs)
        dstate = dstate + dot(q_into, entering(do, docs), "tn")
        return dstate + dot(k_into, dheld, "tn")

    dstate = row.load("dfinal", head, keys, values)
    dstate = jax.lax.fori_loop(0, job.chunks, step, dstate)
    row.store("dinitial", dstate, head, keys, values)


def weigh(job: Job, refs: Mapping[str, Any]) -> None:
    """Of each chunk and head, `(chunks, B, H)`: `corrected`, `dv`, `dbeta`, `dg` of a decay that
    serves all keys, as far as it comes from pairs, and the squares `dqueries` and `dkeys`.
    """
    chunk = Chunk(job, Row(refs, pl.program_id(1)), pl.program_id(2), pl.program_id(0))
    docs, beta = chunk.documents(), chunk.column("beta")

    def some_values(n, carry):
        dqueries, dkeys, dbeta = carry
        values = block(n, job.tiles.values)
        held = entering(from_state(chunk, "k", values), docs)
        error = chunk.of_head("v", values).astype(jnp.float32) - held
        written = broken(unit_product(chunk.square("inverse"), beta * error, job.segmented), docs)
        written = written.astype(job.dtype)
        dsolved = chunk.of_head("dsolved", values)
        chunk.put("corrected", written, values)
        chunk.put("dv", beta * dsolved.astype(jnp.float32), values)
        dqueries = dqueries + dot(_cotangent(chunk, values), written, "nt")
        dkeys = dkeys + dot(dsolved, written, "nt")
        return dqueries, dkeys, dbeta + (dsolved.astype(jnp.float32) * error).sum(1, keepdims=True)

    zero = jnp.zeros((job.chunk, job.chunk), jnp.float32)
    carry = zero, zero, jnp.zeros((job.chunk, 1), jnp.float32)
    dqueries, dkeys, dbeta = each_block(job.value_blocks, some_values, carry)
    causal, earlier = masks(job.chunk, docs)
    keys = chunk.square("keys")
    dqueries, dkeys = only(causal, dqueries), only(earlier, -dkeys)
    chunk.put_column("dbeta", dbeta + (dkeys * keys).sum(1, keepdims=True))
    dkeys = beta * dkeys
    if job.decay == "head":
        dlogs = dqueries * chunk.square("pairs").astype(jnp.float32) + dkeys * keys
        chunk.put_column("dg", _crossing(finite(dlogs, docs)))
        between = only(causal, jnp.exp(head_sums(chunk).between))
        dqueries, dkeys = dqueries * between, dkeys * between
    chunk.put_square("dqueries", dqueries)
    chunk.put_square("dkeys", dkeys)


def _crossing(dlogs: jax.Array) -> jax.Array:
    """What pairs give to the decays between them: the sum over `i >= t > j` for each t, `(C,)`."""
    row, column = chunks.order(dlogs.shape[0])
    return only(column < row, sums(column >= row, dlogs)).sum(1)


def attribute(job: Job, refs: Mapping[str, Any]) -> None:
    """Of each chunk and some keys, `(chunks, B, H * keys)`: `dq`, `dk` and `dg`."""
    head = jax.lax.div(pl.program_id(2), jnp.int32(job.key_blocks))
    place = pl.program_id(2) - head * job.key_blocks
    keys = block(place, job.tiles.keys)
    chunk = Chunk(job, Row(refs, pl.program_id(1)), head, pl.program_id(0))
    docs = chunk.documents()

    def some_values(n, carry):
        dq, dk, dread, dkeep = carry
        values = block(n, job.tiles.values)
        state, dstate = (chunk.state(name, keys, values) for name in ("states", "dstates"))
        dq = dq + dot(_cotangent(chunk, values), state, "nt")
        dk = dk + dot(chunk.of_head("corrected", values), dstate, "nt")
        dread = dread - dot(chunk.of_head("dv", values), state, "nt")
        if job.decay is not None:
            products = state.astype(jnp.float32) * dstate.astype(jnp.float32)
            dkeep = dkeep + products.sum(1, keepdims=True)
        return dq, dk, dread, dkeep

    zero = jnp.zeros((job.chunk, keys.size), jnp.float32)
    carry = zero, zero, zero, jnp.zeros((keys.size, 1), jnp.float32)
    dq, dk, dread, dkeep = each_block(job.value_blocks, some_values, carry)
    into = chunk.factor("into", keys)
    dq, dread = (entering(times(x, into), docs) for x in (dq, dread))
    dk = leaving(times(dk, chunk.factor("out", keys)), docs)
    q, k = (chunk.of_group(name, keys) for name in ("q", "k"))
    dinto, dout = times(q, dq) + times(k, dread), times(k, dk)
    dkeep = kept(dkeep, chunk.keep(keys), docs).reshape(1, keys.size)
    dk = dk + dread
    dqueries, dkeys = chunk.square("dqueries"), chunk.square("dkeys")
    if job.decay == "key":
        dinto, dout, dkeep = (finite(x, docs) for x in (dinto, dout, dkeep))
        row, column = chunks.order(job.chunk)
        dg = sums(column >= row, dinto) + sums(column < row, dout) + dkeep
        g = clamped(chunk, keys, docs)
        dq, dk, dg = _add_pairs_by_key(q, k, g, docs, dqueries, dkeys, (dq, dk, dg))
        given = chunk.of_head("g", keys).astype(jnp.float32)
        chunk.put("dg", chunks.clamp_transpose(given, dg, docs), keys)
    else:
        dq = dq + dot(dqueries, k)
        dk = dk + dot(dqueries, q, "tn") + dot(dkeys, k) + dot(dkeys, k, "tn")
    if job.decay == "head":
        every = (finite(x.sum(1, keepdims=True), docs) for x in (dinto, dout, dkeep))
        chunk.put_column("dg", _to_the_ends(*every), place)
    chunk.put("dq", dq, keys)
    chunk.put("dk", dk, keys)


def _to_the_ends(dinto: jax.Array, dout: jax.Array, dkeep: jax.Array) -> jax.Array:
    """What the decays to a chunk's ends, `(C, 1)` and `(1, 1)`, give to those in it, `(1, C)`."""
    other, token = chunks.order(dinto.shape[0])
    parts = only(other >= token, jnp.broadcast_to(dinto, token.shape))
    parts = parts + only(other < token, jnp.broadcast_to(dout, token.shape))
    return parts.sum(0, keepdims=True) + dkeep


def _add_pairs_by_key(q, k, g, docs: Documents | None, dqueries, dkeys, carry):
    """What `gpu_forward.add_pairs_by_key` gives to `(dq, dk, dg)`."""
    size, dtype = q.shape[0], k.dtype
    q, k = (x.astype(jnp.float32) for x in (q, k))

    def level(at, carry):
        dq, dk, dg = carry
        apart, factor = chunks.parted(size, at), factor_at(g, at)
        left, right = ((x * factor).astype(dtype) for x in (q, k))
        of_queries, of_keys = (only(apart, x) for x in (dqueries, dkeys))
        more_q = factor * dot(of_queries, right)
        more_k = dot(of_queries, left, "tn") + dot(of_keys, right) + dot(of_keys, right, "tn")
        more_k = factor * more_k
        dlogs = finite(q * more_q + k * more_k, docs)
        return dq + more_q, dk + more_k, dg + factor_at_transpose(dlogs, at)

    dq, dk, dg = each_level(size, level, carry)
    row, column = chunks.order(size)
    same = only(row == column, dqueries).astype(jnp.float32).sum(1, keepdims=True)
    return dq + same * k, dk + same * q, dg
