"""Multi-query associative recall: key-value pairs, then some of the keys again.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023
(arXiv:2312.04927), section 4 and appendix.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, refuse
from seqmodels.ranges import Positive, Size

_RESERVED = 16


@dataclasses.dataclass(frozen=True)
class MQARConfig(RecallConfig):
    """``k1 v1 .. kn vn`` and then each key once more, among noise, where its value is the target.

    Keys are in ``[1, vocabulary / 2)``, values in ``[vocabulary / 2, vocabulary)``.

    Attributes:
      length: L, an even number.
      pairs: n; ``4 n <= L``.
      vocabulary: number of keys and values together, an even number.
      power: gaps between a pair and its query are drawn with ``P(i) ~ i^(power - 1)``: 1 for
        uniform ones, small for short ones.
      noise: tokens between the queries: "any", which may look like keys and values, or "reserved"
        ones, which are neither.
    """

    task: ClassVar[str] = "mqar"

    length: Size = 64
    pairs: Size = 4
    vocabulary: Size = 8192
    power: Positive = 0.01
    noise: Literal["any", "reserved"] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 2 or self.length < 4 * self.pairs:
            refuse(self, "length", f"even and at least 4 * pairs = {4 * self.pairs}")
        if self.vocabulary % 2 or self.vocabulary // 2 - 1 < self.pairs:
            least = 2 * self.pairs + 2
            refuse(self, "vocabulary", f"even and at least {least} for pairs={self.pairs}")

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary + (_RESERVED if self.noise == "reserved" else 0)

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        n, half = self.pairs, self.vocabulary // 2
        keys = 1 + rng.choice(half - 1, n, replace=False)
        values = half + rng.choice(half, n, replace=False)
        low, high = (
            (self.vocabulary, self.vocabulary_size) if self.noise == "reserved" else (0, half * 2)
        )
        inputs = rng.integers(low, high, self.length, dtype=np.int32)
        inputs[0 : 2 * n : 2], inputs[1 : 2 * n : 2] = keys, values
        weights = np.arange(1, self.length // 2 - n + 1) ** (self.power - 1.0)
        gaps = rng.choice(len(weights), n, replace=False, p=weights / weights.sum())
        places = 2 * n + 2 * gaps
        inputs[places] = keys
        targets, mask = np.zeros(self.length, np.int32), np.zeros(self.length, bool)
        targets[places], mask[places] = values, True
        return Example(inputs, targets, mask, context=2 * n)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        known = dict(zip(inputs[0::2][: self.pairs], inputs[1::2][: self.pairs], strict=True))
        return np.array([known.get(token, 0) for token in inputs])

    def longer(self, multiple: int) -> "MQARConfig":
        return dataclasses.replace(self, length=self.length * multiple)
