"""TPU kernels: eight time steps in registers, log-step scan by sublane rolls, carry in VMEM.

Grid `(B, D / width, L / steps)`, time last and in the direction of travel. A block is `steps` rows
of `width` channels; inside, groups of 8 rows (one register tile high) are scanned in 3 log steps
and joined to the state so far. Forward moves each input and output byte once; backward rereads
only the 8 rows before each block, for `h_{t-1}`.
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
from pallas_kernels.common.planes import Planes
from pallas_kernels.common.tpu import (
    LANES,
    SMALL_VMEM_BUDGET,
    SUBLANES,
    round_up,
    sequence_begins,
    step_code_operands,
)
from pallas_kernels.linear_scan import tile
from pallas_kernels.linear_scan.tile import Config


class Tiles(NamedTuple):
    """`(steps, width)` of a block."""

    steps: int
    width: int


def vmem_bytes(tiles: Tiles, planes: int) -> int:
    """Bytes of VMEM that the blocks of the backward kernel, the larger one, take: each twice, so
    that the next is fetched while one is worked on."""
    block = tiles.steps * tiles.width * 4 * planes
    codes = tiles.steps * LANES * 4
    rows = 6 * SUBLANES * tiles.width * 4 * planes
    return 2 * (5 * block + codes + rows)


def choose_tiles(length: int, width: int, planes: int, budget: int = SMALL_VMEM_BUDGET) -> Tiles:
    """The widest block that fits and wastes the fewest channels."""
    steps = min(256, round_up(length, 16))
    tiles = [Tiles(steps, w) for w in range(LANES, round_up(width, LANES) + 1, LANES)]
    fitting = [t for t in tiles if vmem_bytes(t, planes) <= budget]
    return min(fitting, key=lambda t: (round_up(width, t.width), -t.width))


class _KernelShape(NamedTuple):
    """What is static about one kernel."""

    batch: int
    length: int
    width: int
    planes: int
    tiles: Tiles
    constant: bool  # one decay for all steps
    segmented: bool  # step codes come with the arguments
    reverse: bool  # the direction of travel of this kernel

    @property
    def blocks(self) -> int:
        return -(-self.length // self.tiles.steps)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, -(-self.width // self.tiles.width), self.blocks

    @property
    def ragged(self) -> bool:
        return self.length % self.tiles.steps != 0

    def time(self, i):
        """The block that is the i-th in the direction of travel."""
        return self.blocks - 1 - i if self.reverse else i


# Tile bookkeeping: which block of which array a grid step sees.


def _block(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.tiles.steps, dims.tiles.width),
        index_map=lambda b, d, i: (b, dims.time(i), d),
    )


def _row(dims: _KernelShape) -> pl.BlockSpec:
    """One `(1, width)` row a sequence: states."""
    return pl.BlockSpec(
        block_shape=(None, 1, dims.tiles.width), index_map=lambda b, d, i: (b, 0, d)
    )


def _decay_block(dims: _KernelShape) -> pl.BlockSpec:
    if not dims.constant:
        return _block(dims)
    return pl.BlockSpec(block_shape=(1, dims.tiles.width), index_map=lambda b, d, i: (0, d))


def _codes_block(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.tiles.steps, LANES),
        index_map=lambda b, d, i: (b, dims.time(i), 0),
    )


def _edge(dims: _KernelShape) -> pl.BlockSpec:
    """The 8 rows that come before a block in the direction of the forward pass."""
    per_block = dims.tiles.steps // SUBLANES
    last = -(-dims.length // SUBLANES) - 1

    def index(b, d, i):
        first = dims.time(i) * per_block
        neighbour = first - 1 if dims.reverse else first + per_block
        return b, jnp.clip(neighbour, 0, last), d

    return pl.BlockSpec(block_shape=(None, SUBLANES, dims.tiles.width), index_map=index)


# Loads and stores.


def _load(refs, rows=slice(None)) -> Planes:
    return tuple(ref[rows, :].astype(jnp.float32) for ref in refs)


def _store(refs, values: Planes, rows=slice(None)) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[rows, :] = value.astype(ref.dtype)


def _take(refs: list, count: int) -> list:
    taken = refs[:count]
    del refs[:count]
    return taken


@dataclasses.dataclass(frozen=True)
class _Group:
    """Eight rows of a block and what is known of them before they are loaded."""

    rows: slice | pl.Slice
    code: jax.Array | None
    index: jax.Array  # position of each row in the direction of travel, (8, width)
    dims: _KernelShape

    def shift(self, x: jax.Array, by: int) -> jax.Array:
        """Rows moved by `by` in the direction of travel; the first `by` are arbitrary."""
        return compat.tpu.roll(x, SUBLANES - by if self.dims.reverse else by, 0)

    def back(self, x: Planes, before: Planes) -> Planes:
        """Each row replaced by the one before it in the direction of travel."""
        shifted = tuple(self.shift(p, 1) for p in x)
        return planes.where(self.index >= 1, shifted, before)

    def last(self, x: Planes) -> Planes:
        row = 0 if self.dims.reverse else SUBLANES - 1
        return tuple(p[row : row + 1] for p in x)

    def broadcast(self, row: Planes) -> Planes:
        return tuple(jnp.broadcast_to(p, self.index.shape) for p in row)


def _group(dims: _KernelShape, i, codes_ref, *, forward_reverse: bool) -> _Group:
    """The i-th group of the block in the direction of travel."""
    groups = dims.tiles.steps // SUBLANES
    start = (groups - 1 - i if dims.reverse else i) * SUBLANES
    rows = pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)
    shape = (SUBLANES, dims.tiles.width)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    code = None
    if dims.segmented:
        code = jnp.tile(codes_ref[rows, :], (1, dims.tiles.width // LANES))
    if dims.ragged:
        place = row + start + dims.time(pl.program_id(2)) * dims.tiles.steps
        if code is None:
            first = dims.length - 1 if forward_reverse else 0
            code = jnp.where(place == first, segments.ENTER, segments.CONTINUE)
        code = jnp.where(place < dims.length, code, segments.SKIP)
    return _Group(rows, code, SUBLANES - 1 - row if dims.reverse else row, dims)


# The kernels: maths on values between a load and a store.


def _forward_kernel(*all_refs, dims: _KernelShape):
    refs, n = list(all_refs), dims.planes
    a_refs, b_refs, initial_refs = (_take(refs, n) for _ in range(3))
    codes_ref = refs.pop(0) if dims.segmented else None
    h_refs, final_refs = (_take(refs, n) for _ in range(2))

    @pl.when(sequence_begins())
    def _():
        _store(final_refs, _load(initial_refs))

    def scan_group(i, h):
        group = _group(dims, i, codes_ref, forward_reverse=dims.reverse)
        a = _load(a_refs) if dims.constant else _load(a_refs, group.rows)
        decay = tile.step_decay(group.broadcast(a) if dims.constant else a, group.code)
        value = _load(b_refs, group.rows)
        if group.code is not None:
            value = planes.where(group.code == segments.SKIP, planes.zeros_like(value), value)
        maps = tile.prefix(
            decay, value, group.shift, group.index, SUBLANES, segmented=dims.segmented
        )
        after = tile.apply(*maps, group.broadcast(h), segmented=dims.segmented)
        visible = after
        if group.code is not None:
            visible = planes.where(group.code == segments.SKIP, planes.zeros_like(after), after)
        _store(h_refs, visible, group.rows)
        return group.last(after)

    # The final state's block stays in VMEM over all of a sequence: it is the carry too.
    h = _load(final_refs)
    h = jax.lax.fori_loop(0, dims.tiles.steps // SUBLANES, scan_group, h)
    _store(final_refs, h)


def _backward_kernel(*all_refs, dims: _KernelShape):
    refs, n = list(all_refs), dims.planes
    a_refs, h_refs, edge_refs, initial_refs = (_take(refs, n) for _ in range(4))
    dh_refs, dfinal_refs = (_take(refs, n) for _ in range(2))
    codes_ref = refs.pop(0) if dims.segmented else None
    da_refs, db_refs, dinitial_refs = (_take(refs, n) for _ in range(3))
    groups = dims.tiles.steps // SUBLANES

    @pl.when(sequence_begins())
    def _():
        _store(dinitial_refs, _load(dfinal_refs))
        if dims.constant:
            for ref in da_refs:
                ref[...] = jnp.zeros_like(ref)

    initial = _load(initial_refs)
    edge_row = SUBLANES - 1 if dims.reverse else 0
    edge = tuple(p[edge_row : edge_row + 1] for p in _load(edge_refs))
    edge = planes.where(pl.program_id(2) == dims.blocks - 1, initial, edge)

    def scan_group(i, carry):
        c, da_sum = carry
        group = _group(dims, i, codes_ref, forward_reverse=not dims.reverse)
        a = _load(a_refs) if dims.constant else _load(a_refs, group.rows)
        a = group.broadcast(a) if dims.constant else a
        dh = _load(dh_refs, group.rows)
        if group.code is not None:
            dh = planes.where(group.code == segments.SKIP, planes.zeros_like(dh), dh)
        decay = tile.step_decay(a, group.code)
        maps = tile.prefix(
            decay,
            planes.mul(decay, dh),
            group.shift,
            group.index,
            SUBLANES,
            segmented=dims.segmented,
        )
        c_rows = tile.apply(*maps, group.broadcast(c), segmented=dims.segmented)
        gradient = planes.add(dh, group.back(c_rows, group.broadcast(c)))
        if group.code is not None:
            gradient = planes.where(
                group.code == segments.SKIP, planes.zeros_like(gradient), gradient
            )
        _store(db_refs, gradient, group.rows)

        before = tile.state_before(
            _states_before(dims, group, i, h_refs, edge), group.broadcast(initial), group.code
        )
        da = tile.decay_gradient(gradient, before, group.code)
        if dims.constant:
            da_sum = planes.add(da_sum, da)
        else:
            _store(da_refs, da, group.rows)
        return group.last(c_rows), da_sum

    zero = jnp.zeros((SUBLANES, dims.tiles.width), jnp.float32)
    da_sum = (zero,) * n if dims.constant else ()
    c, da_sum = jax.lax.fori_loop(0, groups, scan_group, (_load(dinitial_refs), da_sum))
    _store(dinitial_refs, c)
    if dims.constant:
        total = tuple(p.sum(0, keepdims=True) for p in da_sum)
        _store(da_refs, planes.add(_load(da_refs), total))


def _states_before(dims: _KernelShape, group: _Group, i, h_refs, edge: Planes) -> Planes:
    """`h_{t-1}` of each row: the group's own rows moved by one, and one row of its neighbour."""
    groups = dims.tiles.steps // SUBLANES
    neighbour = jnp.minimum(i + 1, groups - 1)
    start = (groups - 1 - neighbour if dims.reverse else neighbour) * SUBLANES
    rows = _load(h_refs, pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES))
    # Against the direction of travel: backward travels from the last step to the first.
    row = SUBLANES - 1 if dims.reverse else 0
    before = planes.where(i == groups - 1, edge, tuple(p[row : row + 1] for p in rows))
    own = _load(h_refs, group.rows)
    shifted = tuple(compat.tpu.roll(p, 1 if dims.reverse else SUBLANES - 1, 0) for p in own)
    return planes.where(group.index == SUBLANES - 1, group.broadcast(before), shifted)


