"""What the presets of all tasks are made of: recipes by family of models, and ways to change them.

Sources: S5, Smith et al. 2023, lindermanlab/S5 (bin/run_experiments). S4D, Gu et al. 2022,
state-spaces/s4 at v3, the version of the paper; S4, Gu et al. 2022, the same repository's latest
configs. LRU, Orvieto et al. 2023, its appendix. Transformer, Tay et al. 2021,
google-research/long-range-arena. Rotary transformer, Amos et al. 2024 ("Never Train from Scratch"),
IdoAmos/not-from-scratch. S4D-FT, Yu et al. 2025, AnnanYu/FreqBiasSSM. B2S6, Yu & Erichson 2025,
its table of hyperparameters. Nobody has published recipes of the other models: ``ours`` is one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from experiments.lra.experiment import INTERFACES, ExperimentConfig, Model, Preset, Task
from seqmodels.data.lra import TASKS, TaskConfig, TextConfig
from seqmodels.data.lra.retrieval import PUBLISHED as PAIRS
from seqmodels.data.lra.speech import PUBLISHED as RECORDINGS
from seqmodels.mixers import (
    AttentionConfig,
    BidirectionalConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    HydraConfig,
    LRUConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    RATConfig,
    RetNetConfig,
    S4Config,
    S4DConfig,
    S5Config,
    SCOUTConfig,
)
from seqmodels.mixers.lru import LRU_LRA
from seqmodels.models import BackboneConfig, ClassifierConfig
from seqmodels.training.config import TrainConfig

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
"""Training examples of the published data."""

LENGTHS: dict[str, tuple[int, ...]] = {
    "listops": (1024, 1536, 2048),
    "text": (512, 1024, 2048, 4096),
    "retrieval": (1000, 2000, 4000),
    "speech": (8_000, 12_000, 16_000),
}
"""Padded lengths, where rows differ."""

OURS: tuple[Model, ...] = (
    "mamba", "mamba2", "gla", "retnet", "gated_deltanet", "hydra", "rat", "scout",
)  # fmt: skip
"""Models without a published recipe on any of the tasks."""

# Seconds of a step on two cores beside S5's, about; models that are not here take one or less.
_COSTS: dict[Model, int] = {
    "lru": 2, "mamba": 5, "b2s6": 8, "mamba2": 5, "transformer": 2, "rotary": 2, "gla": 3,
    "retnet": 3, "gated_deltanet": 4, "hydra": 4, "rat": 2, "scout": 3,
}  # fmt: skip

HEAD = 32
"""Channels of a head of those, and of smaller attention."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and training of a model by our recipe."""

    layers: int
    width: int
    batch_size: int
    steps: int
    rate: float = 1e-3
    dropout: float = 0.0


Change = Callable[[ExperimentConfig], ExperimentConfig]


@dataclasses.dataclass(frozen=True)
class Presets:
    """The presets of a task.

    Attributes:
      task: which.
      published: settings of papers.
      shape: of the models without; None to take those of ``like``.
      like: another task, whose settings this one takes where it has none.
      changes: what another preset than "paper" changes in it.
    """

    task: Task
    published: Mapping[Model, ExperimentConfig]
    changes: Mapping[Preset, Change]
    shape: Shape | None = None
    like: "Presets | None" = None

    def paper(self, model: Model) -> ExperimentConfig:
        """The published settings, or ours."""
        if model in self.published:
            return self.published[model]
        if self.like is not None:
            return moved(self.like.paper(model), self.task)
        assert self.shape is not None
        return ours(self.task, model, self.shape)

    def config(self, model: Model, preset: Preset) -> ExperimentConfig:
        """The settings of a preset."""
        paper = self.paper(model)
        if preset == "paper":
            return paper
        config = dataclasses.replace(self.changes[preset](paper), preset=preset)
        cost = _COSTS.get(model, 1) if preset.startswith("cpu") else 1
        return config if cost == 1 else trained(config, steps=config.train.steps // cost)


def experiment(
    task: Task, model: Model, mixer: MixerConfig, layers: int, train: TrainConfig, **fields: Any
) -> ExperimentConfig:
    """The published task with a model; other fields are the classifier's or its backbone's."""
    interface, data = INTERFACES[task], TASKS[task]
    names = ("embedding_std", "pooling", "positions", "max_length")
    heads = {name: fields.pop(name) for name in names if name in fields}
    return ExperimentConfig(
        task=task,
        model=model,
        preset="paper",
        data=data,
        lengths=LENGTHS.get(task, (data.longest,)),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(layout=(mixer.mixer,) * layers, mixers=(mixer,), **fields),
            num_classes=interface.classes,
            vocabulary_size=interface.vocabulary,
            **heads,
        ),
        train=train,
        interaction="nli" if interface.parts == 2 else None,
    )


