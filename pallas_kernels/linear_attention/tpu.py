"""TPU kernels: heads as blocks of lanes, a chunk of time at once, states in VMEM.

Grid `(B, blocks of groups, chunks, parts of a group)`, chunks in the direction of travel. A step
takes `Tiles.heads` heads through one chunk: the heads of several groups, or a part of one large
group, whose parts then follow each other so that queries and keys are fetched once and their
gradients summed in VMEM. Arrays stay `(B, L, heads * width)` as they came; only states have
their heads in front. What happens inside a chunk is in `tpu_head` and `tpu_key`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, compat, vjp
from pallas_kernels.compat import pl
from pallas_kernels.linear_attention import tpu_head, tpu_key
from pallas_kernels.linear_attention.config import Config

_LANES, _SUBLANES = 128, 8
_CHUNK = 128
_HEADS, _HEADS_BY_KEY = 16, 4  # unrolled in a step
_VMEM_BUDGET = 2**25  # half of the smallest memory, 64 MiB on tpu7x
_VMEM_LIMIT = 3 * 2**24  # what the compiler may take, its own temporaries included


class Tiles(NamedTuple):
    """`(chunk, heads)` of a step of the grid."""

    chunk: int
    heads: int


class Job(NamedTuple):
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
    def parts(self) -> int:
        """Steps that the heads of one group take."""
        return max(1, self.heads // self.groups // self.tiles.heads)

    @property
    def step_groups(self) -> int:
        """Groups of one step."""
        return max(1, self.tiles.heads * self.groups // self.heads)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return self.batch, self.groups // self.step_groups, self.chunks, self.parts

    @property
    def state(self) -> tuple[int, int]:
        """A state inside: values first where keys, in the lanes, decay each for itself."""
        sizes = self.key_size, self.value_size
        return sizes[::-1] if self.decay == "key" else sizes


def vmem_bytes(job: Job) -> int:
    """Bytes of VMEM of the backward kernel, the larger one, with segments.

    Blocks count twice, so that the next is fetched while one is worked on; scratch counts once.
    """
    size, heads = job.tiles
    width, groups = jnp.dtype(job.dtype).itemsize, job.step_groups
    tokens = 4 * groups * job.key_size + 3 * heads * job.value_size  # with gradients
    blocks = size * tokens * width
    rows = 4 * math.prod(_rows_shape(job))
    if job.decay == "head":
        blocks += 2 * rows
    if job.decay == "key":
        blocks += 2 * 4 * size * heads * job.key_size
    state = 4 * math.prod(job.state)
    blocks += (
        3 * heads * state + 4 * size * _LANES
    )  # entering, and the gradients at both ends; runs
    scratch = job.parts * heads * state + 2 * 4 * size * groups * job.key_size
    between = 12 * 4 * size * max(size, job.key_size, job.value_size)  # what one head works on
    return 2 * blocks + scratch + between


def choose_tiles(job: Job) -> Tiles | None:
    """As many heads as are worth unrolling, fit, and are a part of a group or whole groups.

    None if a group has more heads than fit.
    """
    group = job.heads // job.groups
    counts = [n for n in range(1, group) if group % n == 0]
    counts += [n * group for n in range(1, job.groups + 1) if job.groups % n == 0]
    most = _HEADS_BY_KEY if job.decay == "key" else _HEADS
    for heads in reversed([n for n in counts if n <= most]):
        tiles = Tiles(job.tiles.chunk, heads)
        if vmem_bytes(job._replace(tiles=tiles)) <= _VMEM_BUDGET:
            return tiles
    return None


# Tile bookkeeping: which block of which array a grid step sees.


def _rows_shape(job: Job) -> tuple[int, int]:
    """Log decays of a step, heads in whole tiles of sublanes."""
    return _round_up(job.tiles.heads, _SUBLANES), job.tiles.chunk


def _spec(job: Job, shape, index: Callable[..., Any]) -> pl.BlockSpec:
    """`index(b, chunk, place)` with the place of the step's heads among those of other steps."""

    def index_map(b, s, n, p):
        return index(b, job.chunks - 1 - n if job.backward else n, s * job.parts + p)

    return pl.BlockSpec(block_shape=shape, index_map=index_map)


def _tokens(job: Job, width: int) -> pl.BlockSpec:
    """Of `(B, L, H * width)`."""
    shape = (None, job.tiles.chunk, job.tiles.heads * width)
    return _spec(job, shape, lambda b, n, place: (b, n, place))


def _group_tokens(job: Job) -> pl.BlockSpec:
    """Of `(B, L, G * K)`; the same for all parts of a group."""
    shape = (None, job.tiles.chunk, job.step_groups * job.key_size)
    return _spec(job, shape, lambda b, n, place: (b, n, jax.lax.div(place, job.parts)))


def _decays(job: Job) -> pl.BlockSpec:
    if job.decay == "key":
        return _tokens(job, job.key_size)
    return _spec(job, (None, None, *_rows_shape(job)), lambda b, n, place: (b, place, 0, n))


