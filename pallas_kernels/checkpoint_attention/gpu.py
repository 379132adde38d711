"""GPU kernels (Triton lowering): a program is a block of tokens of one head.

Forward walks the blocks of slots that the tokens see, from the first to the last, with an online
softmax in registers that begins with the token's own key. Backward takes the same walk for the
gradients of queries and own keys; a second kernel holds a block of slots of one head and walks the
tokens behind it. What the heads of a group add to the same keys is summed outside, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checkpoint_attention import tile
from pallas_kernels.checkpoint_attention.slots import Config, Slots
from pallas_kernels.checkpoint_attention.slots import slots as find_slots
from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.gpu import beyond_addresses, masked_places

_LEAST = 16  # what Triton multiplies at least, in any direction


class Tiles(NamedTuple):
    """`tokens` and `slots` that meet at once, `warps` of a program."""

    tokens: int
    slots: int
    warps: int


def choose_tiles(length: int, count: int, key_size: int, value_size: int, *, narrow: bool) -> Tiles:
    """Half as much where keys or values are wide, and of float32, which registers hold."""
    wide = max(key_size, value_size) > 128
    tokens, slots = (64, 32) if wide or not narrow else (128, 64)
    fits = (max(_LEAST, pl.next_power_of_2(n)) for n in (length, count))
    tokens, slots = (min(n, most) for n, most in zip(fits, (tokens, slots), strict=True))
    return Tiles(tokens, slots, 8 if tokens == 128 else 4)


class _KernelShape(NamedTuple):
    """What is static about one kernel; sizes as they are, tiles in powers of two."""

    batch: int
    length: int
    slots: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    interval: int
    scale: float
    own: bool
    plain: bool
    tiles: Tiles

    @property
    def blocks(self) -> int:
        """Blocks of tokens."""
        return -(-self.length // self.tiles.tokens)

    @property
    def slot_blocks(self) -> int:
        return -(-self.slots // self.tiles.slots)

    @property
    def group_heads(self) -> int:
        return self.heads // self.groups


# Loads and stores. References are whole arrays, named.


class _Place(NamedTuple):
    """What a program works on: a row, a head and a block."""

    refs: Mapping[str, Any]
    block: Any
    row: Any
    head: Any
    group: Any

    def load(self, name: str, head, start, mask, width: int) -> jax.Array:
        """A block of `(B, N, heads, width)` at rows from `start`; 0 outside of `mask (N, 1)`."""
        index, mask = self._index(name, head, start, mask, width)
        return compat.triton.load(self.refs[name].at[index], mask=mask, other=0.0)

    def store(self, name: str, head, start, mask, x) -> None:
        ref = self.refs[name]
        index, mask = self._index(name, head, start, mask, ref.shape[3], x.shape[1])
        compat.triton.store(ref.at[index], x.astype(ref.dtype), mask=mask)

    def _index(self, name, head, start, mask, width: int, padded: int | None = None):
        padded = padded or _padded(width)
        lanes = jnp.arange(padded)[None, :] < width
        rows = pl.ds(start, mask.shape[0])
        return (self.row, rows, head, masked_places(0, padded, width, self.row)), mask & lanes


def _padded(width: int) -> int:
    return max(_LEAST, pl.next_power_of_2(width))


def _place(dims: _KernelShape, names, refs) -> _Place:
    block, row, head = map(pl.program_id, range(3))
    group = jax.lax.div(head, dims.group_heads)
    return _Place(dict(zip(names, refs, strict=True)), block, row, head, group)


class _Tokens(NamedTuple):
    """A block of tokens: the rows it is made of, and what they see."""

    start: Any
    inside: jax.Array  # (T, 1)
    real: jax.Array  # (T, 1)
    first: Any  # (T, 1), or None
    last: Any


def _tokens(dims: _KernelShape, place: _Place, block) -> _Tokens:
    start = block * dims.tiles.tokens
    at = start + jnp.arange(dims.tiles.tokens)
    inside = at < dims.length
    if dims.plain:
        column = inside[:, None]
        return _Tokens(start, column, column, None, at[:, None])
    where = place.row, pl.ds(start, dims.tiles.tokens)
    first = compat.triton.load(place.refs["first"].at[where], mask=inside, other=0)
    last = compat.triton.load(place.refs["last"].at[where], mask=inside, other=-1)
    return _Tokens(start, inside[:, None], (last >= 0)[:, None], first[:, None], last[:, None])


def visible(dims: _KernelShape, tokens: _Tokens, slot):
    """`(T, M)`: which of the slots `(1, M)` each token sees."""
    if dims.plain:
        # Slot j is token (j + 1) interval - 1, and comes before what sees it.
        return ((slot + 1) * dims.interval <= tokens.last) & tokens.inside & (slot < dims.slots)
    return tile.visible(slot, tokens.first, tokens.last)


def _reach(dims: _KernelShape, place: _Place, block):
    """The blocks of slots that a block of tokens sees: from, and up to but without."""
    if dims.plain:
        last_token = jnp.minimum((block + 1) * dims.tiles.tokens, dims.length) - 1
        end = jax.lax.div(last_token, dims.interval)
        return 0, jax.lax.div(end + dims.tiles.slots - 1, dims.tiles.slots)
    return tuple(compat.triton.load(place.refs[n].at[place.row, block]) for n in _ENDS)


_ENDS = "begin", "end"


def _column(place: _Place, name: str, tokens: _Tokens, length: int):
    """The block's column `(T, 1)` of an array `(B, H, L)`."""
    rows = place.row, place.head, pl.ds(tokens.start, length)
    return compat.triton.load(place.refs[name].at[rows], mask=tokens.inside[:, 0], other=0.0)[
        :, None
    ]


