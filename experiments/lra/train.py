"""Trains one model on one task and writes down what came out.

    python -m experiments.lra.train --task listops --model s5 --preset cpu
    python -m experiments.lra.train --resume --run-dir runs/lra/listops-s5-cpu-seed0

Presets: "paper" has the published settings and is meant for an accelerator; "cpu" is what two
processor cores do in ten minutes (Text: an hour), with smaller models and easier data (see
experiments/lra/presets.py for each difference). Any field of the config can be changed;
--help-fields lists them. For example

    --train.learning-rate 0.002 --classifier.backbone.width 128 --lengths 100 200

The run directory holds config, metrics (metrics.jsonl, TensorBoard) and checkpoints; the result and
its learning curve go to --results-dir as <task>-<model>-<preset>-seed<k>.json and .png.
Exit codes: 0 done; 1 an error; 2 a wrong command line; 3 the loss was not finite; 130 and 143
stopped by Ctrl-C or SIGTERM, with a checkpoint to --resume from.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import terminal
from experiments.command_line import UsageError, as_options, changed, run_command
from experiments.lra.baselines import baselines
from experiments.lra.experiment import ExperimentConfig
from experiments.lra.plots import learning_curve
from experiments.lra.presets import experiment
from experiments.lra.run import (
    data_digest,
    eval_batches,
    evaluate_checkpoint,
    load_data,
    make_task,
)
from experiments.run import (
    Locations,
    absolute,
    history,
    mesh_sizes,
    require_names,
    result_path,
    say_padding,
    selection,
    validation,
    write_result,
)
from seqmodels.config import from_dict, to_dict
from seqmodels.data import batches
from seqmodels.data.examples import TaskData
from seqmodels.ranges import Checked, Positive, Seed, Size
from seqmodels.training.evaluation import Evaluation
from seqmodels.training.loop import Outcome, fit
from seqmodels.training.run_directory import Run, open_run, read_config

PROG = "experiments.lra.train"
RUNS = Path("runs/lra")
CACHE = "~/.cache/seqmodels"


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    task: str | None = None
    """listops, text, retrieval, image, pathfinder, path-x, path-256, cifar (in colour), mnist,
    pmnist (permuted) or speech; needed unless --resume."""
    model: str | None = None
    """s5 or s4d; needed unless --resume."""
    preset: str | None = None
    """paper or cpu; default cpu."""
    seed: Seed | None = None
    """Seed of parameters, dropout and data order; default 0."""
    data_dir: Path | None = None
    """Where the original files are, a folder or an archive: see experiments.lra.data. Without it,
    listops and the path tasks are generated."""
    allow_partial: bool = False
    """Accept data of other numbers than the published ones, e.g. a part of IMDB's reviews."""
    cache_dir: Path | None = None
    """Where prepared data are kept; default ~/.cache/seqmodels, or where the run has them."""
    run_dir: Path | None = None
    """Where the run goes; default runs/lra/<task>-<model>-<preset>-seed<k>."""
    results_dir: Path = Path("runs/results/lra")
    """Where the result and the learning curve go; those in experiments/results are committed."""
    steps: Size | None = None
    """Number of steps, instead of the preset's; the schedule follows."""
    max_minutes: Positive | None = None
    """Stop after this much training time, with a checkpoint, and test what there is."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,model=2,seq=4: rows of a batch are split over data, heads and
    channels over model, the length of each row over seq; default: all devices are data."""
    resume: bool = False
    """Continue the run in --run-dir; everything else comes from there."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """The same as --train.learning-rate 0.002, as train.learning_rate=0.002; may be repeated."""
    help_fields: bool = False
    """Show the options that change the fields of this config, with their values, and exit."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def resolve(arguments: Arguments, fields: Sequence[str] = ()) -> tuple[ExperimentConfig, Path]:
    """The experiment and its run directory.

    Args:
      arguments: the command line.
      fields: the rest of it, options that change fields of the config.

    Raises:
      UsageError: a name is missing or unknown or not the run's, a field or its value does not fit,
        or the run to resume is not one.
    """
    options = [*as_options(arguments.set), *fields]
    for path, value in (
        ("train.steps", arguments.steps), ("train.max_minutes", arguments.max_minutes),
    ):  # fmt: skip
        options += [] if value is None else [f"--{path}={value}"]
    options += [f"--train.mesh.{axis}={n}" for axis, n in mesh_sizes(arguments.mesh).items()]
    options += ["--data.allow_partial=True"] if arguments.allow_partial else []
    options += ["--help"] if arguments.help_fields else []
    run_dir = arguments.run_dir
    if run_dir is None or not arguments.resume:
        if arguments.task is None or arguments.model is None:
            raise UsageError(
                "a new run needs --task and --model, e.g. --task listops --model s5; "
                "a run to --resume needs its --run-dir. See --help"
            )
        preset = "cpu" if arguments.preset is None else arguments.preset
        fresh = experiment(arguments.task, arguments.model, preset, arguments.seed or 0)
        if not arguments.resume:
            config = changed(fresh, options, prog=PROG)
            return config, run_dir or RUNS / config.name
        run_dir = RUNS / fresh.name
    config = from_dict(ExperimentConfig, read_config(run_dir), where="config")
    saved = {name: getattr(config, name) for name in ("task", "model", "preset")}
    require_names(arguments, saved | {"seed": config.train.seed}, run_dir)
    return changed(config, options, prog=PROG), run_dir


