"""TPU kernels: a block of tokens against the checkpoints that it sees, scores transposed.

Scores stand as `(slots, tokens)`: what is known of a token (its maximum, its sum, its first and
last slot) is a row that spreads over the slots for free, and no block of scores is transposed for
any matmul, forward or backward. A token's own key is the first key of its online softmax; it needs
products of rows only. Heads are blocks of lanes of `(B, L, H K)`, so nothing is transposed outside.

A strip of slots stays in VMEM while the tokens pass; a step of the grid takes one block of it, as
far down as the block's last token sees. Backward takes one strip after another, and sums the
gradients of each over all tokens and all heads of the group, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checkpoint_attention import tile
from pallas_kernels.checkpoint_attention.slots import Config, Slots
from pallas_kernels.checkpoint_attention.slots import slots as find_slots
from pallas_kernels.checkpoint_attention.tpu_layout import (
    KernelShape,
    Limits,
    Place,
    Tiles,
    choose_tiles,
    keys_spec,
    queries_spec,
    ranges,
    rows_spec,
    strips_across_spec,
    strips_spec,
)
from pallas_kernels.common import compat, symbolic
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.tpu import SUBLANES, VMEM_LIMIT, round_up

_PARTS = 4  # how finely a block of slots is cut off behind the last visible one


# Inside a step.


class Step(NamedTuple):
    """One step: where it is, the first slot of its block, and what its tokens see."""

    at: Place
    base: Any  # scalar
    first: Any  # (1, T), or None
    last: Any

    @property
    def real(self):
        """Which tokens are no padding, or None if all."""
        return None if self.last is None else self.last >= 0


def begins(at: Place):
    """True where a block of tokens meets its first slots."""
    return (at.step == 0) & (at.strip == 0)


def ends(dims: KernelShape, at: Place):
    return (at.step == dims.steps - 1) & (at.strip == dims.strips - 1)


def _step(dims: KernelShape, refs) -> Step:
    at = Place(*map(pl.program_id, range(6)))
    base = at.strip * dims.tiles.strip + at.step * dims.tiles.slots
    ranges = (None, None) if dims.plain else (refs["first"][...], refs["last"][...])
    return Step(at, base, *ranges)


def visible(dims: KernelShape, step: Step, count: int):
    """`(count, T)`: who sees the first slots of the step's block."""
    slot = step.base + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    if not dims.plain:
        return tile.visible(slot, step.first, step.last)
    token = step.at.block * dims.tiles.tokens
    token = token + jax.lax.broadcasted_iota(jnp.int32, (1, dims.tiles.tokens), 1)
    # Slot j is token (j + 1) interval - 1, and comes before what sees it.
    return (slot + 1) * dims.interval <= token


