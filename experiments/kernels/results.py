"""What a benchmark measures: rows of figures and ratios, and the bounds that ratios are held to."""

import dataclasses
import json
from typing import Any

from pallas_kernels.tools import aot

TIMED = "median of interleaved runs"
STATIC = "static estimate by the TPU compiler"
PTXAS = "registers and spills by ptxas"
COMPILED = "memory of the compiled program"
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
      kind: TIMED, STATIC, PTXAS, COMPILED, NOT_RUN or FAILED; of the last two, `figures` has the
        reason.
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


def estimated(row: Result, case: str, *arguments: str, targets: Any = None) -> Result:
    """`row` with the static cost of `case` on the absent TPU `row.device` (see `aot.estimate`)."""
    if reason := aot.missing(row.device):
        return dataclasses.replace(row, kind=NOT_RUN, figures={"reason": reason})
    try:
        cost = aot.estimate(row.device, case, *arguments)
    except (RuntimeError, ValueError) as error:
        return dataclasses.replace(row, kind=FAILED, figures={"reason": str(error)})
    ratios = {"floor": cost.times_floor, "layout copies": float(len(cost.layout_copies))}
    figures = dataclasses.asdict(cost)
    return dataclasses.replace(row, figures=figures, ratios=ratios, targets=targets or {})


def registers(row: Result, case: str, shape: str, mode: str = "forward+backward") -> Result:
    """`row` with what ptxas says of the kernels of `case` on the absent GPU `row.device`."""
    if reason := aot.missing(row.device):
        return dataclasses.replace(row, kind=NOT_RUN, figures={"reason": reason})
    try:
        kernels = aot.report(row.device, case, shape, "gpu", mode)
    except RuntimeError as error:
        return dataclasses.replace(row, kind=FAILED, figures={"reason": str(error)})
    family = case.split(".")[1]
    ours = [dataclasses.asdict(k) for k in kernels if k.name.startswith(family)]
    figures = {
        "registers": max(k["registers"] for k in ours),
        "spilled bytes": sum(k["spill_stores"] + k["spill_loads"] for k in ours),
        "kernels": ours,
    }
    return dataclasses.replace(row, figures=figures)


def no_gpu(case: str, shape: str) -> Result:
    """A row that needs a GPU, on a machine without one."""
    return Result(case, "gpu", NOT_RUN, shape, figures={"reason": "this machine has no GPU"})
