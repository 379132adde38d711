"""Prints and draws what a sweep found, and checks the known results against it.

    seqmodels recall report
    seqmodels recall report --results-dir experiments/results/recall --tasks mqar a5

Everything comes from the result files of `seqmodels recall train` and `sweep`, and what
`seqmodels recall eval` wrote to their folder evaluations/. To --output, by
default the last --results-dir, go state.png (accuracy against bytes of state), length.png (accuracy
against the length) and report.md (the table, the known results, both figures).
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments import terminal
from experiments.command_line import run_command
from experiments.errors import UsageError
from experiments.places import committed
from experiments.recall.findings import Checked as CheckedFinding
from experiments.recall.findings import check
from experiments.recall.plots import against_length, against_state
from experiments.recall.result import read_evaluations, read_results
from seqmodels.ranges import Checked

PROG = "experiments.recall.report"
COMMITTED = committed("recall")
OWN = Path("runs/results/recall")
"""Where `seqmodels recall train` writes; git ignores it."""


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    results_dir: tuple[Path, ...] = (COMMITTED, OWN)
    """Where the result files are; a folder that is not there has none."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; default: all that there are results of."""
    output: Path | None = None
    """Folder of the figures and of report.md; default: the last --results-dir."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def multiples_of(results: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({multiple for result in results for multiple in result["tests"]})


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells of the table: task, mixer, size, bytes of state, accuracy at each multiple."""
    multiples = multiples_of(results)
    return [
        [
            result["task"] + (f" x{result['repeats']}" if result["repeats"] > 1 else ""),
            result["mixer"] + ("" if result["complete"] else " (cut)"),
            str(result["size"]),
            f"{result['state_bytes']:,}",
            *(
                f"{result['tests'][m]['accuracy']:.3f}" if m in result["tests"] else "-"
                for m in multiples
            ),
        ]
        for result in results
    ]


def header(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the columns of ``rows``."""
    lengths = [f"{multiple} x" for multiple in multiples_of(results)]
    return ["task", "mixer", "size", "state bytes", *lengths]


CAPTION = (
    "Accuracy of the counted positions at multiples of the trained length. One seed each. "
    '"cut": the run\'s budget ended it early. State bytes: all blocks, of one row at the trained '
    "length, caches in bfloat16."
)


def printed(task: str, results: Sequence[dict[str, Any]]) -> Table:
    """The table of one task for a terminal."""
    view = terminal.table(task)
    _, *names = header(results)
    terminal.add_columns(view, *names, left=("mixer",))
    for _, *cells in rows(results):
        view.add_row(*cells)
    return view


def markdown(results: Sequence[dict[str, Any]], found: Sequence[CheckedFinding]) -> str:
    """The report as a page."""
    names = header(results)
    table = [names, ["---"] * len(names), *rows(results)]
    lines = ["# Recall", "", "## Known results", ""]
    lines += [
        f"- **{each.verdict}**: {each.claim} ({each.source}). Ours: {each.evidence}."
        for each in found
    ]
    lines += ["", "## Accuracy against state", "", "![accuracy against state](state.png)", ""]
    lines += ["## Accuracy against length", ""]
    lines += ["The largest state of each mixer.", "", "![accuracy against length](length.png)", ""]
    lines += ["## All runs", "", CAPTION, ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    environments = {
        f"{result['environment'].get('cpu')}, commit {result['environment'].get('commit')}"
        for result in results
    }
    lines += ["", f"Made on {'; '.join(sorted(environments))}.", ""]
    return "\n".join(lines)


def report(arguments: Arguments) -> None:
    """Prints the table and the known results; writes the figures and the page.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    results = read_results(arguments.results_dir)
    there = sorted({result["task"] for result in results})
    missing = [task for task in arguments.tasks if task not in there]
    if missing:
        raise UsageError(f"--tasks {missing[0]}: there are only results of {', '.join(there)}")
    if arguments.tasks:
        results = [result for result in results if result["task"] in arguments.tasks]
    found = check(results, read_evaluations(arguments.results_dir))
    console = terminal.console()
    for task, group in itertools.groupby(results, key=lambda result: rows([result])[0][0]):
        console.print(printed(task, list(group)))
        print()
    terminal.say(CAPTION)
    print()
    for each in found:
        terminal.say(f"{each.verdict}: {each.claim} ({each.source}). {each.evidence}")
    output = arguments.output or arguments.results_dir[-1]
    output.mkdir(parents=True, exist_ok=True)
    against_state(results, output / "state.png")
    against_length(results, output / "length.png")
    (output / "report.md").write_text(markdown(results, found), encoding="utf-8")
    terminal.say(f"report: {output / 'report.md'}, with state.png and length.png")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, report, arguments, description=__doc__, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
