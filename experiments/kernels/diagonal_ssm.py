"""What is measured of the diagonal state-space model, and what it has to reach."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.kernels import results
from experiments.kernels.baselines import diagonal_ssm as baselines
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import medians, milliseconds
from experiments.kernels.values import arguments
from pallas_kernels import diagonal_ssm
from pallas_kernels.diagonal_ssm.shapes import Shape, named
from pallas_kernels.tools.programs import program

METHODS = ("chunked", "fft", "scan")
CASE = "pallas_kernels.diagonal_ssm.shapes:case"
BOTH = ("forward", "forward+backward")
FLAT = Target("at most", 1.2)
FASTEST = Target("at least", 1.0)
MEMORY = "temporary memory by the compiler"
CPU_SHAPE = Shape("cpu", "S4D at laptop size", 4, 4096, 32, 32)
TOKENS = 65536


def describe(shape: Shape) -> str:
    kind = f"{shape.states} states, {shape.dtype}{', packed' * shape.segmented}"
    return f"({shape.batch}, {shape.length}, {shape.width}) {kind}"


def models(shape: Shape) -> dict[str, Callable[..., Any]]:
    """Ours by method, and the baselines that take the same arguments."""
    names = ("chunked", "scan") if shape.segmented else METHODS
    others = baselines.MODELS
    if shape.segmented:
        others = {"expanded scan": others["expanded scan"]}
    return {name: functools.partial(diagonal_ssm, method=name) for name in names} | others


def timed(shape: Shape, mode: str, repetitions: int, *, only: Any = None) -> Iterator[Result]:
    """Every method and baseline here and now, in time and in memory."""
    named_models = {k: v for k, v in models(shape).items() if only is None or k in only}
    args = arguments(diagonal_ssm, shape, mode)
    chosen = {name: program(model, shape, mode)[0] for name, model in named_models.items()}
    figures = medians(chosen, args, repetitions)
    row = Result(mode, jax.devices()[0].device_kind, results.TIMED, describe(shape))
    ours = figures["chunked"]
    yield dataclasses.replace(
        row,
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={name: value / ours for name, value in figures.items() if name != "chunked"},
        targets=dict.fromkeys(set(figures) - {"chunked"}, FASTEST),
    )
    mib = {name: temporary(fn, args) / 2**20 for name, fn in chosen.items()}
    yield dataclasses.replace(
        row,
        case=f"{mode}, memory",
        kind=MEMORY,
        figures={
            "reason": ", ".join(f"{name} {size:.1f} MiB" for name, size in mib.items()),
            **{f"{name} MiB": size for name, size in mib.items()},
        },
        ratios={name: size / mib["chunked"] for name, size in mib.items() if name != "chunked"},
    )


def temporary(fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Bytes besides inputs and outputs."""
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes if memory else 0


def flat(mode: str, repetitions: int, width: int = 16, states: int = 32) -> Result:
    """The same number of tokens in rows of 1k to 64k."""
    runs = {}
    for length in (1024, 4096, 16384, 65536):
        shape = Shape("flat", "S4D", TOKENS // length, length, width, states)
        fn = jax.jit(program(diagonal_ssm, shape, mode)[0])
        args = arguments(diagonal_ssm, shape, mode)
        runs[f"L={length}"] = functools.partial(fn, *args)
    figures = milliseconds(runs, (), repetitions)
    first = figures["L=1024"]
    ratios = {f"{name} over L=1024": value / first for name, value in figures.items()}
    del ratios["L=1024 over L=1024"]
    return Result(
        case=f"{mode}, {TOKENS} tokens in rows of L",
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=f"(*, L, {width}) {states} states",
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios=ratios,
        targets=dict.fromkeys(ratios, FLAT),
    )


def cpu(repetitions: int, shape: Shape = CPU_SHAPE) -> Iterator[Result]:
    """Methods and baselines at a quarter of the length, at it, at four times; packed; flatness."""
    for mode in BOTH:
        for scale in (0.25, 1.0, 4.0):
            batch = max(1, round(shape.batch / scale))
            case = dataclasses.replace(shape.scaled(scale), batch=batch)
            yield from timed(case, mode, repetitions)
        yield from timed(dataclasses.replace(shape, segmented=True), mode, repetitions)
        yield flat(mode, repetitions)


TPU_SHAPES = ("s4d-listops", "s4-listops", "s4d-text", "s4d-text-packed", "s4d-image")


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """The scan at published shapes, a quarter of the length: cost is proportional to it."""
    for chip in chips:
        for mode in BOTH:
            for name in TPU_SHAPES:
                shape = named(name).scaled(0.25)
                row = Result(mode, chip, results.STATIC, f"{describe(shape)} as real pairs")
                yield results.estimated(row, CASE, name, "tpu", mode, "0.25")


GPU_SHAPES = ("s4d-listops", "s4-listops", "s4d-text", "s4d-text-packed", "dss-listops")


def gpu(repetitions: int, chips: tuple[str, ...]) -> Iterator[Result]:
    """Times on the GPU that is here; what ptxas says for those that are not."""
    for name in GPU_SHAPES:
        if jax.default_backend() == "gpu":
            yield from gpu_timed(named(name), repetitions)
        else:
            yield results.no_gpu("forward+backward", describe(named(name)))
    for chip in chips:
        for name in GPU_SHAPES:
            for mode in BOTH:
                row = Result(mode, chip, results.PTXAS, describe(named(name)))
                yield results.registers(row, CASE, name, mode)


def gpu_timed(shape: Shape, repetitions: int) -> Iterator[Result]:
    """The kernels against the FFT as published and against our chunks in XLA."""
    rows = {"kernel": diagonal_ssm, **models(shape)}
    wanted = {"kernel", "chunked", "fft", "vandermonde fft"}
    for mode in BOTH:
        args = arguments(diagonal_ssm, shape, mode)
        programs = {k: program(v, shape, mode)[0] for k, v in rows.items() if k in wanted}
        figures = medians(programs, args, repetitions)
        ours = figures["kernel"]
        yield Result(
            case=mode,
            device=jax.devices()[0].device_kind,
            kind=results.TIMED,
            shape=describe(shape),
            figures={f"{name} ms": value for name, value in figures.items()},
            ratios={name: value / ours for name, value in figures.items() if name != "kernel"},
        )
