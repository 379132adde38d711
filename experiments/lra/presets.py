"""The experiments: the published settings, and what a CPU run changes in them.

Sources: S5, Smith et al. 2023, lindermanlab/S5 (bin/run_experiments); S4D, Gu et al. 2022,
state-spaces/s4 at v3, the version of the paper. Where neither has a task, there is a "cpu" preset
only, made from the settings of the task that is most like it.
"""

import dataclasses
from typing import Any, get_args

from experiments.command_line import UsageError
from experiments.lra.convolutions import CONVOLUTIONS, convolution
from experiments.lra.experiment import INTERFACES, ExperimentConfig, Model, Preset, Task
from seqmodels.data.lra import (
    TASKS,
    ListOpsConfig,
    PathfinderConfig,
    RetrievalConfig,
    TaskConfig,
    TextConfig,
)
from seqmodels.data.lra.retrieval import PUBLISHED as PAIRS
from seqmodels.data.lra.speech import PUBLISHED as RECORDINGS
from seqmodels.mixers import MixerConfig, S4DConfig, S5Config
from seqmodels.models import BackboneConfig, ClassifierConfig
from seqmodels.training.config import TrainConfig

# Training examples of the published data.
EXAMPLES = {
    "listops": 96_000,
    "text": 25_000 - TextConfig().validation,
    "retrieval": PAIRS["train"],
    "image": 45_000,
    "cifar": 45_000,
    "mnist": 54_000,
    "pmnist": 54_000,
    "speech": RECORDINGS["Speech Commands"]["train"],
} | dict.fromkeys(("pathfinder", "path-x", "path-256"), 160_000)

# Padded lengths, where rows differ.
LENGTHS: dict[str, tuple[int, ...]] = {
    "listops": (1024, 1536, 2048),
    "text": (512, 1024, 2048, 4096),
    "retrieval": (1000, 2000, 4000),
    "speech": (8_000, 12_000, 16_000),
}


def _experiment(
    task: Task, model: Model, mixer: MixerConfig, layers: int, train: TrainConfig, **fields: Any
) -> ExperimentConfig:
    """The published task with a model; other fields are the classifier's or its backbone's."""
    interface, data = INTERFACES[task], TASKS[task]
    heads = {name: fields.pop(name) for name in ("embedding_std", "pooling") if name in fields}
    return ExperimentConfig(
        task=task,
        model=model,
        preset="paper",
        data=data,
        lengths=LENGTHS.get(task, (data.longest,)),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(layout=(model,) * layers, mixers=(mixer,), **fields),
            num_classes=interface.classes,
            vocabulary_size=interface.vocabulary,
            **heads,
        ),
        train=train,
        interaction="nli" if interface.parts == 2 else None,
    )


def _s5(
    task: Task,
    mixer: S5Config,
    *,
    layers: int = 6,
    batch_size: int,
    epochs: int,
    rates: tuple[float, float],
    weight_decay: float,
    warmup_epochs: int = 1,
    **fields: Any,
) -> ExperimentConfig:
    """A recipe of the S5 authors; `rates` are of the state-space parameters and of the others."""
    epoch = EXAMPLES[task] // batch_size
    train = TrainConfig(
        steps=epoch * epochs,
        batch_size=batch_size,
        learning_rate=rates[1],
        group_learning_rates={"ssm": rates[0]},
        weight_decay=weight_decay,
        warmup_steps=epoch * warmup_epochs,
        eval_every=epoch,
        checkpoint_every=epoch,
    )
    return _experiment(task, "s5", mixer, layers, train, norm="batch", **fields)


def _s4d(
    task: Task,
    *,
    layers: int = 6,
    width: int = 256,
    norm: str = "batch",
    prenorm: bool = True,
    batch_size: int,
    steps: int,
    rates: tuple[float, float] = (1e-3, 1e-2),
    weight_decay: float = 0.05,
    mixer: S4DConfig | None = None,
    **fields: Any,
) -> ExperimentConfig:
    """S4D-Lin of the paper; a tenth of the steps is warm-up, as in the authors' later configs."""
    epoch = EXAMPLES[task] // batch_size
    if INTERFACES[task].vocabulary is not None:
        fields["embedding_std"] = 1.0
    train = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=rates[1],
        group_learning_rates={"ssm": rates[0]},
        weight_decay=weight_decay,
        warmup_steps=steps // 10,
        eval_every=epoch,
        checkpoint_every=epoch,
    )
    return _experiment(
        task,
        "s4d",
        mixer or S4DConfig(state_size=64, init="lin", n_ssm=1, bidirectional=True),
        layers,
        train,
        width=width,
        norm=norm,
        prenorm=prenorm,
        final_norm=prenorm,
        gate="glu",
        batchnorm_momentum=0.9,
        **fields,
    )


