"""What is measured of checkpoint attention, and what it has to reach."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import results
from experiments.kernels.baselines import checkpoint_attention as baselines
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import check_equal, milliseconds
from pallas_kernels import checkpoint_attention
from pallas_kernels.checkpoint_attention.shapes import Shape, named, program
from pallas_kernels.programs import MODES

BOTH = "forward+backward"
CASE = "pallas_kernels.checkpoint_attention.shapes:case"
LENGTHS = (2**12, 2**14, 2**16)
TARGET_LENGTH = 2**14
MOST_SCORES = 2**31  # bytes of one array of all scores that a baseline may hold
# Multiples of the floor.
STATIC_TARGETS = {"forward": 4.0, BOTH: 6.0}
V5E_FLOPS = 197e12  # of bfloat16, by its data sheet


def describe(shape: Shape) -> str:
    sizes = (shape.batch, shape.length, shape.heads, shape.key_size, shape.value_size)
    kind = [f"{shape.groups} groups", f"interval {shape.interval}", shape.dtype]
    kind += ["packed"] * shape.segmented + [f"{shape.past} past"] * (shape.past > 0)
    return f"{sizes} {', '.join(kind)}"


def arguments(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """Normal ones, of `program(op, shape, "forward+backward")` for a shape of floats."""
    rng = np.random.default_rng(seed)
    _, operands = program(checkpoint_attention, shape, BOTH)
    return tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in operands)


def timed(shape: Shape, repetitions: int) -> Result:
    """Forward and backward here and now, all gradients, against causal softmax attention.

    Where all scores of a row do not fit the memory only the op is timed.
    """
    args = arguments(shape)
    op = jax.jit(program(checkpoint_attention, shape, BOTH)[0])
    row = Result(BOTH, jax.devices()[0].device_kind, results.TIMED, describe(shape))
    if 4 * shape.batch * shape.heads * shape.length**2 > MOST_SCORES:
        figures = milliseconds({"checkpoint_attention": op}, args, repetitions)
        return dataclasses.replace(row, figures=_named(figures))
    every = {
        name: jax.jit(program(baseline, shape, BOTH)[0])
        for name, baseline in (
            ("causal attention", baselines.causal_attention),
            ("masked attention", baselines.masked_attention),
        )
    }
    check_equal(op(*args), every["masked attention"](*args), "masked attention")
    figures = milliseconds({"checkpoint_attention": op, **every}, args, repetitions)
    ratios = {name: figures[name] / figures["checkpoint_attention"] for name in every}
    targets = {}
    if shape.length >= TARGET_LENGTH:
        targets["causal attention"] = Target("at least", 8.0)
    return dataclasses.replace(row, figures=_named(figures), ratios=ratios, targets=targets)


def _named(figures: dict[str, float]) -> dict[str, float]:
    return {f"{name} ms": value for name, value in figures.items()}


def cpu(repetitions: int) -> Iterator[Result]:
    """At 4k, 16k and 64k tokens; the ratio grows with the length."""
    shape = named("cpu")
    for length in LENGTHS:
        chosen = dataclasses.replace(shape, length=length)
        yield timed(chosen, repetitions if length <= TARGET_LENGTH else min(repetitions, 5))


def causal_us(shape: Shape) -> float:
    """Matmuls of causal attention of a shape, forward, at the full rate of a v5e."""
    pairs = shape.batch * shape.heads * shape.length**2 / 2
    return 1e6 * 2 * pairs * (shape.key_size + shape.value_size) / V5E_FLOPS


def static(shape: str, mode: str, scale: float = 1.0, chip: str = "v5e") -> Result:
    """Static cost on an absent TPU; forward on a v5e also against causal attention's matmuls."""
    chosen = named(shape).scaled(scale)
    row = Result(mode, chip, results.STATIC, describe(chosen))
    targets = {"floor": Target("at most", STATIC_TARGETS[mode])} if shape == "bench" else {}
    row = results.estimated(row, CASE, shape, "tpu", mode, f"{scale:g}", targets=targets)
    if (shape, mode, chip, row.kind) != ("bench", "forward", "v5e", results.STATIC):
        return row
    name = "causal attention at the full matrix rate"
    ratios = {**row.ratios, name: row.figures["us"] / causal_us(chosen)}
    if scale == 1.0:
        targets[name] = Target("at most", 0.5)
    return dataclasses.replace(row, ratios=ratios, targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """The shape that speed is held to, at half the length, at it, at twice; RAT and SCOUT.

    Rows of several documents branch on data, which the estimate does not follow: none are here.
    """
    for chip in chips:
        for mode in MODES:
            for scale in (0.5, 1.0, 2.0):
                yield static("bench", mode, scale, chip)
            for shape in ("rat-1.3b", "scout-430m"):
                yield static(shape, mode, chip=chip)


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
