"""TPU kernels: a fused scan, the N states of 128 channels in registers.

Grid `(B, H / 128, L / steps)`, time last and in the direction of travel. States lie on the
sublanes, channels on the lanes; the input of a step is broadcast over the sublanes and the output
summed over them. Nothing but inputs and outputs of size `(B, L, H)` touches HBM, in either
direction: backward walks once against the time for `du` and once along it for the parameters
(`tile.sensitivity`), and stores no state.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.planes import Planes, add, join, split, zeros_like
from pallas_kernels.common.tpu import LANES, SUBLANES, round_up, sequence_begins, step_code_operands
from pallas_kernels.diagonal_ssm import powers, tile
from pallas_kernels.diagonal_ssm.tile import Config

_VMEM = 8 * 2**20  # half of what a kernel may take on the smallest TPU without asking for more
_ROWS = {"forward": 2, "adjoint": 2, "gradient": 2}  # arrays (B, L, H) that a kernel moves
_STATES = {"forward": 10, "adjoint": 10, "gradient": 14}  # planes (N, 128) that it sees


class Tiles(NamedTuple):
    """`steps` of time in a block of 128 channels."""

    steps: int


def vmem_bytes(tiles: Tiles, states: int, *, kernel: str = "gradient") -> int:
    """Bytes of VMEM that a kernel's blocks take, double-buffered, with codes.

    Args:
      states: N.
      kernel: "forward", "adjoint" (`du`) or "gradient" (of the parameters).
    """
    rows = round_up(tiles.steps, 16) * LANES * 4 * (_ROWS[kernel] + 1)
    return 2 * (rows + _STATES[kernel] * round_up(states, SUBLANES) * LANES * 4)


def choose_tiles(length: int, states: int) -> Tiles:
    """The most steps up to 512 that divide the length, if some do, and fit."""
    fitting = [s for s in range(16, 513, 16) if vmem_bytes(Tiles(s), states) <= _VMEM] or [16]
    exact = [s for s in fitting if length % s == 0 and s >= 64]
    return Tiles(max(exact or [s for s in fitting if s < length + 16 and s <= 256]))


def refusal(states: int) -> str | None:
    """Why the kernels cannot hold this many states, or None."""
    needed = vmem_bytes(Tiles(16), states)
    if needed <= _VMEM:
        return None
    return f"{states} states a channel take {needed} bytes of VMEM, it has {_VMEM}"


class _KernelShape(NamedTuple):
    """What is static about one kernel."""

    batch: int
    length: int
    width: int
    states: int  # N, a multiple of 8
    tiles: Tiles
    segmented: bool  # step codes come with the arguments
    forward_reverse: bool  # the direction of the op
    reverse: bool  # the direction of travel of this kernel

    @property
    def blocks(self) -> int:
        return -(-self.length // self.tiles.steps)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, -(-self.width // LANES), self.blocks

    @property
    def ragged(self) -> bool:
        return self.length % self.tiles.steps != 0

    def time(self, i):
        """The block that is the i-th in the direction of travel."""
        return self.blocks - 1 - i if self.reverse else i


# Tile bookkeeping: which block of which array a grid step sees.


def _block(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.tiles.steps, LANES),
        index_map=lambda b, h, i: (b, dims.time(i), h),
    )


def _codes_block(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.tiles.steps, LANES),
        index_map=lambda b, h, i: (b, dims.time(i), 0),
    )


def _parameters(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(block_shape=(dims.states, LANES), index_map=lambda b, h, i: (0, h))


def _state(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(block_shape=(None, dims.states, LANES), index_map=lambda b, h, i: (b, 0, h))


# Loads and stores.


def _load(refs) -> Planes:
    return tuple(ref[...] for ref in refs)


def _store(refs, values: Planes) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value


class _Group(NamedTuple):
    """Eight rows of a block: one register tile of every array that has time."""

    rows: slice | pl.Slice
    inputs: tuple[jax.Array, ...]  # (8, 128) each; 0 where there is no token
    code: jax.Array | None

    def step(self, j: int) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """`(1, 128)` inputs and code of row j."""
        code = None if self.code is None else self.code[j : j + 1]
        return tuple(x[j : j + 1] for x in self.inputs), code


def _group(dims: _KernelShape, i, refs, codes_ref) -> _Group:
    """The i-th group of the block in the direction of travel."""
    groups = dims.tiles.steps // SUBLANES
    start = (groups - 1 - i if dims.reverse else i) * SUBLANES
    rows = pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)
    inputs = tuple(ref[rows, :].astype(jnp.float32) for ref in refs)
    code = codes_ref[rows, :] if dims.segmented else None
    if dims.ragged:
        place = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        place = place + start + dims.time(pl.program_id(2)) * dims.tiles.steps
        if code is None:
            first = dims.length - 1 if dims.forward_reverse else 0
            code = jnp.where(place == first, segments.ENTER, segments.CONTINUE)
        code = jnp.where(place < dims.length, code, segments.SKIP)
    if code is not None:
        inputs = tuple(jnp.where(code == segments.SKIP, jnp.zeros_like(x), x) for x in inputs)
    return _Group(rows, inputs, code)


def _walk(dims: _KernelShape, refs, codes_ref, lacking_refs, body, carry, out_ref=None):
    """`body((inputs, code), lacking, carry) -> (out, carry)` over the block in the direction of
    travel; `out (N, 128)` is summed over N and written to `out_ref`.

    What the rounded decay lacks is made good once in a group, for eight steps.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    order = range(SUBLANES - 1, -1, -1) if dims.reverse else range(SUBLANES)

    def group(i, carry):
        now = _group(dims, i, refs, codes_ref)
        out = jnp.zeros((SUBLANES, LANES), jnp.float32)
        for k, j in enumerate(order):
            lacking = None
            if k == SUBLANES - 1:
                lacking = tuple(SUBLANES * p for p in _load(lacking_refs))
            terms, carry = body(now.step(j), lacking, carry)
            if out_ref is not None:
                out = jnp.where(row == j, terms.sum(0, keepdims=True), out)
        if out_ref is not None:
            if now.code is not None:
                out = jnp.where(now.code == segments.SKIP, jnp.zeros_like(out), out)
            out_ref[now.rows, :] = out.astype(out_ref.dtype)
        return carry

    return jax.lax.fori_loop(0, dims.tiles.steps // SUBLANES, group, carry)


# The kernels: maths on values between a load and a store.


def _take(refs: list, count: int) -> list:
    taken = refs[:count]
    del refs[:count]
    return taken


def _forward_kernel(*all_refs, dims: _KernelShape):
    refs = list(all_refs)
    u_refs, a_refs, lacking_refs, output_projection_refs, initial_refs = (
        _take(refs, n) for n in (1, 2, 2, 2, 2)
    )
    codes_ref = refs.pop(0) if dims.segmented else None
    (y_ref,), final_refs = _take(refs, 1), _take(refs, 2)

    @pl.when(sequence_begins())
    def _():
        _store(final_refs, _load(initial_refs))

    a, output_projection = _load(a_refs), _load(output_projection_refs)

    def body(step, lacking, h):
        (u,), code = step
        h = tile.advance(h, u, code, a, lacking)
        return tile.contract(output_projection, h), h

    # The final state's block stays in VMEM over all of a sequence: it is the carry too.
    h = _walk(dims, u_refs, codes_ref, lacking_refs, body, _load(final_refs), y_ref)
    _store(final_refs, h)


def _adjoint_kernel(*all_refs, dims: _KernelShape):
    refs = list(all_refs)
    dy_refs, a_refs, lacking_refs, output_projection_refs, dfinal_refs = (
        _take(refs, n) for n in (1, 2, 2, 2, 2)
    )
    codes_ref = refs.pop(0) if dims.segmented else None
    (du_ref,), dinitial_refs = _take(refs, 1), _take(refs, 2)

    @pl.when(sequence_begins())
    def _():
        _store(dinitial_refs, _load(dfinal_refs))

    a, output_projection = _load(a_refs), _load(output_projection_refs)

    def body(step, lacking, carry):
        (dy,), code = step
        gradient, carry = tile.retreat(carry, dy, code, output_projection, a, lacking)
        return gradient[0], carry

    carry = _walk(dims, dy_refs, codes_ref, lacking_refs, body, _load(dinitial_refs), du_ref)
    _store(dinitial_refs, carry)


def _gradient_kernel(*all_refs, dims: _KernelShape):
    """`sum_t dy_t h_t`, `sum_t dy_t p_t`, and `h`, `p` after the last step."""
    refs = list(all_refs)
    input_refs, a_refs, lacking_refs, initial_refs = (_take(refs, n) for n in (2, 2, 2, 2))
    codes_ref = refs.pop(0) if dims.segmented else None
    h_sum_refs, p_sum_refs, h_refs, p_refs = (_take(refs, 2) for _ in range(4))

    @pl.when(sequence_begins())
    def _():
        initial = _load(initial_refs)
        _store(h_refs, initial)
        for other in (h_sum_refs, p_sum_refs, p_refs):
            _store(other, zeros_like(initial))

    a = _load(a_refs)

    def body(step, lacking, carry):
        (u, dy), code = step
        h, p, h_sum, p_sum = carry
        p = tile.sensitivity(p, h, code, a, lacking)
        h = tile.advance(h, u, code, a, lacking)
        h_sum = add(h_sum, tuple(dy * x for x in h))
        return None, (h, p, h_sum, add(p_sum, tuple(dy * x for x in p)))

    all_state = (h_refs, p_refs, h_sum_refs, p_sum_refs)
    carry = _walk(dims, input_refs, codes_ref, lacking_refs, body, tuple(map(_load, all_state)))
    for state_refs, value in zip(all_state, carry, strict=True):
        _store(state_refs, value)


# The calls.


def _kernel_shape(config: Config, u, log_a, segment_index, *, reverse: bool) -> _KernelShape:
    batch, length, width = u.shape
    states = round_up(log_a.shape[1], SUBLANES)
    tiles = config.tiles or choose_tiles(length, states)
    return _KernelShape(
        batch, length, width, states, tiles, segment_index is not None, config.reverse, reverse
    )


def _parameter_planes(dims: _KernelShape, x) -> Planes:
    """`(H, N) -> (N, H)`, states that do not exist are 0."""
    return split(jnp.pad(x.T, ((0, dims.states - x.shape[1]), (0, 0))))


def _state_planes(dims: _KernelShape, x) -> Planes:
    """`(B, H, N) -> (B, N, H)`."""
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, dims.states - x.shape[2]), (0, 0)))
    return split(x)


