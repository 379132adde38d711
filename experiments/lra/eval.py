"""Evaluates a checkpoint on the test split; needs nothing but the run directory.

    seqmodels lra eval --checkpoint runs/lra/listops-s5-cpu-seed0
    seqmodels lra eval --checkpoint runs/lra/listops-s5-cpu-seed0/checkpoints/5000
    seqmodels lra eval --checkpoint runs/lra/listops-s5-cpu-seed0 --window 61

Without a step it takes the one the run was tested at (else the latest), and says whether the
accuracy is the recorded one. With --window the model sees pieces of so many tokens, which it was
not trained for; `seqmodels lra train --window` trains one that was.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from experiments import terminal
from experiments.command_line import run_command
from experiments.lra.experiment import ExperimentConfig
from experiments.lra.run import data_digest, evaluate_checkpoint, load_data
from experiments.run import (
    Locations,
    absolute,
    chosen_step,
    locate,
    mesh_of,
    recorded,
    say_padding,
)
from seqmodels.config import from_dict
from seqmodels.ranges import Checked, Size
from seqmodels.training.run_directory import read_config


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    checkpoint: Path
    """A run directory, its checkpoints/ or one step in there."""
    data_dir: Path | None = None
    """Where the raw data are now, if they have moved."""
    cache_dir: Path | None = None
    """Where the prepared data are now, if they have moved."""
    window: Size | None = None
    """Let the model see windows of so many tokens only."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,model=2,seq=4: rows of a batch are split over data, heads and
    channels over model, the length of each row over seq; default: one device."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def evaluate_run(arguments: Arguments) -> dict[str, Any]:
    """Tests a checkpoint.

    Returns:
      ``step``, ``accuracy``, ``loss``, ``examples`` and, where the run recorded a test of this
      step, ``recorded_accuracy``.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    run_dir, step = locate(arguments.checkpoint)
    config_dict = read_config(run_dir)
    config = from_dict(ExperimentConfig, config_dict, where="config")
    locations = Locations.read(run_dir)
    if step is None:
        step = chosen_step(run_dir, config_dict)
    data = load_data(
        config,
        cache_dir=absolute(arguments.cache_dir) or locations.cache_dir,
        data_dir=absolute(arguments.data_dir) or locations.data_dir,
        progress=arguments.progress,
    )
    if data_digest(data) != locations.digest:
        raise ValueError(f"the data are not those that the run in {run_dir} was trained on")
    if arguments.window is not None:
        classifier = dataclasses.replace(config.classifier, window=arguments.window)
        config = dataclasses.replace(config, classifier=classifier)
    mesh = mesh_of(arguments.mesh)
    say_padding(config.lengths, mesh.shape["seq"])
    checkpoints = run_dir / "checkpoints"
    test = evaluate_checkpoint(config, config_dict, checkpoints, step, data.test, mesh)
    result: dict[str, Any] = {"step": step, **dataclasses.asdict(test)}
    earlier = recorded(run_dir)
    if earlier.get("test_step") == step and arguments.window is None:
        result["recorded_accuracy"] = earlier.get("test_accuracy")
    return result


def report(arguments: Arguments) -> None:
    """Prints the test; ValueError if it differs from what was recorded."""
    result = evaluate_run(arguments)
    terminal.say(
        f"step {result['step']}: test accuracy {result['accuracy']:.6f}, loss "
        f"{result['loss']:.6f}, {result['examples']:.0f} examples"
    )
    accuracy = result.get("recorded_accuracy")
    if accuracy is None:
        return
    if accuracy != result["accuracy"]:
        raise ValueError(
            f"the run recorded test accuracy {accuracy}, now it is {result['accuracy']}: another "
            "device, or other versions than in environment.json?"
        )
    print("equal to the recorded accuracy")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, report, arguments, description=__doc__, prog="experiments.lra.eval"
    )


if __name__ == "__main__":
    sys.exit(main())
