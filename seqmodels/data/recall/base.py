"""The contract of the synthetic tasks: what an example is, and what a task's config can do."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, NoReturn

import numpy as np

from seqmodels.ranges import Checked

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row. ``targets[t]`` is what the model must say at position t, with no further shift.

    Attributes:
      inputs: ``(L,)`` int32 token ids.
      targets: ``(L,)`` int32; anything where ``mask`` and ``trained`` are False.
      mask: ``(L,)`` bool, the counted positions.
      context: number of leading tokens that hold what the rest of the row asks for; 0 where a task
        has no such part.
      trained: ``(L,)`` bool, the positions of the loss; None for the counted ones.
      allowed: ``(L, vocabulary)`` bool, every answer that is right; None for the target alone.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    context: int = 0
    trained: np.ndarray | None = None
    allowed: np.ndarray | None = None

    def right(self, answers: np.ndarray) -> np.ndarray:
        """``(L,)`` bool, the counted positions where the answers ``(L,)`` are right."""
        if self.allowed is None:
            return self.mask & (answers == self.targets)
        return self.mask & self.allowed[np.arange(len(answers)), answers]


@dataclasses.dataclass(frozen=True)
class RecallConfig(Checked):
    """Base of the tasks' configs, which are their generators."""

    task: ClassVar[str]

    @property
    def tokens(self) -> int:
        """L, the length of every row."""
        raise NotImplementedError

    @property
    def vocabulary_size(self) -> int:
        """Token ids, of inputs and of targets, are below it."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the answers that the task has."""
        raise NotImplementedError

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        """A row that is drawn from ``rng``; ``split`` matters where splits share nothing."""
        raise NotImplementedError

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """The oracle: right answers ``(L,)`` at the counted positions, from the inputs ``(L,)``
        alone; answer t reads inputs up to t. Shares no code with ``example``."""
        raise NotImplementedError

    def longer(self, multiple: int) -> "RecallConfig":
        """The same task, for a test, at so many times the length; all else is as it was.

        Raises:
          ValueError: there is none, e.g. because the vocabulary is too small for it.
        """
        raise NotImplementedError


def generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """The source of randomness of one example; no two share it."""
    entropy = np.random.SeedSequence([seed, SPLITS.index(split), index])
    return np.random.Generator(np.random.Philox(entropy))


def completion(
    context: Sequence[int | np.integer] | np.ndarray,
    question: Sequence[int | np.integer] | np.ndarray,
    answer: Sequence[int | np.integer] | np.ndarray,
    length: int | None = None,
    padding: int = 0,
) -> Example:
    """The row ``context question answer`` without its last token, whose answer is asked for.

    The first token of the answer is the target at the question's last token, and each of the others
    at the one before it, as in language modelling. ``length`` fills the row up with ``padding``.
    """
    whole = np.concatenate([np.asarray(p, np.int32) for p in (context, question, answer)])
    inputs, targets = whole[:-1], whole[1:]
    mask = np.arange(len(inputs)) >= len(inputs) - len(answer)
    if length is not None:
        fill = (0, length - len(inputs))
        inputs, targets = (
            np.pad(part, fill, constant_values=padding) for part in (inputs, targets)
        )
        mask = np.pad(mask, fill)
    return Example(inputs, targets, mask, context=len(context))


def repeated(example: Example, times: int) -> Example:
    """The row with its context so many times in a row, and the questions after the last one.

    "Just read twice" (Arora et al. 2024, arXiv:2407.05483): who reads for the second time knows
    what there is to look for.

    Raises:
      ValueError: the task has no context before its questions.
    """
    if example.context == 0:
        raise ValueError(
            f"repeats={times}: this task asks while it goes on and has no context to repeat; "
            "take repeats=1"
        )
    extra = (times - 1) * example.context

    def shifted(part: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((extra, *part.shape[1:]), part.dtype), part])

    return dataclasses.replace(
        example,
        inputs=np.concatenate(
            [np.tile(example.inputs[: example.context], times - 1), example.inputs]
        ),
        targets=shifted(example.targets),
        mask=shifted(example.mask),
        trained=None if example.trained is None else shifted(example.trained),
        allowed=None if example.allowed is None else shifted(example.allowed),
        context=times * example.context,
    )


def refuse(config: Checked, field: str, rule: str) -> NoReturn:
    """Raises ValueError that names the config, the field, its value and what it must be."""
    raise ValueError(f"{type(config).__name__}: {field}={getattr(config, field)!r} must be {rule}")