def _from_planes(x, states: int):
    """`(B, N, H) -> (B, H, N)`, complex."""
    return join(tuple(x))[:, :states].swapaxes(1, 2)


def _call(
    kernel, dims: _KernelShape, name: str, rows, parameters, states, codes, outputs, flops: int
):
    """Run `kernel`; of its outputs, `outputs` gives a dtype for rows, None for a state."""
    operands = [*rows, *parameters, *states, *codes]
    in_specs = [_block(dims)] * len(rows) + [_parameters(dims)] * len(parameters)
    in_specs += [_state(dims)] * len(states) + [_codes_block(dims)] * len(codes)
    state_shape = (dims.batch, dims.states, dims.width)
    out_shape = [
        compat.out_struct(rows[0].shape, dtype, *operands)
        if dtype is not None
        else compat.out_struct(state_shape, jnp.float32, *operands)
        for dtype in outputs
    ]
    return compat.pallas_call(
        functools.partial(kernel, dims=dims),
        backend="tpu",
        name=name,
        grid=dims.grid,
        in_specs=in_specs,
        out_specs=[_state(dims) if dtype is None else _block(dims) for dtype in outputs],
        out_shape=out_shape,
        compiler_params=compat.tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        flops=flops * dims.batch * dims.length * dims.width * dims.states,
    )(*operands)