def _wide(x):
    return x.astype(jnp.float32)


# The kernels.


def _forward_kernel(*refs, dims: _KernelShape, names):
    place = _place(dims, names, refs)
    tokens = _tokens(dims, place, place.block)
    start, inside, real = tokens[:3]
    q = place.load("q", place.head, start, inside, dims.key_size)
    if dims.own:
        k = place.load("k", place.group, start, inside, dims.key_size)
        v = place.load("v", place.group, start, inside, dims.value_size)
        scores = dims.scale * jnp.sum(_wide(q) * _wide(k), axis=1)[:, None]
        maximum = jnp.where(real, scores, tile.LOW)
        total = jnp.where(real, jnp.ones_like(scores), 0.0)
        acc = jnp.where(real, _wide(v), 0.0)
    else:
        total = jnp.zeros((dims.tiles.tokens, 1), jnp.float32)
        maximum = total + tile.LOW
        acc = jnp.zeros((dims.tiles.tokens, _padded(dims.value_size)), jnp.float32)

    def meet(j, carry):
        maximum, total, acc = carry
        slot_k, slot_v, slot = _slots(dims, place, j)
        scores = dims.scale * tile.dot(q, slot_k, "nt")
        mask = visible(dims, tokens, slot)
        maximum, total, factor, p = tile.block(maximum, total, scores, mask, 1)
        return maximum, total, factor * acc + tile.dot(p, slot_v, "nn")

    begin, end = _reach(dims, place, place.block)
    maximum, total, acc = jax.lax.fori_loop(begin, end, meet, (maximum, total, acc))
    place.store("o", place.head, start, inside, acc * tile.inverse(total))
    rows = place.row, place.head, pl.ds(start, dims.tiles.tokens)
    lse = tile.log_sum_exp(maximum, total)[:, 0]
    compat.triton.store(place.refs["lse"].at[rows], lse, mask=inside[:, 0])


def _slots(dims: _KernelShape, place: _Place, j):
    """Keys, values and places `(1, M)` of the j-th block of slots."""
    start = j * dims.tiles.slots
    slot = start + jnp.arange(dims.tiles.slots)
    mask = (slot < dims.slots)[:, None]
    slot_k = place.load("slot_k", place.group, start, mask, dims.key_size)
    slot_v = place.load("slot_v", place.group, start, mask, dims.value_size)
    return slot_k, slot_v, slot[None, :]