def train(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Trains, tests and writes the result; arguments as ``resolve``.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    config, run_dir = resolve(arguments, fields)
    run = open_run(run_dir, to_dict(config), resume=arguments.resume)
    path = result_path(arguments.results_dir, config.name, config)
    data, locations = _data(arguments, config, run_dir)
    task = make_task(config)
    say_padding(config.lengths, config.train.mesh.seq)
    print(f"{config.name}: {run_dir}", file=sys.stderr)
    outcome = fit(
        task,
        batches.train_batches(
            data.train,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            lengths=config.lengths,
        ),
        config.train,
        run,
        validation=eval_batches(config, data.validation) if len(data.validation) else None,
        show_progress=arguments.progress,
        on_event=lambda what, _: locations.write(run_dir) if what == "prepared" else None,
    )
    if not outcome.complete:
        limit = config.train.max_minutes
        terminal.say(f"stopped after {outcome.progress.step} steps: max_minutes={limit}")
    step = outcome.chosen_step
    test = evaluate_checkpoint(config, run.config_dict, run_dir / "checkpoints", step, data.test)
    result = make_result(config, run, data, outcome, test)
    terminal.say(
        f"test accuracy {test.accuracy:.4f} at step {step} of {outcome.progress.step}; baselines: "
        + ", ".join(f"{name} {value:.4f}" for name, value in result["baselines"].items())
    )
    write_result(result, run_dir, path)
    learning_curve(result, path.with_suffix(".png"))
    terminal.say(f"result: {path}")


def _data(
    arguments: Arguments, config: ExperimentConfig, run_dir: Path
) -> tuple[TaskData, Locations]:
    """The data and where they are; a resumed run insists on the data it began with."""
    saved = None
    cache_dir, data_dir = absolute(arguments.cache_dir), absolute(arguments.data_dir)
    if arguments.resume and (run_dir / "data.json").exists():
        saved = Locations.read(run_dir)
        cache_dir, data_dir = cache_dir or saved.cache_dir, data_dir or saved.data_dir
    cache_dir = cache_dir or str(absolute(CACHE))
    data = load_data(config, cache_dir=cache_dir, data_dir=data_dir, progress=arguments.progress)
    locations = Locations(cache_dir, data_dir, data_digest(data))
    if saved is not None and saved.digest != locations.digest:
        raise ValueError(f"the data are not those that the run in {run_dir} began with")
    return data, locations


def make_result(
    config: ExperimentConfig, run: Run, data: TaskData, outcome: Outcome, test: Evaluation
) -> dict[str, Any]:
    """What is published of a run: no path of the machine it ran on."""
    progress, how = outcome.progress, history(run.directory)
    return {
        "task": config.task,
        "model": config.model,
        "preset": config.preset,
        "seed": config.train.seed,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_examples": test.examples,
        "test_step": outcome.chosen_step,
        "selection": selection(config.train, outcome),
        "validation_accuracy": validation(how["curve"], outcome.chosen_step).get("accuracy"),
        "baselines": baselines(data),
        "steps": progress.step,
        "complete": outcome.complete,
        "tokens": progress.tokens,
        "skipped": progress.skipped,
        "parameters": outcome.parameters,
        "wall_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "config": run.config_dict,
        "data": {"digest": data_digest(data), **dict(data.description)},
        **how,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, train, arguments, description=__doc__, prog=PROG, config_fields=True
    )


if __name__ == "__main__":
    sys.exit(main())
