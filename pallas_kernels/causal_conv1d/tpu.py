"""TPU kernels: eight tokens in registers, taps by sublane rolls, each byte moved once.

Grid `(B, D / width, L / steps)`. A block is `steps` rows of `width` channels; inside, groups of 8
rows (one register tile high) are walked, several to a turn of the loop. A tap at distance d is a
select between a group and the one before it, then a roll by d. The rows before a block come as a
small block of their own (`edge`). Forward walks with time, each block for itself; backward walks
against time and carries the cotangents of the groups that follow.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import tile
from pallas_kernels.causal_conv1d.tile import Activation, Config
from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.tpu import (
    LANES,
    SMALL_VMEM_BUDGET,
    SUBLANES,
    over_lanes,
    round_up,
    sequence_begins,
)

_SLAB = 64  # rows between two turns of the loop: enough independent work to hide latencies

Groups = list[jax.Array]  # (8, width) float32 each


class Tiles(NamedTuple):
    """`(steps, width)` of a block, walked `slab` rows at a time (whole tiles of bfloat16: 16)."""

    steps: int
    width: int
    slab: int = _SLAB


def _groups_of(conv_size: int) -> int:
    """Groups of 8 rows that hold the tokens which a group's taps read before it."""
    return max(1, -(-(conv_size - 1) // SUBLANES))


def vmem_bytes(tiles: Tiles, conv_size: int) -> int:
    """Bytes of VMEM that the blocks of the backward kernel, the larger one, take: each twice, so
    that the next is fetched while one is worked on; float32 throughout."""
    block = tiles.steps * tiles.width * 4
    codes = tiles.steps * LANES * 4
    edges = 3 * _groups_of(conv_size) * SUBLANES * tiles.width * 4
    weights = 2 * round_up(conv_size + 1, SUBLANES) * tiles.width * 4
    return 2 * (3 * block + codes + edges + weights)


def choose_tiles(length: int, width: int, conv_size: int, budget: int = SMALL_VMEM_BUDGET) -> Tiles:
    """The widest block that fits, keeps its sums in registers and wastes the fewest channels.

    Raises:
      ValueError: no block fits so wide a window.
    """
    unit = _SLAB * _groups_of(conv_size)
    steps = min(round_up(512, unit), round_up(length, unit))
    tiles = [Tiles(steps, w) for w in range(LANES, min(512, round_up(width, LANES)) + 1, LANES)]
    fitting = [t for t in tiles if vmem_bytes(t, conv_size) <= budget]
    if not fitting:
        raise ValueError(f"weight has {conv_size} taps, more than the TPU kernel's memory holds")
    return min(fitting, key=lambda t: (round_up(width, t.width), -t.width))


class _KernelShape(NamedTuple):
    """What is static about one kernel."""

    batch: int
    length: int
    width: int
    conv_size: int
    activation: Activation
    tiles: Tiles
    segmented: bool  # codes come with the arguments
    reverse: bool  # walk against time

    @property
    def blocks(self) -> int:
        return -(-self.length // self.tiles.steps)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, -(-self.width // self.tiles.width), self.blocks

    @property
    def before(self) -> int:
        """Groups before a group that its taps read."""
        return _groups_of(self.conv_size)

    @property
    def edge(self) -> int:
        """Rows of an edge block."""
        return self.before * SUBLANES

    @property
    def ragged(self) -> bool:
        return self.length % self.tiles.steps != 0

    def time(self, i):
        """The block that is the i-th of the walk."""
        return self.blocks - 1 - i if self.reverse else i


# Tile bookkeeping: which block of which array a grid step sees.


def _block(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.tiles.steps, dims.tiles.width),
        index_map=lambda b, d, i: (b, dims.time(i), d),
    )


def _edge(dims: _KernelShape) -> pl.BlockSpec:
    """The rows before a block."""
    per_block = dims.tiles.steps // dims.edge
    return pl.BlockSpec(
        block_shape=(None, dims.edge, dims.tiles.width),
        index_map=lambda b, d, i: (b, jnp.maximum(dims.time(i) * per_block - 1, 0), d),
    )


def _window(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.edge, dims.tiles.width), index_map=lambda b, d, i: (b, 0, d)
    )


def _weights(dims: _KernelShape) -> pl.BlockSpec:
    """Rows of weights, the bias last."""
    return pl.BlockSpec(
        block_shape=(dims.conv_size + 1, dims.tiles.width), index_map=lambda b, d, i: (0, d)
    )


def _sums(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.conv_size + 1, dims.tiles.width),
        index_map=lambda b, d, i: (b, 0, d),
    )