def _cpu(
    paper: ExperimentConfig,
    *,
    layers: int,
    steps: int,
    warmup: int,
    every: int,
    width: int = 64,
    batch_size: int | None = None,
    data: TaskConfig | None = None,
    lengths: tuple[int, ...] | None = None,
    **mixer: Any,
) -> ExperimentConfig:
    """The experiment with a smaller model, perhaps less data, and this schedule."""
    backbone = paper.classifier.backbone
    (published,) = backbone.mixers
    smaller = dataclasses.replace(
        backbone,
        layout=(paper.model,) * layers,
        mixers=(dataclasses.replace(published, **mixer),),
        width=width,
    )
    return dataclasses.replace(
        paper,
        preset="cpu",
        data=data or paper.data,
        lengths=lengths or paper.lengths,
        classifier=dataclasses.replace(paper.classifier, backbone=smaller),
        train=dataclasses.replace(
            paper.train,
            steps=steps,
            batch_size=batch_size or paper.train.batch_size,
            warmup_steps=warmup,
            eval_every=every,
            checkpoint_every=every,
        ),
    )


_S5 = {
    "listops": _s5(
        "listops",
        S5Config(
            state_size=16,
            blocks=8,
            c_init="lecun_normal",
            bidirectional=True,
            decay="BfastandCdecay",
        ),
        layers=8, width=128, gate="half_glu2", batch_size=50, epochs=40, rates=(1e-3, 3e-3),
        weight_decay=0.04,
    ),
    "text": _s5(
        "text",
        S5Config(
            state_size=192, blocks=12, c_init="lecun_normal", bidirectional=True, dt_global=True
        ),
        width=256, gate="half_glu2", dropout=0.1, batch_size=50, epochs=35, rates=(1e-3, 4e-3),
        weight_decay=0.07, warmup_epochs=0,
    ),
    "retrieval": _s5(
        "retrieval",
        S5Config(
            state_size=256,
            blocks=16,
            c_init="trunc_standard_normal",
            bidirectional=True,
            dt_global=True,
        ),
        width=128, gate="half_glu1", batch_size=32, epochs=20, rates=(1e-3, 2e-3),
        weight_decay=0.05,
    ),
    "image": _s5(
        "image",
        S5Config(
            state_size=384,
            blocks=3,
            c_init="lecun_normal",
            bidirectional=True,
            clip_eigs=True,
            decay="BfastandCdecay",
        ),
        width=512, gate="half_glu1", dropout=0.1, batch_size=50, epochs=250, rates=(1e-3, 4.5e-3),
        weight_decay=0.07,
    ),
    "pathfinder": _s5(
        "pathfinder",
        S5Config(state_size=256, blocks=8, c_init="trunc_standard_normal", bidirectional=True),
        width=192, gate="half_glu1", dropout=0.05, batch_size=64, epochs=200,
        rates=(9e-4, 4.5e-3), weight_decay=0.03, batchnorm_momentum=0.9,
    ),
    "path-x": _s5(
        "path-x",
        S5Config(
            state_size=256,
            blocks=16,
            c_init="complex_normal",
            bidirectional=True,
            dt_min=1e-4,
            decay="BandCdecay",
        ),
        width=128, gate="half_glu1", batch_size=32, epochs=75, rates=(6e-4, 1.8e-3),
        weight_decay=0.06, batchnorm_momentum=0.9,
    ),
    "speech": _s5(
        "speech",
        S5Config(
            state_size=128,
            blocks=16,
            c_init="lecun_normal",
            bidirectional=True,
            decay="noBCdecay",
        ),
        width=96, gate="half_glu1", dropout=0.1, batch_size=16, epochs=40, rates=(2e-3, 8e-3),
        weight_decay=0.04,
    ),
}  # fmt: skip

_LONG_STEPS = S4DConfig(state_size=64, init="lin", n_ssm=1, bidirectional=True, dt_min=1e-4)

_S4D = {
    "listops": _s4d("listops", layers=8, width=128, prenorm=False, batch_size=50, steps=80_000),
    "text": _s4d("text", batch_size=16, steps=50_000),
    "retrieval": _s4d("retrieval", batch_size=64, steps=50_000),
    "image": _s4d(
        "image", width=512, norm="layer", prenorm=False, dropout=0.1, batch_size=50,
        steps=180_000,
        mixer=S4DConfig(state_size=64, init="lin", n_ssm=2, bidirectional=True),
    ),
    "pathfinder": _s4d(
        "pathfinder", batch_size=64, steps=500_000, rates=(1e-3, 4e-3), weight_decay=0.03,
        pooling="last",
    ),
    "path-x": _s4d(
        "path-x", batch_size=16, steps=500_000, rates=(5e-4, 5e-4), mixer=_LONG_STEPS,
    ),
}  # fmt: skip