def _states(job: Job) -> pl.BlockSpec:
    """The state that enters each chunk, of `(B, chunks, H, ...)`."""
    shape = (None, None, job.tiles.heads, *job.state)
    return _spec(job, shape, lambda b, n, place: (b, n, place, 0, 0))


def _end(job: Job, *, last: bool) -> pl.BlockSpec:
    """States before the first or after the last chunk travelled through, `(B, H, ...)`.

    All chunks but that one stay at the block of their group's first or last part: nothing moves
    for them.
    """
    rest = 0 if last else job.parts - 1
    at = job.chunks - 1 if last else 0

    def index(b, s, n, p):
        return b, s * job.parts + jnp.where(n == at, p, rest), 0, 0

    return pl.BlockSpec(block_shape=(None, job.tiles.heads, *job.state), index_map=index)


def _runs(job: Job, runs) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """The operands that `chunks.documents` needs."""
    size = job.tiles.chunk
    entering = chunks.entering_runs(runs, size)
    column = _spec(job, (None, size, 1), lambda b, n, _: (b, n, 0))
    row = _spec(job, (None, 1, size), lambda b, n, _: (b, 0, n))
    one = _spec(job, (None, None, 1, 1), lambda b, n, _: (b, n, 0, 0))
    return {
        "column": (runs[:, :, None], column),
        "row": (runs[:, None], row),
        "entering_run": (entering[:, :, None, None], one),
    }


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# The calls.


def _call(kernel, job: Job, name: str, operands, out, scratch) -> dict[str, jax.Array]:
    """Run a kernel of named operands `{name: (array, spec)}`, outputs `{name: (struct, spec)}`
    and scratch `{name: shape}`; it is called with the job and a dictionary of all references.
    """
    names = [*operands, *out, *scratch]

    def body(*refs):
        kernel(job, dict(zip(names, refs, strict=True)))

    arrays = [array for array, _ in operands.values()]
    size = job.tiles.chunk
    pairs = 2 * size * (job.key_size + job.value_size)
    flops = (pairs + 4 * job.key_size * job.value_size) * (3 if job.backward else 1)
    results = compat.pallas_call(
        body,
        backend="tpu",
        name=name,
        grid=job.grid,
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
        flops=flops * job.batch * job.length * job.heads,
    )(*arrays)
    return dict(zip(out, results, strict=True))


def _job(config: Config, q, v, log_decay, runs) -> Job:
    """Of arguments as `_laid_out` leaves them."""
    groups, key_size = q.shape[2:]
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    batch, length, heads, value_size = v.shape
    job = Job(
        batch, length, groups, heads, key_size, value_size, decay, runs is not None,
        config.scale, v.dtype, Tiles(config.chunk or _CHUNK, 1),
    )  # fmt: skip
    return job._replace(tiles=choose_tiles(job) or job.tiles)


def _copies(config: Config, q, v, log_decay, runs) -> int:
    """How often to repeat each group's queries and keys so that its heads fit."""
    group = v.shape[2] // q.shape[2]
    for copies in (n for n in range(1, group + 1) if group % n == 0):
        repeated = jax.ShapeDtypeStruct((*q.shape[:2], copies * q.shape[2], q.shape[3]), q.dtype)
        if choose_tiles(_job(config, repeated, v, log_decay, runs)) is not None:
            return copies
    raise ValueError(
        f"linear_attention: a head of K={q.shape[3]} and V={v.shape[3]} does not fit a TPU's "
        "memory; use implementation='xla'"
    )


def _operands(job: Job, q, k, v, log_decay, runs) -> dict[str, tuple[Any, pl.BlockSpec]]:
    operands = {
        "q": (_lanes(q), _group_tokens(job)),
        "k": (_lanes(k), _group_tokens(job)),
        "v": (_lanes(v), _tokens(job, job.value_size)),
    }
    if job.decay == "key":
        operands["g"] = (_lanes(log_decay), _decays(job))
    if job.decay == "head":
        operands["g"] = (_decay_rows(job, log_decay), _decays(job))
    return operands | (_runs(job, runs) if job.segmented else {})


def _lanes(x):
    return x.reshape(*x.shape[:2], -1)


def _decay_rows(job: Job, log_decay):
    """`(B, L, H) -> (B, steps, heads of a step, L)`, the heads of a step padded."""
    heads = job.tiles.heads
    rows = log_decay.astype(jnp.float32).swapaxes(1, 2).reshape(job.batch, -1, heads, job.length)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, _rows_shape(job)[0] - heads), (0, 0)))


def _decays_of_rows(job: Job, rows):
    """The inverse of `_decay_rows`."""
    rows = rows[:, :, : job.tiles.heads].reshape(job.batch, job.heads, job.length)
    return rows.swapaxes(1, 2)


def _inside(job: Job, state):
    """A state `(B, H, K, V)` as kernels hold it, and back."""
    return state.swapaxes(2, 3) if job.decay == "key" else state


