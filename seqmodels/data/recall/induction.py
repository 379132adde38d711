"""Induction heads: say what followed a trigger when it comes again.

Olsson et al., "In-context Learning and Induction Heads", 2022; Fu et al., "Hungry Hungry Hippos",
2022 (arXiv:2212.14052), section 3; the form that is tested at other lengths is that of Gu & Dao,
"Mamba", 2023, section 4.1.2.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class InductionConfig(RecallConfig):
    """Random tokens, somewhere among them a trigger and a payload; at the end the trigger again.

    Ids: the ``alphabet``, trigger.

    Attributes:
      length: L.
      alphabet: different random tokens.
      payload: tokens after the trigger that are asked for, each after the one before it.
    """

    task: ClassVar[str] = "induction"

    length: Size = 256
    alphabet: Size = 16
    payload: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 * self.payload + 1
        if self.length < least:
            refuse(self, "length", f"at least 2 * payload + 1 = {least}, for two triggers")

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return self.alphabet + 1

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        trigger, size = self.alphabet, self.length - self.payload
        context = rng.integers(0, self.alphabet, size)
        place = rng.integers(0, size - self.payload)
        context[place] = trigger
        return completion(context, [trigger], context[place + 1 : place + 1 + self.payload])

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        first, last = np.flatnonzero(inputs == self.alphabet)
        answers = np.zeros(len(inputs), np.int64)
        for t in range(last, len(inputs)):
            answers[t] = inputs[first + 1 + t - last]
        return answers

    def longer(self, multiple: int) -> "InductionConfig":
        return dataclasses.replace(self, length=self.length * multiple)