def forward(config: Config, u, log_a, c, initial_state, segment_index, *, return_residuals: bool):
    """`((y, final_state), residuals)`; arguments as in `reference.diagonal_ssm`."""
    dims = _kernel_shape(config, u, log_a, segment_index, reverse=config.reverse)
    parameters = [p for x in (*powers.decay(log_a), 2 * c) for p in _parameter_planes(dims, x)]
    y, *final = _call(
        _forward_kernel,
        dims,
        "diagonal_ssm_forward",
        [u],
        parameters,
        _state_planes(dims, initial_state),
        step_code_operands(segment_index, reverse=config.reverse),
        [u.dtype, None, None],
        flops=12,
    )
    outputs = y, _from_planes(final, c.shape[1])
    return outputs, (u, log_a, c, initial_state, segment_index) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(du, dlog_a, dc, dinitial_state, None)` from the cotangents of `forward`'s outputs."""
    (u, log_a, c, initial_state, segment_index), (dy, dfinal_state) = residuals, cotangents
    dims = _kernel_shape(config, u, log_a, segment_index, reverse=config.reverse)
    codes = step_code_operands(segment_index, reverse=config.reverse)
    decays = [p for x in powers.decay(log_a) for p in _parameter_planes(dims, x)]
    du, *dinitial = _call(
        _adjoint_kernel,
        dims._replace(reverse=not config.reverse),
        "diagonal_ssm_adjoint",
        [dy],
        [*decays, *_parameter_planes(dims, 2 * c)],
        _state_planes(dims, dfinal_state),
        codes,
        [u.dtype, None, None],
        flops=12,
    )
    sums = _call(
        _gradient_kernel,
        dims,
        "diagonal_ssm_gradient",
        [u, dy],
        decays,
        _state_planes(dims, initial_state),
        codes,
        [None] * 8,
        flops=24,
    )
    h_sum, p_sum, _, p = (_from_planes(sums[i : i + 2], c.shape[1]) for i in range(0, 8, 2))
    dlog_a = (2 * c[None] * p_sum + dfinal_state * p).sum(0)
    return du, dlog_a, 2 * h_sum.sum(0), _from_planes(dinitial, c.shape[1]), None


def unsupported(config: Config, u, log_a, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    if config.method not in (None, "scan"):
        return f"its kernel is a scan, method={config.method!r} is xla's"
    return no_wide_numbers(u) or refusal(log_a.shape[1])


BACKEND = Backend(forward, backward, unsupported=unsupported)
