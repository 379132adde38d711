"""The experiments by name: sizes of tasks, of models and of training.

"paper" has about the sizes that the tasks were published with, for an accelerator. "cpu" is what
one core does in one to three minutes; "tiny" is for a look at how everything works.
"""

import dataclasses
import typing
from typing import Any

from experiments.errors import check_name
from experiments.lm.presets import SSM_RATE, ModelSize
from experiments.recall.experiment import ExperimentConfig, Preset, context
from experiments.recall.mixers import mixer_config
from seqmodels.data.recall import TASKS, TaskConfig
from seqmodels.models import BackboneConfig, LanguageModelConfig
from seqmodels.training.config import TrainConfig

MULTIPLES = (1, 2, 4, 8, 16)

# What makes each task small: fields of its config.
TINY: dict[str, dict[str, Any]] = {
    "mqar": {"length": 16, "pairs": 2, "vocabulary": 16, "noise": "reserved"},
    "selective-copy": {"length": 12, "items": 4, "alphabet": 4},
    "plain-copy": {"length": 12, "items": 4, "alphabet": 4},
    "induction": {"length": 16, "alphabet": 4},
    "copy": {"longest": 6, "shortest": 3, "alphabet": 4},
    "copy-duplicate": {"longest": 8, "shortest": 4, "alphabet": 4, "gram": 2},
    "copy-prefix": {"longest": 6, "shortest": 4, "alphabet": 8, "gram": 2, "answer": 1},
    "copy-suffix": {"longest": 6, "shortest": 4, "alphabet": 8, "gram": 2, "answer": 1},
    "passkey": {"length": 24, "digits": 2, "phrase": 4},
    "parity": {"length": 8},
    "s3": {"length": 8},
    "a5": {"length": 8},
    "a5-2steps": {"length": 8},
    "s5": {"length": 8},
    "s5-swaps": {"length": 8},
    "regbench": {"length": 32, "letters": 6, "most": 4, "degree": 2, "longest": 8},
    "disjointness": {"first": 2, "second": 4, "vocabulary": 16},
    "disjointness-long-first": {"first": 4, "second": 2, "vocabulary": 16},
    "niah-single": {"length": 24, "digits": 2},
    "niah-multikey": {"length": 40, "digits": 2},
    "niah-multikey-2": {"length": 40, "digits": 2},
    "niah-multivalue": {"length": 48, "digits": 2},
    "niah-multiquery": {"length": 56, "digits": 2},
    "variable-tracking": {"length": 40, "hops": 2, "names": 8},
    "common-words": {"length": 24, "common": 2, "often": 4, "words": 128},
    "frequent-words": {"length": 80, "words": 32},
}
CPU: dict[str, dict[str, Any]] = {
    "mqar": {"length": 64, "pairs": 16, "vocabulary": 64, "noise": "reserved"},
    "selective-copy": {"length": 64, "items": 8, "alphabet": 8},
    "plain-copy": {"length": 64, "items": 8, "alphabet": 8},
    "induction": {"length": 64},
    "copy": {"longest": 24, "shortest": 4},
    "copy-duplicate": {"longest": 24, "shortest": 6},
    "copy-prefix": {"longest": 24, "shortest": 6},
    "copy-suffix": {"longest": 24, "shortest": 6},
    "passkey": {"length": 128, "digits": 3},
    "parity": {"length": 32},
    "s3": {"length": 24},
    "a5": {"length": 12},
    "a5-2steps": {"length": 12},
    "s5": {"length": 12},
    "s5-swaps": {"length": 16},
    "regbench": {"length": 128, "letters": 8, "most": 6, "longest": 16},
    "disjointness": {"first": 4, "second": 16, "vocabulary": 128},
    "disjointness-long-first": {"first": 16, "second": 4, "vocabulary": 128},
    "niah-single": {"length": 96, "digits": 3},
    "niah-multikey": {"length": 96, "digits": 3},
    "niah-multikey-2": {"length": 96, "digits": 3},
    "niah-multivalue": {"length": 96, "digits": 3},
    "niah-multiquery": {"length": 96, "digits": 3},
    "variable-tracking": {"length": 96, "names": 32},
    "common-words": {"length": 96, "common": 3, "often": 10, "words": 1024},
    "frequent-words": {"length": 128, "words": 64},
}

