"""Writes one page of all results beside the published ones, in four forms.

    seqmodels lra report
    seqmodels lra report --all-published --out page
    seqmodels lra report --check listops-s5-cpu-seed0
    seqmodels lra report --results-dir experiments/results/lra

Rows of ours are the result files of experiments.lra.train: the committed ones and one's own, which
go to a folder that git ignores; there is no row without a file. Published rows are those of
experiments/lra/published.py, each with its source. The page is printed, and written as report.md,
report.html (one file) and report.png beside one's own results; the last of these commands makes the
committed page.

--check trains a row again from the config in its file, up to its first evaluation, and compares:
to the bit where versions, machine and commit are those of the file, else within a tolerance.
"""

import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments import terminal
from experiments.command_line import run_command
from experiments.errors import UsageError
from experiments.lra import page, plots
from experiments.lra.check import check
from experiments.lra.convolutions import CONVOLUTIONS
from experiments.lra.published import CRITICS, ROWS, TASKS
from experiments.lra.published import Row as Published
from experiments.lra.rows import (
    BUDGETS,
    COMMITTED,
    OWN,
    WINDOWS,
    Row,
    by_data,
    find,
    read_rows,
    seeds,
    whole,
    windowed,
)
from seqmodels.ranges import Checked
from seqmodels.training.metrics import write_atomically

SELECTED = (
    "Transformer",
    "BigBird",
    "S4-LegS",
    "S4D-LegS",
    "S4D-Inv",
    "S4D-Lin",
    "S4D-FT",
    "S5",
    "Liquid-S4",
    "LRU",
    "Mega (full attention)",
    "Megalodon",
    "Mamba",
    "Mamba-2",
    "B2S6",
    "Transformer + rotary + masked SPT",
)
"""Published rows that are printed without --all-published."""

AVERAGES = (
    "Average over the six tasks where a failed one counts 50, as papers do since S4; averages "
    "printed in the papers may leave it out or count it 0."
)

LOCAL = (
    "Window 5 and window 61: accuracy of the same model, trained as long, that sees pieces of so "
    "many tokens only. Rows are cut from their start; nothing passes from piece to piece but the "
    "mean before the head, however many layers there are. What is left is what the task gives "
    "away to local patterns."
)

COSTS = (
    "Parameters; float32 state of one row after the longest input, all layers and both directions, "
    "what one would carry to go on; tokens of training, padding not counted, and how many a second "
    "of the whole time, compiling and validating included; that time, in which other work on the "
    "machine shows. A curve's minutes are the run's, in proportion to the tokens read."
)


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    results_dir: tuple[Path, ...] = (COMMITTED, OWN)
    """Where the result files are; a folder that is not there has none."""
    out: Path | None = None
    """Folder of report.md, report.html and report.png; default the last --results-dir."""
    all_published: bool = False
    """Print every published row, not only the best known models; the files have all of them."""
    check: str | None = None
    """Train this row again up to its first evaluation and compare, e.g. listops-s5-cpu-seed0."""
    data_dir: Path | None = None
    """For --check: where the original files are; see `seqmodels lra data`."""
    cache_dir: Path | None = None
    """For --check: where prepared data are kept; default ~/.cache/seqmodels."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.results_dir:
            raise UsageError("--results-dir needs at least one folder")


def cell(value: float | None, form: str = ",.2f") -> str:
    """A number as tables print it; "-" for none."""
    return "-" if value is None else format(value, form)


def accuracies(rows: Sequence[Row]) -> list[page.Block]:
    """A table for each budget: accuracies, whole and local."""
    blocks: list[page.Block] = []
    shown = whole(rows)
    for budget in (*BUDGETS, None):
        title = "longer" if budget is None else f"at most {budget} minutes of training"
        group = [row for row in shown if row.budget == budget]
        lines = [
            (
                row.label,
                "committed" if row.committed else "own",
                f"{row.accuracy:.2f}",
                *(_local(row, rows, window) for window in WINDOWS),
                f"{row.baseline[1]:.2f}",
                "below" if row.caveats else "paper's",
            )
            for row in group
        ]
        windows = [f"window {window}" for window in WINDOWS]
        columns = ["run", "file", "accuracy", *windows, "best baseline", "scale"]
        if lines:
            blocks.append(
                page.Grid(f"Ours, {title}: test accuracy in %", columns, lines, ("run", "file"))
            )
    return blocks


def _local(row: Row, rows: Sequence[Row], window: int) -> str:
    if row.config.classifier.window is not None:
        return "-"
    local = windowed(row, rows, window)
    return cell(None if local is None else local.accuracy)


def costs(rows: Sequence[Row]) -> page.Grid:
    """What each row took."""
    columns = [
        "run", "longest input", "parameters", "state bytes", "million tokens", "tokens/s",
        "minutes",
    ]  # fmt: skip
    lines = [
        (
            f"{row.label}{'' if row.committed else ', own'}",
            f"{row.longest:,}",
            f"{row.result['parameters']:,}",
            cell(row.state_bytes, ",.0f"),
            f"{row.result['tokens'] / 1e6:,.1f}",
            cell(row.tokens_per_second, ",.0f"),
            f"{row.minutes:,.1f}",
        )
        for row in rows
    ]
    return page.Grid("Ours: what it took", columns, lines, ("run",), COSTS)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What else is to be said of rows, once of those of which the same is."""
    said: dict[str, list[str]] = {}
    for row in rows:
        environment = row.result["environment"]
        on_cpu = environment["device"] == "cpu"
        device = environment["cpu"] if on_cpu else environment["device"]
        count = environment["cpu_cores"] if on_cpu else environment["devices"]
        remark = (
            f"{'; '.join(row.caveats) or 'comparable'}. {row.steps:,} steps; best baseline: "
            f"{row.baseline[0]}. On {count} x {device}."
        )
        said.setdefault(remark, []).append(f"{row.label}{'' if row.committed else ', own'}")
    return [f"{'; '.join(labels)}: {remark}" for remark, labels in said.items()]


