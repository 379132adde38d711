"""Times the kernels of a family against plain JAX; every ratio is of one run.

seqmodels kernels bench               linear_scan: all that this machine can measure
seqmodels kernels bench --family delta_rule    another family
seqmodels kernels bench --only cpu    wall times on this machine's CPU
seqmodels kernels bench --only tpu    static estimates for absent TPUs
"""

import dataclasses
import importlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import rich.console
import rich.table
import rich.text

from experiments import places, terminal
from experiments.command_line import run_command
from experiments.kernels import results, s5_step
from experiments.kernels.results import Result, Target
from experiments.machine import installed
from pallas_kernels.tools.families import TABULATED
from seqmodels.ranges import Checked, Size
from seqmodels.training.metrics import write_atomically
from seqmodels.training.run_directory import environment

if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[tuple(TABULATED)]  # the choices of the command line
Tpu = Literal["v5e", "v5p", "v6e", "tpu7x"]
Gpu = Literal["a100", "h100", "h200", "b200"]
RESULTS = places.output("kernels")


@dataclasses.dataclass(frozen=True)
class BenchConfig(Checked):
    """What to measure."""

    family: Family = "linear_scan"
    """The family of kernels."""
    only: Literal["cpu", "step", "tpu", "gpu"] | None = None
    """Only this part: "cpu" times the op, "step" a training step of S5
    (linear_scan only), "tpu" estimates for absent
    TPUs, "gpu" times the GPU if there is one and reads ptxas' report for absent ones."""
    repetitions: Size = 15
    """Interleaved repetitions of every timed program; medians are reported."""
    tpu_chips: tuple[Tpu, ...] = ("v5e",)
    """TPUs to estimate for: v5e, v5p, v6e, tpu7x."""
    gpu_chips: tuple[Gpu, ...] = ("a100", "h100")
    """GPUs to compile for: a100, h100, h200, b200."""
    output: Path | None = None
    """The JSON file. By default experiments/results/kernels/<family>.json, with `-<only>` added."""

    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only == "step" and self.family != "linear_scan":
            raise ValueError(f"only='step' measures linear_scan, not family={self.family!r}")

    @property
    def path(self) -> Path:
        suffix = f"-{self.only}" if self.only else ""
        return self.output or RESULTS / f"{self.family}{suffix}.json"


def measure(config: BenchConfig) -> Iterator[Result]:
    """The rows, each as soon as it is known."""
    family = importlib.import_module(f"experiments.kernels.{config.family}")
    parts = {
        "cpu": lambda: family.cpu(config.repetitions),
        "tpu": lambda: family.tpu(config.tpu_chips),
        "gpu": lambda: family.gpu(config.repetitions, config.gpu_chips),
    }
    if config.family == "linear_scan":
        parts["step"] = lambda: s5_step.results(config.repetitions)
    for name, part in parts.items():
        if config.only in (None, name):
            yield from part()


class Recorded(Protocol):
    """A benchmark's settings: what the JSON file says of them, and where it is."""

    @property
    def path(self) -> Path: ...


def run(
    config: Recorded,
    rows: Iterable[Result],
    console: rich.console.Console,
    packages: tuple[str, ...] = (),
) -> list[Result]:
    """Collects the rows, naming each on `console` as it comes, and writes them after each.

    The versions of `packages` are written besides those of every run.
    """
    if config.path.is_dir():
        raise ValueError(f"output={str(config.path)!r} is a folder; name the JSON file")
    start, done = time.perf_counter(), []
    machine = environment()  # before this command's own output changes the checkout
    machine["versions"] |= {name: installed(name) for name in packages}
    settings = {name: value for name, value in vars(config).items() if name != "traceback"}
    settings["output"] = None
    machine["command"] = re.sub(r" --output[ =]\S+", "", machine["command"])
    config.path.parent.mkdir(parents=True, exist_ok=True)  # a bad path fails before the work
    with console.status("measuring"):
        for row in rows:
            done.append(row)
            console.print(f"{row.device}: {row.case} {row.shape}", style="dim")
            record = {
                "config": settings,
                **machine,
                "wall_s": time.perf_counter() - start,
                "cases": [row.to_json() for row in done],
            }
            write_atomically(config.path, json.dumps(record, indent=2) + "\n")
    return done


def table(rows: Iterable[Result]) -> rich.console.Group:
    """A table of what each row measured, the figures that matter, the ratios and targets."""
    parts: list[rich.console.RenderableType] = []
    for row in rows:
        view = rich.table.Table.grid("", "", padding=(0, 2), pad_edge=True)
        view.add_row(_figure(row), _ratios(row))
        parts += [
            rich.text.Text(f"{row.device}: {row.case}", "bold"),
            f"{row.shape}; {row.kind}",
            view,
            "",
        ]
    return rich.console.Group(*parts)


def _figure(row: Result) -> str:
    figures: dict[str, Any] = row.figures
    if row.kind == results.STATIC:
        return f"{figures['us']:.0f} us, floor {figures['floor_us']:.0f}"
    if row.kind == results.PTXAS:
        return f"{figures['registers']} registers, {figures['spilled bytes']} bytes spilled"
    if "reason" in figures:
        return figures["reason"].strip().splitlines()[-1]
    return "\n".join(_named(name, value) for name, value in figures.items())


def _named(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name}: {value}"
    short = name.removesuffix(" ms")
    shown = f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
    return f"{short}: {shown}" + ("" if short == name else " ms")


def _ratios(row: Result) -> str:
    return "\n".join(_ratio(of, ratio, row.targets.get(of)) for of, ratio in row.ratios.items())


def _ratio(of: str, ratio: float, target: Target | None) -> str:
    value = f"{ratio:.0f} {of}" if of == "layout copies" else f"{ratio:.2f} x {of}"
    if target is None:
        return value
    return f"{value} ({target} {'met' if target.met(ratio) else 'MISSED'})"


def bench(config: BenchConfig) -> None:
    """Measures, prints and writes.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    console = terminal.console()
    rows = run(config, measure(config), console)
    console.print(table(rows))
    terminal.say(f"written to {config.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        BenchConfig,
        bench,
        arguments,
        description=__doc__,
        prog="experiments.kernels.bench",
    )


if __name__ == "__main__":
    sys.exit(main())
