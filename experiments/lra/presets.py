"""What each experiment is: the published settings, and what a CPU run changes in them.

Sources: S5, Smith et al. 2023, lindermanlab/S5 (bin/run_experiments); S4D, Gu et al. 2022,
state-spaces/s4 at v3, the version of the paper.
"""

import dataclasses
from typing import Any

from experiments.run import UsageError, with_changes
from seqmodels.data.lra import ListOpsConfig, TextConfig
from seqmodels.data.lra.listops import SYMBOLS
from seqmodels.mixers import S4DConfig, S5Config
from seqmodels.models import BackboneConfig, ClassifierConfig
from seqmodels.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, complete: data, model and training.

    Attributes:
      task: "listops" or "text".
      model: name of the mixer.
      preset: the name this config was made from.
      data: which data.
      lengths: the padded lengths, increasing; longer rows are cut to the last. Padding is masked
        everywhere, so that the other lengths change the speed only.
      classifier: the model.
      train: the training; its seed also orders the batches.
    """

    task: str
    model: str
    preset: str
    data: ListOpsConfig | TextConfig
    lengths: tuple[int, ...]
    classifier: ClassifierConfig
    train: TrainConfig

    @property
    def name(self) -> str:
        """``<task>-<model>-<preset>-seed<k>``: of the run directory and of the result."""
        return f"{self.task}-{self.model}-{self.preset}-seed{self.train.seed}"


def _steps(examples: int, batch_size: int, epochs: int) -> int:
    return examples // batch_size * epochs


def _s5_listops() -> ExperimentConfig:
    mixer = S5Config(
        state_size=16, blocks=8, c_init="lecun_normal", bidirectional=True, decay="BfastandCdecay"
    )
    return ExperimentConfig(
        task="listops",
        model="s5",
        preset="paper",
        data=ListOpsConfig(),
        lengths=(1024, 1536, 2048),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(
                layout=("s5",) * 8, mixers=(mixer,), width=128, norm="batch", gate="half_glu2"
            ),
            num_classes=10,
            vocabulary_size=len(SYMBOLS),
        ),
        train=TrainConfig(
            steps=_steps(96_000, 50, 40),
            batch_size=50,
            learning_rate=3e-3,
            group_learning_rates={"ssm": 1e-3},
            weight_decay=0.04,
            warmup_steps=_steps(96_000, 50, 1),
            eval_every=_steps(96_000, 50, 1),
            checkpoint_every=_steps(96_000, 50, 1),
        ),
    )


def _s5_text() -> ExperimentConfig:
    mixer = S5Config(
        state_size=192, blocks=12, c_init="lecun_normal", bidirectional=True, dt_global=True
    )
    data = TextConfig()
    examples = 25_000 - data.validation
    return ExperimentConfig(
        task="text",
        model="s5",
        preset="paper",
        data=data,
        lengths=(512, 1024, 2048, 4096),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(
                layout=("s5",) * 6,
                mixers=(mixer,),
                width=256,
                norm="batch",
                gate="half_glu2",
                dropout=0.1,
            ),
            num_classes=2,
            vocabulary_size=257,
        ),
        train=TrainConfig(
            steps=_steps(examples, 50, 35),
            batch_size=50,
            learning_rate=4e-3,
            group_learning_rates={"ssm": 1e-3},
            weight_decay=0.07,
            eval_every=_steps(examples, 50, 1),
            checkpoint_every=_steps(examples, 50, 1),
        ),
    )


def _s4d(
    task: str, *, layers: int, width: int, prenorm: bool, batch_size: int, steps: int
) -> ExperimentConfig:
    """S4D-Lin of the paper; a tenth of the steps is warm-up, as in the authors' later configs."""
    listops = task == "listops"
    data = ListOpsConfig() if listops else TextConfig()
    examples = 96_000 if isinstance(data, ListOpsConfig) else 25_000 - data.validation
    mixer = S4DConfig(state_size=64, init="lin", n_ssm=1, bidirectional=True)
    return ExperimentConfig(
        task=task,
        model="s4d",
        preset="paper",
        data=data,
        lengths=(1024, 1536, 2048) if listops else (512, 1024, 2048, 4096),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(
                layout=("s4d",) * layers,
                mixers=(mixer,),
                width=width,
                norm="batch",
                prenorm=prenorm,
                final_norm=prenorm,
                gate="glu",
                batchnorm_momentum=0.9,
            ),
            num_classes=10 if listops else 2,
            vocabulary_size=len(SYMBOLS) if listops else 257,
            embedding_std=1.0,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-2,
            group_learning_rates={"ssm": 1e-3},
            weight_decay=0.05,
            warmup_steps=steps // 10,
            eval_every=examples // batch_size,
            checkpoint_every=examples // batch_size,
        ),
    )