def for_visible(dims: KernelShape, refs, step: Step, meet: Callable[[int], None]) -> None:
    """`meet(count)` with as many of the block's slots as its last token sees, in whole parts."""
    size = dims.tiles.slots
    part = max(dims.lanes, size // _PARTS)
    if dims.plain:
        last_token = (step.at.block + 1) * dims.tiles.tokens - 1

        def seen(count: int):
            """Whether any token sees the slot that is `count` behind the first."""
            return last_token >= (step.base + count + 1) * dims.interval
    else:
        index = 2 * (step.at.row * dims.blocks + step.at.block)
        begin, end = refs["reach"][index], refs["reach"][index + 1]

        def seen(count: int):
            return (begin < step.base + size) & (end > step.base + count)

    for count in range(part, size + 1, part):
        fits = seen(count - part)
        if count < size:
            fits = fits & ~seen(count)
        pl.when(fits)(functools.partial(meet, count))


def across(x):
    """Sums over the lanes of `(T, width)`, as a row `(1, T)`."""
    return x.T.sum(0, keepdims=True)


def down(row):
    """A row `(1, T)` as a column `(T, 1)`."""
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def only(mask, x, otherwise=0.0):
    return x if mask is None else jnp.where(mask, x, otherwise)


def product(refs, x: str, y: str):
    return refs[x][...].astype(jnp.float32) * refs[y][...].astype(jnp.float32)


def own_scores(dims: KernelShape, refs):
    return dims.scale * across(product(refs, "q", "k"))


def forward_kernel(dims: KernelShape, refs) -> None:
    step = _step(dims, refs)

    @pl.when(begins(step.at))
    def _():
        refs["sum"][...] = jnp.zeros_like(refs["sum"])
        if dims.own:
            scores = own_scores(dims, refs)
            refs["maximum"][...] = only(step.real, scores, tile.LOW)
            refs["total"][...] = only(step.real, jnp.ones_like(scores))
            refs["own"][...] = scores
        else:
            refs["maximum"][...] = jnp.full_like(refs["maximum"], tile.LOW)
            refs["total"][...] = jnp.zeros_like(refs["total"])

    def meet(count: int):
        slots = pl.ds(pl.multiple_of(step.at.step * dims.tiles.slots, dims.lanes), count)
        scores = dims.scale * tile.dot(refs["slot_k"][slots], refs["q"][...], "nt")
        maximum, total, factor, p = tile.block(
            refs["maximum"][...], refs["total"][...], scores, visible(dims, step, count), 0
        )
        refs["maximum"][...], refs["total"][...] = maximum, total
        more = tile.dot(refs["slot_v"][:, slots], p, "nn")
        refs["sum"][...] = factor * refs["sum"][...] + more

    for_visible(dims, refs, step, meet)

    @pl.when(ends(dims, step.at))
    def _():
        maximum, total = refs["maximum"][...], refs["total"][...]
        inverse = tile.inverse(total)
        o = (inverse * refs["sum"][...]).T
        if dims.own:
            weight = only(step.real, inverse * jnp.exp(refs["own"][...] - maximum))
            o = o + only_down(step, down(weight) * refs["v"][...].astype(jnp.float32))
        refs["o"][...] = o.astype(refs["o"].dtype)
        refs["lse"][...] = tile.log_sum_exp(maximum, total)


def only_down(step: Step, x):
    """`x (T, width)`, 0 on padding: there may be infinities that a weight of 0 does not kill."""
    return x if step.last is None else jnp.where(down(step.last.astype(jnp.float32)) >= 0, x, 0.0)


def backward_kernel(dims: KernelShape, refs) -> None:
    step = _step(dims, refs)
    at = step.at

    @pl.when(begins(at))
    def _():
        refs["dq_sum"][...] = jnp.zeros_like(refs["dq_sum"])
        refs["delta"][...] = across(product(refs, "do", "o")) - refs["dlse"][...]

    @pl.when((at.block == 0) & (at.head == 0) & (at.step == 0))
    def _():
        for name in ("dslot_k_sum", "dslot_v_sum"):
            refs[name][...] = jnp.zeros_like(refs[name])

    def meet(count: int):
        slots = pl.ds(pl.multiple_of(at.step * dims.tiles.slots, dims.lanes), count)
        q, do, mask = refs["q"][...], refs["do"][...], visible(dims, step, count)
        scores = dims.scale * tile.dot(refs["slot_k"][slots], q, "nt")
        p = tile.probabilities(scores, mask, refs["lse"][...])
        dp = tile.dot(refs["slot_v"][slots], do, "nt")
        ds = dims.scale * tile.score_gradient(p, mask, dp, refs["delta"][...])
        refs["dslot_v_sum"][slots] += tile.dot(p, do, "nn")
        refs["dslot_k_sum"][slots] += tile.dot(ds, q, "nn")
        refs["dq_sum"][...] += tile.dot(refs["slot_k_across"][:, slots], ds, "nn")

    for_visible(dims, refs, step, meet)
    pl.when(ends(dims, at))(lambda: _finish(dims, refs, step))

    @pl.when((at.block == dims.blocks - 1) & (at.head == dims.group_heads - 1) & ends(dims, at))
    def _():
        for name in ("dslot_k", "dslot_v"):
            refs[name][...] = refs[f"{name}_sum"][...].astype(refs[name].dtype)


def _finish(dims: KernelShape, refs, step: Step) -> None:
    """What a block's own keys give and get; those of the group's heads are summed."""
    dq = refs["dq_sum"][...].T
    if dims.own:
        scores, lse = own_scores(dims, refs), refs["lse"][...]
        real = jnp.ones(scores.shape, bool) if step.real is None else step.real
        p = tile.probabilities(scores, real, lse)
        dp = across(product(refs, "do", "v"))
        ds = dims.scale * tile.score_gradient(p, real, dp, refs["delta"][...])
        ds, p = down(ds), down(p)
        q, k, do = (refs[name][...].astype(jnp.float32) for name in ("q", "k", "do"))
        dq = dq + only_down(step, ds * k)
        _add_up(dims, refs, step, "dk", only_down(step, ds * q))
        _add_up(dims, refs, step, "dv", only_down(step, p * do))
    refs["dq"][...] = dq.astype(refs["dq"].dtype)


def _add_up(dims: KernelShape, refs, step: Step, name: str, x) -> None:
    out = refs[name]
    if dims.group_heads == 1:
        out[...] = x.astype(out.dtype)
        return
    head, sums = step.at.head, refs[f"{name}_sum"]
    x = x + jnp.where(head == 0, 0.0, sums[...])
    sums[...] = x

    @pl.when(head == dims.group_heads - 1)
    def _():
        out[...] = x.astype(out.dtype)


# The calls.


def _call(
    kernel, dims: KernelShape, name: str, operands, out, scratch, flops: int
) -> dict[str, Any]:
    """Run a kernel of named operands `{name: (array, spec)}`, outputs `{name: (struct, spec)}`
    and scratch `{name: shape}`; it is called with the job and a dictionary of all references.
    """
    names = [*operands, *out, *scratch]

    def body(*refs):
        kernel(dims, dict(zip(names, refs, strict=True)))

    arrays = [array for array, _ in operands.values()]
    results = compat.pallas_call(
        body,
        backend="tpu",
        name=f"checkpoint_attention_{name}",
        grid=dims.grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in out.values()],
        out_shape=[compat.out_struct(x.shape, x.dtype, *arrays) for x, _ in out.values()],
        scratch_shapes=[compat.tpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=compat.tpu.CompilerParams(
            # Rows and groups of heads; along all other axes something is summed.
            dimension_semantics=("parallel",) * 2 + ("arbitrary",) * 4,
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        flops=flops * dims.batch * dims.length * dims.heads * dims.slots,
    )(*arrays)
    return dict(zip(out, results, strict=True))


def _kernel_shape(config: Config, q, k, slots: Slots) -> KernelShape:
    """The static part of a call with arguments in whole tiles; of slots there may be fewer."""
    batch, length, heads, key_size = q.shape
    count, groups = slots.k.shape[1:3]
    limits = config.tiles or Limits()
    block = min(limits.slots, round_up(count, limits.lanes))
    tiles = Tiles(min(limits.tokens, length), block, block)
    dims = KernelShape(
        batch, length, count, groups, heads, key_size, slots.v.shape[3], config.interval,
        config.scale, k is not None, slots.last is None, q.dtype, tiles, limits.lanes,
    )  # fmt: skip
    return dims._replace(tiles=choose_tiles(dims, limits))


def _lanes(x):
    return x.reshape(*x.shape[:2], -1)


def _operands(dims: KernelShape, q, k, v, slots: Slots) -> dict[str, tuple[Any, pl.BlockSpec]]:
    operands = {"q": (_lanes(q), queries_spec(dims, dims.key_size))}
    if dims.own:
        operands["k"] = (_lanes(k), keys_spec(dims, dims.key_size))
        operands["v"] = (_lanes(v), keys_spec(dims, dims.value_size))
    operands["slot_k"] = (_lanes(slots.k), strips_spec(dims, dims.key_size))
    return operands | ranges(dims, slots.first, slots.last)


def _struct(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(config: Config, q, k, v, slot_k, slot_v, first, last, *, return_residuals: bool):
    """`((o, lse), residuals)`, `lse` as `(B, H, 1, L)`; arguments as `prepare` makes them."""
    slots = Slots(slot_k, slot_v, first, last)
    dims = _kernel_shape(config, q, k, slots)
    operands = _operands(dims, q, k, v, slots)
    operands["slot_v"] = (_lanes(slot_v).swapaxes(1, 2), strips_across_spec(dims, dims.value_size))
    tokens = dims.tiles.tokens
    wide = (dims.batch, dims.length, dims.heads * dims.value_size)
    rows = (dims.batch, dims.heads, 1, dims.length)
    out = {
        "o": (_struct(wide, q.dtype), queries_spec(dims, dims.value_size)),
        "lse": (_struct(rows), rows_spec(dims)),
    }
    scratch = dict.fromkeys(("maximum", "total", "own")[: 2 + dims.own], (1, tokens))
    scratch["sum"] = (dims.value_size, tokens)
    flops = 2 * (dims.key_size + dims.value_size)
    result = _call(forward_kernel, dims, "forward", operands, out, scratch, flops)
    outputs = result["o"].reshape(*q.shape[:3], -1), result["lse"]
    return outputs, (q, k, v, *slots, *outputs) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """The gradients of all arguments, one strip of slots after another."""
    q, k, v, slot_k, slot_v, first, last, o, lse = residuals
    slots = Slots(slot_k, slot_v, first, last)
    dims = _kernel_shape(config, q, k, slots)
    run = functools.partial(_backward_strip, dims, q, o, lse, cotangents)
    if dims.strips == 1:
        dq, dk, dv, dslot_k, dslot_v = run(k, v, slots)
        return dq, dk, dv, dslot_k, dslot_v, None, None

    def of_strip(number) -> Slots:
        size = dims.tiles.strip
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1) for x in (slot_k, slot_v)
        )
        return Slots(keys, values, *_seen(dims, first, last, number))

    # The tokens' own keys are met with the first strip.
    dq, dk, dv, *start = run(k, v, of_strip(0))

    def next_strip(dq, number):
        more, _, _, *gradients = run(None, None, of_strip(number))
        return dq + more, gradients

    dq, rest = jax.lax.scan(next_strip, dq, jnp.arange(1, dims.strips, dtype=jnp.int32))

    def joined(first_part, parts):
        parts = jnp.moveaxis(jnp.concatenate([first_part[None], parts]), 0, 1)
        return parts.reshape(parts.shape[0], dims.slots, *parts.shape[3:])

    dslot_k, dslot_v = map(joined, start, rest)
    return dq.astype(q.dtype), dk, dv, dslot_k, dslot_v, None, None


def _seen(dims: KernelShape, first, last, number):
    """`first` and `last` of `Slots` in a strip."""
    if last is None:
        token = jnp.arange(dims.length, dtype=jnp.int32)[None]
        last = jnp.broadcast_to(token // dims.interval, (dims.batch, dims.length))
        first = jnp.zeros_like(last)
    base, size = number * dims.tiles.strip, dims.tiles.strip
    inside = jnp.clip(first - base, 0, size), jnp.clip(last - base, 0, size)
    return inside[0], jnp.where(last < 0, -1, inside[1])


def _backward_strip(whole: KernelShape, q, o, lse, cotangents, k, v, slots: Slots):
    """The gradients of q, k, v, and of one strip; that of q in float32 if there are others."""
    do, dlse = cotangents
    dims = whole._replace(slots=whole.tiles.strip, own=k is not None, plain=slots.last is None)
    keys, values = dims.key_size, dims.value_size
    operands = _operands(dims, q, k, v, slots)
    operands["slot_k_across"] = (_lanes(slots.k).swapaxes(1, 2), strips_across_spec(dims, keys))
    operands["slot_v"] = (_lanes(slots.v), strips_spec(dims, values))
    operands |= {
        name: (_lanes(x), queries_spec(dims, values)) for name, x in (("o", o), ("do", do))
    }
    operands |= {"lse": (lse, rows_spec(dims)), "dlse": (dlse, rows_spec(dims))}
    summed = q.dtype if whole.strips == 1 else jnp.float32
    out = {
        "dq": (_struct(_lanes(q).shape, summed), queries_spec(dims, keys)),
        "dslot_k": (_struct(_lanes(slots.k).shape, q.dtype), strips_spec(dims, keys)),
        "dslot_v": (_struct(_lanes(slots.v).shape, q.dtype), strips_spec(dims, values)),
    }
    tokens, strip = dims.tiles.tokens, dims.tiles.strip
    scratch = {"dq_sum": (keys, tokens), "delta": (1, tokens)}
    scratch |= {"dslot_k_sum": (strip, keys), "dslot_v_sum": (strip, values)}
    if dims.own:
        out["dk"] = (_struct(_lanes(k).shape, q.dtype), keys_spec(dims, keys))
        out["dv"] = (_struct(_lanes(v).shape, q.dtype), keys_spec(dims, values))
        if dims.group_heads > 1:
            scratch |= {"dk_sum": (tokens, keys), "dv_sum": (tokens, values)}
    flops = 2 * (3 * keys + 2 * values)
    result = _call(backward_kernel, dims, "backward", operands, out, scratch, flops)
    likes = {"dq": q, "dk": k, "dv": v, "dslot_k": slots.k, "dslot_v": slots.v}
    return [
        result[name].reshape(like.shape) if name in result else None for name, like in likes.items()
    ]


def prepare(config: Config, q, k, v, *rest):
    """The slots of the arguments, and whole tiles of everything; see `Backend.prepare`."""
    slots = find_slots(config, q, k, v, *rest)
    length, value_size = q.shape[1], slots.v.shape[3]
    limits = config.tiles or Limits()
    tokens = -length % min(limits.tokens, round_up(length, limits.lanes))

    def pad(x, rows: int, value=0):
        """More rows, and whole tiles of lanes."""
        if x is None:
            return None
        widths = [(0, 0), (0, rows)]
        widths += [(0, 0), (0, -x.shape[-1] % limits.lanes)] if x.ndim > 2 else []
        return jnp.pad(x, widths, constant_values=value)

    q, k, v = (pad(x, tokens) for x in (q, k, v))
    slots = slots._replace(k=pad(slots.k, 0), v=pad(slots.v, 0))
    more = -slots.k.shape[1] % _kernel_shape(config, q, k, slots).tiles.strip
    first, last = pad(slots.first, tokens), pad(slots.last, tokens, -1)
    arrays = (q, k, v, pad(slots.k, more), pad(slots.v, more), first, last)

    def restore(outputs):
        o, lse = outputs
        return o[:, :length, :, :value_size], lse[:, :, 0, :length].swapaxes(1, 2)

    return arrays, restore


def unsupported(
    config: Config, q, k, v, past_k, past_v, past_length, offset, segment_index
) -> str | None:
    """Why the kernels cannot serve these arrays."""
    if symbolic.is_symbol(q.shape[0]) and not (past_k is offset is segment_index is None):
        return f"its scalar memory holds what every row sees, and the batch is {q.shape[0]}"
    return no_wide_numbers(q)


BACKEND = Backend(forward, backward, prepare, unsupported)