def _token_kernel(*refs, dims: _KernelShape, names):
    """The gradients of queries, and what own keys and values get from one head."""
    place = _place(dims, names, refs)
    tokens = _tokens(dims, place, place.block)
    start, inside, real = tokens[:3]
    q = place.load("q", place.head, start, inside, dims.key_size)
    do, lse, delta = _cotangents(dims, place, tokens)
    dq = jnp.zeros(q.shape, jnp.float32)
    if dims.own:
        k = _wide(place.load("k", place.group, start, inside, dims.key_size))
        v = _wide(place.load("v", place.group, start, inside, dims.value_size))
        scores = dims.scale * jnp.sum(_wide(q) * k, axis=1)[:, None]
        p = tile.probabilities(scores, real, lse)
        dp = jnp.sum(_wide(do) * v, axis=1)[:, None]
        ds = dims.scale * tile.score_gradient(p, real, dp, delta)
        dq = jnp.where(real, ds * k, 0.0)
        place.store("dk", place.head, start, inside, jnp.where(real, ds * _wide(q), 0.0))
        place.store("dv", place.head, start, inside, jnp.where(real, p * _wide(do), 0.0))

    def meet(j, dq):
        slot_k, slot_v, slot = _slots(dims, place, j)
        mask = visible(dims, tokens, slot)
        p = tile.probabilities(dims.scale * tile.dot(q, slot_k, "nt"), mask, lse)
        ds = tile.score_gradient(p, mask, tile.dot(do, slot_v, "nt"), delta)
        return dq + tile.dot(dims.scale * ds, slot_k, "nn")

    begin, end = _reach(dims, place, place.block)
    dq = jax.lax.fori_loop(begin, end, meet, dq)
    place.store("dq", place.head, start, inside, dq)


def _cotangents(dims: _KernelShape, place: _Place, tokens: _Tokens):
    do = place.load("do", place.head, tokens.start, tokens.inside, dims.value_size)
    size = dims.tiles.tokens
    return do, *(_column(place, name, tokens, size) for name in ("lse", "delta"))


def _seen(dims: _KernelShape, place: _Place, start):
    """The blocks of tokens that see this block of slots: from, and up to but without."""
    if dims.plain:
        return jax.lax.div((start + 1) * dims.interval, dims.tiles.tokens), dims.blocks
    return tuple(compat.triton.load(place.refs[n].at[place.row, place.block]) for n in _ENDS)


def _slot_kernel(*refs, dims: _KernelShape, names):
    """The gradients of a block of slots from one head."""
    place = _place(dims, names, refs)
    slot_k, slot_v, slot = _slots(dims, place, place.block)
    start = place.block * dims.tiles.slots

    def meet(i, carry):
        dk, dv = carry
        tokens = _tokens(dims, place, i)
        q = place.load("q", place.head, tokens.start, tokens.inside, dims.key_size)
        do, lse, delta = _cotangents(dims, place, tokens)
        mask = visible(dims, tokens, slot)
        p = tile.probabilities(dims.scale * tile.dot(q, slot_k, "nt"), mask, lse)
        ds = dims.scale * tile.score_gradient(p, mask, tile.dot(do, slot_v, "nt"), delta)
        return dk + tile.dot(ds, q, "tn"), dv + tile.dot(p, do, "tn")

    begin, end = _seen(dims, place, start)
    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (slot_k, slot_v))
    dk, dv = jax.lax.fori_loop(begin, end, meet, tuple(zeros))
    inside = (slot < dims.slots)[0][:, None]
    place.store("dslot_k", place.head, start, inside, dk)
    place.store("dslot_v", place.head, start, inside, dv)


# The calls.


def _call(kernel, dims: _KernelShape, name: str, blocks: int, operands, outputs, flops: int):
    """Run `kernel` on named operands, None left out; `outputs` are structs by name."""
    operands = {key: x for key, x in operands.items() if x is not None}
    out = compat.pallas_call(
        functools.partial(kernel, dims=dims, names=(*operands, *outputs)),
        backend="gpu",
        name=f"checkpoint_attention_{name}",
        grid=(blocks, dims.batch, dims.heads),
        out_shape=[compat.out_struct(*s, *operands.values()) for s in outputs.values()],
        compiler_params=compat.triton.CompilerParams(num_warps=dims.tiles.warps, num_stages=2),
        flops=flops * dims.batch * dims.length * dims.heads * dims.slots,
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))


def _kernel_shape(config: Config, q, k, slots: Slots) -> _KernelShape:
    batch, length, heads, key_size = q.shape
    _, count, groups, value_size = slots.v.shape
    narrow = q.dtype == jnp.bfloat16
    tiles = config.tiles or choose_tiles(length, count, key_size, value_size, narrow=narrow)
    return _KernelShape(
        batch, length, count, groups, heads, key_size, value_size, config.interval,
        config.scale, k is not None, slots.last is None, tiles,
    )  # fmt: skip


