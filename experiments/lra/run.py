"""What training and evaluation share: data, the model of a config, the test accuracy."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.lra.experiment import INTERFACES, ExperimentConfig
from experiments.run import restore
from seqmodels.data import batches
from seqmodels.data.examples import Examples, TaskData
from seqmodels.data.lra import load
from seqmodels.models import Classifier, Matcher, MatcherConfig, param_axes, param_labels
from seqmodels.parallel.mesh import make_mesh, rows_of_process
from seqmodels.training.evaluation import Evaluation, evaluate
from seqmodels.training.state import variable_shardings
from seqmodels.training.step import make_eval_step
from seqmodels.training.task import Task, classification


def data_digest(data: TaskData) -> str:
    """Equal for equal examples in equal order."""
    digest = hashlib.sha256()
    for examples in data.splits.values():
        for array in (examples.tokens, examples.offsets, examples.labels):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def load_data(
    config: ExperimentConfig, *, cache_dir: str, data_dir: str | None, progress: bool = True
) -> TaskData:
    """The config's data.

    Raises:
      ValueError: the data are not there, or have longer rows or more classes than the config says.
    """
    data = load(config.data, cache_dir=cache_dir, data_dir=data_dir, progress=progress)
    if data.num_classes > config.classifier.num_classes:
        raise ValueError(
            f"the data have {data.num_classes} classes, more than "
            f"classifier.num_classes={config.classifier.num_classes}: raise that"
        )
    for split, examples in data.splits.items():
        if len(examples) and examples.lengths.max() > config.lengths[-1]:
            raise ValueError(
                f"the {split} split has rows of up to {examples.lengths.max()} tokens, which "
                f"lengths={config.lengths} would cut; end with that or more"
            )
    return data


def make_task(config: ExperimentConfig) -> Task:
    """The config's model, for training."""
    interface = INTERFACES[config.task]
    shape: dict[str, Any] = {"length": config.lengths[0], "channels": interface.channels}
    if config.interaction is not None:
        matcher = MatcherConfig(config.classifier, interaction=config.interaction)
        return _task(Matcher(matcher), parts=2, **shape)
    return _task(Classifier(config.classifier), **shape)


def _task(model: Classifier | Matcher, **shape: Any) -> Task:
    labels, axes = (functools.partial(f, model.config) for f in (param_labels, param_axes))
    return classification(model, labels, param_axes=axes, **shape)


def eval_batches(
    config: ExperimentConfig, examples: Examples, own: np.ndarray | None = None
) -> Any:
    """Batches that hold each example once; of their rows ``own``, where processes share them."""
    return batches.eval_batches(
        examples, batch_size=config.train.batch_size, lengths=config.lengths, own=own
    )


def evaluate_checkpoint(
    config: ExperimentConfig,
    config_dict: Mapping[str, Any],
    path: Path,
    step: int,
    examples: Examples,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Accuracy and loss of one checkpoint.

    Args:
      config: the experiment.
      config_dict: the same as JSON, as the run directory has it.
      path: the directory of the checkpoints.
      step: which of them.
      examples: the split.
      mesh: default: of the first device. With several processes, theirs, and each calls this.

    Raises:
      CheckpointError: it cannot be read.
    """
    task = make_task(config)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    several = jax.process_count() > 1
    state = restore(task, config.train, config_dict, path, step, mesh if several else None)
    variables = jax.device_put(state.averaged, variable_shardings(task, mesh))
    own = rows_of_process(mesh, config.train.batch_size) if several else None
    rows = eval_batches(config, examples, own)
    return evaluate(make_eval_step(task, mesh), variables, rows, mesh)
