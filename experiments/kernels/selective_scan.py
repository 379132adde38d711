"""What is measured of the selective scan, and what it has to reach."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.kernels import results
from experiments.kernels.baselines import selective_scan as baselines
from experiments.kernels.equal_tokens import equal_tokens
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import check_equal, medians, milliseconds
from experiments.kernels.values import arguments
from pallas_kernels import selective_scan
from pallas_kernels.selective_scan.shapes import Shape, case, named
from pallas_kernels.tools.programs import MODES, program

BOTH = "forward+backward"
MEMORY = "associative_scan's memory"
CPU_TARGETS = {"associative_scan": Target("at least", 5.0), MEMORY: Target("at most", 0.25)}
STATIC_TARGETS = {
    "forward": {"floor": Target("at most", 2.0)},
    BOTH: {"floor": Target("at most", 4.0)},
}
CASE = "pallas_kernels.selective_scan.shapes:case"
PART = "experiments.kernels.selective_scan:part"


def describe(shape: Shape) -> str:
    kind = [f"N={shape.states}", shape.dtype]
    kind += ["gate and softplus"] * shape.gated + ["packed"] * shape.segmented
    kind += ["reverse"] * shape.reverse
    return f"({shape.batch}, {shape.length}, {shape.width}) {', '.join(kind)}"


def timed(shape: Shape, repetitions: int, targets: Any = None) -> Result:
    """Forward and backward here and now, all gradients, against the baselines; and their memory."""
    scans = {"selective_scan": selective_scan, **baselines.SCANS}
    programs = {name: program(scan, shape, BOTH)[0] for name, scan in scans.items()}
    args = arguments(selective_scan, shape)
    figures = medians(programs, args, repetitions)
    ours = figures["selective_scan"]
    scan = min(value for name, value in figures.items() if name.startswith("scan"))
    memory = {name: temporary_bytes(fn, args) for name, fn in programs.items()}
    return Result(
        case=BOTH,
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=describe(shape),
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={
            "associative_scan": figures["associative_scan"] / ours,
            "scan": scan / ours,
            MEMORY: memory["selective_scan"] / memory["associative_scan"],
        },
        targets=targets or {},
    )


def temporary_bytes(fn: Any, args: tuple[Any, ...]) -> float:
    """What a compiled program takes besides its arguments and outputs."""
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    return float(memory.temp_size_in_bytes) if memory else float("nan")


def flat(shape: Shape, lengths: tuple[int, ...], repetitions: int) -> Result:
    """The same number of tokens as rows of different lengths."""
    return equal_tokens(
        shape,
        lengths,
        repetitions,
        program=lambda chosen: program(selective_scan, chosen, BOTH)[0],
        arguments=functools.partial(arguments, selective_scan),
        description=describe(shape),
    )


def against_torch(shape: Shape, repetitions: int) -> Result:
    """The loop over tokens that PyTorch's users have where the CUDA kernel does not run."""
    row = Result(
        case=f"{BOTH}, PyTorch",
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=describe(shape),
    )
    args = arguments(selective_scan, shape)
    try:
        loop = baselines.torch_loop(tuple(map(np.asarray, args)))
    except ImportError:
        reason = {"reason": "PyTorch is not installed"}
        return dataclasses.replace(row, kind=results.NOT_RUN, figures=reason)
    ours = functools.partial(jax.jit(program(selective_scan, shape, BOTH)[0]), *args)
    check_equal(ours(), loop(), "PyTorch")
    figures = milliseconds({"selective_scan": ours, "torch": loop}, (), repetitions)
    return dataclasses.replace(
        row,
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={"torch": figures["torch"] / figures["selective_scan"]},
    )


def cpu(repetitions: int) -> Iterator[Result]:
    """At half the length, at it, at twice; PyTorch; equal tokens from 1k to 64k long."""
    shape = named("cpu")
    for scale in (0.5, 1.0, 2.0):
        yield timed(shape.scaled(scale), repetitions, CPU_TARGETS)
    yield against_torch(shape, min(repetitions, 3))
    wide = dataclasses.replace(shape, batch=1, length=2**16, width=256)
    yield flat(wide, (2**10, 2**12, 2**14, 2**16), repetitions)


def part(length: str, width: str, name: str, implementation: str, mode: str) -> tuple[Any, ...]:
    """A case for `pallas_kernels.tools.aot`: a named shape with fewer tokens and channels."""
    chosen = dataclasses.replace(named(name), length=int(length), width=int(width))
    return case(chosen, implementation, mode)


def static(shape: str, length: int, width: int, mode: str, chip: str) -> Result:
    """Static cost on an absent TPU."""
    chosen = dataclasses.replace(named(shape), length=length, width=width)
    row = Result(mode, chip, results.STATIC, describe(chosen))
    targets = STATIC_TARGETS[mode] if shape == "bench" else {}
    arguments = f"{length}", f"{width}", shape, "tpu", mode
    return results.estimated(row, PART, *arguments, targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """Forward: the scan alone at three lengths; Mamba's, packed, in bfloat16.

    Forward and backward: an eighth of the tokens and half of the channels, because the compiler's
    profile of the backward kernel takes more memory than there is for longer ones. Work and floor
    both grow with tokens and channels, and what does not, some 8000 cycles outside the kernels,
    counts in full: a longer program has fewer floors.
    """
    for chip in chips:
        for length in (2048, 4096, 8192):
            yield static("bench", length, 2048, "forward", chip)
        for name in ("mamba-130m", "mamba-2.8b", "mamba-790m-packed"):
            shape = named(name)
            yield static(name, shape.length, shape.width, "forward", chip)
        yield static("bench", 512, 1024, BOTH, chip)


GPU_SHAPES = ("bench", "mamba-790m", "mamba-790m-packed")


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