CPU_ROWS = {"s3": 64, "a5": 128, "a5-2steps": 64, "s5": 128, "s5-swaps": 64}
"""Rows in a step, where rows are short."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset is made of, whatever the mixer.

    Attributes:
      model: its sizes.
      size: of the mixer's state.
      eval_examples: rows of a test.
      train: how models are trained.
      data: what differs from each task's published form.
      rows: by task, where a step does not have as many rows as ``train`` says.
    """

    model: ModelSize
    size: int
    eval_examples: int
    train: TrainConfig
    data: dict[str, dict[str, Any]]
    rows: dict[str, int] = dataclasses.field(default_factory=dict)


TRAIN = TrainConfig(
    learning_rate=3e-3,
    weight_decay=0.1,
    clip_norm=1.0,
    adam_b2=0.98,
    select="last",
    keep=1,
)
PRESETS = {
    "tiny": Recipe(
        model=ModelSize(layers=1, width=16, mlp=32, head=8),
        size=8,
        eval_examples=8,
        train=dataclasses.replace(
            TRAIN, steps=6, batch_size=4, warmup_steps=2, log_every=2, eval_every=3,
            checkpoint_every=3,
        ),
        data=TINY,
    ),
    "cpu": Recipe(
        model=ModelSize(layers=2, width=64, mlp=128, head=16),
        size=16,
        eval_examples=256,
        train=dataclasses.replace(
            TRAIN, steps=1_500, batch_size=32, warmup_steps=100, log_every=50, eval_every=500,
            checkpoint_every=500,
        ),
        data=CPU,
        rows=CPU_ROWS,
    ),
    "paper": Recipe(
        model=ModelSize(layers=2, width=128, mlp=256, head=64),
        size=64,
        eval_examples=1_000,
        train=dataclasses.replace(
            TRAIN, steps=50_000, batch_size=64, warmup_steps=5_000, learning_rate=1e-3,
            log_every=100, eval_every=5_000, checkpoint_every=5_000,
        ),
        data={},
    ),
}  # fmt: skip


def experiment(
    task: str, mixer: str, preset: str, size: int | None = None, seed: int = 0
) -> ExperimentConfig:
    """The experiment of a preset; ``size`` of the mixer's state, None for the preset's.

    Raises:
      UsageError: an unknown name (the message has the nearest known one), or a size that the mixer
        cannot have.
      ValueError: the seed is out of range.
    """
    check_name("task", task, tuple(TASKS))
    check_name("preset", preset, tuple(PRESETS))
    recipe = PRESETS[preset]
    size = recipe.size if size is None else size
    data = dataclasses.replace(TASKS[task], **recipe.data.get(task, {}))
    config = mixer_config(mixer, recipe.model, size, context(data))
    grouped = any(label.group == "ssm" for label in config.param_labels().values())
    return ExperimentConfig(
        task=task,
        mixer=mixer,
        size=size,
        preset=typing.cast(Preset, preset),
        data=typing.cast(TaskConfig, data),
        repeats=1,
        multiples=MULTIPLES,
        eval_examples=recipe.eval_examples,
        model=LanguageModelConfig(
            backbone=BackboneConfig(
                layout=(config.mixer,) * recipe.model.layers,
                mixers=(config,),
                width=recipe.model.width,
                norm="rms",
                final_norm=True,
                mlp=recipe.model.mlp,
                decay_vectors=False,
                scan_layers=True,
            ),
            vocabulary_size=data.vocabulary_size,
            tie_embeddings=False,
            # Variance 1 in the residual stream: with less, what the first layer adds hides the
            # token itself from the second, which has to look it up.
            embedding_std=recipe.model.width**-0.5,
            embedding_scale=recipe.model.width**0.5,
        ),
        train=dataclasses.replace(
            recipe.train,
            batch_size=recipe.rows.get(task, recipe.train.batch_size),
            group_learning_rates={"ssm": SSM_RATE} if grouped else {},
            seed=seed,
        ),
    )
