"""Tile bookkeeping of TPU kernels with a matrix state a head: which block a grid step sees.

Grid `(B, blocks of groups, chunks, parts of a group)`, chunks in the direction of travel. A step
takes `Tiles.heads` heads through one chunk: the heads of several groups, or a part of one large
group, whose parts then follow each other so that queries and keys are fetched once and their
gradients summed in VMEM. Arrays stay `(B, L, heads * width)` as they came; only states have
their heads in front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.matrix_state import masks

LANES, SUBLANES = 128, 8
SLAB = SUBLANES  # tokens: the rows of a register
_VMEM_LIMIT = 3 * 2**24  # what the compiler may take, its own temporaries included


class Tiles(NamedTuple):
    """`(chunk, heads)` of a step of the grid."""

    chunk: int
    heads: int


class KernelShape(NamedTuple):
    """What is static about one call, widths in whole tiles of lanes."""

    batch: int
    length: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["head", "key"] | None
    segmented: bool
    scale: float
    dtype: Any
    tiles: Tiles
    backward: bool = False

    @property
    def chunks(self) -> int:
        return self.length // self.tiles.chunk

    @property
    def steps_per_group(self) -> int:
        """Steps that the heads of one group take."""
        return max(1, self.heads // self.groups // self.tiles.heads)

    @property
    def groups_per_step(self) -> int:
        """Groups of one step."""
        return max(1, self.tiles.heads * self.groups // self.heads)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return self.batch, self.groups // self.groups_per_step, self.chunks, self.steps_per_group

    @property
    def state(self) -> tuple[int, int]:
        """A state inside: values first where keys, in the lanes, decay each for itself."""
        sizes = self.key_size, self.value_size
        return sizes[::-1] if self.decay == "key" else sizes


def kernel_shape(q, v, log_decay, runs, scale: float, chunk: int) -> KernelShape:
    """`KernelShape` of padded arguments, one head a step."""
    groups, key_size = q.shape[2:]
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    batch, length, heads, value_size = v.shape
    return KernelShape(
        batch, length, groups, heads, key_size, value_size, decay, runs is not None,
        scale, v.dtype, Tiles(chunk, 1),
    )  # fmt: skip


def choose_tiles(dims: KernelShape, most: int, fits: Callable[[KernelShape], bool]) -> Tiles | None:
    """The most heads that fit, up to `most`, and are a part of a group or whole groups.

    None if a group has more heads than fit.
    """
    group = dims.heads // dims.groups
    counts = [n for n in range(1, group) if group % n == 0]
    counts += [n * group for n in range(1, dims.groups + 1) if dims.groups % n == 0]
    for heads in reversed([n for n in counts if n <= most]):
        tiles = Tiles(dims.tiles.chunk, heads)
        if fits(dims._replace(tiles=tiles)):
            return tiles
    return None


def groups_repeated(op: str, q, v, tiles_of: Callable[[Any], Tiles | None]) -> int:
    """How often to repeat each group's queries and keys so that its heads fit.

    Args:
      op: for the message.
      tiles_of: of a call with such queries.

    Raises:
      ValueError: not even one head fits.
    """
    group = v.shape[2] // q.shape[2]
    for n in (n for n in range(1, group + 1) if group % n == 0):
        repeated = jax.ShapeDtypeStruct((*q.shape[:2], n * q.shape[2], q.shape[3]), q.dtype)
        if tiles_of(repeated) is not None:
            return n
    raise ValueError(
        f"{op}: a head of K={q.shape[3]} and V={v.shape[3]} does not fit a TPU's memory; use "
        "implementation='xla'"
    )


def padding(chunk: int, length: int, key_size: int, value_size: int) -> Callable[..., Any]:
    """`pad(x, *kinds)`: zeros at the end of axes, to whole chunks and tiles of lanes.

    Kinds are those of the axes after the first. A kind is "tokens", "keys", "values" or None; kinds of axes that `x` has not are ignored, and
    so is an `x` of None.
    """
    widths = {
        None: 0,
        "tokens": -length % chunk,
        "keys": -key_size % LANES,
        "values": -value_size % LANES,
    }

    def pad(x, *kinds):
        if x is None:
            return None
        fill = [widths[kind] for kind in kinds[: x.ndim - 1]]
        fill += [0] * (x.ndim - 1 - len(fill))
        return jnp.pad(x, [(0, 0), *((0, n) for n in fill)]) if any(fill) else x

    return pad


# Tile bookkeeping: which block of which array a grid step sees.


def rows_shape(dims: KernelShape) -> tuple[int, int]:
    """One number a token and head of a step, heads in whole tiles of sublanes."""
    return round_up(dims.tiles.heads, SUBLANES), dims.tiles.chunk


def spec(dims: KernelShape, shape, index: Callable[..., Any]) -> pl.BlockSpec:
    """`index(b, chunk, place)` with the place of the step's heads among those of other steps."""

    def index_map(b, s, n, p):
        return index(b, dims.chunks - 1 - n if dims.backward else n, s * dims.steps_per_group + p)

    return pl.BlockSpec(block_shape=shape, index_map=index_map)


def tokens(dims: KernelShape, width: int) -> pl.BlockSpec:
    """Blocks of `(B, L, H * width)`."""
    shape = (None, dims.tiles.chunk, dims.tiles.heads * width)
    return spec(dims, shape, lambda b, n, place: (b, n, place))


def group_tokens(dims: KernelShape) -> pl.BlockSpec:
    """Blocks of `(B, L, G * K)`; the same for all parts of a group."""
    shape = (None, dims.tiles.chunk, dims.groups_per_step * dims.key_size)
    return spec(dims, shape, lambda b, n, place: (b, n, jax.lax.div(place, dims.steps_per_group)))