def _ranges(dims: _KernelShape, first, last, *, of_slots: bool = False) -> dict[str, Any]:
    """What each token sees, and the blocks of slots that a block of tokens sees.

    With `of_slots` the blocks of tokens that see a block of slots; `(B, blocks)`, from `begin` up
    to but without `end`.
    """
    if dims.plain:
        return {}
    none = ((0, 0), (0, dims.blocks * dims.tiles.tokens - dims.length))
    some = last > first
    least = jnp.pad(jnp.where(some, first, dims.slots), none, constant_values=dims.slots)
    greatest = jnp.pad(jnp.where(some, last, 0), none)
    blocks = (dims.batch, dims.blocks, dims.tiles.tokens)
    begin = least.reshape(blocks).min(-1) // dims.tiles.slots
    end = -(-greatest.reshape(blocks).max(-1) // dims.tiles.slots)
    if of_slots:
        block = jnp.arange(dims.slot_blocks, dtype=jnp.int32)[None, :, None]
        met = (begin[:, None] <= block) & (block < end[:, None])
        at = jnp.arange(dims.blocks, dtype=jnp.int32)[None, None]
        begin, end = jnp.where(met, at, dims.blocks).min(-1), jnp.where(met, at + 1, 0).max(-1)
    return {"first": first, "last": last, "begin": jnp.minimum(begin, end), "end": end}


def forward(config: Config, q, k, v, slot_k, slot_v, first, last, *, return_residuals: bool):
    """`((o, lse), residuals)`, `lse` as `(B, H, L)`."""
    slots = Slots(slot_k, slot_v, first, last)
    dims = _kernel_shape(config, q, k, slots)
    operands = {"q": q, "k": k, "v": v, "slot_k": slot_k, "slot_v": slot_v}
    operands |= _ranges(dims, first, last)
    out = _call(
        _forward_kernel,
        dims,
        "forward",
        dims.blocks,
        operands,
        {
            "o": ((*q.shape[:3], dims.value_size), q.dtype),
            "lse": ((dims.batch, dims.heads, dims.length), jnp.float32),
        },
        2 * (dims.key_size + dims.value_size),
    )
    outputs = out["o"], out["lse"]
    return outputs, (q, k, v, *slots, *outputs) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """Gradients of the arrays of `forward`, in its order."""
    q, k, v, slot_k, slot_v, first, last, o, lse = residuals
    do, dlse = cotangents
    dims = _kernel_shape(config, q, k, Slots(slot_k, slot_v, first, last))
    delta = jnp.sum(_wide(do) * _wide(o), -1).swapaxes(1, 2) - dlse
    operands = {"q": q, "slot_k": slot_k, "slot_v": slot_v, "do": do, "lse": lse, "delta": delta}
    by_head = q.dtype if dims.group_heads == 1 else jnp.float32

    def grouped(x, like):
        """The sum over the heads of each group."""
        if x is None:
            return None
        return x.reshape(*like.shape[:3], dims.group_heads, -1).sum(3).astype(like.dtype)

    outputs = {"dq": (q.shape, q.dtype)}
    if dims.own:
        outputs["dk"] = (q.shape, by_head)
        outputs["dv"] = (do.shape, by_head)
    flops = 2 * (2 * dims.key_size + dims.value_size)
    given = operands | {"k": k, "v": v} | _ranges(dims, first, last)
    near = _call(_token_kernel, dims, "backward", dims.blocks, given, outputs, flops)
    outputs = {
        name: ((dims.batch, dims.slots, dims.heads, width), by_head)
        for name, width in (("dslot_k", dims.key_size), ("dslot_v", dims.value_size))
    }
    flops += 2 * dims.value_size
    # Two accumulators and queries and cotangents in flight: twice the tokens exceed the shared
    # memory of a B200, whose products read their operands there.
    dims = dims._replace(tiles=dims.tiles._replace(tokens=min(dims.tiles.tokens, 64), warps=4))
    given = operands | _ranges(dims, first, last, of_slots=True)
    far = _call(_slot_kernel, dims, "backward_slots", dims.slot_blocks, given, outputs, flops)
    return (
        near["dq"],
        grouped(near.get("dk"), k),
        grouped(near.get("dv"), v),
        grouped(far["dslot_k"], slot_k),
        grouped(far["dslot_v"], slot_v),
        None,
        None,
    )


def prepare(config: Config, q, k, v, *rest):
    """The slots of the arguments; see `Backend.prepare`."""

    def restore(outputs):
        o, lse = outputs
        return o, lse.swapaxes(1, 2)

    return (q, k, v, *find_slots(config, q, k, v, *rest)), restore


def unsupported(config: Config, q, k, v, past_k, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""

    def largest() -> int:
        return max(x.size for x in (q, past_k) if x is not None)

    return no_wide_numbers(q) or beyond_addresses(q.shape[0], largest)


BACKEND = Backend(forward, backward, prepare, unsupported)
