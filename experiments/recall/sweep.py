"""Trains a grid of mixers and sizes on synthetic tasks, one run at a time.

    seqmodels recall sweep --dry-run
    seqmodels recall sweep --tasks mqar --sizes 8 16 32 --minutes 4
    seqmodels recall sweep --tasks a5 parity --mixers s4d mamba deltanet-negative
    seqmodels recall sweep --grid committed --minutes 6

Every run leaves one result in --results-dir; runs that have one are not made again, and one that
was killed, however, goes on from its last checkpoint: give the same command again. A run whose loss
was not finite is said at the end, and tried again by the next command. A mixer whose state does not
depend on --sizes is run once. Before anything starts, the whole grid is checked: unknown names, and
runs that do not fit into memory.

`seqmodels recall report` draws what came out. Any field of the config can be changed for all runs,
e.g. --train.learning-rate 0.001.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import terminal
from experiments.command_line import changed, run_command
from experiments.errors import UsageError
from experiments.recall.experiment import ExperimentConfig
from experiments.recall.memory import bytes_free, bytes_needed
from experiments.recall.mixers import BOTH_SIDES, CAUSAL, VARIANTS
from experiments.recall.presets import experiment
from experiments.recall.train import say, train_and_test
from experiments.run import result_path, write_result
from seqmodels.config import to_dict
from seqmodels.ranges import Checked, Positive, Seed, Size
from seqmodels.training.errors import NonFiniteError
from seqmodels.training.run_directory import open_run

PROG = "experiments.recall.sweep"
GB = 10**9


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    grid: Literal["committed"] | None = None
    """"committed": the grid that is meant for experiments/results/recall, some 120 runs, instead of
    --tasks, --mixers and --sizes."""
    tasks: tuple[str, ...] = ("mqar",)
    """Names of tasks, see `seqmodels recall train`."""
    mixers: tuple[str, ...] = (*CAUSAL, *VARIANTS)
    """Names of mixers and variants; default: all causal ones."""
    sizes: tuple[Size, ...] = (8, 16, 32)
    """Sizes of the mixers' states."""
    preset: str = "cpu"
    """tiny, cpu or paper."""
    seed: Seed = 0
    """Seed of every run."""
    minutes: Positive = 10.0
    """Budget of one run: training stops after this time, and what there is is tested."""
    memory_gb: Positive | None = None
    """Refuse a grid with a run that needs more; default: what is free."""
    runs_dir: Path = Path("runs/recall")
    """Where the runs go, each to a directory of its name."""
    results_dir: Path = Path("runs/results/recall")
    """Where the results go."""
    dry_run: bool = False
    """Only list the runs, with parameters and memory."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a grid: every task with every mixer at every size."""

    tasks: tuple[str, ...]
    mixers: tuple[str, ...]
    sizes: tuple[int, ...]
    repeats: int = 1


ONE_OF_EACH = ("attention", "mamba2", "gated_deltanet")
RECURRENT = ("gla", "mamba2", "deltanet", "gated_deltanet")
TRACKING = (*RECURRENT, "attention", "mamba", "mamba3", "s4d", "kda", *VARIANTS)
COMMITTED = (
    Stage(("mqar",), (*CAUSAL, "jrt"), (8, 32)),
    Stage(("selective-copy",), (*CAUSAL, "jrt"), (16,)),
    Stage(("mqar",), BOTH_SIDES, (8,)),
    Stage(("parity", "s5-swaps"), TRACKING, (16,)),
    Stage(("a5-2steps",), ("deltanet", "deltanet-negative", "mamba"), (16,)),
    Stage(("disjointness-long-first",), (*RECURRENT, "based", "jrt"), (16,)),
    Stage(("disjointness-long-first",), RECURRENT, (16,), repeats=2),
    Stage(("plain-copy", "induction", "copy", "passkey"), ONE_OF_EACH, (16,)),
    Stage(("regbench", "niah-multikey"), ONE_OF_EACH, (16,)),
)
"""A run that two stages have is made once."""


