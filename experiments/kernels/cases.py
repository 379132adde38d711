"""What is measured of the linear scan, and what it has to reach."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import baselines
from experiments.kernels.timing import medians
from pallas_kernels import aot, linear_scan
from pallas_kernels.linear_scan.shapes import Shape, named, program

TIMED = "median of interleaved runs"
STATIC = "static estimate by the TPU compiler"
PTXAS = "registers and spills by ptxas"
NOT_RUN = "not run"
FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a ratio: "at least" or "at most" `value`."""

    bound: str
    value: float

    def met(self, ratio: float) -> bool:
        return ratio >= self.value if self.bound == "at least" else ratio <= self.value

    def __str__(self) -> str:
        return f"{self.bound} {self.value:g}"


@dataclasses.dataclass(frozen=True)
class Result:
    """One row.

    Attributes:
      case: what was measured.
      device: of a timed row, the kind of device; of an estimate, the absent chip.
      kind: TIMED, STATIC, PTXAS, NOT_RUN or FAILED; of the last two, `figures` has the reason.
      shape: B, L, D, dtype.
      figures: everything that was measured: milliseconds by program, or an `aot.Estimate`.
      ratios: by what they are of: "associative_scan" and "scan" say how many times faster the op
        is; "floor" how many times longer it takes than moving inputs and outputs once.
      targets: of some of the ratios.
    """

    case: str
    device: str
    kind: str
    shape: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    targets: dict[str, Target] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `met` says of each target whether it is reached."""
        met = {of: t.met(self.ratios[of]) for of, t in self.targets.items() if of in self.ratios}
        targets = {of: str(target) for of, target in self.targets.items()}
        plain = {**vars(self), "targets": targets, "met": met}
        return json.loads(json.dumps(plain))


TWICE = {"associative_scan": Target("at least", 2.0)}
STATIC_TARGETS = {
    "forward": {"floor": Target("at most", 1.05), "layout copies": Target("at most", 0)},
    "forward+backward": {"floor": Target("at most", 1.4)},
}
CPU_SHAPE = Shape("cpu", "S5 and LRU at laptop size", 8, 2048, 64, "complex64")


def describe(shape: Shape) -> str:
    kind = [shape.dtype]
    if shape.decay_dtype:
        kind.append(f"{shape.decay_dtype} decay")
    kind += ["constant decay"] * shape.constant + ["packed"] * shape.segmented
    return f"({shape.batch}, {shape.length}, {shape.width}) {', '.join(kind)}"


def inputs(operands: Any, seed: int = 0) -> tuple[jax.Array, ...]:
    """Values for `(a, b, ...)`: decays of modulus 0.9 to 0.999 and any phase, normal inputs."""
    rng = np.random.default_rng(seed)

    def normal(struct: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.standard_normal(struct.shape)
        if jnp.issubdtype(struct.dtype, jnp.complexfloating):
            x = x + 1j * rng.standard_normal(struct.shape)
        return jnp.asarray(x, struct.dtype)

    a, *others = operands
    decay = rng.uniform(0.9, 0.999, a.shape)
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        decay = decay * np.exp(1j * rng.uniform(-np.pi, np.pi, a.shape))
    return jnp.asarray(decay, a.dtype), *map(normal, others)


def without_state(scan: Callable[..., Any]) -> Callable[..., Any]:
    """`(a, b, cotangent) -> (h, (da, db))`, for what takes no initial state."""

    def fn(a, b, cotangent):
        h, vjp = jax.vjp(lambda a, b: scan(a, b)[0], a, b)
        return h, vjp(cotangent)

    return fn


def timed(shape: Shape, repetitions: int, *, with_state: bool = False, targets: Any = None):
    """Forward and backward here and now, against the baselines that take the same arguments."""
    scans = {"linear_scan": linear_scan, **baselines.LINEAR_SCAN}
    a, b, state = inputs(shape.operands())
    cotangent = inputs((b, b), seed=1)[1]
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
        kind=TIMED,
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
    arguments = [shape, baseline or "tpu", mode, f"{scale:g}"]
    module = "experiments.kernels.baselines" if baseline else "pallas_kernels.linear_scan.shapes"
    chosen = named(shape).scaled(scale)
    pairs = " as real pairs" * chosen.is_complex
    case = f"{mode}{', ' * bool(baseline)}{baseline}"
    row = functools.partial(Result, case=case, device=chip, shape=describe(chosen) + pairs)
    if reason := aot.missing(chip):
        return row(kind=NOT_RUN, figures={"reason": reason})
    try:
        cost = aot.estimate(chip, f"{module}:case", *arguments)
    except (RuntimeError, ValueError) as error:
        return row(kind=FAILED, figures={"reason": str(error)})
    ratios = {"floor": cost.times_floor, "layout copies": float(len(cost.layout_copies))}
    per_step = not (chosen.constant or chosen.segmented or baseline)
    targets = STATIC_TARGETS[mode] if per_step else {}
    return row(kind=STATIC, figures=dataclasses.asdict(cost), ratios=ratios, targets=targets)


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
            row = Result("forward+backward", "gpu", NOT_RUN, describe(named(name)))
            yield dataclasses.replace(row, figures={"reason": "this machine has no GPU"})
    for chip in chips:
        for name in GPU_SHAPES:
            yield ptxas(name, chip)


def ptxas(name: str, chip: str) -> Result:
    """Registers and spills of the kernels of forward and backward."""
    row = functools.partial(Result, "forward+backward", chip, shape=describe(named(name)))
    if reason := aot.missing(chip):
        return row(kind=NOT_RUN, figures={"reason": reason})
    case = "pallas_kernels.linear_scan.shapes:case"
    try:
        kernels = aot.report(chip, case, name, "gpu", "forward+backward")
    except RuntimeError as error:
        return row(kind=FAILED, figures={"reason": str(error)})
    ours = [dataclasses.asdict(k) for k in kernels if k.name.startswith("linear_scan")]
    figures = {
        "registers": max(k["registers"] for k in ours),
        "spilled bytes": sum(k["spill_stores"] + k["spill_loads"] for k in ours),
        "kernels": ours,
    }
    return row(kind=PTXAS, figures=figures)
