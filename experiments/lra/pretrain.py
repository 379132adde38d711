"""Self-pretraining: a model denoises the task's own inputs before it sees a label.

Amos, Berant & Gupta, "Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires
Data-Driven Priors", ICLR 2024: it masks half of the pixels, 15 % of bytes and 10 % of ListOps.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments.lra.experiment import INTERFACES, ExperimentConfig, PretrainConfig
from experiments.lra.run import eval_batches
from experiments.run import history, restore
from seqmodels.config import to_dict
from seqmodels.data import batches
from seqmodels.data.examples import Examples, TaskData
from seqmodels.models import param_labels
from seqmodels.models.denoiser import Denoiser, Denoising
from seqmodels.training.config import TrainConfig
from seqmodels.training.denoising import denoising
from seqmodels.training.loop import fit
from seqmodels.training.run_directory import Run
from seqmodels.training.task import Task, Variables

_SHARES = {"listops": 0.1, "text": 0.15, "retrieval": 0.15}
"""Masked tokens; half where inputs are real."""


def with_pretraining(config: ExperimentConfig, kind: Denoising | None) -> ExperimentConfig:
    """The experiment of as many steps, half of them without labels; None leaves it as it is."""
    if kind is None:
        return config
    share = _SHARES.get(config.task, 0.5)
    pretrain = PretrainConfig(kind, steps=1, share=share)
    return split(dataclasses.replace(config, pretrain=pretrain), config.train.steps)


def split(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """The experiment with so many steps; half of them without labels where it has such.

    The warm-up keeps its share of the steps.
    """
    train, pretrain = config.train, config.pretrain
    if pretrain is not None:
        pretrain = dataclasses.replace(pretrain, steps=max(steps // 2, 1))
        steps = max(steps - pretrain.steps, 1)
    warmup = round(steps * train.warmup_steps / train.steps)
    train = dataclasses.replace(train, steps=steps, warmup_steps=warmup)
    return dataclasses.replace(config, train=train, pretrain=pretrain)


def schedule_of(config: ExperimentConfig) -> TrainConfig:
    """How it is pretrained: as it is trained, for other numbers of steps and minutes."""
    assert config.pretrain is not None
    train, steps = config.train, config.pretrain.steps
    minutes = train.max_minutes
    return dataclasses.replace(
        train,
        steps=steps,
        warmup_steps=round(steps * train.warmup_steps / train.steps),
        eval_every=steps,
        select="last",
        max_minutes=None if minutes is None else minutes * steps / (steps + train.steps),
    )


def denoising_task(config: ExperimentConfig) -> Task:
    """The config's model, for denoising."""
    assert config.pretrain is not None
    return denoising(
        Denoiser(config.classifier),
        lambda params: param_labels(config.classifier, params),
        kind=config.pretrain.kind,
        share=config.pretrain.share,
        length=config.lengths[0],
        channels=INTERFACES[config.task].channels,
    )


def without_labels(examples: Examples) -> Examples:
    """The examples, all of one class."""
    return dataclasses.replace(examples, labels=np.zeros_like(examples.labels))


def pretrain(
    config: ExperimentConfig, run: Run, data: TaskData, *, show_progress: bool
) -> tuple[Variables, dict[str, Any]]:
    """Pretrains in the folder "pretrain" of the run's directory, or goes on there.

    Returns:
      what was learned, and what a result says of it; its seconds count as training's.

    Raises:
      as ``fit``.
    """
    assert config.pretrain is not None
    train, task = schedule_of(config), denoising_task(config)
    directory = run.directory / "pretrain"
    config_dict = {**run.config_dict, "train": to_dict(train)}
    begun = (directory / "config.json").exists()
    own = Run(directory, config_dict, resume=begun)
    held_out = without_labels(data.validation)
    outcome = fit(
        task,
        batches.train_batches(
            without_labels(data.train),
            batch_size=train.batch_size,
            seed=train.seed,
            lengths=config.lengths,
        ),
        train,
        own,
        validation=eval_batches(config, held_out) if len(held_out) else None,
        show_progress=show_progress,
    )
    progress = outcome.progress
    state = restore(task, train, config_dict, directory / "checkpoints", progress.step)
    return jax.device_get(state.averaged), {
        **dataclasses.asdict(config.pretrain),
        "steps": progress.step,
        "complete": outcome.complete,
        "tokens": progress.tokens,
        "wall_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "curve": history(directory)["curve"],
    }