def training(
    task: Task,
    *,
    batch_size: int,
    steps: int,
    rates: tuple[float, float],
    weight_decay: float,
    warmup: int | None = None,
    ssm: bool = True,
    **fields: Any,
) -> TrainConfig:
    """Evaluated and saved once an epoch.

    Args:
      task, batch_size, steps, weight_decay: as they are called.
      rates: of the state-space parameters and of the others.
      warmup: steps; None for a tenth of all.
      ssm: whether the model has state-space parameters.
      fields: more of ``TrainConfig``'s.
    """
    epoch = EXAMPLES[task] // batch_size
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=rates[1],
        group_learning_rates={"ssm": rates[0]} if ssm else {},
        weight_decay=weight_decay,
        warmup_steps=steps // 10 if warmup is None else warmup,
        eval_every=epoch,
        checkpoint_every=epoch,
        **fields,
    )


def s5(
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
    """A recipe of the S5 authors."""
    epoch = EXAMPLES[task] // batch_size
    train = training(
        task,
        batch_size=batch_size,
        steps=epoch * epochs,
        rates=rates,
        weight_decay=weight_decay,
        warmup=epoch * warmup_epochs,
    )
    return experiment(task, "s5", mixer, layers, train, norm="batch", **fields)


def s4(
    task: Task,
    model: Model = "s4",
    mixer: MixerConfig | None = None,
    *,
    layers: int = 6,
    width: int = 256,
    norm: str = "batch",
    prenorm: bool = True,
    batch_size: int,
    steps: int,
    rates: tuple[float, float] = (1e-3, 1e-2),
    weight_decay: float = 0.05,
    warmup: int | None = None,
    **fields: Any,
) -> ExperimentConfig:
    """A recipe of the S4 authors; a tenth of the steps is warm-up, as in their latest configs."""
    if INTERFACES[task].vocabulary is not None:
        fields["embedding_std"] = 1.0
    train = training(
        task,
        batch_size=batch_size,
        steps=steps,
        rates=rates,
        weight_decay=weight_decay,
        warmup=warmup,
    )
    return experiment(
        task,
        model,
        mixer or S4Config(state_size=64, bidirectional=True),
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


def s4d(task: Task, *, dt_min: float = 1e-3, n_ssm: int = 1, **fields: Any) -> dict[Model, Any]:
    """The recipe of S4D's paper for each of its initialisations."""
    inits: dict[Model, Literal["lin", "legs", "inv"]] = {
        "s4d": "lin", "s4d-legs": "legs", "s4d-inv": "inv",
    }  # fmt: skip
    return {
        model: s4(
            task,
            model,
            S4DConfig(state_size=64, init=init, n_ssm=n_ssm, bidirectional=True, dt_min=dt_min),
            **fields,
        )
        for model, init in inits.items()
    }


def s4d_ft(
    task: Task, scale: float, *, mixer: Mapping[str, Any] | None = None, **fields: Any
) -> ExperimentConfig:
    """A recipe of S4D-FT: 64 complex states, and a rate of 0.01 for the frequencies' weights.

    Args:
      scale: of the frequencies.
      mixer: more of ``S4DConfig``'s fields; ``fields`` are those of ``s4``.
    """
    config = S4DConfig(
        state_size=128,
        bidirectional=True,
        frequency_scale=scale,
        frequency_weight=True,
        **(mixer or {}),
    )
    found = s4(task, "s4d-ft", config, **fields)
    rates = found.train.group_learning_rates | {"frequency": 1e-2}
    return dataclasses.replace(
        found, train=dataclasses.replace(found.train, group_learning_rates=rates)
    )


def b2s6(
    task: Task,
    *,
    layers: int = 6,
    width: int,
    norm: str = "batch",
    prenorm: bool = True,
    rate: float,
    batch_size: int,
    epochs: int,
    weight_decay: float,
) -> ExperimentConfig:
    """A recipe of B2S6, from both sides; 16 complex states and a rate of 1e-3 for A and the step
    sizes are ours."""
    train = training(
        task,
        batch_size=batch_size,
        steps=EXAMPLES[task] // batch_size * epochs,
        rates=(1e-3, rate),
        weight_decay=weight_decay,
    )
    mixer = BidirectionalConfig(MambaConfig(expand=1, blocks=8, layers=layers))
    return experiment(
        task, "b2s6", mixer, layers, train,
        width=width, norm=norm, prenorm=prenorm, final_norm=prenorm,
    )  # fmt: skip


def lru(
    task: Task, published: str, *, factor: float, batch_size: int, steps: int, dropout: float
) -> ExperimentConfig:
    """A recipe of the LRU authors.

    Args:
      published: the task as they call it.
      factor: of the rate of the recurrence's parameters.
    """
    width, layers, mixer = LRU_LRA[published]
    train = training(
        task,
        batch_size=batch_size,
        steps=steps,
        rates=(1e-3 * factor, 1e-3),
        weight_decay=0.05,
        min_lr=1e-7,
    )
    return experiment(
        task, "lru", mixer, layers, train,
        width=width, norm="batch", gate="glu", dropout=dropout,
    )  # fmt: skip


def transformer(
    task: Task,
    *,
    layers: int,
    heads: int,
    sizes: tuple[int, int, int],
    dropout: float,
    train: TrainConfig,
    learned: bool = False,
    pooling: str = "class",
) -> ExperimentConfig:
    """Long Range Arena's Transformer; pixels enter as reals, and attention itself has no dropout.

    Args:
      sizes: widths of the stream, of all heads and of the MLP.
      learned: positions are learned rather than sinusoids.
    """
    width, inner, mlp = sizes
    mixer = AttentionConfig(
        heads=heads,
        head_size=inner // heads,
        rotary_base=None,
        bidirectional=True,
        init_std=width**-0.5,
    )
    longest = TASKS[task].longest + (pooling == "class")
    return experiment(
        task, "transformer", mixer, layers, train,
        width=width, mlp=mlp, final_norm=True, dropout=dropout, pooling=pooling,
        positions="learned" if learned else "sinusoid",
        max_length=longest if learned else None,
    )  # fmt: skip


def rsqrt(task: Task, *, warmup: int, steps: int) -> TrainConfig:
    """Adam as Long Range Arena trains on tokens: 0.05 times the warm-up's share, over the root of
    the steps. A training that ends before the warm-up does has a share of its peak."""
    reached = min(steps, warmup)
    return training(
        task,
        batch_size=32,
        steps=steps,
        rates=(0.0, 0.05 * warmup**-0.5 * reached / warmup),
        weight_decay=0.1,
        warmup=reached,
        ssm=False,
        schedule="rsqrt",
        adam_b2=0.98,
        adam_eps=1e-9,
    )


def cosine(task: Task, rate: float, *, batch_size: int, steps: int, **fields: Any) -> TrainConfig:
    """Adam as Long Range Arena trains on pixels: an epoch of warm-up, no weight decay."""
    return training(
        task,
        batch_size=batch_size,
        steps=steps,
        rates=(0.0, rate),
        weight_decay=0.0,
        warmup=EXAMPLES[task] // batch_size,
        ssm=False,
        adam_b2=0.98,
        adam_eps=1e-9,
        **fields,
    )


def rotary(
    task: Task,
    *,
    layers: int,
    width: int,
    heads: int,
    mlp: int,
    rate: float,
    batch_size: int,
    epochs: int,
) -> ExperimentConfig:
    """The control of Long Range Arena's critics: full attention, rotary embedding, no dropout.

    Sizes and rates of "Never Train from Scratch"; it has a constant rate after the warm-up. Batch
    sizes and numbers of epochs are ours: the paper says at most 200 epochs or a day.
    """
    mixer = AttentionConfig(heads=heads, bidirectional=True, init_std=width**-0.5)
    steps = EXAMPLES[task] // batch_size * epochs
    train = training(
        task,
        batch_size=batch_size,
        steps=steps,
        rates=(0.0, rate),
        weight_decay=0.0,
        warmup=steps // 20,
        ssm=False,
        schedule="constant",
        clip_norm=1.0,
    )
    return experiment(task, "rotary", mixer, layers, train, width=width, mlp=mlp, final_norm=True)


def ours(task: Task, model: Model, shape: Shape) -> ExperimentConfig:
    """Our recipe: layer norms before each branch, an MLP behind mixers that have no gate inside,
    AdamW with a clipped gradient, a cosine after a tenth of warm-up."""
    train = training(
        task,
        batch_size=shape.batch_size,
        steps=shape.steps,
        rates=(0.0, shape.rate),
        weight_decay=0.05,
        ssm=False,
        clip_norm=1.0,
        adam_b2=0.98,
    )
    return experiment(
        task, model, mixer(model, shape.width, shape.layers), shape.layers, train,
        width=shape.width, mlp=mlp(model, shape.width), final_norm=True, dropout=shape.dropout,
        decay_vectors=False,
    )  # fmt: skip


def mlp(model: Model, width: int) -> int | None:
    """Width of the MLP in our recipe; None for mixers that expand the width themselves."""
    return None if model in ("mamba", "mamba2", "hydra") else 2 * width


def mixer(model: Model, width: int, layers: int) -> MixerConfig:
    """The mixer of a model by our recipe.

    A mixer that is causal reads rows from both sides, as everything that does well on these tasks,
    but for RAT and SCOUT, which compress the past.
    """
    heads, init = max(width // HEAD, 1), {"init_std": width**-0.5}
    if model == "hydra":
        return HydraConfig(state_size=HEAD, head_size=HEAD)
    if model == "rat":
        return RATConfig(chunk=16, heads=heads, groups=heads, **init)
    if model == "scout":
        return SCOUTConfig(
            heads=heads, interval=16, local=MambaConfig(expand=1, layers=layers), **init
        )
    causal: dict[str, MixerConfig] = {
        "mamba": MambaConfig(expand=1, layers=layers),
        "mamba2": Mamba2Config(expand=1, state_size=HEAD, head_size=HEAD, layers=layers),
        "gla": GLAConfig(heads=heads, **init),
        "retnet": RetNetConfig(heads=heads, expand_v=1.0, **init),
        "gated_deltanet": GatedDeltaNetConfig(heads=heads, head_size=HEAD, expand_v=1.0, **init),
    }
    return BidirectionalConfig(causal[model])


def moved(config: ExperimentConfig, task: Task) -> ExperimentConfig:
    """Another task with the settings of this one; not published."""
    interface, data = INTERFACES[task], TASKS[task]
    longest = config.classifier.max_length
    if longest is not None:
        longest += data.longest - config.data.longest
    return dataclasses.replace(
        config,
        task=task,
        data=data,
        lengths=LENGTHS.get(task, (data.longest,)),
        classifier=dataclasses.replace(
            config.classifier, num_classes=interface.classes, max_length=longest
        ),
    )


def resized(
    config: ExperimentConfig, *, layers: int, width: int, state: int | None = None
) -> ExperimentConfig:
    """The experiment with a smaller model.

    Args:
      layers, width: of the backbone.
      state: real states of S4, S4D, S5 and LRU; None for as many as there are.
    """
    backbone = config.classifier.backbone
    (kept,) = backbone.mixers
    hidden = backbone.mlp
    if config.model in OURS:
        kept, hidden = mixer(config.model, width, layers), mlp(config.model, width)
    elif isinstance(kept, AttentionConfig):
        kept = dataclasses.replace(kept, heads=width // HEAD, head_size=None, init_std=width**-0.5)
        hidden = 2 * width
    elif state is not None and isinstance(kept, S5Config):
        kept = dataclasses.replace(kept, state_size=state, blocks=state // 16)
    elif state is not None and isinstance(kept, LRUConfig):
        kept = dataclasses.replace(kept, state_size=state // 2)
    elif state is not None and isinstance(kept, S4Config | S4DConfig):
        kept = dataclasses.replace(kept, state_size=state)
    smaller = dataclasses.replace(
        backbone, layout=(kept.mixer,) * layers, mixers=(kept,), width=width, mlp=hidden
    )
    return dataclasses.replace(
        config, classifier=dataclasses.replace(config.classifier, backbone=smaller)
    )


def trained(
    config: ExperimentConfig,
    *,
    steps: int,
    batch_size: int | None = None,
    every: int | None = None,
    rate: float | None = None,
) -> ExperimentConfig:
    """The experiment with another schedule, a tenth of it warm-up.

    Args:
      steps, batch_size: as they are called; None for the batch that there is.
      every: steps between two evaluations and between two checkpoints; None for a fifth of all.
      rate: for models by our recipe, and transformers; None for what they have.
    """
    train = config.train
    every = every or max(steps // 5, 1)
    new = dataclasses.replace(
        train,
        steps=steps,
        batch_size=batch_size or train.batch_size,
        warmup_steps=steps // 10,
        eval_every=every,
        checkpoint_every=every,
    )
    if rate is not None and not train.group_learning_rates:
        new = dataclasses.replace(new, learning_rate=rate, schedule="cosine")
    return dataclasses.replace(config, train=new)


def on(
    config: ExperimentConfig, data: TaskConfig, lengths: tuple[int, ...] | None = None
) -> ExperimentConfig:
    """The experiment on other data of the task, padded to other lengths."""
    longest = config.classifier.max_length
    if longest is not None:
        longest += data.longest - config.data.longest
    return dataclasses.replace(
        config,
        data=data,
        lengths=lengths or config.lengths,
        classifier=dataclasses.replace(config.classifier, max_length=longest),
    )