PAPER = {
    ("listops", "s5"): _s5_listops(),
    ("listops", "s4d"): _s4d(
        "listops", layers=8, width=128, prenorm=False, batch_size=50, steps=80_000
    ),
    ("text", "s5"): _s5_text(),
    ("text", "s4d"): _s4d("text", layers=6, width=256, prenorm=True, batch_size=16, steps=50_000),
}

_CPU_LISTOPS: dict[str, Any] = {
    # Trees of 65 to 199 tokens instead of 501 to 1999: not the published task.
    "data.min_length": 64,
    "data.max_length": 200,
    "lengths": [136, 200],
    "classifier.backbone.width": 64,
    "train.steps": 2_500,
    "train.warmup_steps": 250,
    "train.eval_every": 500,
    "train.checkpoint_every": 500,
}
_CPU_TEXT: dict[str, Any] = {
    # The first 1024 bytes of each review instead of 4096.
    "data.max_length": 1024,
    "lengths": [512, 768, 1024],
    "classifier.backbone.width": 64,
    "train.steps": 7_000,
    "train.warmup_steps": 500,
    "train.eval_every": 1_000,
    "train.checkpoint_every": 1_000,
}

CPU_CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("listops", "s5"): {**_CPU_LISTOPS, "classifier.backbone.layout": ["s5"] * 6},
    ("listops", "s4d"): {
        **_CPU_LISTOPS,
        "classifier.backbone.layout": ["s4d"] * 6,
    },
    ("text", "s5"): {
        **_CPU_TEXT,
        "train.batch_size": 16,
        "classifier.backbone.layout": ["s5"] * 4,
        "classifier.backbone.mixers.0.state_size": 64,
        "classifier.backbone.mixers.0.blocks": 4,
    },
    ("text", "s4d"): {
        **_CPU_TEXT,
        "classifier.backbone.layout": ["s4d"] * 4,
        "classifier.backbone.mixers.0.state_size": 32,
    },
}
"""The fields in which "cpu" differs from "paper", by their path."""

PRESETS = ("paper", "cpu")
TASKS = tuple(sorted({task for task, _ in PAPER}))
MODELS = tuple(sorted({model for _, model in PAPER}))


def experiment(task: str, model: str, preset: str, seed: int = 0) -> ExperimentConfig:
    """The experiment of a preset.

    Raises:
      UsageError: an unknown name; the message lists the known ones.
    """
    for what, name, known in (
        ("task", task, TASKS), ("model", model, MODELS), ("preset", preset, PRESETS),
    ):  # fmt: skip
        if name not in known:
            raise UsageError(f"{what}={name!r} is not known; choose one of {', '.join(known)}")
    if (task, model) not in PAPER:
        known_models = ", ".join(m for t, m in PAPER if t == task)
        raise UsageError(f"model={model!r} has no preset for task={task!r}; it has {known_models}")
    changes = dict(CPU_CHANGES[task, model]) if preset == "cpu" else {}
    return with_changes(PAPER[task, model], {**changes, "preset": preset, "train.seed": seed})
