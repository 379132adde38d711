"""Trains many models on many tasks, one after another, each for the same time.

    seqmodels lra sweep --minutes 10 --data text=aclImdb_v1.tar.gz image=cifar-10
    seqmodels lra sweep --tasks listops --models s5 gla --seeds 0 1 2 --dry-run
    seqmodels lra sweep --cells image:s4:cpu-hour mnist:s4d --minutes 60

A cell is a task, a model, a preset, a seed, and perhaps a pretraining; `seqmodels lra train` runs
it with --minutes, which chooses the number of steps by timing a few. A sweep that was killed, at
any moment, and is started again with the same command goes on where it was: cells with a result
are left out, the one under way continues from its last checkpoint, and the time it has trained
counts. Results, learning curves and run directories are those of `seqmodels lra train`. A cell
that fails is reported and does not stop the others. Exit codes: 0 all cells have a result; 1 some
have failed; 130 and 143 stopped.
"""

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any, cast, get_args

import jax

from experiments import terminal
from experiments.command_line import run_command
from experiments.errors import UsageError
from experiments.lra import train
from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets import experiment
from experiments.lra.pretrain import with_pretraining
from experiments.run import read_object
from seqmodels.models.denoiser import Denoising
from seqmodels.ranges import Checked, Positive, Seed

PROG = "experiments.lra.sweep"
TASKS = ("listops", "text", "image", "pathfinder")
MODELS = (
    "s4d", "s5", "lru", "mamba2", "gla", "gated_deltanet", "rat", "scout", "hydra", "rotary",
)  # fmt: skip
KINDS = get_args(Denoising)


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    tasks: tuple[str, ...] = TASKS
    """Tasks; each with all models."""
    models: tuple[str, ...] = MODELS
    """Models."""
    preset: str = "cpu"
    """Preset of all cells."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds; each with all tasks and models."""
    pretrain: tuple[str, ...] = ("none",)
    """none, masked or causal, or several; each with all of these. See `seqmodels lra train`."""
    cells: tuple[str, ...] = ()
    """The cells themselves, in this order, in place of tasks and models:
    task:model, and then perhaps :preset, :seed and :masked or :causal."""
    minutes: Positive = 10.0
    """Training time of each cell."""
    data: tuple[str, ...] = ()
    """Where the original files of a task are, as task=PATH; as --data-dir of `seqmodels lra train`
    for that task."""
    allow_partial: tuple[str, ...] = ()
    """Tasks whose data may have other numbers than the published ones."""
    cache_dir: Path | None = None
    """Where prepared data are kept; default ~/.cache/seqmodels."""
    runs_dir: Path = train.RUNS
    """Where the runs go, a folder each."""
    results_dir: Path = Path("runs/results/lra")
    """Where results and learning curves go."""
    dry_run: bool = False
    """List the cells and how far they are, and exit."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def cells(arguments: Arguments) -> list[ExperimentConfig]:
    """The experiments in the order in which they are to run, without the numbers of steps.

    Raises:
      UsageError: a name is unknown, a cell is there twice or reads like none.
    """
    names = arguments.cells or [
        f"{task}:{model}:{arguments.preset}:{seed}:{kind}"
        for kind in arguments.pretrain
        for seed in arguments.seeds
        for task in arguments.tasks
        for model in arguments.models
    ]
    found: dict[str, ExperimentConfig] = {}
    for name in names:
        config = dataclasses.replace(_cell(name, arguments.preset), minutes=arguments.minutes)
        if config.name in found:
            raise UsageError(f"--cells {name}: it is there twice")
        found[config.name] = config
    return list(found.values())


def _cell(name: str, preset: str) -> ExperimentConfig:
    task, *rest = name.split(":")
    model, preset, seed, kind = [*rest, *("", preset, "0", "none")[len(rest) :]][:4]
    if not 1 <= len(rest) <= 4 or not seed.isdecimal() or kind not in ("none", *KINDS):
        raise UsageError(f"--cells {name} must look like listops:s5 or listops:s5:cpu:0:masked")
    config = experiment(task, model, preset, int(seed))
    return with_pretraining(config, None if kind == "none" else cast(Denoising, kind))


def locations(arguments: Arguments) -> dict[str, str]:
    """The original files by task.

    Raises:
      UsageError: an entry does not look like task=PATH.
    """
    places = {}
    for entry in arguments.data:
        task, equals, path = entry.partition("=")
        if not equals or not path:
            raise UsageError(f"--data {entry} must look like text=PATH")
        places[task] = path
    return places


def command(arguments: Arguments, config: ExperimentConfig, data_dir: str | None) -> list[str]:
    """The arguments of `seqmodels lra train` that begin or continue a cell."""
    run_dir = arguments.runs_dir / config.name
    options = [f"--run-dir={run_dir}", f"--results-dir={arguments.results_dir}"]
    options += [] if arguments.cache_dir is None else [f"--cache-dir={arguments.cache_dir}"]
    options += [] if data_dir is None else [f"--data-dir={data_dir}"]
    options += [] if arguments.progress else ["--no-progress"]
    options += ["--traceback"] if arguments.traceback else []
    if (run_dir / "config.json").exists():
        return [*options, "--resume"]
    return [
        f"--task={config.task}", f"--model={config.model}", f"--preset={config.preset}",
        f"--seed={config.train.seed}", f"--minutes={arguments.minutes:g}",
        *([] if config.pretrain is None else [f"--pretrain={config.pretrain.kind}"]),
        *(["--allow-partial"] if config.task in arguments.allow_partial else []), *options,
    ]  # fmt: skip


def sweep(arguments: Arguments) -> None:
    """Runs the cells that have no result.

    Raises:
      UsageError: see ``cells`` and ``locations``.
      Stopped: a signal has stopped a cell.
      ValueError: cells have failed.
    """
    todo, places = cells(arguments), locations(arguments)
    failed = []
    for number, config in enumerate(todo, 1):
        about, result = f"[{number}/{len(todo)}] {config.name}", _result(arguments, config)
        if arguments.dry_run or result is not None:
            terminal.say(f"{about}: {_state(arguments, config, result)}")
            continue
        terminal.say(f"{about}: trains for {arguments.minutes:g} minutes")
        code = train_cell(command(arguments, config, places.get(config.task)))
        if code in (130, 143):
            raise Stopped(code)
        result = _result(arguments, config)
        if code or result is None:
            failed.append(config.name)
        terminal.say(f"{about}: {_state(arguments, config, result)}")
        jax.clear_caches()
        gc.collect()
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} cells have failed: {', '.join(failed)}")


def train_cell(words: list[str]) -> int:
    """Trains in this process, so that what ends one ends both; the exit code."""
    return train.main(words)


class Stopped(ValueError):
    """A signal has stopped the sweep; ``exit_code`` says which."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped; the same command goes on")
        self.exit_code = exit_code


def _result(arguments: Arguments, config: ExperimentConfig) -> dict[str, Any] | None:
    path = arguments.results_dir / f"{config.name}.json"
    return read_object(path) if path.exists() else None


def _state(arguments: Arguments, config: ExperimentConfig, result: dict[str, Any] | None) -> str:
    """How far a cell is, in words."""
    if result is not None:
        return (
            f"test accuracy {result['test_accuracy']:.4f}, {result['steps']:,} steps in "
            f"{result['wall_seconds'] / 60:.1f} minutes"
        )
    begun = (arguments.runs_dir / config.name / "config.json").exists()
    return "begun, no result" if begun else "to do"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, sweep, arguments, description=__doc__, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