def _codes_block(dims: _KernelShape) -> pl.BlockSpec:
    return pl.BlockSpec(
        block_shape=(None, dims.tiles.steps, LANES),
        index_map=lambda b, d, i: (b, dims.time(i), 0),
    )


# Rows that come from another group.


def _index(like: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, 0)


def lag(groups: Groups, by: int) -> jax.Array:
    """The rows `by` before those of `groups[0]`; `groups[k]` is the k-th group before it."""
    q, r = divmod(by, SUBLANES)
    if r == 0:
        return groups[q]
    mixed = jnp.where(_index(groups[q]) < SUBLANES - r, groups[q], groups[q + 1])
    return compat.tpu.roll(mixed, r, 0)


def lead(groups: Groups, by: int) -> jax.Array:
    """The rows `by` after those of `groups[0]`; `groups[k]` is the k-th group after it."""
    q, r = divmod(by, SUBLANES)
    if r == 0:
        return groups[q]
    mixed = jnp.where(_index(groups[q]) >= r, groups[q], groups[q + 1])
    return compat.tpu.roll(mixed, SUBLANES - r, 0)


# Loads and stores.


def _split(rows: jax.Array) -> Groups:
    rows = rows.astype(jnp.float32)
    return [rows[i : i + SUBLANES] for i in range(0, rows.shape[0], SUBLANES)]


def _rows(start, count: int) -> slice | pl.Slice:
    return pl.ds(pl.multiple_of(start, SUBLANES), count)


def _weight_rows(ref, dims: _KernelShape) -> tuple[Groups, jax.Array]:
    """Weights by distance and the bias, each over 8 rows."""
    shape = (SUBLANES, dims.tiles.width)
    *weights, bias = (jnp.broadcast_to(ref[i : i + 1, :], shape) for i in range(dims.conv_size + 1))
    return weights[::-1], bias


def _before_block(dims: _KernelShape, edge_ref, initial_ref) -> Groups:
    """The groups before the block, the nearest first."""
    at_start = dims.time(pl.program_id(2)) == 0
    edge, initial = _split(edge_ref[...]), _split(initial_ref[...])
    return [jnp.where(at_start, i, e) for i, e in zip(initial, edge, strict=True)][::-1]


