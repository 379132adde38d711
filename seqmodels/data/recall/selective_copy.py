"""Selective copying: say the tokens that stand scattered among noise, in their order.

Gu & Dao, "Mamba", 2023 (arXiv:2312.00752), section 3.1; the copying memory of Arjovsky et al. 2016
is the form whose tokens stand at known places.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, refuse
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class SelectiveCopyConfig(RecallConfig):
    """``length`` tokens of noise with ``items`` others among them, then as many markers.

    Ids: the ``alphabet``, noise, marker. The target at the i-th marker is the i-th token.

    Attributes:
      length: tokens before the markers.
      items: tokens to copy.
      alphabet: different ones.
      selective: they stand at random places; False, at the first ones, which a model that is the
        same at every token can do.
    """

    task: ClassVar[str] = "selective_copy"

    length: Size = 256
    items: Size = 16
    alphabet: Size = 16
    selective: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < self.items:
            refuse(self, "length", f"at least items={self.items}")

    @property
    def tokens(self) -> int:
        return self.length + self.items

    @property
    def vocabulary_size(self) -> int:
        return self.alphabet + 2

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        noise, marker = self.alphabet, self.alphabet + 1
        inputs = np.full(self.tokens, noise, np.int32)
        places = np.arange(self.items)
        if self.selective:
            places = np.sort(rng.choice(self.length, self.items, replace=False))
        content = rng.integers(0, self.alphabet, self.items)
        inputs[places] = content
        inputs[self.length :] = marker
        targets, mask = np.zeros(self.tokens, np.int32), inputs == marker
        targets[mask] = content
        return Example(inputs, targets, mask, context=self.length)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        seen: list[int] = []
        answers, said = [], 0
        for token in inputs.tolist():
            if token < self.alphabet:
                seen.append(token)
            said += token == self.alphabet + 1
            answers.append(seen[said - 1] if 0 < said <= len(seen) else 0)
        return np.array(answers)

    def longer(self, multiple: int) -> "SelectiveCopyConfig":
        return dataclasses.replace(self, length=self.length * multiple)
