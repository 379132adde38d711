"""TPU kernels with a matrix state a head: their grid, their calls, and what kernels share inside.

Grid `(B, blocks of groups, chunks, parts of a group)`, chunks in the direction of travel. A step
takes `Tiles.heads` heads through one chunk: the heads of several groups, or a part of one large
group, whose parts then follow each other so that queries and keys are fetched once and their
gradients summed in VMEM. Arrays stay `(B, L, heads * width)` as they came; only states have
their heads in front.

A family is a `Kernels`; `backend` makes its `Backend`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.tpu import (
    LANES,
    SUBLANES,
    VMEM_BUDGET,
    VMEM_LIMIT,
    round_up,
    sequence_begins,
)
from pallas_kernels.matrix_state import masks
from pallas_kernels.matrix_state.config import Config

SLAB = SUBLANES  # tokens: the rows of a register
_CHUNK = 128  # tokens


class Limits(NamedTuple):
    """What a step of the grid takes at most.

    Attributes:
      heads, heads_vector_decay: unrolled in a step; the second where each key has its decay.
      solve_block: tokens of the blocks that the delta rule inverts one token at a time.
      vmem_bytes: of a kernel's blocks and scratch.
    """

    heads: int = 16
    heads_vector_decay: int = 4
    solve_block: int = 32
    vmem_bytes: int = VMEM_BUDGET


class Tiles(NamedTuple):
    """`(chunk, heads)` of a step of the grid; `solve_block` as in `Limits`."""

    chunk: int
    heads: int
    solve_block: int = Limits().solve_block


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


class Kernels(NamedTuple):
    """What a family is made of, beside what all have: q, k, v, log decays, states and segments.

    Attributes:
      op: name of the op.
      scalar_decay, vector_decay: `(forward, backward)`, kernels `(KernelShape, refs)` for one decay
        of all keys, or none, and for one a key.
      rows: names of further operands `(B, L, H)`, which stand after v in the op's order.
      scratch: shapes of further scratch by name.
      flops: of a token and head beyond linear attention's.
    """

    op: str
    scalar_decay: tuple[Callable[..., None], Callable[..., None]]
    vector_decay: tuple[Callable[..., None], Callable[..., None]]
    rows: tuple[str, ...] = ()
    scratch: Callable[[KernelShape], dict[str, tuple[int, ...]]] = lambda dims: {}
    flops: Callable[[KernelShape], int] = lambda dims: 0


# Tiles.


def vmem_bytes(kernels: Kernels, dims: KernelShape) -> int:
    """Bytes of VMEM of the backward kernel, the larger one, with segments.

    Blocks count twice, so that the next is fetched while one is worked on; scratch counts once.
    """
    size, heads, _ = dims.tiles
    width, groups = jnp.dtype(dims.dtype).itemsize, dims.groups_per_step
    tokens = 4 * groups * dims.key_size + 3 * heads * dims.value_size  # with gradients
    blocks = size * tokens * width
    rows = len(kernels.rows) + (1 if dims.decay == "head" else 0)
    blocks += 2 * 4 * rows * math.prod(rows_shape(dims))
    if dims.decay == "key":
        blocks += 2 * 4 * size * heads * dims.key_size
    state = 4 * math.prod(dims.state)
    blocks += 3 * heads * state  # entering, and the gradients at both ends
    blocks += 4 * size * LANES  # segment_index
    scratch = dims.steps_per_group * heads * state + 2 * 4 * size * groups * dims.key_size
    more = pair_decay_scratch(dims) | kernels.scratch(dims)
    scratch += sum(4 * math.prod(shape) for shape in more.values())
    working = 12 * 4 * size * max(size, dims.key_size, dims.value_size)  # what one head works on
    return 2 * blocks + scratch + working


def choose_tiles(kernels: Kernels, dims: KernelShape, limits: Limits) -> Tiles | None:
    """As many heads as are worth unrolling and fit, a part of a group or whole groups.

    None if a group has more heads than fit.
    """
    most = limits.heads_vector_decay if dims.decay == "key" else limits.heads
    group = dims.heads // dims.groups
    counts = [n for n in range(1, group) if group % n == 0]
    counts += [n * group for n in range(1, dims.groups + 1) if dims.groups % n == 0]
    for heads in reversed([n for n in counts if n <= most]):
        tiles = Tiles(dims.tiles.chunk, heads, limits.solve_block)
        if vmem_bytes(kernels, dims._replace(tiles=tiles)) <= limits.vmem_bytes:
            return tiles
    return None


def _limits(config: Config) -> Limits:
    return config.tiles or Limits()


def _untiled(config: Config, q, v, log_decay, segment_index) -> KernelShape:
    """`KernelShape` of padded arguments, one head a step."""
    groups, key_size = q.shape[2:]
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    batch, length, heads, value_size = v.shape
    tiles = Tiles(config.chunk or _CHUNK, 1, _limits(config).solve_block)
    return KernelShape(
        batch, length, groups, heads, key_size, value_size, decay, segment_index is not None,
        config.scale, v.dtype, tiles,
    )  # fmt: skip


def kernel_shape(kernels: Kernels, config: Config, q, v, log_decay, segment_index) -> KernelShape:
    """`KernelShape` of padded arguments."""
    dims = _untiled(config, q, v, log_decay, segment_index)
    return dims._replace(tiles=choose_tiles(kernels, dims, _limits(config)) or dims.tiles)


def _groups_repeated(kernels: Kernels, config: Config, q, v, log_decay, segment_index) -> int:
    """How often to repeat each group's queries and keys so that its heads fit.

    Raises:
      ValueError: not even one head fits.
    """
    group = v.shape[2] // q.shape[2]
    for n in (n for n in range(1, group + 1) if group % n == 0):
        repeated = jax.ShapeDtypeStruct((*q.shape[:2], n * q.shape[2], q.shape[3]), q.dtype)
        dims = _untiled(config, repeated, v, log_decay, segment_index)
        if choose_tiles(kernels, dims, _limits(config)) is not None:
            return n
    raise ValueError(
        f"{kernels.op}: a head of K={q.shape[3]} and V={v.shape[3]} does not fit a TPU's memory; "
        "use implementation='xla'"
    )


def padding(chunk: int, length: int, key_size: int, value_size: int) -> Callable[..., Any]:
    """`pad(x, *kinds)`: zeros at the end of axes, to whole chunks and tiles of lanes.

    Kinds are those of the axes after the first, each "tokens", "keys", "values" or None; kinds of
    axes that `x` has not are ignored, and so is an `x` of None.
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


