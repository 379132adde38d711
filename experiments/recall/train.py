"""Trains one mixer on one synthetic task and tests it at 1 to 16 times the trained length.

    seqmodels recall train --task mqar --mixer gla --preset cpu
    seqmodels recall train --task a5 --mixer deltanet-negative --size 16
    seqmodels recall train --resume --run-dir runs/recall/mqar-gla-16-cpu-seed0

Tasks: mqar, selective-copy, plain-copy, induction, copy (-duplicate, -prefix, -suffix), passkey,
parity, s3, a5 (-2steps: two tokens an element), s5 (-swaps: products of swaps alone), regbench,
disjointness (-long-first), and RULER's niah-single, niah-multikey, niah-multikey-2,
niah-multivalue, niah-multiquery, variable-tracking, common-words, frequent-words.
Examples are made on the fly and follow from the seed. Mixers: those of seqmodels.mixers that are
causal, and deltanet-negative, gated_deltanet-negative, kda-negative, whose states may change sign.

Accuracy is that of the counted positions; which these are, the docstring of each task in
seqmodels/data/recall says. --size is about how many numbers of state a layer has for each channel.

Presets: "tiny" is for trying things out, "cpu" takes one core one to three minutes, "paper" has
about the published sizes. Any field of the config can be changed; --help-fields lists them. For
example

    --data.pairs 8 --train.learning-rate 0.001 --model.backbone.width 128 --repeats 2

The run directory holds config, metrics (metrics.jsonl, TensorBoard) and checkpoints; the result
goes to --results-dir as <task>-<mixer>-<size>-<preset>-seed<k>.json.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import terminal
from experiments.allocator import keep_freed_memory
from experiments.command_line import as_options, changed, run_command
from experiments.errors import UsageError
from experiments.lm.presets import state_bytes
from experiments.recall.experiment import ExperimentConfig
from experiments.recall.presets import experiment
from experiments.recall.run import make_task, predictor, score_at, variables_at
from experiments.run import history, require_names, result_path, validation, write_result
from seqmodels.config import from_dict, to_dict
from seqmodels.data import recall
from seqmodels.ranges import Checked, Positive, Seed, Size
from seqmodels.training.loop import OnEvent, Outcome, fit
from seqmodels.training.run_directory import Run, open_run, read_config

PROG = "experiments.recall.train"
RUNS = Path("runs/recall")


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    task: str | None = None
    """Name of a task, see above; needed unless --resume."""
    mixer: str | None = None
    """Name of a causal mixer or of a variant, see above; needed unless --resume."""
    size: Size | None = None
    """Size of the mixer's state; default the preset's."""
    preset: str | None = None
    """tiny, cpu or paper; default cpu."""
    seed: Seed | None = None
    """Seed of parameters, dropout and examples; default 0."""
    run_dir: Path | None = None
    """Where the run goes; default runs/recall/<task>-<mixer>-<size>-<preset>-seed<k>."""
    results_dir: Path = Path("runs/results/recall")
    """Where the result goes; those in experiments/results are committed."""
    steps: Size | None = None
    """Number of steps, instead of the preset's; the schedule follows."""
    max_minutes: Positive | None = None
    """Stop after this much training time, with a checkpoint, and test what there is."""
    resume: bool = False
    """Continue the run in --run-dir; everything else comes from there."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """The same as --train.learning-rate 0.002, as train.learning_rate=0.002; may be repeated."""
    help_fields: bool = False
    """Show the options that change the fields of this config, with their values, and exit."""
    progress: bool = True
    """Draw a progress bar."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def resolve(arguments: Arguments, fields: Sequence[str] = ()) -> tuple[ExperimentConfig, Path]:
    """The experiment and its run directory; ``fields`` are options that change the config.

    Raises:
      UsageError: a name is missing or unknown or not the run's, a field or its value does not fit,
        or the run to resume is not one.
    """
    given = {"train.steps": arguments.steps, "train.max_minutes": arguments.max_minutes}
    options = [*as_options(arguments.set), *fields]
    options += [f"--{path}={value}" for path, value in given.items() if value is not None]
    options += ["--help"] * arguments.help_fields
    if arguments.resume:
        if arguments.run_dir is None:
            raise UsageError("--resume needs the --run-dir of the run to continue")
        config = from_dict(ExperimentConfig, read_config(arguments.run_dir), where="config")
        saved = {name: getattr(config, name) for name in ("task", "mixer", "size", "preset")}
        require_names(arguments, saved | {"seed": config.train.seed}, arguments.run_dir)
        return changed(config, options, prog=PROG), arguments.run_dir
    if arguments.task is None or arguments.mixer is None:
        raise UsageError(
            "a new run needs --task and --mixer, e.g. --task mqar --mixer gla; "
            "a run to --resume needs its --run-dir. See --help"
        )
    preset = "cpu" if arguments.preset is None else arguments.preset
    config = experiment(
        arguments.task, arguments.mixer, preset, arguments.size, arguments.seed or 0
    )
    config = changed(config, options, prog=PROG)
    return config, arguments.run_dir or RUNS / config.name


