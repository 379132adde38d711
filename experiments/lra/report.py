"""Prints and plots our results beside the published ones.

    python -m experiments.lra.report
    python -m experiments.lra.report --all-published --plot experiments/results/lra/report.png

Everything comes from the result files that experiments.lra.train writes and from
experiments/lra/published.py.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.command_line import run_command
from experiments.lra.plots import comparison
from experiments.lra.presets import PAPER
from experiments.lra.published import ROWS, TASKS
from experiments.lra.result import read_result
from seqmodels.config import to_dict
from seqmodels.ranges import Checked

SELECTED = (
    "Transformer",
    "BigBird",
    "S4-LegS",
    "S4D-LegS",
    "S4D-Inv",
    "S4D-Lin",
    "S5",
    "Liquid-S4",
    "LRU",
    "Mega (full attention)",
    "Mamba",
)
"""Published rows that are shown without --all-published."""

AVERAGES = (
    "Average over the six tasks where a failed one counts 50, as papers do since S4; averages "
    "printed in the papers may leave it out or count it 0."
)


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    results_dir: Path = Path("experiments/results/lra")
    """Where the result files are."""
    plot: Path | None = None
    """The figure; default report.png in --results-dir."""
    all_published: bool = False
    """Show every published row, not only the best known models."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def read_results(results_dir: Path) -> list[dict[str, Any]]:
    """All results, by task, model, preset and seed.

    Raises:
      ValueError: there is none, or a file is not a result.
    """
    results = [read_result(path) for path in sorted(results_dir.glob("*.json"))]
    if not results:
        raise ValueError(
            f"no results in {results_dir}; make one with python -m experiments.lra.train, "
            "or name another --results-dir"
        )
    names = ("task", "model", "preset", "seed", "test_accuracy")
    return sorted(results, key=lambda result: [result[name] for name in names])


def longest(result: dict[str, Any]) -> int:
    """The most tokens a result's inputs have."""
    limit = result["config"]["data"]["max_length"] - (result["task"] == "listops")
    return min(limit, result["config"]["lengths"][-1])


def caveats(result: dict[str, Any]) -> list[str]:
    """Why a result must not be read against the published column; empty if it may."""
    data, published = result["config"]["data"], PAPER[result["task"], result["model"]]
    paper = to_dict(published)
    reasons = []
    if result["task"] == "listops":
        keys = ("min_length", "max_length", "max_depth", "max_arguments")
        if any(data[key] != paper["data"][key] for key in keys):
            reasons.append(
                f"ListOps of at most {longest(result)} tokens, not the published 2K task"
            )
    elif longest(result) < paper["data"]["max_length"]:
        reasons.append(f"cut to {longest(result)} bytes, published 4K")
    if result["config"]["classifier"] != paper["classifier"]:
        reasons.append("other model size")
    if result["steps"] < published.train.steps:
        reasons.append(f"published recipe {published.train.steps} steps")
    return reasons


def our_table(results: list[dict[str, Any]]) -> Table:
    """Our runs, one a row."""
    table = Table(title="Our runs: test accuracy in %")
    right = {"seed", "longest", "accuracy", "steps", "parameters", "minutes"}
    for name in ("task", "model", "preset", "seed", "longest", "accuracy", "best baseline",
                 "steps", "parameters", "minutes", "device", "remarks"):  # fmt: skip
        table.add_column(name, justify="right" if name in right else "left")
    for result in results:
        baseline, value = max(result["baselines"].items(), key=lambda item: item[1])
        environment = result["environment"]
        on_cpu = environment["device"] == "cpu"
        device = environment["cpu"] if on_cpu else environment["device"]
        count = environment["cpu_cores"] if on_cpu else environment["devices"]
        table.add_row(
            result["task"],
            result["model"],
            result["preset"],
            str(result["seed"]),
            str(longest(result)),
            f"{100 * result['test_accuracy']:.2f}",
            f"{100 * value:.2f} ({baseline.replace('_', ' ')})",
            str(result["steps"]),
            f"{result['parameters']:,}",
            f"{result['wall_seconds'] / 60:.0f}",
            f"{count} x {device}",
            "; ".join(caveats(result)) or "comparable",
        )
    return table


def published_table(everything: bool) -> Table:
    """Published rows."""
    table = Table(title="Published: test accuracy in %", caption=AVERAGES)
    for name in ("model", *TASKS, "average", "read in"):
        table.add_column(name, justify="left" if name in ("model", "read in") else "right")
    for row in ROWS:
        if everything or row.model in SELECTED:
            accuracies = ("fail" if a is None else f"{a:.2f}" for a in row.accuracies)
            table.add_row(row.model, *accuracies, f"{row.average:.2f}", row.source)
    return table


def report(arguments: Arguments) -> None:
    """Prints both tables and writes the figure.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    results = read_results(arguments.results_dir)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(our_table(results))
    console.print(published_table(arguments.all_published))
    plot = arguments.plot or arguments.results_dir / "report.png"
    published = [row for row in ROWS if arguments.all_published or row.model in SELECTED]
    comparison([(result, not caveats(result)) for result in results], published, plot)
    console.print(f"figure: {plot}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, report, arguments, description=__doc__, prog="experiments.lra.report"
    )


if __name__ == "__main__":
    sys.exit(main())