def _like(paper: ExperimentConfig, task: Task) -> ExperimentConfig:
    """Another task with the settings of this one; not published."""
    interface, data = INTERFACES[task], TASKS[task]
    return dataclasses.replace(
        paper,
        task=task,
        data=data,
        lengths=LENGTHS.get(task, (data.longest,)),
        classifier=dataclasses.replace(paper.classifier, num_classes=interface.classes),
    )


def _on_cpu(task: str, model: str, paper: ExperimentConfig) -> ExperimentConfig:
    """What two cores do; ListOps, Text, Retrieval and Pathfinder are easier than published."""
    s5 = model == "s5"
    short: dict[str, Any] = {"state_size": 64, "blocks": 4} if s5 else {"state_size": 32}
    tiny: dict[str, Any] = {"state_size": 32, "blocks": 2} if s5 else {"state_size": 16}
    if task == "listops":  # trees of 65 to 199 tokens instead of 501 to 1999
        easier: TaskConfig = ListOpsConfig(min_length=64, max_length=200)
        return _cpu(paper, layers=6, steps=2_500, warmup=250, every=500, data=easier,
                    lengths=(136, 200))  # fmt: skip
    if task == "text":  # the first 1024 bytes of each review instead of 4096
        easier = TextConfig(max_length=1024)
        return _cpu(paper, layers=4, steps=7_000, warmup=500, every=1_000, batch_size=16,
                    data=easier, lengths=(512, 768, 1024), **short)  # fmt: skip
    if task == "retrieval":  # the first 1000 bytes of each text instead of 4000
        easier = RetrievalConfig(max_length=1_000)
        return _cpu(paper, layers=2, steps=300, warmup=30, every=150, batch_size=16, data=easier,
                    lengths=(1_000,), **tiny)  # fmt: skip
    if isinstance(paper.data, PathfinderConfig):  # short contours, and few images
        images, batch, steps = {
            "pathfinder": (20_000, 32, 800), "path-x": (2_000, 8, 120), "path-256": (400, 2, 100),
        }[task]  # fmt: skip
        easier = dataclasses.replace(
            paper.data,
            difficulty="easy",
            train=images,
            validation=images // 20,
            test=images // 10,
        )
        return _cpu(paper, layers=2, width=32, steps=steps, warmup=steps // 10, every=steps // 2,
                    batch_size=batch, data=easier, **tiny)  # fmt: skip
    if task == "speech":
        return _cpu(paper, layers=2, width=32, steps=200, warmup=20, every=100, batch_size=16,
                    **tiny)  # fmt: skip
    return _cpu(paper, layers=2, steps=400, warmup=40, every=200, batch_size=50,
                **tiny)  # fmt: skip


# Tasks that have no published settings here, and the one whose settings they are made from.
_MADE_FROM: dict[Task, str] = {
    "path-256": "path-x", "cifar": "image", "mnist": "image", "pmnist": "image",
    "speech": "path-x",
}  # fmt: skip

PAPER: dict[tuple[str, str], ExperimentConfig] = {
    (task, model): config
    for model, recipes in (("s5", _S5), ("s4d", _S4D))
    for task, config in recipes.items()
}
"""The published settings of a task and model."""

CPU: dict[tuple[str, str], ExperimentConfig] = {
    (task, model): _on_cpu(
        task,
        model,
        PAPER[task, model] if (task, model) in PAPER
        else _like(PAPER[_MADE_FROM[task], model], task),
    )
    for task in get_args(Task)
    for model in ("s4d", "s5")
    if (task, model) in PAPER or task in _MADE_FROM
}  # fmt: skip
"""What two cores do in ten minutes; Text takes an hour."""


def experiment(task: str, model: str, preset: str, seed: int = 0) -> ExperimentConfig:
    """The experiment of a preset.

    Raises:
      UsageError: an unknown name, or a preset that the task and model do not have; the message
        lists the known ones.
      ValueError: the seed is out of range.
    """
    for what, name, known in (
        ("task", task, get_args(Task)),
        ("model", model, get_args(Model)),
        ("preset", preset, get_args(Preset)),
    ):
        if name not in known:
            raise UsageError(f"{what}={name!r} is not known; choose one of {', '.join(known)}")
    if model in CONVOLUTIONS:
        return convolution(experiment(task, "s5", preset, seed), model)
    configs = {"paper": PAPER, "cpu": CPU}[preset]
    if (task, model) not in configs:
        raise UsageError(
            f"task={task!r} and model={model!r} have no preset={preset!r}: "
            + (
                "nobody published settings that are at hand; take preset='cpu' and change it"
                if (task, model) in CPU
                else f"{model} is there for {', '.join(t for t, m in configs if m == model)}"
            )
        )
    config = configs[task, model]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
