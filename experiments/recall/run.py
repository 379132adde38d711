"""What the commands share: the task of a config, a trained model, accuracy at a length."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.recall.experiment import ExperimentConfig
from experiments.recall.mixers import BOTH_SIDES
from experiments.run import chosen_step, locate, restore
from pallas_kernels.common import dispatch
from seqmodels.config import from_dict
from seqmodels.data import recall
from seqmodels.data.recall import TaskConfig
from seqmodels.models import LanguageModel, LanguageModelConfig, param_labels
from seqmodels.training.language import language
from seqmodels.training.masked import prefix_language
from seqmodels.training.run_directory import read_config
from seqmodels.training.task import Batch, Task, Variables

Predict = Callable[[Variables, Any], Array]
FEWEST = 32
"""Rows of a test, however long they are."""


def make_task(config: ExperimentConfig) -> Task:
    """The config's model, for training; rows are one document each."""
    model = LanguageModel(config.model)

    def labels(params: Any) -> Any:
        return param_labels(config.model, params)

    if config.mixer == "jrt":
        # Questions alone are trained, as for everyone: nothing of the context is masked.
        last = config.model.vocabulary_size - 1
        return prefix_language(model, labels, mask_token=last, share=0.0, packed=False)
    return language(model, labels, packed=False, causal=config.mixer not in BOTH_SIDES)


def predictor(config: LanguageModelConfig) -> Predict:
    """``predict(variables, inputs (B, L)) -> (B, L)``, the likeliest tokens; compiled."""
    model = LanguageModel(config)

    @jax.jit
    def predict(variables: Variables, inputs: Array) -> Array:
        hidden, _ = model.apply(variables, inputs, method="hidden")

        def likeliest(row: Array) -> Array:
            logits: Any = model.apply(variables, row, method="logits")
            return jnp.argmax(logits, axis=-1)

        return jax.lax.map(likeliest, hidden)  # the logits of one row exist at a time

    def run(variables: Variables, inputs: Array) -> Array:
        with dispatch.where(variables):
            return predict(variables, inputs)

    return run


@dataclasses.dataclass(frozen=True)
class Score:
    """How a model did on the rows of a test.

    Attributes:
      accuracy: share of the counted positions that are right.
      rows_right: share of the rows all of whose counted positions are.
      counted: number of counted positions.
      tokens: length of the rows.
    """

    accuracy: float
    rows_right: float
    counted: int
    tokens: int


def score(predict: Predict, variables: Variables, batches: Iterable[Batch]) -> Score:
    """The score over batches of ``recall.eval_batches``."""
    right = counted = rows = whole = tokens = 0
    for batch in batches:
        answers = np.asarray(predict(variables, batch["inputs"]))
        mask = batch["weights"] > 0
        if "allowed" in batch:
            good = np.take_along_axis(batch["allowed"], answers[..., None], axis=-1)[..., 0]
        else:
            good = answers == batch["targets"]
        right += int(np.sum(good & mask))
        counted += int(np.sum(mask))
        whole += int(np.sum(np.all(good | ~mask, axis=1)))
        rows += len(mask)
        tokens = mask.shape[1]
    return Score(right / max(counted, 1), whole / max(rows, 1), counted, tokens)


def score_at(
    config: ExperimentConfig,
    predict: Predict,
    variables: Variables,
    multiple: int,
    data: TaskConfig,
    repeats: int,
) -> Score:
    """The score on the test split of the task at a multiple of the trained length.

    Longer tests have fewer rows, and smaller batches; never fewer than ``FEWEST`` rows.
    """
    batches = recall.eval_batches(
        data,
        seed=config.train.seed,
        examples=max(config.eval_examples // multiple, min(FEWEST, config.eval_examples)),
        batch_size=max(config.train.batch_size // multiple, 1),
        split="test",
        repeats=repeats,
    )
    return score(predict, variables, batches)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model from a run directory."""

    config: ExperimentConfig
    step: int
    variables: Variables


def load_trained(checkpoint: Path) -> Trained:
    """The model of a checkpoint: a run directory, its checkpoints/ or one step in there.

    Raises:
      UsageError: the path is not in a run directory.
      ValueError: the run is not one of experiments.recall.
      CheckpointError: the checkpoint cannot be read.
    """
    run_dir, step = locate(checkpoint)
    config_dict = read_config(run_dir)
    try:
        config = from_dict(ExperimentConfig, config_dict, where="config")
    except ValueError as error:
        raise ValueError(
            f"--checkpoint {checkpoint} is not a run of `seqmodels recall train`, or of another "
            f"version ({error}); give the directory of such a run"
        ) from error
    if step is None:
        step = chosen_step(run_dir, config_dict)
    return Trained(config, step, variables_at(config, config_dict, run_dir, step))


def variables_at(config: ExperimentConfig, config_dict: Any, run_dir: Path, step: int) -> Variables:
    """The model's variables at a step; raises as ``restore``."""
    checkpoints = run_dir / "checkpoints"
    return restore(make_task(config), config.train, config_dict, checkpoints, step).averaged
