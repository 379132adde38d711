"""GPU kernels (Triton lowering): chunks of time in parallel, state in registers.

A program owns a strip of channels, one a thread, and walks one chunk of time. Where the batch alone
fills the GPU there is one chunk: two reads, one write. Otherwise the chunks are first reduced to
their maps `h -> A h + F`, a third kernel chains the maps, and all chunks walk again from the state
that enters each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, planes, segments
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.gpu import Strip, StripShape, Tiles, beyond_addresses, by_chunks, token
from pallas_kernels.common.gpu import strip as this_strip
from pallas_kernels.common.planes import Planes
from pallas_kernels.linear_scan import tile
from pallas_kernels.linear_scan.tile import Config

_ENOUGH_PROGRAMS = 512  # a few for each multiprocessor of the GPUs since Ampere


def choose_tiles(batch: int, length: int, width: int) -> Tiles:
    """One chunk if the batch fills the GPU, else chunks of 256 steps."""
    strip = min(128, max(32, pl.next_power_of_2(width)))
    programs = batch * -(-width // strip)
    steps = length if programs >= _ENOUGH_PROGRAMS else min(length, 256)
    return Tiles(steps, strip, min(8, pl.next_power_of_2(steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelShape(StripShape):
    planes: int
    constant: bool  # one decay for all steps


class _Step(NamedTuple):
    """One step of a walk: its token, whether it exists, its code."""

    t: jax.Array
    live: jax.Array | bool
    code: jax.Array | None


def _walk(dims: _KernelShape, strip: Strip, codes_ref, body, carry):
    """`body(step, carry)` over the chunk in the direction of travel, some steps unrolled."""
    chunk = pl.program_id(0)

    def group(i, carry):
        for j in range(dims.tiles.unroll):
            carry = body(_Step(*token(dims, chunk, i, j, strip.row, codes_ref)), carry)
        return carry

    return jax.lax.fori_loop(0, dims.groups, group, carry)


def _decay(dims: _KernelShape, strip: Strip, a_refs, step: _Step) -> Planes:
    """`a_t`, `(width,)`."""
    index = () if dims.constant else (strip.row, step.t)
    return strip.load_planes(a_refs, index, True if dims.constant else step.live)


# The kernels: maths on values between a load and a store.


def _split_refs(refs, planes: int, groups: int, *, segmented: bool):
    """References in groups of one a plane, and that of the codes (last of the inputs)."""
    refs = list(refs)
    inputs = [refs[i * planes : (i + 1) * planes] for i in range(groups)]
    rest = refs[groups * planes :]
    codes = rest.pop(0) if segmented else None
    outputs = [rest[i : i + planes] for i in range(0, len(rest), planes)]
    return inputs, codes, outputs


def _zeros(dims: _KernelShape) -> Planes:
    return (jnp.zeros((dims.tiles.width,), jnp.float32),) * dims.planes


def _reduce_kernel(*refs, dims: _KernelShape, backward: bool):
    """The map of each chunk: `decay, flow (B, C, D)`."""
    (a_refs, x_refs), codes_ref, (decay_refs, flow_refs) = _split_refs(
        refs, dims.planes, 2, segmented=dims.segmented
    )
    strip = this_strip(dims)

    def body(step, carry):
        decay, flow = carry
        a = _decay(dims, strip, a_refs, step)
        x = strip.load_planes(x_refs, (strip.row, step.t), step.live)
        if backward:
            _, flow = tile.retreat(flow, a, x, step.code)
        else:
            flow = tile.advance(flow, a, x, step.code)
        return tile.compose(decay, a, step.code), flow

    zero = _zeros(dims)
    decay, flow = _walk(dims, strip, codes_ref, body, (planes.ones_like(zero), zero))
    chunk = (strip.row, pl.program_id(0))
    strip.store_planes(decay_refs, chunk, decay)
    strip.store_planes(flow_refs, chunk, flow)


def _chain_kernel(*refs, dims: _KernelShape):
    """The state that enters each chunk `(B, C, D)` and the one that leaves the last `(B, D)`."""
    (decay_refs, flow_refs, first_refs), _, (entering_refs, last_refs) = _split_refs(
        refs, dims.planes, 3, segmented=False
    )
    strip = this_strip(dims, row_axis=0)

    def body(i, h):
        chunk = (strip.row, dims.chunks - 1 - i if dims.reverse else i)
        strip.store_planes(entering_refs, chunk, h)
        decay, flow = strip.load_planes(decay_refs, chunk), strip.load_planes(flow_refs, chunk)
        return tile.apply(decay, flow, h, segmented=True)

    h = strip.load_planes(first_refs, (strip.row,))
    h = jax.lax.fori_loop(0, dims.chunks, body, h)
    strip.store_planes(last_refs, (strip.row,), h)


def _forward_kernel(*refs, dims: _KernelShape):
    (a_refs, b_refs, entering_refs), codes_ref, (h_refs, leaving_refs) = _split_refs(
        refs, dims.planes, 3, segmented=dims.segmented
    )
    strip = this_strip(dims)
    chunk = (strip.row, pl.program_id(0))

    def body(step, h):
        a = _decay(dims, strip, a_refs, step)
        b = strip.load_planes(b_refs, (strip.row, step.t), step.live)
        h = tile.advance(h, a, b, step.code)
        visible = h
        if dims.segmented:
            visible = planes.where(step.code == segments.SKIP, planes.zeros_like(h), h)
        strip.store_planes(h_refs, (strip.row, step.t), visible, step.live)
        return h

    h = _walk(dims, strip, codes_ref, body, strip.load_planes(entering_refs, chunk))
    strip.store_planes(leaving_refs, chunk, h)


def _backward_kernel(*refs, dims: _KernelShape):
    (a_refs, h_refs, initial_refs, dh_refs, entering_refs), codes_ref, outputs = _split_refs(
        refs, dims.planes, 5, segmented=dims.segmented
    )
    da_refs, db_refs, leaving_refs = outputs
    strip = this_strip(dims)
    chunk = (strip.row, pl.program_id(0))
    initial = strip.load_planes(initial_refs, (strip.row,))

    def body(step, carry):
        c, da_sum = carry
        a = _decay(dims, strip, a_refs, step)
        dh = strip.load_planes(dh_refs, (strip.row, step.t), step.live)
        # This kernel travels against the forward pass: the state before is one step ahead.
        before = step.t - 1 if dims.reverse else step.t + 1
        exists = (before >= 0) & (before < dims.length)
        h_before = strip.load_planes(h_refs, (strip.row, before), step.live & exists)
        h_before = planes.where(exists, h_before, initial)
        h_before = tile.state_before(h_before, initial, step.code)
        gradient, c = tile.retreat(c, a, dh, step.code)
        da = tile.decay_gradient(gradient, h_before, step.code)
        strip.store_planes(db_refs, (strip.row, step.t), gradient, step.live)
        if dims.constant:
            da_sum = planes.add(da_sum, da)
        else:
            strip.store_planes(da_refs, (strip.row, step.t), da, step.live)
        return c, da_sum

    carry = strip.load_planes(entering_refs, chunk), _zeros(dims) if dims.constant else ()
    c, da_sum = _walk(dims, strip, codes_ref, body, carry)
    strip.store_planes(leaving_refs, chunk, c)
    if dims.constant:
        strip.store_planes(da_refs, chunk, da_sum)


# The calls.


def _kernel_shape(a, b, segment_index, tiles: Tiles | None, *, reverse: bool) -> _KernelShape:
    batch, length, width = b.shape
    planes = 2 if jnp.iscomplexobj(b) else 1
    tiles = tiles or choose_tiles(batch, length, width)
    return _KernelShape(
        batch=batch,
        length=length,
        width=width,
        tiles=tiles,
        segmented=segment_index is not None,
        reverse=reverse,
        planes=planes,
        constant=a.ndim == 1,
    )


def _call(kernel, dims: _KernelShape, name: str, grid, operands, outputs, flops: int):
    """Run `kernel`; `outputs` are `(shape, dtype)` pairs, each made once a plane."""
    structs = [compat.out_struct(*output, *operands) for output in outputs]
    out = compat.pallas_call(
        kernel,
        backend="gpu",
        name=name,
        grid=grid,
        out_shape=[struct for struct in structs for _ in range(dims.planes)],
        compiler_params=compat.triton.CompilerParams(
            num_warps=max(1, dims.tiles.width // 32), num_stages=1
        ),
        flops=flops * dims.batch * dims.length * dims.width * dims.planes**2,
    )(*operands)
    return [tuple(out[i : i + dims.planes]) for i in range(0, len(out), dims.planes)]


def _entering(dims: _KernelShape, a: Planes, x: Planes, first: Planes, codes, *, backward: bool):
    """The state that enters each chunk, `(B, C, D)`, and what leaves the last if that is known."""
    whole, chained = _whole, functools.partial(_chained, dims, backward=backward)
    return by_chunks("linear_scan", dims.chunks, whole, chained, a, x, first, codes)


def _whole(a: Planes, x: Planes, first: Planes, codes):
    return tuple(p[:, None] for p in first), None


def _chained(dims: _KernelShape, a: Planes, x: Planes, first: Planes, codes, *, backward: bool):
    per_chunk = ((dims.batch, dims.chunks, dims.width), jnp.float32)
    decay, flow = _call(
        functools.partial(_reduce_kernel, dims=dims, backward=backward),
        dims,
        "linear_scan_reduce",
        dims.grid,
        [*a, *x, *codes],
        [per_chunk, per_chunk],
        flops=4,
    )
    return _call(
        functools.partial(_chain_kernel, dims=dims),
        dims,
        "linear_scan_chain",
        dims.grid[1:],
        [*decay, *flow, *first],
        [per_chunk, ((dims.batch, dims.width), jnp.float32)],
        flops=0,
    )


def _codes(segment_index, *, reverse: bool) -> list[jax.Array]:
    return [] if segment_index is None else [segments.step_codes(segment_index, reverse=reverse)]


def forward(config: Config, a, b, initial_state, segment_index, *, return_residuals: bool):
    """`(h, final_state)`, and what `backward` reads; arguments as in `reference.forward`."""
    reverse = config.reverse
    dims = _kernel_shape(a, b, segment_index, config.tiles, reverse=reverse)
    a_planes, b_planes, codes = (
        planes.split(a),
        planes.split(b),
        _codes(segment_index, reverse=reverse),
    )
    entering, final_state = _entering(
        dims, a_planes, b_planes, planes.split(initial_state), codes, backward=False
    )
    h_planes, leaving = _call(
        functools.partial(_forward_kernel, dims=dims),
        dims,
        "linear_scan_forward",
        dims.grid,
        [*a_planes, *b_planes, *entering, *codes],
        [(b.shape, b_planes[0].dtype), ((dims.batch, dims.chunks, dims.width), jnp.float32)],
        flops=2,
    )
    final_state = final_state or tuple(p[:, 0] for p in leaving)
    h, final_state = planes.join(h_planes), planes.join(final_state)
    return (h, final_state), (a, h, initial_state, segment_index) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(da, db, dinitial_state, None)` from the cotangents of `forward`'s outputs."""
    (a, h, initial_state, segment_index), (dh, dfinal_state), reverse = (
        residuals,
        cotangents,
        config.reverse,
    )
    dims = _kernel_shape(a, h, segment_index, config.tiles, reverse=not reverse)
    a_planes, h_planes, dh_planes = planes.split(a), planes.split(h), planes.split(dh)
    codes = _codes(segment_index, reverse=reverse)
    entering, dinitial = _entering(
        dims, a_planes, dh_planes, planes.split(dfinal_state), codes, backward=True
    )
    per_chunk = ((dims.batch, dims.chunks, dims.width), jnp.float32)
    da, db, leaving = _call(
        functools.partial(_backward_kernel, dims=dims),
        dims,
        "linear_scan_backward",
        dims.grid,
        [*a_planes, *h_planes, *planes.split(initial_state), *dh_planes, *entering, *codes],
        [
            per_chunk if dims.constant else (a.shape, a_planes[0].dtype),
            (h.shape, h_planes[0].dtype),
            per_chunk,
        ],
        flops=5,
    )
    dinitial = dinitial or tuple(p[:, 0] for p in leaving)
    da = planes.join(da)
    if dims.constant:
        da = da.sum((0, 1)).astype(a.dtype)
    return da, planes.join(db), planes.join(dinitial), None


def unsupported(config: Config, a, b, initial_state, segment_index) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(b) or beyond_addresses(b.shape[0], lambda: b.size)


BACKEND = Backend(forward, backward, unsupported=unsupported)
