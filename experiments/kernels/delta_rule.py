"""What is measured of the delta rule, and what it has to reach."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from experiments.kernels import results
from experiments.kernels.against_scans import against_scans
from experiments.kernels.baselines import delta_rule as baselines
from experiments.kernels.equal_tokens import equal_tokens
from experiments.kernels.results import Result, Target
from experiments.kernels.values import arguments
from pallas_kernels import delta_rule
from pallas_kernels.delta_rule.shapes import Shape, named
from pallas_kernels.tools.programs import MODES, program

BOTH = "forward+backward"
CPU_TARGETS = {"scan": Target("at least", 10.0)}
STATIC_TARGETS = {
    "forward": {"floor": Target("at most", 8.0)},
    "forward+backward": {"floor": Target("at most", 12.0)},
}
CASE = "pallas_kernels.delta_rule.shapes:case"


def describe(shape: Shape) -> str:
    decays = {None: "no decay", "head": "decay per head", "key": "decay per key"}
    groups = "" if shape.groups == shape.heads else f" ({shape.groups} of keys)"
    kind = [f"K={shape.key_size}", f"V={shape.value_size}", decays[shape.decay], shape.dtype]
    kind += ["packed"] * shape.segmented + ["state"] * shape.state
    return f"({shape.batch}, {shape.length}), {shape.heads} heads{groups}, {', '.join(kind)}"


def timed(shape: Shape, repetitions: int, targets: Any = None) -> Result:
    """Forward and backward here and now, all gradients, against the recurrence."""
    ops = {"delta_rule": delta_rule, **baselines.SCANS}
    programs = {name: program(op, shape, BOTH)[0] for name, op in ops.items()}
    return against_scans(
        programs, arguments(delta_rule, shape), repetitions, describe(shape), targets
    )


def flat(shape: Shape, lengths: tuple[int, ...], repetitions: int) -> Result:
    """The same number of tokens as rows of different lengths."""
    return equal_tokens(
        shape,
        lengths,
        repetitions,
        program=lambda chosen: program(delta_rule, chosen, BOTH)[0],
        arguments=functools.partial(arguments, delta_rule),
        description=describe(shape),
    )


def cpu(repetitions: int) -> Iterator[Result]:
    """At half the length, at it, at twice; other decays; equal tokens from 256 to 16k long."""
    shape = named("cpu")
    for scale in (0.5, 1.0, 2.0):
        yield timed(shape.scaled(scale), repetitions, CPU_TARGETS)
    for decay in (None, "key"):
        yield timed(dataclasses.replace(shape, decay=decay), repetitions, CPU_TARGETS)
    # Differences of a tenth matter here, and the machine makes such.
    yield flat(shape.scaled(4.0), (2**8, 2**10, 2**12, 2**14), max(repetitions, 9))


def static(shape: str, mode: str, scale: float, chip: str) -> Result:
    """Static cost on an absent TPU; with documents and a state 1.3 times the cost is allowed."""
    row = Result(mode, chip, results.STATIC, describe(named(shape).scaled(scale)))
    targets: dict[str, Target] = {}
    if shape.startswith("gated-delta-bench"):
        more = 1.3 if named(shape).segmented else 1.0
        targets = {
            of: Target(target.bound, more * target.value)
            for of, target in STATIC_TARGETS[mode].items()
        }
    return results.estimated(row, CASE, shape, "tpu", mode, f"{scale:g}", targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """The shapes that speed is held to, and KDA, at a part of their length, as for linear
    attention.
    """
    for chip in chips:
        for mode in MODES:
            for shape in ("gated-delta-bench", "gated-delta-bench-packed", "kda-bench"):
                yield static(shape, mode, 1 / 16, chip)
            yield static("gated-delta-bench", mode, 1 / 8, chip)


GPU_SHAPES = ("gated-delta-bench", "gated-delta-bench-packed", "kda-bench")


def gpu(repetitions: int, chips: tuple[str, ...]) -> Iterator[Result]:
    """Times on the GPU that is here; what ptxas says for those that are not."""
    if jax.default_backend() == "gpu":
        yield timed(named("gated-delta-bench"), repetitions)
    else:
        yield results.no_gpu(BOTH, describe(named("gated-delta-bench")))
    for chip in chips:
        for mode in MODES:
            for name in GPU_SHAPES:
                row = Result(mode, chip, results.PTXAS, describe(named(name)))
                yield results.registers(row, CASE, name, mode)
