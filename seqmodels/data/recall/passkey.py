"""Passkey retrieval: a number hidden in a text that repeats itself.

Mohtashami & Jaggi, "Landmark Attention", 2023 (arXiv:2305.16300); in the form of Chen et al.,
"Stuffed Mamba: State Collapse and State Capacity of RNN-Based Long-Context Modeling", 2024
(arXiv:2410.07145), with tokens in place of its sentences.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class PasskeyConfig(RecallConfig):
    """Filler, in place of a part of it ``[key is] d.. [remember] d.. [is key]``, and the question.

    The filler is one phrase over and over; ids: digits, the phrase, the four words. The answer is
    asked for digit by digit. Copying the only digits is enough, so that it is an easy needle: see
    ``NeedlesConfig`` for harder ones.

    Attributes:
      length: L.
      digits: of the passkey.
      phrase: tokens of the filler.
    """

    task: ClassVar[str] = "passkey"

    length: Size = 1024
    digits: Size = 5
    phrase: Size = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < self._needle + self.digits:
            least = self._needle + self.digits
            refuse(self, "length", f"at least {least}, the needle and the answer")

    @property
    def _needle(self) -> int:
        return 3 + 2 * self.digits

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return 10 + self.phrase + 4

    @property
    def chance(self) -> float:
        return 0.1

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        key_is, remember, is_key, what = range(10 + self.phrase, 14 + self.phrase)
        digits = rng.integers(0, 10, self.digits)
        size = self.length - self._needle - self.digits
        filler = 10 + np.arange(size) % self.phrase
        place = self.phrase * rng.integers(0, size // self.phrase + 1)
        needle = [key_is, *digits, remember, *digits, is_key]
        return completion(np.insert(filler, place, needle), [what], digits)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        words = inputs.tolist()
        begin = words.index(10 + self.phrase) + 1
        asked = words.index(10 + self.phrase + 3)
        answers = np.zeros(len(words), np.int64)
        answers[asked : asked + self.digits] = inputs[begin : begin + self.digits]
        return answers

    def longer(self, multiple: int) -> "PasskeyConfig":
        return dataclasses.replace(self, length=self.length * multiple)
