"""Prepares a task's data, checks and counts them, and draws a page of samples.

    seqmodels lra data --task listops
    seqmodels lra data --task path-x --train 1000 --validation 100 --test 100
    seqmodels lra data --task image --data-dir cifar-10-binary.tar.gz

ListOps and the path tasks are generated, unless --data-dir has Long Range Arena's files; a killed
generation of images continues where it was. All others need the original files: without --data-dir
the command says what to get, from where and how large it is. What is prepared stays in --cache-dir,
where `seqmodels lra train` finds it. Any field of the task's data is an option, as --train above;
--help-fields lists them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import tyro

from experiments import terminal
from experiments.command_line import as_options, changed, run_command
from experiments.errors import check_name
from experiments.lra.experiment import Task
from experiments.lra.plots import samples
from experiments.lra.run import data_digest
from experiments.run import absolute
from seqmodels.data.examples import Examples
from seqmodels.data.lra import TASKS, load
from seqmodels.ranges import Checked, Size

PROG = "experiments.lra.data"
CACHE = "~/.cache/seqmodels"


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    task: str
    """listops, text, retrieval, image, pathfinder, path-x, path-256, cifar (in colour), mnist,
    pmnist (permuted) or speech."""
    data_dir: Path | None = None
    """The original files: a folder or an archive."""
    allow_partial: bool = False
    """Accept other numbers of examples than the published ones."""
    cache_dir: Path = Path(CACHE)
    """Where prepared data are kept."""
    picture: Path | None = None
    """The page of samples; default runs/lra/data/<task>.png."""
    workers: Size | None = None
    """Processes that generate; default all cores. The data do not depend on it."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """The same as --train 1000, as train=1000; may be repeated."""
    help_fields: bool = False
    """Show the options that change the fields of the data, with their values, and exit."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def prepare(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Prepares and reports.

    Args:
      arguments: the command line.
      fields: the rest of it, options that change fields of the task's data.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    check_name("task", arguments.task, get_args(Task))
    options = [*as_options(arguments.set), *fields]
    options += ["--allow-partial=True"] if arguments.allow_partial else []
    options += ["--help"] if arguments.help_fields else []
    config = changed(TASKS[arguments.task], options, prog=PROG)
    data = load(
        config,
        cache_dir=str(absolute(arguments.cache_dir)),
        data_dir=absolute(arguments.data_dir),
        workers=arguments.workers,
        progress=arguments.progress,
    )
    console = terminal.console()
    view = terminal.table(f"{arguments.task}: {data.description['source']}")
    names = (
        "split",
        "examples",
        "shortest",
        "median",
        "longest",
        "rarest\nlabel",
        "most\nfrequent",
    )
    terminal.add_columns(view, *names, left=("split",))
    for split, examples in data.splits.items():
        view.add_row(split, *counts(examples, data.num_classes))
    console.print(view)
    terminal.say(f"checked; digest {data_digest(data)}")
    picture = arguments.picture or Path("runs/lra/data") / f"{arguments.task}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    samples(data, picture)
    terminal.say(f"samples: {picture}")


def counts(examples: Examples, classes: int) -> list[str]:
    """How many examples, their lengths, and the shares of the rarest and commonest label."""
    if not len(examples):
        return ["0", *["-"] * 5]
    lengths = examples.lengths
    shares = np.bincount(examples.labels, minlength=classes) / len(examples)
    return [
        f"{len(examples):,}",
        f"{lengths.min():,}",
        f"{int(np.median(lengths)):,}",
        f"{lengths.max():,}",
        f"{100 * shares.min():.1f} %",
        f"{100 * shares.max():.1f} %",
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, prepare, arguments, description=__doc__, prog=PROG, config_fields=True
    )


if __name__ == "__main__":
    sys.exit(main())
