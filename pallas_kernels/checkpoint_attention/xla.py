"""The portable path: blocks of tokens meet blocks of the checkpoints that they see.

Tokens of all heads of a group are rows of one matrix. A block of rows walks over the blocks of
slots between the first and the last that any of its rows sees, so no more scores exist than one
block of each; what comes before or after is never touched.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checkpoint_attention import tile
from pallas_kernels.checkpoint_attention.slots import Config, Slots
from pallas_kernels.checkpoint_attention.slots import slots as find_slots
from pallas_kernels.common import compat, products, symbolic
from pallas_kernels.common.backend import Backend

# Measured on x86: rows and slots of a block, and scores worked on together.
_ROWS, _SLOTS = 256, 256
_AT_ONCE = 2**17


class _Tokens(NamedTuple):
    """One block of T tokens; all arrays as `(C, blocks, N, ...)` with C N = B G in `_cut`."""

    q: Any  # (T R, K), R heads a group
    k: Any  # (T, K) or None
    v: Any  # (T, V) or None
    first: Any  # (T R, 1)
    last: Any


class _Plan(NamedTuple):
    """How arrays are cut."""

    batch: int
    length: int
    groups: int
    heads: int  # a group's
    tokens: int  # of a block
    slots: int  # of a block
    rows: int  # of B G worked on together

    @property
    def blocks(self) -> int:
        return -(-self.length // self.tokens)


def _plan(config: Config, q, slots: Slots) -> _Plan:
    batch, length, heads, _ = q.shape
    count, groups = slots.k.shape[1:3]
    size = config.tiles or (max(1, _ROWS // (heads // groups)), _SLOTS)
    tokens = min(size[0], _power_of_two(length))
    block = min(size[1], _power_of_two(count))
    most = max(1, _AT_ONCE // (tokens * (heads // groups) * block))
    of = symbolic.known(batch, 1) * groups
    rows = max(n for n in range(1, min(most, of) + 1) if of % n == 0)
    return _Plan(batch, length, groups, heads // groups, tokens, block, rows)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cut_tokens(plan: _Plan, x, value=0):
    """`(B, L, G R, ...) -> (C, blocks, N, T R, ...)`; what is appended is `value`."""
    padding = plan.blocks * plan.tokens - plan.length
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
    heads = x.shape[2] // plan.groups
    x = x.reshape(plan.batch, plan.blocks, plan.tokens, plan.groups, heads, *x.shape[3:])
    x = jnp.moveaxis(x, 3, 1)
    x = x.reshape(-1, plan.rows, plan.blocks, plan.tokens * heads, *x.shape[5:])
    return x.swapaxes(1, 2)


def _join_tokens(plan: _Plan, x):
    """The inverse of `_cut_tokens`."""
    heads = x.shape[3] // plan.tokens
    x = x.swapaxes(1, 2)
    x = x.reshape(plan.batch, plan.groups, plan.blocks, plan.tokens, heads, *x.shape[4:])
    x = jnp.moveaxis(x, 1, 3)
    x = x.reshape(plan.batch, -1, plan.groups * heads, *x.shape[5:])
    return x[:, : plan.length]


def _cut_slots(plan: _Plan, x):
    """`(B, M, G, width) -> (C, N, M, width)`, M whole blocks."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % plan.slots), (0, 0), (0, 0)))
    return jnp.moveaxis(x, 2, 1).reshape(-1, plan.rows, x.shape[1], x.shape[3])


def _join_slots(plan: _Plan, x, like):
    x = x.reshape(plan.batch, plan.groups, -1, x.shape[-1])[:, :, : like.shape[1]]
    return jnp.moveaxis(x, 1, 2).astype(like.dtype)


def _cut(config: Config, plan: _Plan, q, k, v, slots: Slots) -> _Tokens:
    ranges = slots.first, slots.last
    if slots.last is None:
        at = jax.lax.broadcasted_iota(jnp.int32, (plan.batch, plan.length), 1)
        ranges = jnp.zeros_like(at), at // config.interval
    shape = (plan.batch, plan.length, plan.groups * plan.heads, 1)
    first, last = (jnp.broadcast_to(x[:, :, None, None], shape) for x in ranges)
    return _Tokens(
        _cut_tokens(plan, q),
        None if k is None else _cut_tokens(plan, k),
        None if v is None else _cut_tokens(plan, v),
        _cut_tokens(plan, first),
        _cut_tokens(plan, last, -1),
    )


