"""What is measured of linear attention, and what it has to reach."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from experiments.kernels import results
from experiments.kernels.against_scans import against_scans
from experiments.kernels.baselines import linear_attention as baselines
from experiments.kernels.equal_tokens import equal_tokens
from experiments.kernels.results import Result, Target
from experiments.kernels.values import arguments
from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.shapes import Shape, named
from pallas_kernels.tools.programs import MODES, program

BOTH = "forward+backward"
CASE = "pallas_kernels.linear_attention.shapes:case"
TENFOLD = {"scan": Target("at least", 10.0)}
# Multiples of the floor. With documents and a state 1.3 times as much.
STATIC_TARGETS = {"forward": 4.0, BOTH: 6.0}
BENCH = ("head-bench", "head-bench-packed", "key-bench", "key-bench-packed")


def describe(shape: Shape) -> str:
    sizes = (shape.batch, shape.length, shape.heads, shape.key_size, shape.value_size)
    kind = [f"{shape.groups} groups", f"decay per {shape.decay}", shape.dtype]
    kind += ["packed"] * shape.segmented + ["state"] * shape.state
    return f"{sizes} {', '.join(kind)}"


def timed(shape: Shape, repetitions: int, targets: Any = None) -> Result:
    """Forward and backward here and now, all gradients, against the step-by-step scan."""
    ops = {"linear_attention": linear_attention, **baselines.SCANS}
    programs = {name: program(op, shape, BOTH)[0] for name, op in ops.items()}
    return against_scans(
        programs, arguments(linear_attention, shape), repetitions, describe(shape), targets
    )


def flat(shape: Shape, lengths: tuple[int, ...], repetitions: int) -> Result:
    """The same number of tokens as rows of different lengths."""
    return equal_tokens(
        shape,
        lengths,
        repetitions,
        program=lambda chosen: program(linear_attention, chosen, BOTH)[0],
        arguments=functools.partial(arguments, linear_attention),
        description=describe(shape),
    )


def cpu(repetitions: int) -> Iterator[Result]:
    """At half the length, at it, at twice; the other decays; equal tokens from 1k to 64k long."""
    shape = named("cpu")
    for scale in (0.5, 1.0, 2.0):
        yield timed(shape.scaled(scale), repetitions, TENFOLD)
    for decay in ("key", None):
        yield timed(dataclasses.replace(shape, decay=decay), repetitions, TENFOLD)
    long = dataclasses.replace(shape, length=2**16)
    # Differences of a tenth matter here, and the machine makes such.
    yield flat(long, (2**10, 2**12, 2**14, 2**16), max(repetitions, 9))


def static(shape: str, mode: str, scale: float, chip: str) -> Result:
    """Static cost on an absent TPU."""
    chosen = named(shape).scaled(scale)
    row = Result(mode, chip, results.STATIC, describe(chosen))
    bound = STATIC_TARGETS[mode] * (1.3 if chosen.segmented else 1.0)
    targets = {"floor": Target("at most", bound)} if shape in BENCH else {}
    return results.estimated(row, CASE, shape, "tpu", mode, f"{scale:g}", targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """The shapes that speed is held to, at a sixteenth and an eighth of their length, longer ones
    take the compiler hours to profile: floor and cost both grow by chunks, so that what does not
    counts more here than at full length.
    """
    for chip in chips:
        for mode in MODES:
            for shape in BENCH:
                yield static(shape, mode, 1 / 16, chip)
            for shape in ("head-bench", "key-bench"):
                yield static(shape, mode, 1 / 8, chip)


GPU_SHAPES = ("head-bench", "key-bench", "mamba2-2.7b", "gla-1.3b")


def gpu(repetitions: int, chips: tuple[str, ...]) -> Iterator[Result]:
    """Times on the GPU that is here; what ptxas says for those that are not."""
    for name in ("head-bench", "key-bench"):
        if jax.default_backend() == "gpu":
            yield timed(named(name), repetitions)
        else:
            yield results.no_gpu(BOTH, describe(named(name)))
    for chip in chips:
        for mode in MODES:
            for name in GPU_SHAPES:
                row = Result(mode, chip, results.PTXAS, describe(named(name)))
                yield results.registers(row, CASE, name, mode)
