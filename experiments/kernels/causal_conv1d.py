"""What is measured of the short convolution, and what it has to reach."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from experiments.kernels import results
from experiments.kernels.baselines import causal_conv1d as baselines
from experiments.kernels.equal_tokens import equal_tokens
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import medians
from experiments.kernels.values import arguments
from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d.shapes import Shape, named
from pallas_kernels.tools.programs import program

FASTER = {"depthwise_conv": Target("at least", 2.0)}
STATIC_TARGETS = {
    "forward": {"floor": Target("at most", 1.5)},
    "forward+backward": {"floor": Target("at most", 2.0)},
}
CASE = "pallas_kernels.causal_conv1d.shapes:case"
BASELINE_CASE = "experiments.kernels.baselines.causal_conv1d:case"
CPU_SHAPE = Shape("cpu", "Mamba at laptop size", 2, 2048, 512, dtype="float32")
SCALES = (0.5, 1.0, 2.0)


def describe(shape: Shape) -> str:
    kind = [
        f"{shape.conv_size} taps",
        shape.dtype,
        *([shape.activation] if shape.activation else []),
    ]
    kind += ["no bias"] * (not shape.bias) + ["packed"] * shape.segmented
    return f"({shape.batch}, {shape.length}, {shape.width}) {', '.join(kind)}"


def timed(shape: Shape, repetitions: int, *, targets: Any = None) -> Result:
    """Forward and backward here and now, against the baselines."""
    convs = {"causal_conv1d": causal_conv1d, **baselines.CONVS}
    programs = {name: program(c, shape, "forward+backward")[0] for name, c in convs.items()}
    figures = medians(programs, arguments(causal_conv1d, shape), repetitions)
    ours = figures["causal_conv1d"]
    return Result(
        case="forward+backward",
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=describe(shape),
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={name: figures[name] / ours for name in baselines.CONVS},
        targets=targets or {},
    )


def flat(shape: Shape, lengths: tuple[int, ...], repetitions: int) -> Result:
    """The same number of tokens as rows of different lengths."""
    return equal_tokens(
        shape,
        lengths,
        repetitions,
        program=lambda chosen: program(causal_conv1d, chosen, "forward+backward")[0],
        arguments=inputs,
        description=describe(shape),
    )


def cpu(repetitions: int, shape: Shape = CPU_SHAPE) -> Iterator[Result]:
    """At half the length, at it, at twice; equal tokens from 1k to 64k long."""
    for scale in SCALES:
        yield timed(shape.scaled(scale), repetitions, targets=FASTER)
    long = dataclasses.replace(shape, batch=1, length=2**16, width=256)
    yield flat(long, (2**10, 2**12, 2**14, 2**16), repetitions)


def static(shape: str, mode: str, scale: float = 1.0, chip: str = "v5e", baseline: str = ""):
    """Static cost on an absent TPU, of the op or of a baseline."""
    row = Result(
        case=f"{mode}{', ' * bool(baseline)}{baseline}",
        device=chip,
        kind=results.STATIC,
        shape=describe(named(shape).scaled(scale)),
    )
    if baseline:
        return results.estimated(row, BASELINE_CASE, shape, baseline, mode, f"{scale:g}")
    targets = STATIC_TARGETS[mode]
    return results.estimated(row, CASE, shape, "tpu", mode, f"{scale:g}", targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """Mamba's in float32 at three lengths; those of other models; the baselines."""
    both = ("forward", "forward+backward")
    for chip in chips:
        for mode in both:
            for scale in SCALES:
                yield static("mamba-370m-f32", mode, scale, chip)
            for shape in ("mamba-2.8b", "mamba-2.8b-packed", "recurrentgemma-2b"):
                yield static(shape, mode, chip=chip)
    for baseline in baselines.CONVS:
        for mode in both:
            yield static("mamba-370m-f32", mode, chip=chips[0], baseline=baseline)


GPU_SHAPES = ("mamba-370m-f32", "mamba-2.8b", "recurrentgemma-2b")


def gpu(repetitions: int, chips: tuple[str, ...]) -> Iterator[Result]:
    """Times on the GPU that is here; what ptxas says for those that are not."""
    for name in GPU_SHAPES:
        if jax.default_backend() == "gpu":
            yield timed(named(name), repetitions)
        else:
            yield results.no_gpu("forward+backward", describe(named(name)))
    for chip in chips:
        for name in GPU_SHAPES:
            row = Result("forward+backward", chip, results.PTXAS, describe(named(name)))
            yield results.registers(row, CASE, name)
