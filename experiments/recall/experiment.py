"""What an experiment is: one config of a synthetic task, a model of one mixer, and its training."""

import dataclasses
import typing
from typing import Annotated, Literal

import numpy as np
from tyro.conf import Fixed

from experiments.recall.mixers import BOTH_SIDES, VARIANTS
from seqmodels.data.recall import TASKS, TaskConfig
from seqmodels.data.recall.base import generator
from seqmodels.mixers import JRTConfig
from seqmodels.models import LanguageModelConfig
from seqmodels.ranges import Checked, Size
from seqmodels.training.config import TrainConfig

Preset = Literal["tiny", "cpu", "paper"]

# Fields of the data that tell tasks with the same kind of data apart.
_FIXED = ("kind", "group", "steps", "selective", "haystack")


def context(data: TaskConfig) -> int:
    """Tokens of a row before its questions; 0 where a task asks while it goes on."""
    return data.example(generator(0, "train", 0)).context


def holds_answers(data: TaskConfig) -> bool:
    """Whether rows go on with their answers: a model that sees all of a row has but to copy them.

    Told by examples: of bits or group elements some are what follows by chance, at the end of an
    answer something else follows.
    """
    follows: list[bool] = []
    for number in range(8):
        row = data.example(generator(0, "train", number))
        counted = row.mask[:-1]
        follows.extend(row.inputs[1:][counted] == row.targets[:-1][counted])
    return len(follows) > 0 and bool(np.mean(follows) > 0.7)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Checked):
    """One experiment, complete.

    Attributes:
      task: names what ``data`` are, and does not change them.
      mixer: name of the mixer in ``model``, or of a variant of one; likewise.
      size: of the mixer's state, see ``experiments.recall.mixers.mixer_config``; likewise.
      preset: the name this config was made from.
      data: the task's generator.
      repeats: how often the context stands in each row, in training and in the test.
      multiples: lengths of the test, as multiples of the trained one.
      eval_examples: rows of a test at the trained length; of longer ones there are fewer.
      model: the model.
      train: the training; its seed is that of the examples too.
    """

    task: Annotated[str, Fixed]
    mixer: Annotated[str, Fixed]
    size: Annotated[Size, Fixed]
    preset: Annotated[Preset, Fixed]
    data: TaskConfig
    repeats: Size
    multiples: tuple[Size, ...]
    eval_examples: Size
    model: LanguageModelConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        published = TASKS.get(self.task)
        fixed = {name: getattr(published, name) for name in _FIXED if hasattr(published, name)}
        if type(self.data) is not type(published) or any(
            getattr(self.data, name) != value for name, value in fixed.items()
        ):
            raise ValueError(f"task={self.task!r} does not have data={self.data}")
        layout = self.model.backbone.layout
        if set(layout) != {VARIANTS.get(self.mixer, (self.mixer,))[0]}:
            raise ValueError(f"mixer={self.mixer!r} is not what layout={layout} consists of")
        for mixer in self.model.backbone.mixers:
            if isinstance(mixer, JRTConfig):
                self._check_prefix(mixer.prefix)
            elif self.mixer in BOTH_SIDES:
                self._check_answers()
            elif not mixer.causal:
                raise ValueError(f"mixer={self.mixer!r} must be causal: set bidirectional to False")
        if self.model.vocabulary_size < self.data.vocabulary_size:
            raise ValueError(
                f"model.vocabulary_size={self.model.vocabulary_size} is too small for "
                f"task={self.task!r}, which has {self.data.vocabulary_size}"
            )
        if 1 not in self.multiples:
            raise ValueError(f"multiples={self.multiples} must have 1, the trained length")

    def _check_prefix(self, prefix: int) -> None:
        """What the encoder reads must not hold answers, which stand behind the context."""
        given = self.repeats * context(self.data)
        if prefix > given:
            raise ValueError(
                f"mixer={self.mixer!r}: prefix={prefix} must be at most the {given} tokens that "
                f"task={self.task!r} has before its questions"
            )

    def _check_answers(self) -> None:
        if holds_answers(self.data):
            raise ValueError(
                f"mixer={self.mixer!r} sees the answers of task={self.task!r}, whose rows go on "
                "with them; take a causal mixer, or a task such as mqar or parity"
            )

    @property
    def name(self) -> str:
        """``<task>-<mixer>-<size>-<preset>-seed<k>``: of the run directory and of the result."""
        twice = f"-{self.repeats}times" if self.repeats > 1 else ""
        return f"{self.task}{twice}-{self.mixer}-{self.size}-{self.preset}-seed{self.train.seed}"

    def tests(self) -> dict[int, TaskConfig]:
        """The task at each multiple of the trained length that it has."""
        found = {}
        for multiple in self.multiples:
            try:
                longer = self.data if multiple == 1 else self.data.longer(multiple)
            except ValueError:  # e.g. a vocabulary that is too small
                continue
            if longer.vocabulary_size <= self.model.vocabulary_size:
                found[multiple] = typing.cast(TaskConfig, longer)
        return found
