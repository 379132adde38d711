"""What is measured of checkpoint attention, and what it has to reach."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.kernels import results
from experiments.kernels.baselines import checkpoint_attention as baselines
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import check_equal, milliseconds
from experiments.kernels.values import arguments
from pallas_kernels import checkpoint_attention
from pallas_kernels.checkpoint_attention import shapes
from pallas_kernels.checkpoint_attention.shapes import Shape, named
from pallas_kernels.tools.programs import MODES, program

BOTH = "forward+backward"
CASE = "pallas_kernels.checkpoint_attention.shapes:case"
FEW_HEADS = "experiments.kernels.checkpoint_attention:few_heads"
LENGTHS = (2**12, 2**14, 2**16)
TARGET_LENGTH = 2**14
MOST_SCORES = 2**31  # bytes of one array of all scores that a baseline may hold
# Multiples of the floor.
STATIC_TARGETS = {"forward": 4.0, BOTH: 6.0}
V5E_FLOPS = 197e12  # of bfloat16, by its data sheet
V5E_CLOCK, V5E_ALUS = 1.5e9, 4 * 8 * 128  # vector operations a cycle
# Vector operations a score in the kernels, by hand: scale, compare, select, maximum, subtract,
# multiply (in exp), sum, round; backward: scale, subtract, compare, select, multiply (in exp),
# subtract, select, multiply, scale, twice round. Matmuls a score: 2 and 5, of 2 K operations.
BY_HAND = {"forward": (8, 2), "backward": (11, 5)}


def describe(shape: Shape) -> str:
    sizes = (shape.batch, shape.length, shape.heads, shape.key_size, shape.value_size)
    kind = [f"{shape.groups} groups", f"interval {shape.interval}", shape.dtype]
    kind += ["packed"] * shape.segmented + [f"{shape.past} past"] * (shape.past > 0)
    return f"{sizes} {', '.join(kind)}"


def timed(shape: Shape, repetitions: int) -> Result:
    """Forward and backward here and now, all gradients, against causal softmax attention.

    Where all scores of a row do not fit the memory the baseline works in blocks of queries, all of
    the same cost; it takes minutes, so a quarter of them is timed, once.
    """
    args = arguments(checkpoint_attention, shape)
    op = jax.jit(program(checkpoint_attention, shape, BOTH)[0])
    row = Result(BOTH, jax.devices()[0].device_kind, results.TIMED, describe(shape))
    fits = 4 * shape.batch * shape.heads * shape.length**2 <= MOST_SCORES
    if fits:
        every = {name: jax.jit(program(run, shape, BOTH)[0]) for name, run in BASELINES.items()}
        check_equal(op(*args), every.pop(MASKED)(*args), MASKED)
        check_equal(every[CAUSAL](*args), every[BLOCKED](*args), BLOCKED)
        figures = milliseconds({"checkpoint_attention": op, **every}, args, repetitions)
    else:
        figures = milliseconds({"checkpoint_attention": op}, args, repetitions)
        figures[BLOCKED] = 4 * _quarter(shape, args)
    ratios = {
        n: ms / figures["checkpoint_attention"] for n, ms in figures.items() if n in BASELINES
    }
    targets = dict.fromkeys(ratios, LEAST) if shape.length >= TARGET_LENGTH else {}
    return dataclasses.replace(row, figures=_named(figures), ratios=ratios, targets=targets)


LEAST = Target("at least", 8.0)
CAUSAL, BLOCKED = "causal attention", "causal attention in blocks of 1,024 queries"
MASKED = "masked attention"
BASELINES = {
    CAUSAL: baselines.causal_attention,
    BLOCKED: baselines.blocked_attention,
    MASKED: baselines.masked_attention,  # the same numbers as the op
}


def _quarter(shape: Shape, args: tuple[jax.Array, ...]) -> float:
    """Milliseconds of a quarter of the blocked baseline's work, the last queries against all keys.

    Both passes, gradients of all arguments; the first run of what is compiled.
    """
    q, k, v, cotangent = args
    last = slice(3 * shape.length // 4, None)

    def run(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        attend = functools.partial(baselines.blocked_attention, interval=shape.interval)
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(cotangent)

    part = q[:, last], k, v, cotangent[:, last]
    compiled = jax.jit(run).lower(*part).compile()
    start = time.perf_counter()
    jax.block_until_ready(compiled(*part))
    return 1e3 * (time.perf_counter() - start)


def _named(figures: dict[str, float]) -> dict[str, float]:
    return {f"{name} ms": value for name, value in figures.items()}


def cpu(repetitions: int) -> Iterator[Result]:
    """At 4k, 16k and 64k tokens; the ratio grows with the length. Long rows take a minute: once."""
    shape = named("cpu")
    for length in LENGTHS:
        chosen = dataclasses.replace(shape, length=length)
        yield timed(chosen, repetitions if length < TARGET_LENGTH else 1)


def causal_us(shape: Shape) -> float:
    """Matmuls of causal attention of a shape, forward, at the full rate of a v5e."""
    pairs = shape.batch * shape.heads * shape.length**2 / 2
    return 1e6 * 2 * pairs * (shape.key_size + shape.value_size) / V5E_FLOPS


def by_hand(shape: Shape, mode: str) -> dict[str, float]:
    """Microseconds on a v5e of matrix and of vector units, counted by hand.

    Per head and block of 1,024 tokens, as many checkpoints as its last token sees, rounded up to
    parts of 128: what the kernels do for one document from its start. Vector operations on scores
    only; these are lower bounds.
    """
    ends = np.arange(1024, shape.length + 1024, 1024).clip(max=shape.length)
    seen = np.maximum(1, -(-((ends - 1) // shape.interval) // 128)) * 128
    scores = shape.batch * shape.heads * 1024 * int(seen.sum())
    passes = ("forward",) if mode == "forward" else ("forward", "backward")
    vector, matmuls = (
        sum(counts) for counts in zip(*(BY_HAND[part] for part in passes), strict=True)
    )
    return {
        "matrix units by hand us": 1e6 * scores * matmuls * 2 * shape.key_size / V5E_FLOPS,
        "vector units by hand us": 1e6 * scores * vector / (V5E_CLOCK * V5E_ALUS),
    }


def few_heads(name: str, mode: str, scale: str, heads: str) -> tuple[Any, ...]:
    """`shapes.case` on a TPU of a named shape with another number of heads."""
    return shapes.case(_with_heads(name, scale, heads), "tpu", mode)


def _with_heads(name: str, scale: str, heads: str) -> Shape:
    shape = named(name).scaled(float(scale))
    return dataclasses.replace(shape, heads=int(heads), groups=int(heads))


def static(
    shape: str, mode: str, scale: float = 1.0, chip: str = "v5e", heads: int | None = None
) -> Result:
    """Static cost on an absent TPU; on a v5e also against the count by hand.

    Heads are an axis of the grid: the cost grows in proportion, and with fewer of them the
    compiler's profile of a long row fits the memory. Forward of "bench" is also held against causal
    attention's matmuls.
    """
    arguments = shape, f"{scale:g}", str(heads or named(shape).heads)
    chosen = _with_heads(*arguments)
    row = Result(mode, chip, results.STATIC, describe(chosen))
    bench = shape == "bench" and chip == "v5e"
    targets = {"floor": Target("at most", STATIC_TARGETS[mode])} if bench else {}
    row = results.estimated(row, FEW_HEADS, shape, mode, *arguments[1:], targets=targets)
    if (chip, row.kind) != ("v5e", results.STATIC):
        return row
    counted = by_hand(chosen, mode)
    static_us, ratios = row.figures["static_us"], dict(row.ratios)
    ratios["largest count by hand"] = static_us / max(counted.values())
    targets["largest count by hand"] = Target("at least", 1.0)  # or a branch was not followed
    if bench and mode == "forward":
        name = "causal attention at the full matrix rate"
        ratios[name] = row.figures["us"] / causal_us(chosen)
        if scale == 1.0:
            targets[name] = Target("at most", 0.5)
    figures = {**row.figures, **counted}
    return dataclasses.replace(row, figures=figures, ratios=ratios, targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """The shape that speed is held to, at parts of its length, at it, at twice; RAT and SCOUT.

    A profile of 8,192 tokens and 16 heads takes 40 GB, so there are fewer heads. Rows of several
    documents branch on data, which the estimate does not follow: none are here.
    """
    for chip in chips:
        for mode in MODES:
            for scale, heads in ((1 / 8, 4), (1 / 4, 4), (1 / 2, 2), (1.0, 2)):
                yield static("bench", mode, scale, chip, heads)
            for shape in ("rat-1.3b", "scout-430m"):
                yield static(shape, mode, 0.5, chip, 2)
        yield static("bench", "forward", 2.0, chip, 1)


GPU_SHAPES = ("bench", "bench-packed", "scout-430m")


def gpu(repetitions: int, chips: tuple[str, ...]) -> Iterator[Result]:
    """Times on the GPU that is here; what ptxas says for those that are not."""
    if jax.default_backend() == "gpu":
        yield timed(named("bench"), repetitions)
    else:
        yield results.no_gpu(BOTH, describe(named("bench")))
    for chip in chips:
        for mode in MODES:
            for name in GPU_SHAPES:
                row = Result(mode, chip, results.PTXAS, describe(named(name)))
                yield results.registers(row, CASE, name, mode)
