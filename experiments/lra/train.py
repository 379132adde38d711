"""Trains one model on one task and writes down what came out.

    seqmodels lra train --task listops --model s5 --preset cpu
    seqmodels lra train --task listops --model gla --minutes 10
    seqmodels lra train --resume --run-dir runs/lra/listops-s5-cpu-seed0

Presets: "paper" has the published settings, or our recipe where nobody has published any, and is
meant for an accelerator; "gpu-15min" is shorter; "cpu" is what two processor cores do in ten
minutes and "cpu-hour" in an hour, with smaller models and some with easier data (see
experiments/lra/presets/ for each difference). Any field of the config can be changed; --help-fields
lists them. For example

    --train.learning-rate 0.002 --classifier.backbone.width 128 --lengths 100 200

The run directory holds config, metrics (metrics.jsonl, TensorBoard) and checkpoints; the result and
its learning curve go to --results-dir as <task>-<model>-<preset>-seed<k>.json and .png, with
--minutes 10 as <task>-<model>-<preset>-10min-seed<k>, with --pretrain masked -masked before that.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments import terminal
from experiments.allocator import keep_freed_memory
from experiments.command_line import as_options, changed, run_command
from experiments.errors import UsageError
from experiments.lra.baselines import baselines
from experiments.lra.budget import Budget, planned, timed
from experiments.lra.command import PROG, command_of
from experiments.lra.experiment import ExperimentConfig
from experiments.lra.plots import learning_curve
from experiments.lra.presets import experiment
from experiments.lra.pretrain import pretrain, with_pretraining
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
    require_same_data,
    result_path,
    say_padding,
    selection,
    validation,
    write_result,
)
from seqmodels.config import from_dict, to_dict
from seqmodels.data import batches
from seqmodels.data.examples import TaskData
from seqmodels.models.denoiser import Denoising
from seqmodels.parallel.mesh import rows_of_process
from seqmodels.ranges import Checked, Positive, Seed, Size
from seqmodels.training import processes
from seqmodels.training.denoising import beginning_with
from seqmodels.training.evaluation import Evaluation
from seqmodels.training.loop import Outcome, fit
from seqmodels.training.processes import Distributed
from seqmodels.training.run_directory import Run, open_run, read_config

RUNS = Path("runs/lra")
CACHE = "~/.cache/seqmodels"


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    task: str | None = None
    """listops, text, retrieval, image, pathfinder, path-x, path-256, cifar (in colour), mnist,
    pmnist (permuted) or speech; needed unless --resume."""
    model: str | None = None
    """s4, s4d, s4d-legs, s4d-inv, s4d-ft, s5, lru, mamba, b2s6, mamba2, transformer (Long Range
    Arena's), rotary (the transformer of its critics), gla, retnet, gated_deltanet, hydra, rat,
    scout, or conv5 or conv61, convolutions that see so many tokens; needed unless --resume."""
    preset: str | None = None
    """paper, gpu-15min, cpu or cpu-hour; default cpu."""
    seed: Seed | None = None
    """Seed of parameters, dropout and data order; default 0."""
    data_dir: Path | None = None
    """Where the original files are, a folder or an archive: see `seqmodels lra data`. Without it,
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
    pretrain: Denoising | None = None
    """Give half of the steps to denoising the task's own inputs, without labels, before training:
    masked, or causal for models that see the past alone."""
    minutes: Positive | None = None
    """Time a few steps first, and take as many as fill this training time on this machine; the
    schedule follows. With --steps nothing is timed, only noted."""
    max_minutes: Positive | None = None
    """Stop after this much training time, with a checkpoint, and test what there is."""
    window: Size | None = None
    """Let the model see windows of so many tokens only, e.g. 5 or 61: how local the task is."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,model=2,seq=4: rows of a batch are split over data, heads and
    channels over model, the length of each row over seq; default: all devices are data."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    """Several processes that train as one, see docs/launching.md."""
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
        ("classifier.window", arguments.window),
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
        fresh = with_pretraining(fresh, arguments.pretrain)
        fresh = dataclasses.replace(fresh, minutes=arguments.minutes)
        if not arguments.resume:
            config = changed(fresh, options, prog=PROG)
            return config, run_dir or RUNS / config.name
        window = [] if arguments.window is None else [f"--classifier.window={arguments.window}"]
        run_dir = RUNS / changed(fresh, window, prog=PROG).name
    config = from_dict(ExperimentConfig, read_config(run_dir), where="config")
    saved = {name: getattr(config, name) for name in ("task", "model", "preset", "minutes")}
    saved |= {"seed": config.train.seed, "pretrain": config.pretrain and config.pretrain.kind}
    require_names(arguments, saved, run_dir)
    return changed(config, options, prog=PROG), run_dir


def train(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Trains, tests and writes the result; arguments as ``resolve``.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    keep_freed_memory()
    arguments.distributed.start()
    with processes.together():
        config, run_dir = resolve(arguments, fields)
        _require_one_process(config)
        run = open_run(run_dir, to_dict(config), resume=arguments.resume)
        path = result_path(arguments.results_dir, config.name, config)
        data, locations = _data(arguments, config, run_dir)
        mesh = config.train.mesh.make()
        own = rows_of_process(mesh, config.train.batch_size)
        config, budget = _budgeted(arguments, config, run_dir, data)
        run = dataclasses.replace(run, config_dict=to_dict(config))
    require_same_data(locations)

    def note() -> None:
        if processes.is_first():
            locations.write(run_dir)
            if budget is not None:
                budget.write(run_dir)

    outcome, pretraining = _fit(
        config, run, data, note, mesh=mesh, own=own, show_progress=arguments.progress
    )
    test = evaluate_checkpoint(
        config,
        run.config_dict,
        run_dir / "checkpoints",
        outcome.chosen_step,
        data.test,
        mesh if jax.process_count() > 1 else None,
    )
    with processes.together():
        if processes.is_first():
            result = make_result(config, run, data, outcome, test)
            result |= {
                "command": command_of(config, locations.data_dir is not None),
                "budget": None if budget is None else dataclasses.asdict(budget),
                "pretraining": pretraining,
            }
            if pretraining is not None:
                result["wall_seconds"] += pretraining["wall_seconds"]
            _tell(result, config, run_dir, path)


def _require_one_process(config: ExperimentConfig) -> None:
    """Raises ValueError for what several processes cannot do together."""
    if jax.process_count() > 1 and (config.minutes is not None or config.pretrain is not None):
        raise ValueError(
            "--minutes and --pretrain need a single process, which times or pretrains by itself; "
            "leave them out, or start one process"
        )


def _tell(result: Mapping[str, Any], config: ExperimentConfig, run_dir: Path, path: Path) -> None:
    """Prints the result, draws the learning curve and writes both."""
    if not result["complete"]:
        limit = config.train.max_minutes
        terminal.say(f"stopped after {result['steps']} steps: max_minutes={limit}")
    terminal.say(
        f"test accuracy {result['test_accuracy']:.4f} at step {result['test_step']} of "
        f"{result['steps']}; baselines: "
        + ", ".join(f"{name} {value:.4f}" for name, value in result["baselines"].items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    learning_curve(result, path.with_suffix(".png"))
    write_result(result, run_dir, path)  # last: where a result is, nothing is missing
    terminal.say(f"result: {path}")


def _budgeted(
    arguments: Arguments, config: ExperimentConfig, run_dir: Path, data: TaskData
) -> tuple[ExperimentConfig, Budget | None]:
    """The experiment with its number of steps, and what that was chosen from, if it was."""
    if arguments.resume:
        return config, Budget.read(run_dir)
    if arguments.minutes is None or arguments.steps is not None:
        return config, None
    budget = timed(config, data, arguments.minutes)
    terminal.say(f"{budget.minutes:g} minutes: {budget.steps} steps")
    return planned(config, budget), budget


def _fit(
    config: ExperimentConfig,
    run: Run,
    data: TaskData,
    note: Callable[[], None],
    *,
    mesh: jax.sharding.Mesh,
    own: np.ndarray,
    show_progress: bool,
) -> tuple[Outcome, dict[str, Any] | None]:
    """Trains, after pretraining if there is any; of that, what a result says.

    ``note`` leaves beside the config what a resumed run needs; ``own`` are this process's rows.
    """
    task, pretraining = make_task(config), None
    if config.pretrain is not None:
        run.write_config()  # from here on it can be resumed
        note()
        learned, pretraining = pretrain(config, run, data, show_progress=show_progress)
        task = beginning_with(task, learned)
    if processes.is_first():
        say_padding(config.lengths, config.train.mesh.seq)
        print(f"{config.name}: {run.directory}", file=sys.stderr)
    outcome = fit(
        task,
        batches.train_batches(
            data.train,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            lengths=config.lengths,
            own=own,
        ),
        config.train,
        run,
        validation=eval_batches(config, data.validation, own) if len(data.validation) else None,
        mesh=mesh,
        show_progress=show_progress,
        on_event=lambda what, _: note() if what == "prepared" else None,
    )
    return outcome, pretraining


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
        "window": config.classifier.window,
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