# The calls.


def _kernel_shape(a, b, segment_index, tiles: Tiles | None, *, reverse: bool) -> _KernelShape:
    batch, length, width = b.shape
    planes = 2 if jnp.iscomplexobj(b) else 1
    tiles = tiles or choose_tiles(length, width, planes)
    return _KernelShape(
        batch, length, width, planes, tiles, a.ndim == 1, segment_index is not None, reverse
    )


def _decay_planes(a) -> Planes:
    return planes.split(a[None] if a.ndim == 1 else a)


def _call(kernel, dims: _KernelShape, name: str, operands, in_specs, out, out_specs, flops: int):
    return compat.pallas_call(
        functools.partial(kernel, dims=dims),
        backend="tpu",
        name=name,
        grid=dims.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out,
        compiler_params=compat.tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        flops=flops * dims.batch * dims.length * dims.width,
    )(*operands)


def forward(config: Config, a, b, initial_state, segment_index, *, return_residuals: bool):
    """`(h, final_state)`, and what `backward` reads; arguments as in `reference.forward`."""
    reverse = config.reverse
    dims = _kernel_shape(a, b, segment_index, config.tiles, reverse=reverse)
    n = dims.planes
    b_planes = planes.split(b)
    initial = planes.split(initial_state[:, None])
    operands = [
        *_decay_planes(a),
        *b_planes,
        *initial,
        *step_code_operands(segment_index, reverse=reverse),
    ]
    in_specs = [_decay_block(dims)] * n + [_block(dims)] * n + [_row(dims)] * n
    in_specs += [_codes_block(dims)] * dims.segmented
    block = compat.out_struct(b.shape, b_planes[0].dtype, *operands)
    row = compat.out_struct((dims.batch, 1, dims.width), jnp.float32, *operands)
    out = _call(
        _forward_kernel,
        dims,
        "linear_scan_forward",
        operands,
        in_specs,
        [block] * n + [row] * n,
        [_block(dims)] * n + [_row(dims)] * n,
        flops=20 * n * n,
    )
    h, final_state = planes.join(tuple(out[:n])), planes.join(tuple(out[n:]))[:, 0]
    return (h, final_state), (a, h, initial_state, segment_index) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(da, db, dinitial_state, None)` from the cotangents of `forward`'s outputs."""
    (a, h, initial_state, segment_index), (dh, dfinal_state), reverse = (
        residuals,
        cotangents,
        config.reverse,
    )
    dims = _kernel_shape(a, h, segment_index, config.tiles, reverse=not reverse)
    n = dims.planes
    h_planes, dh_planes = planes.split(h), planes.split(dh)
    initial, dfinal = planes.split(initial_state[:, None]), planes.split(dfinal_state[:, None])
    operands = [*_decay_planes(a), *h_planes, *h_planes, *initial, *dh_planes, *dfinal]
    operands += step_code_operands(segment_index, reverse=reverse)
    in_specs = [_decay_block(dims)] * n + [_block(dims)] * n + [_edge(dims)] * n + [_row(dims)] * n
    in_specs += [_block(dims)] * n + [_row(dims)] * n + [_codes_block(dims)] * dims.segmented
    block = compat.out_struct(h.shape, h_planes[0].dtype, *operands)
    row = compat.out_struct((dims.batch, 1, dims.width), jnp.float32, *operands)
    decays = row if dims.constant else compat.out_struct(a.shape, operands[0].dtype, *operands)
    out = _call(
        _backward_kernel,
        dims,
        "linear_scan_backward",
        operands,
        in_specs,
        [decays] * n + [block] * n + [row] * n,
        [_row(dims) if dims.constant else _block(dims)] * n + [_block(dims)] * n + [_row(dims)] * n,
        flops=30 * n * n,
    )
    da, db, dinitial = (planes.join(tuple(out[i * n : (i + 1) * n])) for i in range(3))
    if dims.constant:
        da = da.sum((0, 1))
    return da.astype(a.dtype), db, dinitial[:, 0], None


def unsupported(config: Config, a, b, initial_state, segment_index) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(b)


BACKEND = Backend(forward, backward, unsupported=unsupported)