def run_operands(dims: KernelShape, segment_index) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """The operands that `masks.segment_masks` needs."""
    size = dims.tiles.chunk
    entering = masks.entering_segment(segment_index, size)
    column = spec(dims, (None, size, 1), lambda b, n, _: (b, n, 0))
    row = spec(dims, (None, 1, size), lambda b, n, _: (b, 0, n))
    one = spec(dims, (None, None, 1, 1), lambda b, n, _: (b, n, 0, 0))
    return {
        "column": (segment_index[:, :, None], column),
        "row": (segment_index[:, None], row),
        "entering_segment": (entering[:, :, None, None], one),
    }


# The calls.


def _call(kernels: Kernels, dims: KernelShape, operands, out) -> dict[str, jax.Array]:
    """Run a kernel of named operands `{name: (array, spec)}` and outputs `{name: (struct, spec)}`.

    It is called for each step of the grid, with the shape and a dictionary of all references. Among
    them is float32 scratch: `state`, or backward `dstate`, which is handed on from chunk to chunk
    and is here filled, kept and written at the ends; and what heads and parts of a group leave.
    """
    carried, first, last = "state", "initial", "final"
    if dims.backward:
        carried, first, last = "dstate", "dfinal", "dinitial"
    heads = dims.steps_per_group * dims.tiles.heads
    scratch: dict[str, tuple[int, ...]] = {carried: (heads, *dims.state)}
    if dims.backward and dims.steps_per_group > 1:
        scratch |= dict.fromkeys(("dq_sum", "dk_sum"), (dims.tiles.chunk, dims.key_size))
    scratch |= pair_decay_scratch(dims) | kernels.scratch(dims)
    names = [*operands, *out, *scratch]
    kernel = (kernels.vector_decay if dims.decay == "key" else kernels.scalar_decay)[dims.backward]

    def body(*given):
        refs = dict(zip(names, given, strict=True))

        @pl.when(sequence_begins())
        def _():
            refs[carried][own(dims)] = refs[first][...]

        if "states" in out:
            refs["states"][...] = refs[carried][own(dims)].astype(dims.dtype)
        kernel(dims, refs)

        @pl.when(sequence_ends(dims))
        def _():
            refs[last][...] = refs[carried][own(dims)]

    arrays = [array for array, _ in operands.values()]
    pairs = 2 * dims.tiles.chunk * (dims.key_size + dims.value_size)
    flops = pairs + 4 * dims.key_size * dims.value_size + kernels.flops(dims)
    results = compat.pallas_call(
        body,
        backend="tpu",
        name=f"{kernels.op}_{'backward' if dims.backward else 'forward'}",
        grid=dims.grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in out.values()],
        out_shape=[
            compat.out_struct(struct.shape, struct.dtype, *arrays) for struct, _ in out.values()
        ],
        scratch_shapes=[compat.tpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=compat.tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        flops=flops * (3 if dims.backward else 1) * dims.batch * dims.length * dims.heads,
    )(*arrays)
    return dict(zip(out, results, strict=True))


def _operands(kernels: Kernels, dims: KernelShape, q, k, v, further, log_decay, segment_index):
    """`{name: (array, spec)}` of what forward and backward read."""
    operands = {
        "q": (to_lanes(q), group_tokens(dims)),
        "k": (to_lanes(k), group_tokens(dims)),
        "v": (to_lanes(v), tokens(dims, dims.value_size)),
    }
    for name, x in zip(kernels.rows, further, strict=True):
        operands[name] = (to_rows(dims, x), rows(dims))
    if dims.decay == "key":
        operands["g"] = (to_lanes(log_decay), decays(dims))
    if dims.decay == "head":
        operands["g"] = (to_rows(dims, log_decay), decays(dims))
    return operands | (run_operands(dims, segment_index) if dims.segmented else {})


