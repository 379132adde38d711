"""What training and evaluation share: errors, data, the model of a config, the test accuracy."""

import dataclasses
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from seqmodels.data import batches
from seqmodels.data.examples import Examples, TaskData
from seqmodels.data.lra import load
from seqmodels.models import Classifier, marks
from seqmodels.parallel.mesh import make_mesh
from seqmodels.training.checkpoint import Checkpoints
from seqmodels.training.errors import RunDirectoryError, TrainingError
from seqmodels.training.evaluation import Evaluation, evaluate
from seqmodels.training.metrics import write_atomically
from seqmodels.training.state import abstract_state
from seqmodels.training.step import make_eval_step
from seqmodels.training.task import Task, classification

if TYPE_CHECKING:
    from experiments.lra.presets import ExperimentConfig


class UsageError(ValueError):
    """The command line asks for something that does not exist."""

    exit_code = 2


def main_guard(main: Callable[[], None], *, show_traceback: bool) -> int:
    """Runs ``main``; errors the user can act on become one line on stderr.

    Args:
      main: the program.
      show_traceback: print the whole traceback as well.

    Returns:
      The exit code: 0, or the error's.
    """
    try:
        main()
    except (ValueError, OSError, TrainingError, NotImplementedError) as error:
        if show_traceback:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


@dataclasses.dataclass(frozen=True)
class Locations:
    """Where a run's data are, and what they were; in the run directory as data.json.

    Attributes:
      cache_dir: see ``seqmodels.data.lra.load``.
      data_dir: the same.
      digest: of all splits, to notice other data.
    """

    cache_dir: str
    data_dir: str | None
    digest: str

    def write(self, run_dir: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_atomically(run_dir / "data.json", text)

    @classmethod
    def read(cls, run_dir: Path) -> "Locations":
        """Raises RunDirectoryError if there is none."""
        try:
            return cls(**json.loads((run_dir / "data.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunDirectoryError(f"cannot read {run_dir / 'data.json'}: {error}") from error


def absolute(path: Path | str | None) -> str | None:
    """The path from the root, with ~ resolved; None stays None."""
    return None if path is None else os.path.abspath(Path(path).expanduser())


def data_digest(data: TaskData) -> str:
    """Equal for equal examples in equal order."""
    digest = hashlib.sha256()
    for examples in data.splits.values():
        for array in (examples.tokens, examples.offsets, examples.labels):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def load_data(
    config: "ExperimentConfig", *, cache_dir: str, data_dir: str | None, progress: bool = True
) -> TaskData:
    """The config's data.

    Raises:
      ValueError: the data are not there, or the config's model does not fit them.
    """
    data = load(config.data, cache_dir=cache_dir, data_dir=data_dir, progress=progress)
    for name in ("vocabulary_size", "num_classes"):
        model, needed = getattr(config.classifier, name), getattr(data, name)
        if model is None or model < needed:
            raise ValueError(f"classifier.{name}={model} is too small for the data's {needed}")
    return data


def make_task(config: "ExperimentConfig") -> Task:
    """The config's model, for training."""
    return classification(
        Classifier(config.classifier),
        lambda params: marks(config.classifier, params),
        length=config.lengths[0],
    )


def eval_batches(config: "ExperimentConfig", examples: Examples) -> Any:
    """Batches that hold each example once."""
    return batches.eval_batches(
        examples, batch_size=config.train.batch_size, lengths=config.lengths
    )


def evaluate_checkpoint(
    config: "ExperimentConfig", identity: dict[str, Any], path: Path, step: int, examples: Examples
) -> Evaluation:
    """Accuracy and loss of one checkpoint.

    Args:
      config: the experiment.
      identity: the same as JSON, as the run directory has it.
      path: the directory of the checkpoints.
      step: which of them.
      examples: the split.

    Raises:
      CheckpointError: it cannot be read.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    task = make_task(config)
    template = abstract_state(task, config.train, mesh)
    with Checkpoints(path, identity, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(template, step)
    return evaluate(
        make_eval_step(task, mesh), state.averaged, eval_batches(config, examples), mesh
    )