def train(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Trains, tests and writes the result; arguments as ``resolve``.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    config, run_dir = resolve(arguments, fields)
    path = result_path(arguments.results_dir, config.name, config)
    run = open_run(run_dir, to_dict(config), resume=arguments.resume)
    print(f"{config.name}: {run_dir}", file=sys.stderr)
    result = train_and_test(config, run, show_progress=arguments.progress)
    say(result)
    write_result(result, run_dir, path)
    terminal.say(f"result: {path}")


def say(result: dict[str, Any]) -> None:
    """Prints what came out, in a line or two."""
    if not result["complete"]:
        limit = result["config"]["train"]["max_minutes"]
        terminal.say(f"stopped after {result['steps']} steps: max_minutes={limit}")
    accuracies = ", ".join(
        f"{test['accuracy']:.3f} at {multiple} x" for multiple, test in result["tests"].items()
    )
    terminal.say(
        f"{result['task']}, {result['mixer']}: accuracy {accuracies} the length; chance "
        f"{result['chance']:.3f}; {result['state_bytes']:,} bytes of state"
    )


def train_and_test(
    config: ExperimentConfig,
    run: Run,
    *,
    show_progress: bool = True,
    on_event: OnEvent = lambda what, step: None,
) -> dict[str, Any]:
    """Trains in the run's directory and returns the result, with the tests at all lengths."""
    keep_freed_memory()
    seed, rows = config.train.seed, config.train.batch_size
    outcome = fit(
        make_task(config),
        recall.train_batches(config.data, seed=seed, batch_size=rows, repeats=config.repeats),
        config.train,
        run,
        validation=[
            {name: value for name, value in batch.items() if name != "allowed"}
            for batch in recall.eval_batches(
                config.data,
                seed=seed,
                examples=config.eval_examples,
                batch_size=rows,
                repeats=config.repeats,
            )
        ],
        show_progress=show_progress,
        on_event=on_event,
    )
    step = outcome.chosen_step
    variables = variables_at(config, run.config_dict, run.directory, step)
    predict = predictor(config.model)
    tests = {
        str(multiple): dataclasses.asdict(
            score_at(config, predict, variables, multiple, data, config.repeats)
        )
        for multiple, data in config.tests().items()
    }
    return make_result(config, run, outcome, tests)


def make_result(
    config: ExperimentConfig, run: Run, outcome: Outcome, tests: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is published of a run: no path of the machine it ran on."""
    progress, how = outcome.progress, history(run.directory)
    return {
        "task": config.task,
        "mixer": config.mixer,
        "size": config.size,
        "preset": config.preset,
        "repeats": config.repeats,
        "seed": config.train.seed,
        "tests": tests,
        "chance": config.data.chance,
        "trained_tokens": tests["1"]["tokens"],
        "state_bytes": state_bytes(config.model, tests["1"]["tokens"]),
        "validation_loss": validation(how["curve"], outcome.chosen_step).get("loss"),
        "test_step": outcome.chosen_step,
        "steps": progress.step,
        "complete": outcome.complete,
        "tokens": progress.tokens,
        "skipped": progress.skipped,
        "parameters": outcome.parameters,
        "wall_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "config": run.config_dict,
        **how,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, train, arguments, description=__doc__, prog=PROG, config_fields=True
    )


if __name__ == "__main__":
    sys.exit(main())
