"""Common and frequent words, the two tests of RULER that count.

Hsieh et al., "RULER", 2024 (arXiv:2404.06654), section 3, with tokens in place of its words. Where
words stand is drawn anew for every row, which the authors' code does not do.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class CommonWordsConfig(RecallConfig):
    """A few words that come often among many that come seldom, in random order; which are they?

    The answer is the common words by their ids, ascending: a set has no order of its own. Ids: the
    words, ``[ask]``, padding at the front.

    Attributes:
      length: L.
      common: number of common words.
      often, seldom: how many times each common word and each other word stands in the row.
      words: different words.
    """

    task: ClassVar[str] = "common_words"

    length: Size = 256
    common: Size = 4
    often: Size = 12
    seldom: Size = 2
    words: Size = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seldom >= self.often:
            refuse(self, "seldom", f"below often={self.often}")
        least = self.common * self.often + self.common
        if self.length < least:
            refuse(self, "length", f"at least {least}, the common words and the answer")
        if self.words < self.common + self._others:
            refuse(self, "words", f"at least {self.common + self._others} for length={self.length}")

    @property
    def _others(self) -> int:
        return (self.length - self.common * self.often - self.common) // self.seldom

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return self.words + 2

    @property
    def chance(self) -> float:
        return 1 / (self.common + self._others)

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        drawn = rng.choice(self.words, self.common + self._others, replace=False)
        common, others = np.sort(drawn[: self.common]), drawn[self.common :]
        row = np.concatenate([np.repeat(common, self.often), np.repeat(others, self.seldom)])
        rest = self.length - self.common - len(row)
        padding = np.full(rest, self.words + 1)
        return completion(np.concatenate([padding, rng.permutation(row)]), [self.words], common)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        counts: dict[int, int] = {}
        words = inputs.tolist()
        end = words.index(self.words)
        for word in words[:end]:
            if word < self.words:
                counts[word] = counts.get(word, 0) + 1
        answers = np.zeros(len(words), np.int64)
        answers[end:] = sorted(word for word, times in counts.items() if times == self.often)
        return answers

    def longer(self, multiple: int) -> "CommonWordsConfig":
        """More other words; the common ones come as often as before."""
        return dataclasses.replace(self, length=self.length * multiple)


@dataclasses.dataclass(frozen=True)
class FrequentWordsConfig(RecallConfig):
    """Words whose counts fall as a power of their rank, in random order; which come most often?

    The first rank is noise; the answer is ranks 2 to 4, in their order. Rank k has
    ``floor(N k^-exponent / zeta(exponent))`` words of N. Ids: the words, noise, ``[ask]``.

    Attributes:
      length: L.
      exponent: of the fall.
      words: different words.
    """

    task: ClassVar[str] = "frequent_words"

    length: Size = 256
    exponent: Positive = 2.0
    words: Size = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent <= 1:
            refuse(self, "exponent", "above 1")
        counts = self._counts()
        if len(counts) < 3 or len(set(counts[:4])) < min(len(counts), 4):
            refuse(self, "length", "longer: ranks 2 to 5 do not differ in how often they come")
        if self.words < len(counts):
            refuse(self, "words", f"at least {len(counts)} for length={self.length}")

    def _counts(self) -> list[int]:
        """How often ranks 2, 3, .. come, down to 1."""
        size, ranks = self.length - 3, np.arange(1, 10_000, dtype=float)
        zeta = float(np.sum(ranks**-self.exponent))
        counts = np.floor(size * ranks[1:] ** -self.exponent / zeta).astype(int)
        return [count for count in counts.tolist() if count > 0]

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return self.words + 2

    @property
    def chance(self) -> float:
        return 1 / len(self._counts())

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        counts = self._counts()
        drawn = rng.choice(self.words, len(counts), replace=False)
        noise = np.full(self.length - 3 - sum(counts), self.words)
        row = rng.permutation(np.concatenate([np.repeat(drawn, counts), noise]))
        return completion(row, [self.words + 1], drawn[:3])

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        words = inputs.tolist()
        end = words.index(self.words + 1)
        seen = [word for word in words[:end] if word < self.words]
        ranked = sorted(set(seen), key=seen.count, reverse=True)
        answers = np.zeros(len(words), np.int64)
        answers[end : end + 3] = ranked[:3]
        return answers

    def longer(self, multiple: int) -> "FrequentWordsConfig":
        return dataclasses.replace(self, length=self.length * multiple)
