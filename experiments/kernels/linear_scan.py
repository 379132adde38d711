"""What is measured of the linear scan, and what it has to reach."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.kernels import results
from experiments.kernels.baselines import linear_scan as baselines
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import medians
from experiments.kernels.values import arguments
from pallas_kernels import linear_scan
from pallas_kernels.linear_scan.shapes import Shape, named
from pallas_kernels.tools.programs import program

TWICE = {"associative_scan": Target("at least", 2.0)}
STATIC_TARGETS = {
    "forward": {"floor": Target("at most", 1.05), "layout copies": Target("at most", 0)},
    "forward+backward": {"floor": Target("at most", 1.4)},
}
CASE = "pallas_kernels.linear_scan.shapes:case"
BASELINE_CASE = "experiments.kernels.baselines.linear_scan:case"
CPU_SHAPE = Shape("cpu", "S5 and LRU at laptop size", 8, 2048, 64, "complex64")


def describe(shape: Shape) -> str:
    kind = [shape.dtype]
    if shape.decay_dtype:
        kind.append(f"{shape.decay_dtype} decay")
    kind += ["constant decay"] * shape.constant + ["packed"] * shape.segmented
    return f"({shape.batch}, {shape.length}, {shape.width}) {', '.join(kind)}"


def without_state(scan: Callable[..., Any]) -> Callable[..., Any]:
    """`(a, b, cotangent) -> (h, (da, db))`, for what takes no initial state."""

    def fn(a, b, cotangent):
        h, vjp = jax.vjp(lambda a, b: scan(a, b)[0], a, b)
        return h, vjp(cotangent)

    return fn


def timed(shape: Shape, repetitions: int, *, with_state: bool = False, targets: Any = None):
    """Forward and backward here and now, against the baselines that take the same arguments."""
    scans = {"linear_scan": linear_scan, **baselines.SCANS}
    a, b, state, cotangent = arguments(linear_scan, shape)
    if with_state:
        del scans["associative_scan"]  # as published it takes none
        programs = {name: program(s, shape, "forward+backward")[0] for name, s in scans.items()}
        args: tuple[Any, ...] = (a, b, state, cotangent)
    else:
        programs = {name: without_state(scan) for name, scan in scans.items()}
        args = (a, b, cotangent)
    figures = medians(programs, args, repetitions)
    ours = figures["linear_scan"]
    scan = min(value for name, value in figures.items() if name.startswith("scan"))
    ratios = {"scan": scan / ours}
    if not with_state:
        ratios = {"associative_scan": figures["associative_scan"] / ours, **ratios}
    return Result(
        case="forward+backward" + ", initial state" * with_state,
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=describe(shape),
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios=ratios,
        targets=targets or {},
    )


def cpu(repetitions: int, shape: Shape = CPU_SHAPE) -> Iterator[Result]:
    """Complex scans with decays per step and constant ones, at half the length, at it, at twice."""
    for scale in (0.5, 1.0, 2.0):
        for constant in (False, True):
            case = dataclasses.replace(shape.scaled(scale), constant=constant)
            yield timed(case, repetitions, targets=TWICE)
    yield timed(shape, repetitions, with_state=True)
    yield timed(dataclasses.replace(shape, dtype="float32"), repetitions)


def static(shape: str, mode: str, scale: float = 1.0, chip: str = "v5e", baseline: str = ""):
    """Static cost on an absent TPU, of the op or of a baseline."""
    chosen = named(shape).scaled(scale)
    row = Result(
        case=f"{mode}{', ' * bool(baseline)}{baseline}",
        device=chip,
        kind=results.STATIC,
        shape=describe(chosen) + " as real pairs" * chosen.is_complex,
    )
    if baseline:
        return results.estimated(row, BASELINE_CASE, shape, baseline, mode, f"{scale:g}")
    per_step = not (chosen.constant or chosen.segmented)
    targets = STATIC_TARGETS[mode] if per_step else {}
    return results.estimated(row, CASE, shape, "tpu", mode, f"{scale:g}", targets=targets)


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """RecurrentGemma's scan at three lengths, packed, in bfloat16; complex ones; the baseline."""
    both = ("forward", "forward+backward")
    for chip in chips:
        for mode in both:
            for scale in (0.5, 1.0, 2.0):
                yield static("recurrentgemma-2b", mode, scale, chip)
            for shape in ("recurrentgemma-2b-packed", "griffin-9b", "lru-scifar"):
                yield static(shape, mode, chip=chip)
    yield static("recurrentgemma-2b", "forward", chip=chips[0], baseline="associative_scan")
    yield static("recurrentgemma-2b", both[1], chip=chips[0], baseline="associative_scan")


GPU_SHAPES = ("recurrentgemma-2b", "griffin-9b", "s5-text", "s5-pathx")


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
