"""Copying strings, and looking up what follows a part of one.

Jelassi et al., "Repeat After Me: Transformers are Better than State Space Models at Copying", 2024
(arXiv:2402.01032). Queries occur once in their string; in the authors' code they need not.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.ranges import Size

Kind = Literal["copy", "duplicate", "prefix", "suffix"]


@dataclasses.dataclass(frozen=True)
class CopyingConfig(RecallConfig):
    """A string x of random letters, and then all or a part of it.

    "copy" ``$ x | x .``; "duplicate", the same where a part of x stands in it twice; "prefix"
    ``$ g | x | answer .`` and "suffix" ``$ x | g answer .``, where g occurs once in x and the
    answer follows it there. Ids: the ``alphabet``, ``$``, ``|``, ``.`` and padding at the end.

    Attributes:
      longest: letters of the longest string.
      shortest: of the shortest; lengths are uniform in between.
      alphabet: different letters.
      kind: see above.
      gram: letters of g, and of what stands twice.
      answer: letters of the answer.
    """

    task: ClassVar[str] = "copying"

    longest: Size = 20
    shortest: Size = 5
    alphabet: Size = 26
    kind: Kind = "copy"
    gram: Size = 3
    answer: Size = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"copy": 1, "duplicate": 2 * self.gram}.get(self.kind, self.gram + self.answer)
        if not least <= self.shortest <= self.longest:
            refuse(self, "shortest", f"in [{least}, longest={self.longest}] for kind={self.kind!r}")
        # Half of the parts that there can be: strings without one that occurs once are rare then.
        most = self.alphabet**self.gram // 2
        if self._asks and self.longest > most:
            refuse(self, "longest", f"at most alphabet^gram / 2 = {most}: parts must occur once")

    @property
    def _asks(self) -> bool:
        return self.kind in ("prefix", "suffix")

    @property
    def tokens(self) -> int:
        asked = {"prefix": self.gram + self.answer + 1, "suffix": self.gram + self.answer}
        return self.longest + 2 + asked.get(self.kind, self.longest)

    @property
    def vocabulary_size(self) -> int:
        return self.alphabet + 4

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        begin, bar, end, padding = range(self.alphabet, self.alphabet + 4)
        size = rng.integers(self.shortest, self.longest + 1)
        x = rng.integers(0, self.alphabet, size)
        if self.kind == "duplicate":
            source, place = rng.permutation(size // self.gram)[:2] * self.gram
            x[place : place + self.gram] = x[source : source + self.gram]
        if not self._asks:
            context, question, answer = [begin, *x], [bar], x
        else:
            place = None
            while place is None:
                place = self._place(rng, x)
                if place is None:
                    x = rng.integers(0, self.alphabet, size)
            g, answer = x[place : place + self.gram], x[place + self.gram :][: self.answer]
            context, question = [begin, *x], [bar, *g]
            if self.kind == "prefix":
                context, question = [begin, *g, bar, *x], [bar]
        return completion(context, question, [*answer, end], self.tokens, padding)

    def _place(self, rng: np.random.Generator, x: np.ndarray) -> int | None:
        """Where a part begins that occurs once and has an answer after it; None for nowhere."""
        grams = np.lib.stride_tricks.sliding_window_view(x, self.gram)
        codes = grams @ (self.alphabet ** np.arange(self.gram))
        _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
        once = counts[inverse] == 1
        places = np.flatnonzero(once[: len(x) - self.gram - self.answer + 1])
        return int(rng.choice(places)) if len(places) else None

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        end = self.alphabet + 2
        text = "".join(chr(int(token)) for token in inputs)
        bars = [t for t, token in enumerate(inputs) if token == self.alphabet + 1]
        if self.kind == "prefix":
            query, string, start = text[1 : bars[0]], text[bars[0] + 1 : bars[1]], bars[1]
        else:
            query, string, start = "", text[1 : bars[0]], bars[0]
        if self.kind == "suffix":
            query = text[start + 1 : start + 1 + self.gram]
            start += self.gram
        begin = string.index(query) + len(query)
        size = self.answer if self._asks else len(string)
        answer = [*string[begin : begin + size], chr(end)]
        answers = np.zeros(len(inputs), np.int64)
        for t, letter in enumerate(answer):
            answers[start + t] = ord(letter)
        return answers

    def longer(self, multiple: int) -> "CopyingConfig":
        """Strings of exactly so many times the longest one."""
        size = self.longest * multiple
        return dataclasses.replace(self, shortest=size, longest=size)
