"""The backward kernels on a GPU (Triton lowering), after `gpu_forward.chunk_scaled_dot_kkt`.

1. `chunk_bwd_dhu`, a program for some values of a head, from the last chunk to the first: the
   gradient of the state that leaves each chunk, and of what each chunk's inverse was applied to.
2. `prepare_wy_repr_bwd`, all chunks at once: the new values again, the gradients of values, of beta
   and of the scores of tokens.
3. `chunk_bwd_dqkwg`, all chunks and some keys at once: the gradients of queries, keys and decays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule.gpu_forward import clamped, from_state, head_sums
from pallas_kernels.delta_rule.gpu_tile import (
    Chunk,
    all_keys,
    broken,
    dot,
    each_level,
    factor_at,
    factor_at_transpose,
    sums,
    unit_product,
)
from pallas_kernels.delta_rule.tile import finite
from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.matrix_state.gpu import KernelShape, Row, Span, block, each_block, scaled
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


def _cotangent(chunk: Chunk, values: Span) -> jax.Array:
    return scaled(chunk.dims, chunk.of_head("do", values))


def chunk_bwd_dhu(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Some values of a head, grid `(values, B, H)`: `dstates`, `dsolved` and `dinitial`."""
    row, head = Row(refs, pl.program_id(1)), pl.program_id(2)
    keys, values = Span(0, all_keys(dims)), block(pl.program_id(0), dims.tiles.state_values)

    def step(back, dstate):
        chunk = Chunk(dims, row, head, dims.chunks - 1 - back)
        docs = chunk.documents()
        chunk.put_state("dstates", dstate, keys, values)
        do, k = _cotangent(chunk, values), chunk.of_group("k", keys)
        k_to_end = apply_decay(k, chunk.factor("to_end", keys)).astype(k.dtype)
        dvalues = where_leaving(dot(k_to_end, dstate.astype(k.dtype)), docs)
        dvalues = (dvalues + dot(chunk.square("A_qk"), do, "tn")).astype(k.dtype)
        solved = chunk.square("inverse")
        if docs is not None:
            solved = zero_where_not(docs.same, finite(solved, docs))
        dsolved = dot(solved, finite(dvalues, docs), "tn")
        chunk.put("dsolved", dsolved, values)
        dretrieved = -where_entering(chunk.column("beta") * dsolved, docs).astype(k.dtype)
        from_start = chunk.factor("from_start", keys)
        q_into, k_into = (
            apply_decay(x, from_start).astype(k.dtype) for x in (chunk.of_group("q", keys), k)
        )
        dstate = decayed_state(dstate, chunk.chunk_decay(keys), docs)
        dstate = dstate + dot(q_into, where_entering(do, docs), "tn")
        return dstate + dot(k_into, dretrieved, "tn")

    dstate = row.load("dfinal", head, keys, values)
    dstate = jax.lax.fori_loop(0, dims.chunks, step, dstate)
    row.store("dinitial", dstate, head, keys, values)


