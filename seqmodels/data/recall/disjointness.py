"""Set disjointness: two lists share one token; which?

Arora et al., "Just read twice: closing the recall gap for recurrent language models", 2024
(arXiv:2407.05483), section 4: what must be remembered is the first list, so that the order matters.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.ranges import Size

_FIRST, _SECOND, _ANSWER, _SPECIAL = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class DisjointnessConfig(RecallConfig):
    """``[first] A [second] C [answer]``, where A and C have one token in common.

    Attributes:
      first, second: tokens of A and of C.
      vocabulary: different tokens; a half, drawn anew for each row, may be in A, the rest in C.
    """

    task: ClassVar[str] = "disjointness"

    first: Size = 8
    second: Size = 32
    vocabulary: Size = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 * max(self.first, self.second)
        if self.vocabulary < least:
            refuse(self, "vocabulary", f"at least twice the longer list, {least}")

    @property
    def tokens(self) -> int:
        return self.first + self.second + 3

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary + _SPECIAL

    @property
    def chance(self) -> float:
        return 1 / min(self.first, self.second)

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        ids = _SPECIAL + rng.permutation(self.vocabulary)
        a = ids[: self.first]
        c = ids[self.vocabulary // 2 :][: self.second].copy()
        common = rng.choice(a)
        c[rng.integers(self.second)] = common
        return completion([_FIRST, *a, _SECOND, *c], [_ANSWER], [common])

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        words = inputs.tolist()
        middle, end = words.index(_SECOND), words.index(_ANSWER)
        (common,) = set(words[1:middle]) & set(words[middle + 1 : end])
        return np.full(len(words), common)

    def longer(self, multiple: int) -> "DisjointnessConfig":
        return dataclasses.replace(self, first=self.first * multiple, second=self.second * multiple)
