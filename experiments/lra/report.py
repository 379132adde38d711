"""Prints and plots our results beside the published ones.

    python -m experiments.lra.report
    python -m experiments.lra.report --all-published --plot all.png
    python -m experiments.lra.report --results-dir experiments/results/lra

Everything comes from the result files of experiments.lra.train, the committed ones and one's own,
and from experiments/lra/published.py. The figure goes beside one's own results; the last of these
commands makes the committed one.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments import terminal
from experiments.command_line import run_command
from experiments.lra.experiment import ExperimentConfig
from experiments.lra.plots import comparison
from experiments.lra.presets import PAPER
from experiments.lra.published import ROWS, TASKS, Row
from experiments.lra.result import read_result
from seqmodels.config import from_dict, to_dict
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


COMMITTED = Path("experiments/results/lra")
OWN = Path("runs/results/lra")
"""Where experiments.lra.train writes; git ignores it."""


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    results_dir: tuple[Path, ...] = (COMMITTED, OWN)
    """Where the result files are; a folder that is not there has none."""
    plot: Path | None = None
    """The figure; default report.png in the last --results-dir."""
    all_published: bool = False
    """Show every published row, not only the best known models."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def read_results(*folders: Path) -> list[dict[str, Any]]:
    """All results, by task, model, preset, seed and accuracy; "committed" says where they are.

    Raises:
      ValueError: there is none, or a file is not a result.
    """
    results = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            results.append({**read_result(path), "committed": path.parent == COMMITTED})
    if not results:
        raise ValueError(
            f"no results in {', '.join(map(str, folders))}; make one with "
            "python -m experiments.lra.train, or name another --results-dir"
        )
    names = ("task", "model", "preset", "seed", "test_accuracy")
    return sorted(results, key=lambda result: [result[name] for name in names])


def longest(result: dict[str, Any]) -> int:
    """The most tokens a result's inputs have."""
    config = from_dict(ExperimentConfig, result["config"])
    return min(config.data.longest, config.lengths[-1])


def caveats(result: dict[str, Any]) -> list[str]:
    """Why a result must not be read against the published column; empty if it may."""
    published = PAPER.get((result["task"], result["model"]))
    if published is None:
        return ["no published recipe"]
    data, paper = result["config"]["data"], to_dict(published)
    reasons = []
    if result["task"] == "listops":
        keys = ("min_length", "max_length", "max_depth", "max_arguments")
        if any(data[key] != paper["data"][key] for key in keys):
            reasons.append(
                f"ListOps of at most {longest(result)} tokens, not the published 2K task"
            )
    elif longest(result) < published.data.longest:
        reasons.append(f"cut to {longest(result)} tokens, published {published.data.longest}")
    reasons += [
        f"data.{key}={data[key]}, published {paper['data'][key]}"
        for key in ("difficulty", "train")
        if result["task"] != "listops" and key in data and data[key] != paper["data"][key]
    ]
    if result["config"]["classifier"] != paper["classifier"]:
        reasons.append("other model size")
    if result["steps"] < published.train.steps:
        reasons.append(f"published recipe {published.train.steps} steps")
    if data.get("allow_partial"):
        reasons.append("perhaps a part of the data (--allow-partial)")
    return reasons


def name_of(result: dict[str, Any]) -> str:
    """What tells a run from the others."""
    name = f"{result['task']} {result['model']} {result['preset']} seed {result['seed']}"
    return f"{name}, committed" if result["committed"] else name


def our_table(results: list[dict[str, Any]]) -> Table:
    """Our runs, one a row."""
    view = terminal.table("Our runs: test accuracy in %")
    names = ("run", "longest\ninput", "accuracy", "best\nbaseline", "steps", "parameters")
    terminal.add_columns(view, *names, left=("run",))
    for result in results:
        view.add_row(
            name_of(result),
            f"{longest(result):,}",
            f"{100 * result['test_accuracy']:.2f}",
            f"{100 * max(result['baselines'].values()):.2f}",
            f"{result['steps']:,}",
            f"{result['parameters']:,}",
        )
    return view


def remarks(result: dict[str, Any]) -> str:
    """What stands under the table of a run."""
    baselines, environment = result["baselines"], result["environment"]
    on_cpu = environment["device"] == "cpu"
    device = environment["cpu"] if on_cpu else environment["device"]
    count = environment["cpu_cores"] if on_cpu else environment["devices"]
    return (
        f"{name_of(result)}: {'; '.join(caveats(result)) or 'comparable'}. Best baseline: "
        f"{max(baselines, key=baselines.__getitem__).replace('_', ' ')}. "
        f"{result['wall_seconds'] / 60:.0f} minutes on {count} x {device}."
    )


def published_table(rows: list[Row]) -> Table:
    """Published rows; the last column says by number where they were read."""
    sources = list(dict.fromkeys(row.source for row in rows))
    read_in = "; ".join(f"{number} {source}" for number, source in enumerate(sources, 1))
    view = terminal.table("Published: test accuracy in %", f"{AVERAGES} Read in: {read_in}.")
    terminal.add_columns(view, "model", *TASKS, "average", "read in", left=("model",))
    for row in rows:
        accuracies = ("fail" if a is None else f"{a:.2f}" for a in row.accuracies)
        number = str(1 + sources.index(row.source))
        view.add_row(row.model, *accuracies, f"{row.average:.2f}", number)
    return view


def report(arguments: Arguments) -> None:
    """Prints both tables and writes the figure.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    results = read_results(*arguments.results_dir)
    published = [row for row in ROWS if arguments.all_published or row.model in SELECTED]
    console = terminal.console()
    console.print(our_table(results))
    for result in results:
        terminal.say(remarks(result))
    console.print()
    console.print(published_table(published))
    plot = arguments.plot or arguments.results_dir[-1] / "report.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    bars = [(result, name_of(result), not caveats(result)) for result in results]
    comparison(bars, published, plot)
    terminal.say(f"figure: {plot}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, report, arguments, description=__doc__, prog="experiments.lra.report"
    )


if __name__ == "__main__":
    sys.exit(main())
