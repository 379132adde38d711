"""What an experiment is: one config of data, model and training."""

import dataclasses
import itertools
from typing import Annotated, Literal

from tyro.conf import Fixed

from seqmodels.data.lra import TASKS, TaskConfig
from seqmodels.data.lra.listops import SYMBOLS
from seqmodels.mixers import BidirectionalConfig
from seqmodels.models import ClassifierConfig
from seqmodels.models.classifier import Interaction
from seqmodels.models.denoiser import Denoising
from seqmodels.ranges import Between, Checked, Positive, Size
from seqmodels.training.config import TrainConfig

Task = Literal[
    "listops", "text", "retrieval", "image", "pathfinder", "path-x", "path-256", "cifar", "mnist",
    "pmnist", "speech",
]  # fmt: skip
Model = Literal[
    "s4", "s4d", "s4d-legs", "s4d-inv", "s4d-ft", "s5", "lru", "mamba", "b2s6", "mamba2",
    "transformer", "rotary", "gla", "retnet", "gated_deltanet", "hydra", "rat", "scout", "conv5",
    "conv61",
]  # fmt: skip
"""A mixer and its block; "s4d" is S4D-Lin, "transformer" Long Range Arena's."""
Preset = Literal["paper", "cpu", "cpu-hour", "gpu-15min"]