def grid(arguments: Arguments, fields: Sequence[str] = ()) -> list[ExperimentConfig]:
    """The runs, each model once.

    Raises:
      UsageError: a name is unknown, or a field or its value does not fit.
    """
    if not (arguments.tasks and arguments.mixers and arguments.sizes):
        raise UsageError("--tasks, --mixers and --sizes must name at least one each")
    asked = Stage(arguments.tasks, arguments.mixers, arguments.sizes)
    stages = (asked,) if arguments.grid is None else COMMITTED
    found: dict[Any, ExperimentConfig] = {}
    for stage in stages:
        options = [*fields, f"--train.max-minutes={arguments.minutes}"]
        options += [f"--repeats={stage.repeats}"] if stage.repeats > 1 else []
        for task, mixer, size in itertools.product(stage.tasks, stage.mixers, sorted(stage.sizes)):
            config = experiment(task, mixer, arguments.preset, size, arguments.seed)
            config = changed(config, options, prog=PROG)
            found.setdefault((task, mixer, config.model, config.repeats), config)
    return list(found.values())


def check_memory(configs: Sequence[ExperimentConfig], limit_gb: float | None) -> dict[str, int]:
    """Bytes that each run needs at most, by name: what the longest one of its model's layers needs.

    Raises:
      ValueError: one needs more than there is; the message has both numbers.
    """
    free = bytes_free() if limit_gb is None else round(limit_gb * GB)
    groups: dict[Any, list[ExperimentConfig]] = {}
    for config in configs:
        groups.setdefault(config.model.backbone, []).append(config)
    needed: dict[str, int] = {}
    for group in groups.values():
        longest = max(group, key=_scores)
        size = bytes_needed(longest)
        if free is not None and size > free:
            raise ValueError(
                f"{longest.name} needs about {size / GB:.1f} GB, there are {free / GB:.1f}: "
                "take a smaller --train.batch-size, --train.accumulate, or leave its size, mixer "
                "or task out"
            )
        needed |= dict.fromkeys((config.name for config in group), size)
        jax.clear_caches()
    return needed


def _scores(config: ExperimentConfig) -> int:
    """Pairs of tokens in a step."""
    return config.train.batch_size * (config.data.tokens * config.repeats) ** 2


def finished(config: ExperimentConfig, results_dir: Path) -> bool:
    """Whether the run has its result; raises UsageError if that is one of another config."""
    return result_path(results_dir, config.name, config).exists()


def sweep(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Makes the runs that have no result yet, or lists all.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    configs = grid(arguments, fields)
    waiting = [config for config in configs if not finished(config, arguments.results_dir)]
    needed = check_memory(waiting, arguments.memory_gb)
    terminal.say(
        f"{len(configs)} in the grid, {len(configs) - len(waiting)} of them done; "
        f"at most {arguments.minutes:g} minutes of training each, "
        f"{len(waiting) * arguments.minutes / 60:.1f} hours in all"
    )
    if arguments.dry_run:
        listed(configs, needed)
        return
    failed = []
    for number, config in enumerate(waiting, 1):
        print(f"{number} of {len(waiting)}: {config.name}", file=sys.stderr)
        try:
            make(config, arguments)
        except NonFiniteError as error:
            failed.append(config.name)
            terminal.say(f"{config.name}: {error}")
        jax.clear_caches()
    if failed:
        raise ValueError(f"not finite: {', '.join(failed)}; a lower --train.learning-rate may help")


def make(config: ExperimentConfig, arguments: Arguments) -> None:
    """One run, from its last checkpoint if there is one."""
    run_dir = arguments.runs_dir / config.name
    run = open_run(run_dir, to_dict(config), resume=(run_dir / "config.json").exists())
    result = train_and_test(config, run, show_progress=arguments.progress)
    say(result)
    write_result(result, run_dir, result_path(arguments.results_dir, config.name, config))


def listed(configs: Sequence[ExperimentConfig], needed: dict[str, int]) -> None:
    """Prints the runs, those that are done without their memory."""
    view = terminal.table("Runs", "Memory, at most: parameters, moments, what backward reads.")
    terminal.add_columns(
        view, "run", "tokens\na row", "rows\na step", "steps", "memory", left=("run",)
    )
    for config in configs:
        size = needed.get(config.name)
        view.add_row(
            config.name,
            f"{config.data.tokens:,}",
            str(config.train.batch_size),
            f"{config.train.steps:,}",
            "done" if size is None else f"{size / GB:.2f} GB",
        )
    terminal.console().print(view)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, sweep, arguments, description=__doc__, prog=PROG, config_fields=True
    )


if __name__ == "__main__":
    sys.exit(main())
