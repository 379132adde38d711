"""Times the portable path of every family in two checkouts, in turn: did a rebuild cost speed?

    git worktree add ../before COMMIT
    seqmodels kernels between --before ../before
    seqmodels kernels between --before ../before --family delta_rule --repetitions 50

Each checkout has a process of its own; in each repetition both run the same program on the same
numbers one after the other, so that a disturbance of the machine meets them alike. `before/after`
is the ratio of the medians: above 1, the second checkout is faster.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.progress

from experiments import places, terminal
from experiments.command_line import run_command
from experiments.errors import check_name
from experiments.kernels import between_worker
from pallas_kernels.tools.families import TABULATED
from pallas_kernels.tools.programs import MODES
from seqmodels.ranges import Checked, Size
from seqmodels.training.metrics import write_atomically
from seqmodels.training.run_directory import environment, source_version


@dataclasses.dataclass(frozen=True)
class BetweenConfig(Checked):
    """Which checkouts, and what is timed."""

    before: Path
    """The checkout to compare with."""
    after: Path = places.ROOT
    """The other one; by default that of this command."""
    family: tuple[str, ...] = ()
    """Families of kernels; empty means all."""
    repetitions: Size = 15
    """Timed runs of each program in each checkout; medians are reported."""
    length: Size = 1024
    """Tokens: longer shapes are cut to so many."""
    output: Path = places.output("kernels") / "between-cpu.json"
    """The JSON file."""

    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("before", "after"):
            path = getattr(self, name)
            if not (path / "pallas_kernels").is_dir():
                raise ValueError(f"{name}={str(path)!r} is no checkout: it has no pallas_kernels")
        for family in self.family:
            check_name("family", family, TABULATED)


class Checkout:
    """A process that times the programs of one checkout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, between_worker.__file__],
            env=os.environ | {"PYTHONPATH": str(path.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, program: Sequence[str] | None = None) -> float:
        """The time of one run of `program`, compiled and run before; by default the last one again.

        Raises:
          RuntimeError: the process has ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(program), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"{program} failed in the checkout {self.path}")
        return float(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(config: BetweenConfig, programs: Sequence[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """A row for each program: medians in milliseconds and their ratio."""
    with contextlib.ExitStack() as stack:
        checkouts = [Checkout(path) for path in (config.before, config.after)]
        for checkout in checkouts:
            stack.callback(checkout.close)
        for program in programs:
            for checkout in checkouts:
                checkout.seconds(program)
            pairs = [
                [checkout.seconds() for checkout in checkouts] for _ in range(config.repetitions)
            ]
            before, after = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
            family, shape, mode, _ = program
            yield {
                "family": family,
                "shape": shape,
                "mode": mode,
                "before_ms": before,
                "after_ms": after,
                "before/after": before / after,
            }


def listed(config: BetweenConfig) -> list[tuple[str, ...]]:
    """The programs to time, one shape of each kind: (family, shape, mode, factor on the length)."""
    return [
        (name, shape, mode, repr(min(1.0, config.length / family.shapes[shape].length)))
        for name, family in TABULATED.items()
        if not config.family or name in config.family
        for shape in family.representatives
        for mode in MODES
    ]


def between(config: BetweenConfig) -> None:
    """Times, prints and writes.

    Raises:
      RuntimeError: a program does not run in one of the checkouts.
    """
    console, start = terminal.console(), time.perf_counter()
    programs = listed(config)
    tracked = rich.progress.track(
        measure(config, programs), total=len(programs), description="timing", console=console
    )
    rows = list(tracked)
    view = terminal.table("before / after")
    columns = ("family", "shape", "mode", "before ms", "after ms", "ratio")
    terminal.add_columns(view, *columns, left=columns[:3])
    for row in rows:
        figures = (row["before_ms"], row["after_ms"], row["before/after"])
        view.add_row(row["family"], row["shape"], row["mode"], *(f"{x:.2f}" for x in figures))
    console.print(view)
    settings = {"family": config.family, "repetitions": config.repetitions, "length": config.length}
    record = {
        "config": settings,
        **environment(),
        "before": source_version(config.before),
        "after": source_version(config.after),
        "wall_s": time.perf_counter() - start,
        "rows": rows,
    }
    write_atomically(config.output, json.dumps(record, indent=1) + "\n")
    terminal.say(f"written to {config.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        BetweenConfig,
        between,
        arguments,
        description=__doc__,
        prog="experiments.kernels.between",
    )


if __name__ == "__main__":
    sys.exit(main())