def _limits(dims: _KernelShape, codes_ref, start, like: jax.Array):
    """`(reach, ahead)` of a group, each `(8, width)` or None, as `_codes` packs them."""
    limit = following = None
    if dims.segmented:
        code = jnp.tile(codes_ref[_rows(start, SUBLANES), :], (1, dims.tiles.width // LANES))
        limit = jnp.where(code < 0, code, code & 0xFFFF)
        following = code >> 16
    if dims.ragged and dims.reverse:
        place = _index(like) + start + dims.time(pl.program_id(2)) * dims.tiles.steps
        limit = jnp.where(place < dims.length, dims.conv_size - 1 if limit is None else limit, -1)
    return limit, following


# The kernels: maths on values between a load and a store.


def _forward_kernel(*refs, dims: _KernelShape):
    x_ref, edge_ref, initial_ref, weight_ref, *codes, y_ref = refs
    codes_ref = codes[0] if dims.segmented else None
    weights, bias = _weight_rows(weight_ref, dims)

    def slab(i, before):
        out = []
        for k, group in enumerate(_split(x_ref[_rows(i * dims.tiles.slab, dims.tiles.slab), :])):
            groups = [group, *before]
            limit, _ = _limits(dims, codes_ref, i * dims.tiles.slab + k * SUBLANES, group)
            seen = [lag(groups, d) for d in range(dims.conv_size)]
            out.append(tile.output(seen, weights, bias, limit, dims.activation))
            before = groups[:-1]
        y_ref[_rows(i * dims.tiles.slab, dims.tiles.slab), :] = jnp.concatenate(out).astype(
            y_ref.dtype
        )
        return before

    before = _before_block(dims, edge_ref, initial_ref)
    jax.lax.fori_loop(0, dims.tiles.steps // dims.tiles.slab, slab, before)


def _leaving(groups: Groups) -> Groups:
    """What the groups before need of those after them."""
    return groups[:-1]


def _backward_kernel(*refs, dims: _KernelShape):
    x_ref, edge_ref, initial_ref, dy_ref, weight_ref, *codes, dx_ref, sums_ref, after_ref = refs
    codes_ref = codes[0] if dims.segmented else None
    weights, bias = _weight_rows(weight_ref, dims)
    before_block = _before_block(dims, edge_ref, initial_ref)
    slabs = dims.tiles.steps // dims.tiles.slab

    @pl.when(sequence_begins())
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)
        after_ref[...] = jnp.zeros_like(after_ref)

    def group_before(start, k: int) -> jax.Array:
        """The k-th group before row `start` of the block; that row may lie `k` before its first."""
        place = start - k * SUBLANES
        inside = x_ref[_rows(jnp.maximum(place, 0), SUBLANES), :].astype(jnp.float32)
        for j, group in enumerate(before_block):
            inside = jnp.where(place == -(j + 1) * SUBLANES, group, inside)
        return inside

    def slab(i, carry):
        after, sums = carry
        start = (slabs - 1 - i) * dims.tiles.slab
        earlier = [group_before(start, k + 1) for k in range(dims.before)]
        groups = [*_split(x_ref[_rows(start, dims.tiles.slab), :])[::-1], *earlier]
        cotangents = _split(dy_ref[_rows(start, dims.tiles.slab), :])[::-1]
        out = []
        for k, dy in enumerate(cotangents):
            row = start + dims.tiles.slab - (k + 1) * SUBLANES
            limit, following = _limits(dims, codes_ref, row, dy)
            inputs = [tile.zero_beyond(lag(groups[k:], d), limit, d) for d in range(dims.conv_size)]
            g = tile.cotangent(inputs, weights, bias, dy, limit, dims.activation)
            sums = [s + g * x for s, x in zip(sums, inputs, strict=False)] + [sums[-1] + g]
            after = [g, *after]
            dx = [w * tile.zero_beyond(lead(after, d), following, d) for d, w in enumerate(weights)]
            out.append(functools.reduce(jnp.add, dx))
            after = _leaving(after)
        dx_ref[_rows(start, dims.tiles.slab), :] = jnp.concatenate(out[::-1]).astype(dx_ref.dtype)
        return after, sums

    zero = jnp.zeros((SUBLANES, dims.tiles.width), jnp.float32)
    carry = _split(after_ref[...]), [zero] * (dims.conv_size + 1)
    after, sums = jax.lax.fori_loop(0, slabs, slab, carry)
    after_ref[...] = jnp.concatenate(after)
    *by_distance, dbias = (s.sum(0, keepdims=True) for s in sums)
    sums_ref[...] += jnp.concatenate([*by_distance[::-1], dbias])


# The calls.


def _kernel_shape(
    x, conv_size: int, segment_index, activation: Activation, tiles: Tiles | None, *, reverse: bool
) -> _KernelShape:
    batch, length, width = x.shape
    tiles = tiles or choose_tiles(length, width, conv_size)
    return _KernelShape(
        batch, length, width, conv_size, activation, tiles, segment_index is not None, reverse
    )


def _codes(segment_index, conv_size: int) -> list[jax.Array]:
    """`reach` and `ahead` in the halves of an integer, -1 on padding, over a row of lanes."""
    if segment_index is None:
        return []
    codes = (tile.ahead(segment_index, conv_size) << 16) | (
        tile.reach(segment_index, conv_size) & 0xFFFF
    )
    codes = jnp.where(segment_index == 0, -1, codes)
    return [over_lanes(codes)]


def _small_operands(dims: _KernelShape, weight, bias, initial_state) -> tuple[jax.Array, jax.Array]:
    """The window, zeros before it, `(B, edge, D)`; weights and bias `(W+1, D)` float32."""
    missing = dims.edge - (dims.conv_size - 1)
    rows = jnp.concatenate([weight.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    return jnp.pad(initial_state, ((0, 0), (missing, 0), (0, 0))), rows


def _call(
    kernel, dims: _KernelShape, name: str, operands, in_specs, out, out_specs, scratch, flops: int
):
    time: Literal["arbitrary", "parallel"] = "arbitrary" if dims.reverse else "parallel"
    return compat.pallas_call(
        functools.partial(kernel, dims=dims),
        backend="tpu",
        name=name,
        grid=dims.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=compat.tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", time)
        ),
        flops=flops * dims.batch * dims.length * dims.width,
    )(*operands)


def forward(
    config: Config, x, weight, bias, initial_state, segment_index, *, return_residuals: bool
):
    """`(y,)`; arguments as in `reference.with_state`, which are all that `backward` needs."""
    dims = _kernel_shape(x, weight.shape[0], segment_index, *config, reverse=False)
    window, rows = _small_operands(dims, weight, bias, initial_state)
    operands = [x, x, window, rows, *_codes(segment_index, dims.conv_size)]
    in_specs = [_block(dims), _edge(dims), _window(dims), _weights(dims)]
    in_specs += [_codes_block(dims)] * dims.segmented
    y = _call(
        _forward_kernel,
        dims,
        "causal_conv1d_forward",
        operands,
        in_specs,
        compat.out_struct(x.shape, x.dtype, *operands),
        _block(dims),
        [],
        flops=2 * dims.conv_size + 4,
    )
    return (y,), (x, weight, bias, initial_state, segment_index) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(dx, dweight, dbias, dinitial_state, None)` from the cotangent of `forward`'s output."""
    (x, weight, bias, initial_state, segment_index), (dy,) = residuals, cotangents
    dims = _kernel_shape(x, weight.shape[0], segment_index, *config, reverse=True)
    window, rows = _small_operands(dims, weight, bias, initial_state)
    operands = [x, x, window, dy, rows, *_codes(segment_index, dims.conv_size)]
    in_specs = [_block(dims), _edge(dims), _window(dims), _block(dims), _weights(dims)]
    in_specs += [_codes_block(dims)] * dims.segmented
    sums = (dims.batch, dims.conv_size + 1, dims.width)
    dx, sums = _call(
        _backward_kernel,
        dims,
        "causal_conv1d_backward",
        operands,
        in_specs,
        [
            compat.out_struct(x.shape, x.dtype, *operands),
            compat.out_struct(sums, jnp.float32, *operands),
        ],
        [_block(dims), _sums(dims)],
        [compat.tpu.VMEM((dims.edge, dims.tiles.width), jnp.float32)],
        flops=6 * dims.conv_size + 8,
    )
    limit = tile.limits(segment_index, dims.conv_size)
    dinitial = tile.initial_gradient(
        x, list(rows[-2::-1]), rows[-1], initial_state, limit, dy, config.activation
    )
    total = sums.sum(0)
    return dx, total[:-1].astype(weight.dtype), total[-1].astype(bias.dtype), dinitial, None


def unsupported(config: Config, x, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(x)


BACKEND = Backend(forward, backward, unsupported=unsupported)
