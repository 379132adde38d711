"""Trains a language model of one mixer on the bytes of a text.

    seqmodels lm train --data book.txt --mixer mamba2 --preset cpu
    seqmodels lm train --data book.txt --mixer gla --carry-state --ema-decay 0.999
    seqmodels lm train --data book.txt --mixer hydra --objective mlm
    seqmodels lm train --resume --run-dir runs/lm/mamba2-cpu-seed0

--data is a file, or a folder whose *.txt files are one document each; the last tenth of the bytes
is for validation. Rows are shuffled windows of the text; with --carry-state they are contiguous
streams, and each batch begins in the states that the one before ended in. With --data.decompose
grow_p2 (or grow_linear, uniform, shrink_p2) they are pieces of single documents of --data.shortest
to --data.length tokens, a step's all of one length, shorter ones earlier (Dataset Decomposition).

Presets: "tiny" is for trying things out, "cpu" has about half a million parameters and is for two
processor cores, "small" about a hundred million, for an accelerator. Any field of the config can be
changed; --help-fields lists them. For example

    --train.learning-rate 0.001 --data.length 1024 --model.backbone.width 256

The run directory holds config, metrics (metrics.jsonl, TensorBoard) and checkpoints; the result
goes to --results-dir as <mixer>-<preset>-seed<k>.json.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments import terminal
from experiments.allocator import keep_freed_memory
from experiments.command_line import as_options, changed, run_command
from experiments.errors import UsageError
from experiments.lm.presets import ExperimentConfig, Objective, experiment
from experiments.lm.run import TextData, bits_per_byte, load_data, make_task
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
    unescaped,
    validation,
    write_result,
)
from seqmodels.config import from_dict, to_dict
from seqmodels.data import decomposition, text
from seqmodels.parallel.mesh import rows_of_process
from seqmodels.ranges import Between, Checked, Positive, Seed, Size
from seqmodels.training import processes
from seqmodels.training.loop import OnEvent, Outcome, fit
from seqmodels.training.processes import Distributed
from seqmodels.training.run_directory import Run, open_run, read_config

PROG = "experiments.lm.train"


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    data: Path | None = None
    """A text file, or a folder with *.txt files; needed unless --resume."""
    mixer: str | None = None
    """Name of a causal mixer of seqmodels.mixers; needed unless --resume."""
    preset: str | None = None
    """tiny, cpu or small; default cpu."""
    seed: Seed | None = None
    """Seed of parameters, dropout and data order; default 0."""
    separator: str | None = None
    """What stands between the documents of a file, e.g. "<|endoftext|>"; default: one document.
    \\n, \\t, \\r and \\\\ are understood, as in --stop of `seqmodels lm generate`."""
    objective: Objective | None = None
    """next, the next byte; mlm, bytes that are hidden (masked language model); or prefix, the next
    byte behind a half of the row that jrt reads whole; default next."""
    carry_state: bool = False
    """Carry the states from batch to batch: truncated backpropagation through time."""
    ema_decay: Between | None = None
    """Decay of an average of the parameters that evaluation and generation use, e.g. 0.999."""
    run_dir: Path | None = None
    """Where the run goes; default runs/lm/<mixer>-<preset>-seed<k>."""
    results_dir: Path = Path("runs/results/lm")
    """Where the result goes."""
    steps: Size | None = None
    """Number of steps, instead of the preset's; the schedule follows."""
    max_minutes: Positive | None = None
    """Stop after this much training time, with a checkpoint, and evaluate what there is."""
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
    """Draw a progress bar."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def options_of(arguments: Arguments) -> list[str]:
    """The fields of the config that the command line changes, as options of ``changed``."""
    given = {
        "data.separator": None if arguments.separator is None else unescaped(arguments.separator),
        "carry_state": arguments.carry_state or None,
        "train.ema_decay": arguments.ema_decay,
        "train.steps": arguments.steps,
        "train.max_minutes": arguments.max_minutes,
    }
    given |= {f"train.mesh.{axis}": n for axis, n in mesh_sizes(arguments.mesh).items()}
    options = [f"--{path}={value}" for path, value in given.items() if value is not None]
    return [*options, *["--help"] * arguments.help_fields]


def resolve(arguments: Arguments, fields: Sequence[str] = ()) -> tuple[ExperimentConfig, Path]:
    """The experiment and its run directory.

    Args:
      arguments: the command line.
      fields: the rest of it, options that change fields of the config.

    Raises:
      UsageError: a name is missing or unknown or not the run's, a field or its value does not fit,
        or the run to resume is not one.
    """
    options = [*as_options(arguments.set), *fields, *options_of(arguments)]
    if arguments.resume:
        if arguments.run_dir is None:
            raise UsageError("--resume needs the --run-dir of the run to continue")
        run_dir = arguments.run_dir
        config = from_dict(ExperimentConfig, read_config(run_dir), where="config")
        saved = {"mixer": config.mixer, "preset": config.preset, "seed": config.train.seed}
        saved |= {"objective": config.objective}
        require_names(arguments, saved, run_dir)
        return changed(config, options, prog=PROG), run_dir
    if arguments.mixer is None or arguments.data is None:
        raise UsageError(
            "a new run needs --data and --mixer, e.g. --data book.txt --mixer mamba2; "
            "a run to --resume needs its --run-dir. See --help"
        )
    preset = "cpu" if arguments.preset is None else arguments.preset
    objective = arguments.objective or "next"
    config = experiment(arguments.mixer, preset, arguments.seed or 0, objective)
    config = changed(config, options, prog=PROG)
    return config, arguments.run_dir or Path("runs/lm") / config.name


def train(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Trains, evaluates and writes the result; arguments as ``resolve``.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    arguments.distributed.start()
    with processes.together():
        config, run_dir = resolve(arguments, fields)
        run = open_run(run_dir, to_dict(config), resume=arguments.resume)
        path = result_path(arguments.results_dir, config.name, config)
        data, locations = _data(arguments, config, run_dir)
    require_same_data(locations)
    if processes.is_first():
        say_padding([config.data.length], config.train.mesh.seq)
        print(f"{config.name}: {run_dir}", file=sys.stderr)
    result = train_and_evaluate(
        config, data, run, locations=locations, show_progress=arguments.progress
    )
    with processes.together():
        if processes.is_first():
            _tell(result, config, run_dir, path)


def _tell(result: Mapping[str, Any], config: ExperimentConfig, run_dir: Path, path: Path) -> None:
    """Prints the result and writes it."""
    if not result["complete"]:
        limit = config.train.max_minutes
        terminal.say(f"stopped after {result['steps']} steps: max_minutes={limit}")
    if result["bits_per_byte"] is not None:
        terminal.say(
            f"validation: {result['bits_per_byte']:.4f} bits per byte, at step "
            f"{result['test_step']} of {result['steps']}"
        )
    elif result["validation_loss"] is not None:
        terminal.say(
            f"validation: {result['validation_accuracy']:.4f} of the predicted bytes correct, loss "
            f"{result['validation_loss']:.4f}, at step {result['test_step']} of {result['steps']}"
        )
    write_result(result, run_dir, path)
    terminal.say(f"result: {path}")


def train_and_evaluate(
    config: ExperimentConfig,
    data: TextData,
    run: Run,
    *,
    locations: Locations,
    show_progress: bool = True,
    on_event: OnEvent = lambda what, step: None,
) -> dict[str, Any]:
    """Trains in the run's directory; returns the result, with the validation of the chosen step.

    Of several processes, the first one; the others return an empty result.
    """
    keep_freed_memory()
    mesh = config.train.mesh.make()
    own = rows_of_process(mesh, config.train.batch_size)

    def event(what: str, step: int) -> None:
        if what == "prepared" and processes.is_first():
            locations.write(run.directory)
        on_event(what, step)

    outcome = fit(
        make_task(config, packed=data.packed),
        train_batches(config, data, own),
        config.train,
        run,
        validation=text.eval_batches(data.validation, own=own, **batch_options(config)),
        mesh=mesh,
        show_progress=show_progress,
        on_event=event,
    )
    return make_result(config, run, data, outcome) if processes.is_first() else {}


def batch_options(config: ExperimentConfig) -> dict[str, Any]:
    """What training and validation batches have in common."""
    return {
        "length": config.data.length,
        "batch_size": config.train.batch_size,
        "streams": config.carry_state,
    }


def train_batches(config: ExperimentConfig, data: TextData, own: np.ndarray) -> Any:
    """Endless batches, of this process's rows: windows, streams, or pieces of documents.

    Raises:
      ValueError: pieces of documents for several processes.
    """
    seed, cut = config.train.seed, config.data
    if cut.decompose is None:
        return text.train_batches(data.train, seed=seed, own=own, **batch_options(config))
    if len(own) < config.train.batch_size:
        raise ValueError(
            f"data.decompose={cut.decompose!r} needs a single process, whose batches differ in "
            "their number of rows; leave it out, or start one process"
        )
    return decomposition.train_batches(
        data.train,
        shortest=cut.shortest,
        longest=cut.length,
        batch_size=config.train.batch_size,
        curriculum=cut.decompose,
        seed=seed,
    )


def make_result(
    config: ExperimentConfig, run: Run, data: TextData, outcome: Outcome
) -> dict[str, Any]:
    """What is published of a run: no path of the machine it ran on."""
    progress, how = outcome.progress, history(run.directory)
    best = validation(how["curve"], outcome.chosen_step)  # none if time ended the run before one
    bits = None  # of all bytes: other objectives predict some
    if best and config.objective == "next":
        bits = bits_per_byte(best["loss"], data.validation)
    return {
        "mixer": config.mixer,
        "preset": config.preset,
        "seed": config.train.seed,
        "objective": config.objective,
        "carry_state": config.carry_state,
        "bits_per_byte": bits,
        "validation_loss": best.get("loss"),
        "validation_accuracy": best.get("accuracy"),
        "validation_bytes": data.validation.bytes,
        "test_step": outcome.chosen_step,
        "selection": selection(config.train, outcome),
        "steps": progress.step,
        "complete": outcome.complete,
        "tokens": progress.tokens,
        "skipped": progress.skipped,
        "parameters": outcome.parameters,
        "wall_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "config": run.config_dict,
        "data": {"sha256_of_tokens": data.digest, "train_bytes": data.train.bytes},
        **how,
    }


def _data(
    arguments: Arguments, config: ExperimentConfig, run_dir: Path
) -> tuple[TextData, Locations]:
    """The data and where they are; a resumed run insists on the data it began with."""
    saved, path = None, absolute(arguments.data)
    if arguments.resume and (run_dir / "data.json").exists():
        saved = Locations.read(run_dir)
        path = path or saved.data_dir
    if path is None:
        raise UsageError(f"the run in {run_dir} does not say where its text is; give --data")
    data = load_data(config.data, path)
    if saved is not None and saved.digest != data.digest:
        raise ValueError(
            f"data={path!r} is not the text that the run in {run_dir} began with; give that as "
            "--data, or start in another --run-dir"
        )
    return data, Locations("", path, data.digest)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, train, arguments, description=__doc__, prog=PROG, config_fields=True
    )


if __name__ == "__main__":
    sys.exit(main())