def _between(job: Job) -> dict[str, tuple[int, ...]]:
    """Scratch for the decays between tokens, see `tpu_head.slab_sums`."""
    if job.decay != "head":
        return {}
    heads, size = _rows_shape(job)
    slab = tpu_head.SLAB
    return {
        "before": (size // slab, heads, size),
        "inside": (slab, heads, size),
        "start": (size // slab, heads, job.value_size),
    }


def _struct(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _forward(config: Config, q, k, v, log_decay, initial_state, runs, *, keep: bool):
    """`(o, final_state)` and, to be kept for backward, the state that enters each chunk."""
    job = _job(config, q, v, log_decay, runs)
    operands = _operands(job, q, k, v, log_decay, runs)
    operands["initial"] = (_inside(job, initial_state), _end(job, last=False))
    ends = (job.batch, job.heads, *job.state)
    out = {
        "o": (_struct(_lanes(v).shape, v.dtype), _tokens(job, job.value_size)),
        "final": (_struct(ends), _end(job, last=True)),
    }
    if keep:
        kept = _struct((job.batch, job.chunks, job.heads, *job.state), v.dtype)
        out["states"] = (kept, _states(job))
    scratch: dict[str, tuple[int, ...]] = {"state": (job.parts * job.tiles.heads, *job.state)}
    scratch |= _between(job)
    kernel = tpu_key.forward if job.decay == "key" else tpu_head.forward
    result = _call(kernel, job, "linear_attention_forward", operands, out, scratch)
    return result["o"].reshape(v.shape), _inside(job, result["final"]), result.get("states")


def _backward(config: Config, residuals, cotangents):
    """The gradients of all arguments."""
    q, k, v, log_decay, runs, states = residuals
    do, dfinal = cotangents
    job = _job(config, q, v, log_decay, runs)._replace(backward=True)
    operands = _operands(job, q, k, v, log_decay, runs)
    operands["do"] = (_lanes(do), _tokens(job, job.value_size))
    operands["states"] = (states, _states(job))
    operands["dfinal"] = (_inside(job, dfinal), _end(job, last=False))
    queries = _struct(_lanes(q).shape, q.dtype)
    out = {
        "dq": (queries, _group_tokens(job)),
        "dk": (queries, _group_tokens(job)),
        "dv": (_struct(_lanes(v).shape, v.dtype), _tokens(job, job.value_size)),
        "dinitial": (_struct(dfinal.shape[:2] + job.state), _end(job, last=True)),
    }
    if job.decay is not None:
        g, _ = operands["g"]
        out["dg"] = (_struct(g.shape, g.dtype), _decays(job))
    scratch: dict[str, tuple[int, ...]] = {"dstate": (job.parts * job.tiles.heads, *job.state)}
    if job.parts > 1:
        scratch |= dict.fromkeys(("dq_sum", "dk_sum"), (job.tiles.chunk, job.key_size))
    scratch |= _between(job)
    kernel = tpu_key.backward if job.decay == "key" else tpu_head.backward
    result = _call(kernel, job, "linear_attention_backward", operands, out, scratch)
    dlog_decay = None
    if job.decay == "key":
        dlog_decay = result["dg"].reshape(log_decay.shape).astype(log_decay.dtype)
    if job.decay == "head":
        dlog_decay = _decays_of_rows(job, result["dg"]).astype(log_decay.dtype)
    dq, dk, dv = (result[n].reshape(x.shape) for n, x in (("dq", q), ("dk", k), ("dv", v)))
    return dq, dk, dv, dlog_decay, _inside(job, result["dinitial"]), None


def _primal(config: Config, *arrays):
    return _forward(config, *arrays, keep=False)[:2]


def _keep(config: Config, q, k, v, log_decay, initial_state, runs):
    *outputs, states = _forward(config, q, k, v, log_decay, initial_state, runs, keep=True)
    return tuple(outputs), (q, k, v, log_decay, runs, states)


_linear_attention = vjp.join(_primal, _keep, _backward)


def linear_attention(config: Config, q, k, v, log_decay, initial_state, runs):
    """See `reference.linear_attention`; float32 and bfloat16.

    Raises:
      ValueError: one head does not fit into a TPU's memory.
    """
    length, value_size = v.shape[1], v.shape[3]
    key_size = q.shape[3]
    tokens = -length % (config.chunk or _CHUNK)
    keys, values = -key_size % _LANES, -value_size % _LANES

    def pad(x, *widths):
        """Zeros behind all axes but the first."""
        return x if not any(widths) else jnp.pad(x, [(0, 0), *((0, w) for w in widths)])

    q, k, v = pad(q, tokens, 0, keys), pad(k, tokens, 0, keys), pad(v, tokens, 0, values)
    if log_decay is not None:
        log_decay = pad(log_decay, tokens, 0, *([keys] if log_decay.ndim == 4 else []))
    if runs is not None:
        runs = pad(runs, tokens)
    # The states of a group stay in VMEM together: a group that is too large becomes several.
    copies = _copies(config, q, v, log_decay, runs)
    if copies > 1:
        q, k = (jnp.repeat(x, copies, axis=2) for x in (q, k))
    state = pad(initial_state, 0, keys, values)
    o, final = _linear_attention(config, q, k, v, log_decay, state, runs)
    return o[:, :length, :, :value_size], final[:, :, :key_size, :value_size]