def forward(
    kernels: Kernels, config: Config, q, k, v, *rest, return_residuals: bool
) -> tuple[Any, Any]:
    """`((o, final_state), residuals)`: the arguments and the state that enters each chunk."""
    *further, log_decay, initial_state, segment_index = rest
    dims = kernel_shape(kernels, config, q, v, log_decay, segment_index)
    operands = _operands(kernels, dims, q, k, v, further, log_decay, segment_index)
    operands["initial"] = (inside(dims, initial_state), end(dims, last=False))
    ends = (dims.batch, dims.heads, *dims.state)
    out = {
        "o": (struct(to_lanes(v).shape, v.dtype), tokens(dims, dims.value_size)),
        "final": (struct(ends), end(dims, last=True)),
    }
    if return_residuals:
        entering = struct((dims.batch, dims.chunks, dims.heads, *dims.state), v.dtype)
        out["states"] = (entering, states(dims))
    result = _call(kernels, dims, operands, out)
    outputs = result["o"].reshape(v.shape), inside(dims, result["final"])
    if not return_residuals:
        return outputs, None
    return outputs, (q, k, v, *further, log_decay, segment_index, result["states"])


def backward(kernels: Kernels, config: Config, residuals, cotangents) -> tuple[Any, ...]:
    """The gradients of all arguments."""
    q, k, v, *further, log_decay, segment_index, entering = residuals
    do, dfinal = cotangents
    dims = kernel_shape(kernels, config, q, v, log_decay, segment_index)._replace(backward=True)
    operands = _operands(kernels, dims, q, k, v, further, log_decay, segment_index)
    operands["do"] = (to_lanes(do), tokens(dims, dims.value_size))
    operands["states"] = (entering, states(dims))
    operands["dfinal"] = (inside(dims, dfinal), end(dims, last=False))
    queries = (struct(to_lanes(q).shape, q.dtype), group_tokens(dims))
    out = {
        "dq": queries,
        "dk": queries,
        "dv": (struct(to_lanes(v).shape, v.dtype), tokens(dims, dims.value_size)),
    }
    for name in kernels.rows:
        out[f"d{name}"] = (struct(operands[name][0].shape), rows(dims))
    out["dinitial"] = (struct(dfinal.shape[:2] + dims.state), end(dims, last=True))
    if dims.decay is not None:
        g, _ = operands["g"]
        out["dg"] = (struct(g.shape, g.dtype), decays(dims))
    result = _call(kernels, dims, operands, out)
    dlog_decay = None
    if dims.decay == "key":
        dlog_decay = result["dg"].reshape(log_decay.shape).astype(log_decay.dtype)
    if dims.decay == "head":
        dlog_decay = of_rows(dims, result["dg"]).astype(log_decay.dtype)
    dq, dk, dv = (result[n].reshape(x.shape) for n, x in (("dq", q), ("dk", k), ("dv", v)))
    dfurther = [
        of_rows(dims, result[f"d{name}"]).astype(x.dtype)
        for name, x in zip(kernels.rows, further, strict=True)
    ]
    return dq, dk, dv, *dfurther, dlog_decay, inside(dims, result["dinitial"]), None


def prepare(kernels: Kernels, config: Config, q, k, v, *rest):
    """The arguments, padded to whole tiles; `restore` cuts the outputs. See `Backend.prepare`.

    Raises:
      ValueError: one head does not fit into a TPU's memory.
    """
    *further, log_decay, initial_state, segment_index = rest
    length, key_size, value_size = v.shape[1], q.shape[3], v.shape[3]
    pad = padding(config.chunk or _CHUNK, length, key_size, value_size)
    q, k = pad(q, "tokens", None, "keys"), pad(k, "tokens", None, "keys")
    v, further = pad(v, "tokens", None, "values"), [pad(x, "tokens") for x in further]
    log_decay, segment_index = pad(log_decay, "tokens", None, "keys"), pad(segment_index, "tokens")
    # The states of a group stay in VMEM together: a group that is too large becomes several.
    repeats = _groups_repeated(kernels, config, q, v, log_decay, segment_index)
    if repeats > 1:
        q, k = (jnp.repeat(x, repeats, axis=2) for x in (q, k))
    state = pad(initial_state, None, "keys", "values")

    def restore(outputs):
        o, final = outputs
        return o[:, :length, :, :value_size], final[:, :, :key_size, :value_size]

    return (q, k, v, *further, log_decay, state, segment_index), restore


def unsupported(config: Config, q, k, v, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(v)


def backend(kernels: Kernels) -> Backend:
    """The family's implementation; arrays: `q, k, v, *rows, log_decay, state, segment_index`."""
    return Backend(
        functools.partial(forward, kernels),
        functools.partial(backward, kernels),
        functools.partial(prepare, kernels),
        unsupported,
    )


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


def sequence_ends(dims):
    """True in the last chunk that is travelled through."""
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