def spread(rows: Sequence[Row]) -> list[str]:
    """Mean and standard deviation of rows that differ in their seed."""
    return [
        f"{group[0].label.rpartition(' seed')[0]}: {np.mean([r.accuracy for r in group]):.2f} ± "
        f"{np.std([r.accuracy for r in group], ddof=1):.2f} % over {len(group)} runs, seeds "
        f"{', '.join(str(r.config.train.seed) for r in group)}."
        for group in seeds(rows)
    ]


def baseline_table(rows: Sequence[Row]) -> page.Grid:
    """The trivial and the trained baselines of each task as it was run."""
    names = list(dict.fromkeys(name for row in rows for name in row.result["baselines"]))
    lines = []
    for group in by_data(rows):
        found = group[0].result["baselines"]
        trivial = [cell(100 * found[name] if name in found else None) for name in names]
        trained = [cell(_best(group, model)) for model in CONVOLUTIONS]
        lines.append((group[0].title, *trivial, *trained))
    columns = ["task", *(name.replace("_", " ") for name in names)]
    columns += [f"conv of {sees}" for sees in CONVOLUTIONS.values()]
    caption = (
        "Majority: the most frequent label. First token: that among inputs which begin alike, of "
        "ListOps the first operator. Token counts: logistic regression on how often each token "
        "occurs; linear: on the values. Conv of 5, of 61: the best row of conv5 and of conv61, "
        "convolutions of so many tokens in place of S5, trained likewise; layer upon layer they "
        "see more."
    )
    return page.Grid("Baselines: test accuracy in %", columns, lines, ("task",), caption)


def _best(rows: Sequence[Row], model: str) -> float | None:
    found = (row for row in rows if row.config.model == model)
    return max((row.accuracy for row in found if not row.config.classifier.window), default=None)


def averages(rows: Sequence[Row]) -> str:
    """The averages of our models that have all six tasks as published."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if not row.caveats and row.config.task in TASKS:
            of_model = found.setdefault(row.config.model, {})
            of_model.setdefault(row.config.task, []).append(row.accuracy)
    whole = {model: means for model, means in found.items() if len(means) == len(TASKS)}
    if not whole:
        return (
            "None of our models has an average: that takes all six tasks at their published scale."
        )
    means = {model: np.mean([np.mean(a) for a in tasks.values()]) for model, tasks in whole.items()}
    return f"Averages of ours: {', '.join(f'{model} {mean:.2f}' for model, mean in means.items())}."


def published_table(rows: Sequence[Published]) -> page.Grid:
    """Published rows; the last column says by number where they were read."""
    sources = list(dict.fromkeys(row.source for row in rows))
    read_in = "; ".join(f"{number} {source}" for number, source in enumerate(sources, 1))
    lines = [
        (
            row.model,
            *(row.cell(task) for task in TASKS),
            cell(row.average),
            f"{1 + sources.index(row.source)}{'?' if row.second_hand else ''}",
        )
        for row in rows
    ]
    columns = ["model", *TASKS, "average", "read in"]
    doubt = " ?: as others give it, not compared with the source." if "?" in str(lines) else ""
    caption = f"{AVERAGES} Read in: {read_in}.{doubt}"
    return page.Grid("Published: test accuracy in %", columns, lines, ("model",), caption)


def build(rows: Sequence[Row], published: Sequence[Published]) -> list[page.Block]:
    """The page without its picture."""
    several = spread(rows)
    return [
        page.Heading("Long Range Arena: our runs beside the published"),
        page.Text(
            "Each row of ours is a result file: committed in experiments/results/lra, or one's own "
            f"in {OWN}. Scale: below the paper's, where data, model or schedule are smaller than "
            "published or nobody has published any; such a row must not be read against the "
            "published ones. One seed a row; the checkpoint that is tested was chosen on "
            "validation data."
        ),
        *accuracies(rows),
        page.Text(f"{LOCAL} {CRITICS}"),
        *([page.Items(several)] if several else []),
        page.Items(remarks(rows)),
        page.Heading("Cost"),
        costs(rows),
        page.Heading("Baselines"),
        baseline_table(rows),
        page.Heading("Published"),
        page.Text(averages(rows)),
        published_table(published),
    ]


def picture(
    rows: Sequence[Row], published: Sequence[Published], texts: Sequence[str] = ()
) -> bytes:
    """The page's picture as PNG, with ``texts`` above it."""
    into = io.BytesIO()
    plots.overview([panel(group) for group in by_data(rows)], published, into, texts)
    return into.getvalue()


