"""GPU kernels (Triton lowering): a fused scan, the N states of a channel in registers.

A program is one warp: it owns a strip of channels, as many as fill its registers with states, and
walks one chunk of time. Where the batch
alone fills the GPU there is one chunk. Otherwise the chunks are first reduced to the state they
leave behind, a second kernel chains these, and all chunks walk from the state that enters each.
Backward stores no state: the parameters' gradients are summed forward in time within a chunk
(`tile.sensitivity`) and reach over its end through the cotangent of the state that leaves it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.gpu import Strip, StripShape, Tiles, beyond_addresses, by_chunks, token
from pallas_kernels.common.gpu import strip as this_strip
from pallas_kernels.common.planes import Planes, add, join, mul, split, where, zeros_like
from pallas_kernels.diagonal_ssm import powers, tile
from pallas_kernels.diagonal_ssm.tile import Config

_ENOUGH_PROGRAMS = 2048  # of one warp; a dozen for each multiprocessor of an H100
_PARTIAL = 3  # code of a chunk of which padding is a part
_STATES_A_LANE, _MOST_STATES = 16, 256


def choose_tiles(batch: int, length: int, width: int, states: int) -> Tiles:
    """Up to 16 states a lane; chunks as long as can be while there are enough programs, but of 64
    steps or more."""
    strip = max(1, min(32, _STATES_A_LANE * 32 // pl.next_power_of_2(states)))
    strip = min(strip, pl.next_power_of_2(width))
    chunks = -(-_ENOUGH_PROGRAMS // (batch * -(-width // strip)))
    steps = length
    if chunks > 1:
        steps = min(length, max(64, pl.next_power_of_2(-(-length // chunks))))
    return Tiles(steps, strip, min(4, pl.next_power_of_2(steps)))


def refusal(states: int) -> str | None:
    """Why the kernels cannot hold this many states, or None."""
    if states <= _MOST_STATES:
        return None
    return f"{states} states a channel do not fit in registers, {_MOST_STATES} do"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelShape(StripShape):
    states: int  # N, a power of two


class _Step(NamedTuple):
    """One step of a walk: its token, whether it exists, its code, its inputs, its correction."""

    t: jax.Array
    live: jax.Array | bool
    code: jax.Array | None
    inputs: tuple[jax.Array, ...]  # (width,) each; 0 where there is no token
    lacking: Planes | None

    def visible(self, x: jax.Array) -> jax.Array:
        return x if self.code is None else jnp.where(self.code == segments.SKIP, 0.0, x)


def _walk(dims: _KernelShape, strip: Strip, input_refs, codes_ref, lacking_refs, body, carry):
    """`body(step, carry)` over the chunk in the direction of travel, some steps unrolled.

    What the rounded decay lacks is made good once in a group, for all its steps.
    """
    chunk = pl.program_id(0)

    def step(i, j) -> _Step:
        t, live, code = token(dims, chunk, i, j, strip.row, codes_ref)
        inputs = [strip.load(ref, (strip.row, t), live) for ref in input_refs]
        if dims.segmented:
            inputs = [jnp.where(code == segments.SKIP, 0.0, x) for x in inputs]
        lacking = None
        if j == dims.tiles.unroll - 1:
            lacking = tuple(dims.tiles.unroll * p for p in strip.load_planes(lacking_refs))
        return _Step(t, live, code, tuple(inputs), lacking)

    def group(i, carry):
        for now in [step(i, j) for j in range(dims.tiles.unroll)]:
            carry = body(now, carry)
        return carry

    return jax.lax.fori_loop(0, dims.groups, group, carry)


# The kernels: maths on values between a load and a store.


def _split_refs(refs, rows: int, pairs: int, *, segmented: bool):
    """References of `rows` single inputs, `pairs` of planes, codes, and all outputs."""
    refs = list(refs)
    single, rest = refs[:rows], refs[rows:]
    double = [rest[2 * i : 2 * i + 2] for i in range(pairs)]
    rest = rest[2 * pairs :]
    codes = rest.pop(0) if segmented else None
    return single, double, codes, rest


def _reduce_kernel(*refs, dims: _KernelShape, adjoint: bool):
    """What each chunk leaves from a zero state, `(B, C, N, H)`."""
    x_refs, (a_refs, lacking_refs, output_projection_refs), codes_ref, flow_refs = _split_refs(
        refs, 1, 3, segmented=dims.segmented
    )
    strip = this_strip(dims)
    a, output_projection = strip.load_planes(a_refs), strip.load_planes(output_projection_refs)

    def body(step, h):
        x = step.inputs[0][None]
        if adjoint:
            return tile.retreat(h, x, step.code, output_projection, a, step.lacking)[1]
        return tile.advance(h, x, step.code, a, step.lacking)

    h = _walk(dims, strip, x_refs, codes_ref, lacking_refs, body, zeros_like(a))
    strip.store_planes(flow_refs, (strip.row, pl.program_id(0)), h)


def _chain_kernel(*refs, dims: _KernelShape):
    """The state that enters each chunk `(B, C, N, H)` and the one that leaves the last."""
    _, (decay_refs, partial_refs, flow_refs, first_refs), codes_ref, outputs = _split_refs(
        refs, 0, 4, segmented=True
    )
    entering_refs, last_refs = outputs[:2], outputs[2:]
    strip = this_strip(dims, row_axis=0)
    decay = strip.load_planes(decay_refs)
    partial = strip.load_planes(partial_refs, (strip.row,))

    def body(i, h):
        chunk = (strip.row, dims.chunks - 1 - i if dims.reverse else i)
        strip.store_planes(entering_refs, chunk, h)
        code = compat.triton.load(codes_ref.at[chunk])
        flow = strip.load_planes(flow_refs, chunk)
        after = add(mul(where(code == _PARTIAL, partial, decay), h), flow)
        return tile.select(code, h, flow, after)

    h = jax.lax.fori_loop(0, dims.chunks, body, strip.load_planes(first_refs, (strip.row,)))
    strip.store_planes(last_refs, (strip.row,), h)


def _output_kernel(*refs, dims: _KernelShape, adjoint: bool):
    """`y` or `du`, and the state that leaves each chunk."""
    x_refs, (a_refs, lacking_refs, output_projection_refs, entering_refs), codes_ref, outputs = (
        _split_refs(refs, 1, 4, segmented=dims.segmented)
    )
    strip = this_strip(dims)
    chunk = (strip.row, pl.program_id(0))
    a, output_projection = strip.load_planes(a_refs), strip.load_planes(output_projection_refs)

    def body(step, h):
        x = step.inputs[0][None]
        if adjoint:
            gradient, h = tile.retreat(h, x, step.code, output_projection, a, step.lacking)
            out = gradient[0]
        else:
            h = tile.advance(h, x, step.code, a, step.lacking)
            out = tile.contract(output_projection, h)
        strip.store_planes(outputs[:1], (strip.row, step.t), (step.visible(out.sum(0)),), step.live)
        return h

    h = strip.load_planes(entering_refs, chunk)
    h = _walk(dims, strip, x_refs, codes_ref, lacking_refs, body, h)
    strip.store_planes(outputs[1:], chunk, h)


def _gradient_kernel(*refs, dims: _KernelShape):
    """What each chunk adds to the gradients of `c` and `log_a`, `(B, C, N, H)`."""
    input_refs, pairs, codes_ref, outputs = _split_refs(refs, 2, 5, segmented=dims.segmented)
    a_refs, lacking_refs, output_projection_refs, entering_refs, leaving_refs = pairs
    strip = this_strip(dims)
    chunk = (strip.row, pl.program_id(0))
    a = strip.load_planes(a_refs)

    def body(step, carry):
        h, p, h_sum, p_sum = carry
        u, dy = (x[None] for x in step.inputs)
        p = tile.sensitivity(p, h, step.code, a, step.lacking)
        h = tile.advance(h, u, step.code, a, step.lacking)
        h_sum = add(h_sum, tuple(dy * x for x in h))
        return h, p, h_sum, add(p_sum, tuple(dy * x for x in p))

    zero = zeros_like(a)
    carry = (strip.load_planes(entering_refs, chunk), zero, zero, zero)
    _, p, h_sum, p_sum = _walk(dims, strip, input_refs, codes_ref, lacking_refs, body, carry)
    strip.store_planes(outputs[:2], chunk, tuple(2 * x for x in h_sum))
    output_projection, leaving = (
        strip.load_planes(output_projection_refs),
        strip.load_planes(leaving_refs, chunk),
    )
    strip.store_planes(outputs[2:], chunk, add(mul(output_projection, p_sum), mul(leaving, p)))


# The calls.


class _Operands(NamedTuple):
    """Arrays of one call as the kernels want them; planes of parameters are `(N, H)`."""

    a: Planes
    lacking: Planes
    output_projection: Planes
    decay: Planes  # of a whole chunk
    partial: Planes  # of the chunk with the last token of each row, (B, N, H)
    codes: list[jax.Array]
    chunk_codes: jax.Array  # (B, C)


def _prepare(config: Config, u, log_a, c, segment_index) -> tuple[_KernelShape, _Operands]:
    batch, length, width = u.shape
    states = pl.next_power_of_2(log_a.shape[1])
    tiles = config.tiles or choose_tiles(batch, length, width, states)
    dims = _KernelShape(
        batch=batch,
        length=length,
        width=width,
        tiles=tiles,
        segmented=segment_index is not None,
        reverse=config.reverse,
        states=states,
    )
    lengths = jnp.full((batch,), length, jnp.int32)
    codes = []
    if segment_index is not None:
        lengths = (segment_index != 0).sum(1, dtype=jnp.int32)
        codes = [segments.step_codes(segment_index, reverse=config.reverse)]
    last = (lengths - 1) % tiles.steps + 1
    ending = powers.powers(log_a.T[None], last[:, None, None])
    whole = powers.powers(log_a.T, jnp.full((1, 1), min(tiles.steps, length), jnp.int32))
    nearest, rest = powers.decay(log_a.T)
    a, lacking, output_projection, decay, partial = (
        split(_pad(x, states=states)) for x in (nearest, rest, 2 * c.T, whole, ending)
    )
    chunk_codes = _chunk_codes(dims, codes)
    operands = _Operands(a, lacking, output_projection, decay, partial, codes, chunk_codes)
    return dims, operands


def _pad(x, *, states: int):
    """Zeros for states `(..., N, H)` that do not exist."""
    width = [(0, 0)] * (x.ndim - 2) + [(0, states - x.shape[-2]), (0, 0)]
    return jnp.pad(x, width)


def _chunk_codes(dims: _KernelShape, codes) -> jax.Array:
    """What the chain does at each chunk, `(B, C)`."""
    shape = (dims.batch, dims.length)
    steps = codes[0] if codes else jnp.full(shape, segments.CONTINUE, jnp.int32)
    behind = ((0, 0), (0, dims.chunks * dims.tiles.steps - dims.length))
    steps = jnp.pad(steps, behind, constant_values=segments.SKIP)
    steps = steps.reshape(dims.batch, dims.chunks, dims.tiles.steps)
    skipped = steps == segments.SKIP
    code = jnp.where(skipped.any(2), jnp.int32(_PARTIAL), segments.CONTINUE)
    code = jnp.where((steps == segments.RESET).any(2), segments.RESET, code)
    return jnp.where(skipped.all(2), segments.SKIP, code)


def _state_planes(dims: _KernelShape, x) -> Planes:
    """`(B, H, N) -> (B, N, H)`."""
    return split(_pad(x.swapaxes(1, 2), states=dims.states))


def _from_planes(x, states: int):
    """`(B, N, H) -> (B, H, N)`, complex."""
    return join(tuple(x))[:, :states].swapaxes(1, 2)


def _call(kernel, dims: _KernelShape, name: str, grid, operands, outputs, *, flops: int):
    """Run `kernel`; `outputs` are `(shape, dtype)`."""
    structs = [compat.out_struct(*output, *operands) for output in outputs]
    return compat.pallas_call(
        kernel,
        backend="gpu",
        name=name,
        grid=grid,
        out_shape=structs,
        compiler_params=compat.triton.CompilerParams(num_warps=1, num_stages=1),
        flops=flops * dims.batch * dims.length * dims.width * dims.states,
    )(*operands)


def _entering(dims: _KernelShape, ops: _Operands, x, first: Planes, *, adjoint: bool):
    """The state that enters each chunk, `(B, C, N, H)`, and the one that leaves the last or None
    where there is one chunk."""
    whole, chained = _whole, functools.partial(_chained, dims, adjoint=adjoint)
    return by_chunks("diagonal_ssm", dims.chunks, whole, chained, ops, x, first)


def _whole(ops: _Operands, x, first: Planes):
    return tuple(p[:, None] for p in first), None


def _chained(dims: _KernelShape, ops: _Operands, x, first: Planes, *, adjoint: bool):
    per_chunk = ((dims.batch, dims.chunks, dims.states, dims.width), jnp.float32)
    flow = _call(
        functools.partial(_reduce_kernel, dims=dims, adjoint=adjoint),
        dims,
        "diagonal_ssm_reduce",
        dims.grid,
        [x, *ops.a, *ops.lacking, *ops.output_projection, *ops.codes],
        [per_chunk] * 2,
        flops=8,
    )
    out = _call(
        functools.partial(_chain_kernel, dims=dims),
        dims,
        "diagonal_ssm_chain",
        dims.grid[1:],
        [*ops.decay, *ops.partial, *flow, *first, ops.chunk_codes],
        [per_chunk] * 2 + [((dims.batch, dims.states, dims.width), jnp.float32)] * 2,
        flops=0,
    )
    return tuple(out[:2]), tuple(out[2:])


def _walk_once(dims: _KernelShape, ops: _Operands, x, first: Planes, dtype, *, adjoint: bool):
    """`(output, last state, entering states)` of a walk in one direction."""
    entering, last = _entering(dims, ops, x, first, adjoint=adjoint)
    per_chunk = ((dims.batch, dims.chunks, dims.states, dims.width), jnp.float32)
    out, *leaving = _call(
        functools.partial(_output_kernel, dims=dims, adjoint=adjoint),
        dims,
        "diagonal_ssm_adjoint" if adjoint else "diagonal_ssm_forward",
        dims.grid,
        [x, *ops.a, *ops.lacking, *ops.output_projection, *entering, *ops.codes],
        [(x.shape, dtype), per_chunk, per_chunk],
        flops=12,
    )
    return out, last or tuple(p[:, 0] for p in leaving), entering


def forward(config: Config, u, log_a, c, initial_state, segment_index, *, return_residuals: bool):
    """`((y, final_state), residuals)`: the arguments and the states that enter the chunks."""
    dims, ops = _prepare(config, u, log_a, c, segment_index)
    first = _state_planes(dims, initial_state)
    y, last, entering = _walk_once(dims, ops, u, first, u.dtype, adjoint=False)
    outputs = y, _from_planes(last, c.shape[1])
    return outputs, (u, log_a, c, entering, segment_index) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(du, dlog_a, dc, dinitial_state, None)` from the cotangents of `forward`'s outputs."""
    (u, log_a, c, entering, segment_index), (dy, dfinal_state) = residuals, cotangents
    dims, ops = _prepare(config, u, log_a, c, segment_index)
    against = dataclasses.replace(dims, reverse=not config.reverse)
    first = _state_planes(dims, dfinal_state)
    du, dinitial, leaving = _walk_once(against, ops, dy, first, u.dtype, adjoint=True)
    per_chunk = ((dims.batch, dims.chunks, dims.states, dims.width), jnp.float32)
    sums = _call(
        functools.partial(_gradient_kernel, dims=dims),
        dims,
        "diagonal_ssm_gradient",
        dims.grid,
        [u, dy, *ops.a, *ops.lacking, *ops.output_projection, *entering, *leaving, *ops.codes],
        [per_chunk] * 4,
        flops=24,
    )
    dc, dlog_a = (join(tuple(sums[i : i + 2])).sum((0, 1))[: c.shape[1]].T for i in (0, 2))
    return du, dlog_a, dc, _from_planes(dinitial, c.shape[1]), None


def unsupported(config: Config, u, log_a, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    if config.method not in (None, "scan"):
        return f"its kernel is a scan, method={config.method!r} is xla's"
    return (
        no_wide_numbers(u)
        or beyond_addresses(u.shape[0], lambda: u.size)
        or refusal(log_a.shape[1])
    )


BACKEND = Backend(forward, backward, unsupported=unsupported)
