"""What each experiment is: a language model of one mixer, of a size, and how it is trained.

The models are the usual stack (norm, mixer, norm, MLP; tied embeddings) and the recipe the usual
one of small language models; none of it is a published experiment.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal

import jax
from tyro.conf import Fixed

from experiments.errors import UsageError, check_name
from seqmodels.data.decomposition import Curriculum, check_lengths
from seqmodels.data.text import VOCABULARY
from seqmodels.mixers import REGISTRY, MixerConfig, build
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from seqmodels.models.language import Dtype
from seqmodels.ranges import Between, Checked, Share, Size
from seqmodels.training.config import TrainConfig

Preset = Literal["tiny", "cpu", "small", "table"]
"""Names of configs; "table" is that of `seqmodels lm table`."""

Objective = Literal["next", "mlm", "prefix"]
"""What a model is trained to say: the next token; tokens that are hidden; or the next token behind
a prefix that it reads whole (JRT)."""

MASK = VOCABULARY
"""The token that stands for a hidden one."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """How a text becomes rows.

    Attributes:
      length: tokens of a row.
      separator: what stands between the documents of a file; None, a file is one document.
      validation: share of the bytes, at the end, that is held out of training.
      decompose: None; or train on rows of many lengths, of one document each, in the order of this
        curriculum, see ``seqmodels.data.decomposition``. Their tokens a step are the same.
      shortest: tokens of the shortest rows then; it and ``length``, the longest, are powers of two.
    """

    length: Size = 256
    separator: str | None = None
    validation: Between = 0.1
    decompose: Curriculum | None = None
    shortest: Size = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator == "":
            raise ValueError("DataConfig: separator='' must be at least one character or None")
        if self.decompose is not None:
            check_lengths(self.shortest, self.length)


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Checked):
    """What is computed again, rather than kept, where rows are long; see docs/parallel.md.

    Attributes:
      loss_tile: tokens on a device whose logits exist at a time; None for all.
      chunk: None, or tokens of a row that a step goes over at a time, forward and backward; the
        same gradient.
      share: None, or the share of the chunks that a step backpropagates through; an unbiased
        gradient.
    """

    loss_tile: Size | None = 1024
    chunk: Size | None = None
    share: Between | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.chunk is None:
            raise ValueError(
                f"MemoryConfig: share={self.share} is of chunks; set chunk, or share=None"
            )


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Checked):
    """One experiment, complete: data, model and training.

    Attributes:
      mixer: name of the mixer in ``model``, and does not change it.
      preset: the name this config was made from.
      data: how the text is cut.
      carry_state: rows are streams, and states go on from batch to batch.
      model: the model.
      train: the training; its seed also orders the windows.
      memory: what training keeps.
      balance: weight of the loss that has a mixture's experts or memories used alike, where
        ``model`` has some.
      objective: what is predicted.
      masked: share of the tokens that are hidden, of those of the prefix in "prefix".
    """

    mixer: Annotated[str, Fixed]
    preset: Annotated[Preset, Fixed]
    data: DataConfig
    carry_state: bool
    model: LanguageModelConfig
    train: TrainConfig
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    balance: Share = 0.01
    objective: Objective = "next"
    masked: Between = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        layout = self.model.backbone.layout
        if set(layout) != {self.mixer}:
            raise ValueError(f"mixer={self.mixer!r} is not what layout={layout} consists of")
        causal = all(mixer.causal for mixer in self.model.backbone.mixers)
        if self.objective == "next" and not causal:
            raise ValueError(f"mixer={self.mixer!r} must be causal: set bidirectional to False")
        tokens = VOCABULARY + (self.objective != "next")
        if self.model.vocabulary_size < tokens:
            raise ValueError(
                f"model.vocabulary_size={self.model.vocabulary_size} is too small: tokens are "
                f"bytes, a boundary and, unless objective='next', a mask, {tokens}"
            )
        if self.objective != "next" and (self.carry_state or self.memory.chunk is not None):
            raise ValueError(
                f"objective={self.objective!r} sees both sides of a token and needs whole rows: "
                "take carry_state=False and memory.chunk=None"
            )
        if self.carry_state and self.data.decompose is not None:
            raise ValueError(
                f"data.decompose={self.data.decompose!r} shuffles pieces of documents, of which no "
                "state can be carried to the next: take carry_state=False"
            )

    @property
    def name(self) -> str:
        """``<mixer>-<preset>[-<objective>][-carry][-<curriculum>]-seed<k>``: of the run directory
        and of the result."""
        how = "" if self.objective == "next" else f"-{self.objective}"
        how += "-carry" if self.carry_state else ""
        how += f"-{self.data.decompose}" if self.data.decompose else ""
        return f"{self.mixer}-{self.preset}{how}-seed{self.train.seed}"


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Blocks, width of the residual stream, width of the MLP, channels of a head, tokens that
    filters look back."""

    layers: int
    width: int
    mlp: int
    head: int
    length: int = 256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset is made of, whatever the mixer."""

    size: ModelSize
    data: DataConfig
    train: TrainConfig
    dtype: Dtype = "float32"


TRAIN = TrainConfig(
    learning_rate=2e-3,
    weight_decay=0.1,
    clip_norm=1.0,
    adam_b2=0.95,
    select="loss",
)
PRESETS = {
    # For a look at how everything works; learns next to nothing.
    "tiny": Recipe(
        ModelSize(layers=1, width=16, mlp=32, head=8, length=32),
        DataConfig(length=32),
        dataclasses.replace(
            TRAIN,
            steps=20,
            batch_size=4,
            warmup_steps=2,
            log_every=5,
            eval_every=10,
            checkpoint_every=10,
        ),
    ),
    # About a million parameters; minutes on two processor cores.
    "cpu": Recipe(
        ModelSize(layers=4, width=128, mlp=256, head=32),
        DataConfig(length=256),
        dataclasses.replace(
            TRAIN,
            steps=1_000,
            batch_size=8,
            warmup_steps=50,
            log_every=20,
            eval_every=200,
            checkpoint_every=200,
        ),
    ),
    # About 100 million parameters; for an accelerator.
    "small": Recipe(
        ModelSize(layers=12, width=768, mlp=2304, head=64, length=2048),
        DataConfig(length=2048),
        dataclasses.replace(
            TRAIN,
            learning_rate=6e-4,
            steps=20_000,
            batch_size=64,
            warmup_steps=500,
            log_every=50,
            eval_every=1_000,
            checkpoint_every=1_000,
        ),
        dtype="bfloat16",
    ),
}
SIZES = {name: recipe.size for name, recipe in PRESETS.items()}
MIXERS = tuple(REGISTRY)
SSM_RATE = 1e-3
"""Peak learning rate of parameters that mixers label "ssm"."""


def experiment(
    mixer: str, preset: str, seed: int = 0, objective: Objective = "next"
) -> ExperimentConfig:
    """The experiment of a preset.

    Raises:
      UsageError: an unknown name (the message has the nearest known one), or a mixer that sees what
        is to be predicted.
      ValueError: the seed is out of range.
    """
    check_name("preset", preset, PRESETS)
    recipe = PRESETS[preset]
    model = language_model(mixer, recipe.size, objective)
    return ExperimentConfig(
        mixer=mixer,
        preset=typing.cast(Preset, preset),
        data=recipe.data,
        carry_state=False,
        model=dataclasses.replace(model, dtype=recipe.dtype),
        train=dataclasses.replace(
            recipe.train, group_learning_rates=group_rates(mixer, recipe.size, objective), seed=seed
        ),
        objective=objective,
    )


def language_model(
    mixer: str, size: ModelSize, objective: Objective = "next"
) -> LanguageModelConfig:
    """The model of one mixer; raises as ``mixer_config``."""
    return LanguageModelConfig(
        backbone=BackboneConfig(
            layout=(mixer,) * size.layers,
            mixers=(mixer_config(mixer, size, objective),),
            width=size.width,
            norm="rms",
            final_norm=True,
            mlp=size.mlp,
            decay_vectors=False,
            scan_layers=True,
        ),
        vocabulary_size=VOCABULARY + (objective != "next"),
    )


def mixer_config(name: str, size: ModelSize, objective: Objective = "next") -> MixerConfig:
    """A mixer's config for models of this size: heads and states that suit its width.

    For "mlm" it sees both sides where it can.

    Raises:
      UsageError: an unknown name, or a mixer that sees what is to be predicted.
    """
    check_name("mixer", name, MIXERS)
    kind = REGISTRY[name][0]
    fields = {field.name for field in dataclasses.fields(kind)}
    heads = max(size.width // size.head, 1)
    general: dict[str, Any] = {
        "heads": heads,
        "head_size": size.head,
        # The default 0.02 is meant for a width of about 2048.
        "init_std": size.width**-0.5,
        "layers": size.layers,
        "length": size.length,
        "bidirectional": objective == "mlm",
    }
    special: dict[str, dict[str, Any]] = {
        "attention": {"head_size": None},
        "gam": {"slots": 2 * size.width},
        "jrt": {"prefix": max(size.length // 2, 1)},
        "sliding_window": {"head_size": None, "window": 64},
        "scout": {"head_size": None, "interval": 8},
        "rat": {"chunk": 8, "groups": heads},
        "gated_deltanet": {"expand_v": 1.0},
        "retnet": {"expand_v": 1.0},
        "hgrn2": {"layers": 1},
        "lightning": {"layers": 1},
        "mamba2": {"state_size": 64},
        "mamba3": {"state_size": 64},
        "parallel": {"mixers": _side_by_side(size)} if name == "parallel" else {},
        "s4d": {"state_size": 32},
        "s5": {"state_size": size.width},
        "lru": {"state_size": size.width},
    }
    wanted = {name: value for name, value in general.items() if name in fields}
    try:
        config = kind(**{**wanted, **special.get(name, {})})
    except ValueError as error:
        raise UsageError(f"mixer={name!r} has no preset of width {size.width}: {error}") from error
    served = {"next": config.causal, "mlm": True, "prefix": name == "jrt"}
    if not served[objective]:
        others = ", ".join(other for other in MIXERS if other != name)
        raise UsageError(
            f"mixer={name!r} reads no prefix; objective='prefix' is for jrt"
            if objective == "prefix"
            else f"mixer={name!r} sees the tokens that a language model predicts; choose one of "
            f"{others}, or another objective"
        )
    return config


def _side_by_side(size: ModelSize) -> tuple[MixerConfig, ...]:
    """Those that are published in one block."""
    return tuple(mixer_config(name, size) for name in ("mamba2", "attention"))


def group_rates(mixer: str, size: ModelSize, objective: Objective = "next") -> dict[str, float]:
    """A lower rate for the state-space parameters of mixers that label them, as S4 and S5 do."""
    labels = mixer_config(mixer, size, objective).param_labels().values()
    return {"ssm": SSM_RATE} if any(label.group == "ssm" for label in labels) else {}


def parameters(config: LanguageModelConfig) -> int:
    """The model's number of parameters, without making them."""
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def state_bytes(config: LanguageModelConfig, length: int) -> int:
    """Bytes of the states of one row after so many tokens, of all blocks; caches in bfloat16.

    A mixer that sees both sides has no state: it counts with its input, the whole row in bfloat16.
    """
    width = config.backbone.width
    mixers = [build(mixer, width, parent=None) for mixer in config.backbone.each_mixer()]
    return sum(
        mixer.state_bytes(length) if mixer.stateful else 2 * length * width for mixer in mixers
    )