def _reach(plan: _Plan, x: _Tokens) -> tuple[jax.Array, jax.Array]:
    """The blocks of slots that any token of these sees: from, and up to but without."""
    some = x.last > x.first
    most = jnp.iinfo(jnp.int32).max
    begin = jnp.min(jnp.where(some, x.first, most)) // plan.slots
    end = -(-jnp.max(jnp.where(some, x.last, 0)) // plan.slots)
    return jnp.minimum(begin, end), end


def _block(plan: _Plan, j, *arrays):
    return [jax.lax.dynamic_slice_in_dim(x, j * plan.slots, plan.slots) for x in arrays]


def _mask(plan: _Plan, x: _Tokens, j):
    slot = j * plan.slots + jax.lax.broadcasted_iota(jnp.int32, (1, plan.slots), 1)
    return tile.visible(slot, x.first, x.last)


def _heads(plan: _Plan, x):
    """A group's `(T, width)` for each of its heads: `(T R, width)`."""
    return jnp.repeat(x, plan.heads, axis=0)


def _dot(x, y, contract: str):
    """`tile.dot` for every backend."""
    dtype = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    product = functools.partial(tile.dot, contract=contract)
    return products.widened_on_cpu(product, x.astype(dtype), y.astype(dtype))


def _own_scores(config: Config, plan: _Plan, x: _Tokens, wide):
    """`(T R, 1)`."""
    product = x.q.astype(wide) * _heads(plan, x.k.astype(wide))
    return config.scale * product.sum(1, keepdims=True)


def _attend(config: Config, plan: _Plan, x: _Tokens, slot_k, slot_v, begin, end):
    """`o (T R, V)` and `lse (T R, 1)` of a block of tokens."""
    wide = jnp.float64 if x.q.dtype == jnp.float64 else jnp.float32
    real = x.last >= 0
    if x.k is None:
        _, maximum, total, acc = compat.match_vma(
            x.q,
            jnp.full(real.shape, tile.LOW, wide),
            jnp.zeros(real.shape, wide),
            jnp.zeros((x.q.shape[0], slot_v.shape[1]), wide),
        )
    else:
        maximum = jnp.where(real, _own_scores(config, plan, x, wide), tile.LOW)
        total = jnp.where(real, jnp.ones_like(maximum), 0.0)
        acc = jnp.where(real, _heads(plan, x.v.astype(wide)), 0.0)

    def meet(j, carry):
        maximum, total, acc = carry
        k, v = _block(plan, j, slot_k, slot_v)
        scores = config.scale * _dot(x.q, k, "nt")
        maximum, total, factor, p = tile.block(maximum, total, scores, _mask(plan, x, j), 1)
        return maximum, total, factor * acc + _dot(p, v, "nn")

    maximum, total, acc = jax.lax.fori_loop(begin, end, meet, (maximum, total, acc))
    o = (acc * tile.inverse(total)).astype(slot_v.dtype)
    return o, tile.log_sum_exp(maximum, total)


class _Gradients(NamedTuple):
    """`dq, dk, dv` of a block of tokens."""

    q: Any
    k: Any
    v: Any


def _pull(config: Config, plan: _Plan, x: _Tokens, o, lse, do, dlse, slots, dslots, begin, end):
    """`_Gradients` of a block of tokens; those of the slots are added to `dslots`."""
    wide, real = lse.dtype, x.last >= 0
    delta = jnp.sum(do.astype(wide) * o.astype(wide), 1, keepdims=True) - dlse
    dk = dv = None
    _, dq = compat.match_vma(x.q, jnp.zeros(x.q.shape, wide))
    if x.k is not None:
        p = tile.probabilities(_own_scores(config, plan, x, wide), real, lse)
        dp = jnp.sum(do.astype(wide) * _heads(plan, x.v.astype(wide)), 1, keepdims=True)
        ds = config.scale * tile.score_gradient(p, real, dp, delta)
        dq = jnp.where(real, ds * _heads(plan, x.k.astype(wide)), 0.0)
        by_head = (plan.tokens, plan.heads, -1)
        dk = jnp.where(real, ds * x.q.astype(wide), 0.0).reshape(by_head).sum(1)
        dv = jnp.where(real, p * do.astype(wide), 0.0).reshape(by_head).sum(1)

    def meet(j, carry):
        dq, *sums = carry
        k, v = _block(plan, j, *slots)
        mask = _mask(plan, x, j)
        p = tile.probabilities(config.scale * _dot(x.q, k, "nt"), mask, lse)
        ds = config.scale * tile.score_gradient(p, mask, _dot(do, v, "nt"), delta)
        more = _dot(ds, x.q, "tn"), _dot(p, do, "tn")
        added = [a + b for a, b in zip(_block(plan, j, *sums), more, strict=True)]
        sums = [
            jax.lax.dynamic_update_slice_in_dim(total, x, j * plan.slots, 0)
            for total, x in zip(sums, added, strict=True)
        ]
        return dq + _dot(ds, k, "nn"), *sums

    dq, *dslots = jax.lax.fori_loop(begin, end, meet, (dq, *dslots))
    return _Gradients(dq, dk, dv), dslots


def _rows(fn, plan: _Plan, x: _Tokens, *more):
    """`fn(x, *more, begin, end)` of all rows worked on together, within one reach."""
    return jax.vmap(fn, in_axes=(*[0] * (1 + len(more)), None, None))(x, *more, *_reach(plan, x))


def forward(config: Config, q, k, v, slot_k, slot_v, first, last, *, return_residuals: bool):
    """`((o, lse), residuals)`; the slots of `slots.Slots`."""
    slots = Slots(slot_k, slot_v, first, last)
    plan = _plan(config, q, slots)

    def chunk(x, slot_k, slot_v):
        def blocks(x):
            fn = functools.partial(_attend, config, plan)
            return _rows(fn, plan, x, slot_k, slot_v)

        return jax.lax.map(blocks, x)

    x = _cut(config, plan, q, k, v, slots)
    chunks = x, _cut_slots(plan, slot_k), _cut_slots(plan, slot_v)
    o, lse = jax.lax.map(lambda xs: chunk(*xs), chunks)
    outputs = _join_tokens(plan, o), _join_tokens(plan, lse)[..., 0]
    return outputs, (q, k, v, *slots, *outputs) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """The gradients of `forward`'s arrays; `residuals` are these, `o` and `lse`."""
    q, k, v, slot_k, slot_v, first, last, o, lse = residuals
    do, dlse = cotangents
    slots = Slots(slot_k, slot_v, first, last)
    plan = _plan(config, q, slots)

    def chunk(tokens, k, v):
        def block(sums, tokens):
            x, o, lse, do, dlse = tokens

            def fn(x, o, lse, do, dlse, k, v, dk, dv, begin, end):
                given = x, o, lse, do, dlse, (k, v), (dk, dv)
                return _pull(config, plan, *given, begin, end)

            gradients, sums = _rows(fn, plan, x, o, lse, do, dlse, k, v, *sums)
            narrow = jax.tree.map(lambda x: x.astype(q.dtype), gradients)
            return tuple(sums), narrow

        zeros = compat.match_vma(q, *(jnp.zeros_like(x, lse.dtype) for x in (k, v)))[1:]
        return jax.lax.scan(block, zeros, tokens)

    x = _cut(config, plan, q, k, v, slots)
    tokens = (
        x,
        *(_cut_tokens(plan, z) for z in (o, lse[..., None], do, dlse[..., None])),
    )
    chunks = tokens, _cut_slots(plan, slot_k), _cut_slots(plan, slot_v)
    sums, gradients = jax.lax.map(lambda xs: chunk(*xs), chunks)
    dq, dk, dv = (None if z is None else _join_tokens(plan, z) for z in gradients)
    joined = (_join_slots(plan, z, like) for z, like in zip(sums, (slot_k, slot_v), strict=True))
    return dq, dk, dv, *joined, None, None


def prepare(config: Config, q, k, v, *rest):
    """The slots of the arguments of `reference.checkpoint_attention`; see `Backend.prepare`."""
    return (q, k, v, *find_slots(config, q, k, v, *rest)), lambda outputs: outputs


BACKEND = Backend(forward, backward, prepare)


def one_token(config: Config, q, k, v, *rest):
    """A decoding step: one row of scores for each head, no blocks; JAX differentiates it."""
    slots = find_slots(config, q, k, v, *rest)
    batch, _, heads, _ = q.shape
    groups, wide = slots.k.shape[2], jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    precision = jax.lax.Precision.DEFAULT if q.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    einsum = functools.partial(products.einsum, precision=precision, dtype=wide)
    grouped = (batch, groups, heads // groups, -1)
    q = q.reshape(grouped)
    scores = config.scale * einsum("bgrk,bpgk->bgrp", q, slots.k)
    mask, real = jnp.zeros((1, 1, 1, 1), bool), jnp.ones((1, 1, 1, 1), bool)
    if slots.last is not None:
        first, last = slots.first[:, :, None, None], slots.last[:, :, None, None]
        slot = jnp.arange(slots.k.shape[1], dtype=jnp.int32)[None, None, None]
        mask, real = tile.visible(slot, first, last), last >= 0
    own = jnp.full((*scores.shape[:3], 1), tile.LOW, wide)
    if k is not None:
        own = config.scale * (q.astype(wide) * k.reshape(batch, groups, 1, -1).astype(wide)).sum(
            -1, keepdims=True
        )
        own = jnp.where(real, own, tile.LOW)
    highest = jax.lax.stop_gradient(
        jnp.maximum(own, jnp.where(mask, scores, tile.LOW).max(-1, keepdims=True))
    )
    p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0.0)), 0.0)
    total, acc = p.sum(-1, keepdims=True), einsum("bgrp,bpgv->bgrv", p.astype(q.dtype), slots.v)
    if k is not None:
        p = jnp.where(real, jnp.exp(own - highest), 0.0)
        total, acc = total + p, acc + p * v.reshape(batch, groups, 1, -1).astype(wide)
    o = (acc * tile.inverse(total)).reshape(batch, 1, heads, -1).astype(slots.v.dtype)
    return o, tile.log_sum_exp(highest, total).reshape(batch, 1, heads)