def panel(rows: Sequence[Row]) -> plots.Panel:
    """Rows on the same data, to be drawn."""
    names = [row.label.removeprefix(row.config.task).strip() for row in rows]
    names = [
        f"{name}{'' if row.committed else ', own'}" for name, row in zip(names, rows, strict=True)
    ]
    return plots.Panel(
        rows[0].title,
        rows[0].config.task,
        [
            plots.Dot(name, row.accuracy, not row.caveats)
            for name, row in zip(names, rows, strict=True)
        ],
        [
            line
            for name, row in zip(names, rows, strict=True)
            if (line := curve(row, name)) is not None
        ],
        max(row.baseline[1] for row in rows),
    )


def curve(row: Row, name: str) -> plots.Line | None:
    """A row's evaluations, to be drawn; None where its file has none."""
    points = [
        (float(p.tokens), 100 * p.accuracy)
        for p in row.curve("eval")
        if p.tokens is not None and p.accuracy is not None
    ]
    losses = [
        (float(p.tokens), p.loss)
        for p in row.curve("train")
        if p.tokens is not None and p.loss is not None
    ]
    if not points:
        return None
    share = row.minutes / max(row.result["tokens"], 1)
    tokens, values = zip(*points, strict=True)
    read, loss = zip(*losses, strict=True) if losses else ((), ())
    return plots.Line(name, tokens, [share * n for n in tokens], values, read, loss)


def as_text(blocks: Sequence[page.Block], width: int = 100) -> str:
    """Tables as they look in a terminal, for the picture."""
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    for block in blocks:
        if isinstance(block, page.Grid):
            console.print(page.view(dataclasses.replace(block, caption="")))
            console.print()
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def report(arguments: Arguments) -> None:
    """Prints and writes the page, or checks a row.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    rows = read_rows(*arguments.results_dir)
    if arguments.check is not None:
        check(
            find(rows, arguments.check),
            data_dir=arguments.data_dir,
            cache_dir=arguments.cache_dir,
            progress=arguments.progress,
        )
        return
    selected = [row for row in ROWS if row.model in SELECTED]
    page.to_terminal(build(rows, ROWS if arguments.all_published else selected))
    folder = arguments.out or arguments.results_dir[-1]
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder, rows, selected)


def write_page(folder: Path, rows: Sequence[Row], selected: Sequence[Published]) -> None:
    """Writes report.png, report.md and report.html."""
    about = "Accuracies, published and ours, and how ours came about, by task"
    shown = page.Picture("report.png", picture(rows, selected), about)
    blocks = build(rows, ROWS)
    blocks[2:2] = [shown]
    ours = as_text([*accuracies(rows), costs(rows), baseline_table(rows)])
    texts = (ours, as_text([published_table(selected)]))
    (folder / "report.png").write_bytes(picture(rows, selected, texts))
    forms: dict[str, Callable[[Sequence[page.Block]], str]] = {
        "report.md": page.to_markdown,
        "report.html": page.to_html,
    }
    for name, form in forms.items():
        write_atomically(folder / name, form(blocks))
    for name in ("report.png", *forms):
        terminal.say(f"written: {folder / name}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, report, arguments, description=__doc__, prog="experiments.lra.report"
    )


if __name__ == "__main__":
    sys.exit(main())