def decays(dims: KernelShape) -> pl.BlockSpec:
    return tokens(dims, dims.key_size) if dims.decay == "key" else rows(dims)


def rows(dims: KernelShape) -> pl.BlockSpec:
    """Blocks of what `to_rows` makes."""
    return spec(dims, (None, None, *rows_shape(dims)), lambda b, n, place: (b, place, 0, n))


def states(dims: KernelShape) -> pl.BlockSpec:
    """The state that enters each chunk, of `(B, chunks, H, ...)`."""
    shape = (None, None, dims.tiles.heads, *dims.state)
    return spec(dims, shape, lambda b, n, place: (b, n, place, 0, 0))


def end(dims: KernelShape, *, last: bool) -> pl.BlockSpec:
    """States before the first or after the last chunk travelled through, `(B, H, ...)`.

    All chunks but that one stay at the block of their group's first or last part: nothing moves
    for them.
    """
    rest = 0 if last else dims.steps_per_group - 1
    at = dims.chunks - 1 if last else 0

    def index(b, s, n, p):
        return b, s * dims.steps_per_group + jnp.where(n == at, p, rest), 0, 0

    return pl.BlockSpec(block_shape=(None, dims.tiles.heads, *dims.state), index_map=index)


def run_operands(dims: KernelShape, runs) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """The operands that `masks.segment_masks` needs."""
    size = dims.tiles.chunk
    entering = masks.entering_runs(runs, size)
    column = spec(dims, (None, size, 1), lambda b, n, _: (b, n, 0))
    row = spec(dims, (None, 1, size), lambda b, n, _: (b, 0, n))
    one = spec(dims, (None, None, 1, 1), lambda b, n, _: (b, n, 0, 0))
    return {
        "column": (runs[:, :, None], column),
        "row": (runs[:, None], row),
        "entering_run": (entering[:, :, None, None], one),
    }


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# The calls.


def call(
    kernel, dims: KernelShape, name: str, operands, out, scratch, more_flops: int = 0
) -> dict[str, jax.Array]:
    """Run a kernel of named operands `{name: (array, spec)}`, outputs `{name: (struct, spec)}`
    and float32 scratch `{name: shape}`; it is called with the dims and a dictionary of all
    references. `more_flops` are those of a token and head beyond linear attention's.
    """
    names = [*operands, *out, *scratch]

    def body(*refs):
        kernel(dims, dict(zip(names, refs, strict=True)))

    arrays = [array for array, _ in operands.values()]
    size = dims.tiles.chunk
    pairs = 2 * size * (dims.key_size + dims.value_size)
    flops = pairs + 4 * dims.key_size * dims.value_size + more_flops
    results = compat.pallas_call(
        body,
        backend="tpu",
        name=name,
        grid=dims.grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in out.values()],
        out_shape=[
            compat.out_struct(struct.shape, struct.dtype, *arrays) for struct, _ in out.values()
        ],
        scratch_shapes=[compat.tpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=compat.tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        flops=flops * (3 if dims.backward else 1) * dims.batch * dims.length * dims.heads,
    )(*arrays)
    return dict(zip(out, results, strict=True))


def to_lanes(x):
    return x.reshape(*x.shape[:2], -1)


def to_rows(dims: KernelShape, x):
    """`(B, L, H) -> (B, steps, heads of a step, L)`, the heads of a step padded."""
    heads = dims.tiles.heads
    rows = x.astype(jnp.float32).swapaxes(1, 2).reshape(dims.batch, -1, heads, dims.length)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, rows_shape(dims)[0] - heads), (0, 0)))


def of_rows(dims: KernelShape, rows):
    """The inverse of `to_rows`."""
    rows = rows[:, :, : dims.tiles.heads].reshape(dims.batch, dims.heads, dims.length)
    return rows.swapaxes(1, 2)


def inside(dims: KernelShape, state):
    """A state `(B, H, K, V)` as kernels hold it, and back."""
    return state.swapaxes(2, 3) if dims.decay == "key" else state


def pair_decay_scratch(dims: KernelShape) -> dict[str, tuple[int, ...]]:
    """Scratch for the decays between tokens, see `linear_attention.tpu_scalar_decay.slab_sums`."""
    if dims.decay != "head":
        return {}
    heads, size = rows_shape(dims)
    return {
        "before": (size // SLAB, heads, size),
        "inside": (SLAB, heads, size),
        "start": (size // SLAB, heads, dims.value_size),
    }


def struct(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# Inside a kernel.


def chunk_begins():
    """True in the first chunk that is travelled through."""
    return pl.program_id(2) == 0


def chunk_ends(dims):
    return pl.program_id(2) == dims.chunks - 1


def own(dims):
    """The states of a step's heads among those in scratch."""
    return pl.ds(pl.program_id(3) * dims.tiles.heads, dims.tiles.heads)


def lanes(ref, i: int, width: int):
    """The i-th block of lanes."""
    return ref.at[:, i * width : (i + 1) * width]


def heads_of(dims, group: int) -> range:
    count = dims.tiles.heads // dims.groups_per_step
    return range(group * count, (group + 1) * count)


def add_up(dims, refs, name: str, group: int, x) -> None:
    """The gradient of a group's queries or keys, over the parts of its heads."""
    out = lanes(refs[name], group, dims.key_size)
    if dims.steps_per_group == 1:
        out[...] = x.astype(out.dtype)
        return
    part, sums = pl.program_id(3), refs[f"{name}_sum"]
    x = x + jnp.where(part == 0, 0.0, sums[...])
    sums[...] = x

    @pl.when(part == dims.steps_per_group - 1)
    def _():
        out[...] = x.astype(out.dtype)


def transposed(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).T.astype(x.dtype)


def total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)