# The mixer of a model that is not called as it is.
_MIXERS = {
    "s4d-legs": "s4d", "s4d-inv": "s4d", "s4d-ft": "s4d", "b2s6": "mamba",
    "transformer": "attention", "rotary": "attention", "conv5": "conv", "conv61": "conv",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a model of a task takes and gives.

    Attributes:
      classes: of the answer.
      vocabulary: of token ids, padding included; None where inputs are real.
      channels: of real inputs; None for token ids.
      parts: sequences of one example.
    """

    classes: int
    vocabulary: int | None = None
    channels: int | None = None
    parts: int = 1


INTERFACES = {
    "listops": Interface(10, vocabulary=len(SYMBOLS)),
    "text": Interface(2, vocabulary=257),
    "retrieval": Interface(2, vocabulary=257, parts=2),
    "image": Interface(10, channels=1),
    "pathfinder": Interface(2, channels=1),
    "path-x": Interface(2, channels=1),
    "path-256": Interface(2, channels=1),
    "cifar": Interface(10, channels=3),
    "mnist": Interface(10, channels=1),
    "pmnist": Interface(10, channels=1),
    "speech": Interface(35, channels=1),
}

# Fields of the data that tell tasks with the same kind of data apart.
_FIXED = ("size", "colour", "permuted")


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Checked):
    """Denoising of the training inputs, with the schedule of the training that comes after it.

    Attributes:
      kind: "masked" or "causal", see ``seqmodels.models.denoiser.corrupt``.
      steps: before the first step with labels.
      share: of the tokens that are masked.
    """

    kind: Annotated[Denoising, Fixed]
    steps: Size
    share: Between = 0.5


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Checked):
    """One experiment, complete: data, model and training.

    Attributes:
      task: names what ``data`` are, and does not change them.
      model: names what ``classifier`` is, whose blocks have that mixer, or it from both sides,
        or, of "conv5" and "conv61", a convolution that sees so many tokens; likewise.
      preset: what this config was made from.
      data: which data.
      lengths: the padded lengths, increasing; the last one holds the longest row. Padding is
        masked everywhere, so that they change the speed only.
      classifier: the model, or what encodes each of two inputs.
      train: the training; its seed also orders the batches.
      interaction: what the head sees of two encodings, see ``MatcherConfig``; None for one input.
      minutes: the training time that ``train.steps`` were chosen to take on the machine at hand;
        None where nothing was timed.
      pretrain: what the model learns from inputs alone before it is trained; None for nothing.
    """

    task: Annotated[Task, Fixed]
    model: Annotated[Model, Fixed]
    preset: Annotated[Preset, Fixed]
    data: TaskConfig
    lengths: tuple[Size, ...]
    classifier: ClassifierConfig
    train: TrainConfig
    interaction: Interaction | None = None
    minutes: Annotated[Positive | None, Fixed] = None
    pretrain: PretrainConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        published = TASKS[self.task]
        fixed = {name: getattr(published, name) for name in _FIXED if hasattr(published, name)}
        if not isinstance(self.data, type(published)) or any(
            getattr(self.data, name) != value for name, value in fixed.items()
        ):
            raise ValueError(f"task={self.task!r} does not have data={self.data}")
        backbone = self.classifier.backbone
        sides = (m.local if isinstance(m, BidirectionalConfig) else m for m in backbone.mixers)
        if {side.mixer for side in sides} != {_MIXERS.get(self.model, self.model)}:
            raise ValueError(
                f"model={self.model!r} is not what layout={backbone.layout} consists of"
            )
        causal = all(m.causal for m in backbone.mixers) and self.classifier.pooling != "class"
        if self.pretrain is not None and self.pretrain.kind == "causal" and not causal:
            raise ValueError(
                f"pretrain.kind='causal', but model={self.model!r} sees the tokens that it would "
                "predict: take 'masked'"
            )
        self._check_data()
        self._check_interface(INTERFACES[self.task])

    def _check_interface(self, interface: Interface) -> None:
        """The model takes what the data are."""
        needed = {"num_classes": interface.classes, "vocabulary_size": interface.vocabulary}
        for name, least in needed.items():
            size = getattr(self.classifier, name)
            if least is None and size is not None:
                raise ValueError(
                    f"classifier.{name}={size}, but task={self.task!r} has real inputs: take None"
                )
            if least is not None and (size is None or size < least):
                raise ValueError(
                    f"classifier.{name}={size} is too small for task={self.task!r}, which has "
                    f"{least}"
                )
        if (self.interaction is None) != (interface.parts == 1):
            raise ValueError(
                f"interaction={self.interaction!r}, but task={self.task!r} has {interface.parts} "
                "inputs: take None for one, 'nli' or 'concat' for two"
            )

    def _check_data(self) -> None:
        """What is trained on, selected by and tested on is there and whole."""
        data, lengths = self.data, self.lengths
        if not lengths or any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(f"lengths={lengths} must be increasing, and at least one")
        if self.classifier.window is not None and self.train.mesh.seq > 1:
            raise ValueError(
                f"classifier.window={self.classifier.window} cuts rows that one device has whole: "
                "take train.mesh.seq=1"
            )
        if lengths[-1] < data.longest:
            limit = getattr(data, "max_length", None)
            shorter = "" if limit is None else f", or change data.max_length={limit}"
            raise ValueError(
                f"lengths={lengths} would cut rows of up to {data.longest} tokens: end with that "
                f"or more{shorter}"
            )
        if not getattr(data, "validation", 1) and self.train.select != "last":
            raise ValueError(
                f"data.validation=0 leaves nothing for train.select={self.train.select!r}: hold "
                "some out, or take train.select='last'"
            )
        if not getattr(data, "test", 1):
            raise ValueError("data.test=0 leaves nothing to test on")
        rows = getattr(data, "train", self.train.batch_size)
        if self.train.batch_size > rows:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is more than data.train={rows}"
            )

    @property
    def name(self) -> str:
        """``<task>-<model>-<preset>[-masked][-window<n>][-<m>min]-seed<k>``: of the run directory
        and of the result; "masked" or "causal" is how it is pretrained."""
        parts: list[str] = [self.task, self.model, self.preset]
        parts += [] if self.pretrain is None else [self.pretrain.kind]
        parts += [] if self.classifier.window is None else [f"window{self.classifier.window}"]
        parts += [] if self.minutes is None else [f"{self.minutes:g}min"]
        return "-".join([*parts, f"seed{self.train.seed}"])