def prepare_wy_repr_bwd(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Each chunk and head, grid `(chunks, B, H)`: `v_new`, `dv`, `dbeta`, `dg` of a decay that
    serves all keys, as far as it comes from pairs, and the squares `dA_qk` and `dA_kk`.
    """
    chunk = Chunk(dims, Row(refs, pl.program_id(1)), pl.program_id(2), pl.program_id(0))
    docs, beta = chunk.documents(), chunk.column("beta")

    def some_values(n, carry):
        dA_qk, dA_kk, dbeta = carry
        values = block(n, dims.tiles.values)
        retrieved = where_entering(from_state(chunk, "k", values), docs)
        error = chunk.of_head("v", values).astype(jnp.float32) - retrieved
        v_new = broken(unit_product(chunk.square("inverse"), beta * error, dims.segmented), docs)
        v_new = v_new.astype(dims.dtype)
        dsolved = chunk.of_head("dsolved", values)
        chunk.put("v_new", v_new, values)
        chunk.put("dv", beta * dsolved.astype(jnp.float32), values)
        dA_qk = dA_qk + dot(_cotangent(chunk, values), v_new, "nt")
        dA_kk = dA_kk + dot(dsolved, v_new, "nt")
        return dA_qk, dA_kk, dbeta + (dsolved.astype(jnp.float32) * error).sum(1, keepdims=True)

    zero = jnp.zeros((dims.tiles.chunk, dims.tiles.chunk), jnp.float32)
    carry = zero, zero, jnp.zeros((dims.tiles.chunk, 1), jnp.float32)
    dA_qk, dA_kk, dbeta = each_block(dims.value_blocks, some_values, carry)
    mask, earlier = causal(dims.tiles.chunk, docs), strictly_causal(dims.tiles.chunk, docs)
    keys = chunk.square("A_kk")
    dA_qk, dA_kk = zero_where_not(mask, dA_qk), zero_where_not(earlier, -dA_kk)
    chunk.put_column("dbeta", dbeta + (dA_kk * keys).sum(1, keepdims=True))
    dA_kk = beta * dA_kk
    if dims.decay == "head":
        dlogs = dA_qk * chunk.square("A_qk").astype(jnp.float32) + dA_kk * keys
        chunk.put_column("dg", _crossing(finite(dlogs, docs)))
        pair_decay = zero_where_not(mask, jnp.exp(head_sums(chunk).g_between))
        dA_qk, dA_kk = dA_qk * pair_decay, dA_kk * pair_decay
    chunk.put_square("dA_qk", dA_qk)
    chunk.put_square("dA_kk", dA_kk)


def _crossing(dlogs: jax.Array) -> jax.Array:
    """What pairs give to the decays between them: the sum over `i >= t > j` for each t, `(C,)`."""
    row, column = masks.token_indices(dlogs.shape[0])
    return zero_where_not(column < row, sums(column >= row, dlogs)).sum(1)


def chunk_bwd_dqkwg(dims: KernelShape, refs: Mapping[str, Any]) -> None:
    """Each chunk and some keys, grid `(chunks, B, H * keys)`: `dq`, `dk` and `dg`."""
    head = jax.lax.div(pl.program_id(2), jnp.int32(dims.key_blocks))
    place = pl.program_id(2) - head * dims.key_blocks
    keys = block(place, dims.tiles.keys)
    chunk = Chunk(dims, Row(refs, pl.program_id(1)), head, pl.program_id(0))
    docs = chunk.documents()

    def some_values(n, carry):
        dq, dk, dread, dg_last = carry
        values = block(n, dims.tiles.values)
        state, dstate = (chunk.state(name, keys, values) for name in ("states", "dstates"))
        dq = dq + dot(_cotangent(chunk, values), state, "nt")
        dk = dk + dot(chunk.of_head("v_new", values), dstate, "nt")
        dread = dread - dot(chunk.of_head("dv", values), state, "nt")
        if dims.decay is not None:
            products = state.astype(jnp.float32) * dstate.astype(jnp.float32)
            dg_last = dg_last + products.sum(1, keepdims=True)
        return dq, dk, dread, dg_last

    zero = jnp.zeros((dims.tiles.chunk, keys.size), jnp.float32)
    carry = zero, zero, zero, jnp.zeros((keys.size, 1), jnp.float32)
    dq, dk, dread, dg_last = each_block(dims.value_blocks, some_values, carry)
    from_start = chunk.factor("from_start", keys)
    dq, dread = (where_entering(apply_decay(x, from_start), docs) for x in (dq, dread))
    dk = where_leaving(apply_decay(dk, chunk.factor("to_end", keys)), docs)
    q, k = (chunk.of_group(name, keys) for name in ("q", "k"))
    dg_cumsum, dg_to_end = apply_decay(q, dq) + apply_decay(k, dread), apply_decay(k, dk)
    dg_last = decayed_state(dg_last, chunk.chunk_decay(keys), docs).reshape(1, keys.size)
    dk = dk + dread
    dA_qk, dA_kk = chunk.square("dA_qk"), chunk.square("dA_kk")
    if dims.decay == "key":
        dg_cumsum, dg_to_end, dg_last = (finite(x, docs) for x in (dg_cumsum, dg_to_end, dg_last))
        row, column = masks.token_indices(dims.tiles.chunk)
        dg = sums(column >= row, dg_cumsum) + sums(column < row, dg_to_end) + dg_last
        g = clamped(chunk, keys, docs)
        dq, dk, dg = _add_A_vector_decay_vjp(q, k, g, docs, dA_qk, dA_kk, (dq, dk, dg))
        given = chunk.of_head("g", keys).astype(jnp.float32)
        chunk.put("dg", decay_sums.clamp_vjp(given, dg, docs), keys)
    else:
        dq = dq + dot(dA_qk, k)
        dk = dk + dot(dA_qk, q, "tn") + dot(dA_kk, k) + dot(dA_kk, k, "tn")
    if dims.decay == "head":
        every = (finite(x.sum(1, keepdims=True), docs) for x in (dg_cumsum, dg_to_end, dg_last))
        chunk.put_column("dg", _to_the_ends(*every), place)
    chunk.put("dq", dq, keys)
    chunk.put("dk", dk, keys)


def _to_the_ends(dg_cumsum: jax.Array, dg_to_end: jax.Array, dg_last: jax.Array) -> jax.Array:
    """What the decays to a chunk's ends, `(C, 1)` and `(1, 1)`, give to those in it, `(1, C)`."""
    other, token = masks.token_indices(dg_cumsum.shape[0])
    parts = zero_where_not(other >= token, jnp.broadcast_to(dg_cumsum, token.shape))
    parts = parts + zero_where_not(other < token, jnp.broadcast_to(dg_to_end, token.shape))
    return parts.sum(0, keepdims=True) + dg_last


def _add_A_vector_decay_vjp(q, k, g, docs: SegmentMasks | None, dA_qk, dA_kk, carry):
    """What `gpu_forward.add_A_vector_decay` gives to `(dq, dk, dg)`."""
    size, dtype = q.shape[0], k.dtype
    q, k = (x.astype(jnp.float32) for x in (q, k))

    def level(at, carry):
        dq, dk, dg = carry
        apart, factor = masks.parted(size, at), factor_at(g, at)
        left, right = ((x * factor).astype(dtype) for x in (q, k))
        dA_q, dA_k = (zero_where_not(apart, x) for x in (dA_qk, dA_kk))
        more_q = factor * dot(dA_q, right)
        more_k = dot(dA_q, left, "tn") + dot(dA_k, right) + dot(dA_k, right, "tn")
        more_k = factor * more_k
        dlogs = finite(q * more_q + k * more_k, docs)
        return dq + more_q, dk + more_k, dg + factor_at_transpose(dlogs, at)

    dq, dk, dg = each_level(size, level, carry)
    row, column = masks.token_indices(size)
    same = zero_where_not(row == column, dA_qk).astype(jnp.float32).sum(1, keepdims=True)
    return dq + same * k, dk + same * q, dg
