"""Needles in a haystack, one of RULER's tests, with tokens in place of its texts.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", 2024
(arXiv:2404.06654), section 3.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.data.recall.filler import STATES, markov, scattered
from seqmodels.ranges import Size

_WORDS = 32
_NEEDLE, _IS, _ASK = range(STATES, STATES + 3)
_FIRST = STATES + 3
_SECOND = _FIRST + _WORDS
_DIGITS = _SECOND + _WORDS


@dataclasses.dataclass(frozen=True)
class NeedlesConfig(RecallConfig):
    """Needles ``[needle] key [is] value`` among other tokens; at the end ``[ask] key [is] value``.

    A key is two words, a value some digits; the digits of the answer are asked for one by one.

    Attributes:
      length: L.
      keys: different keys in the row; those that are not asked for are there to confuse.
      values: of each key, all of which are the answer, in the order of the row.
      queries: keys that are asked for, one question after another.
      digits: of a value.
      haystack: "repeat", one phrase over and over; "markov", of random transitions; "needles", as
        many other needles as there is room for.
    """

    task: ClassVar[str] = "needles"

    length: Size = 256
    keys: Size = 1
    values: Size = 1
    queries: Size = 1
    digits: Size = 7
    haystack: Literal["repeat", "markov", "needles"] = "markov"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries > self.keys:
            refuse(self, "queries", f"at most keys={self.keys}")
        least = self._needle * self.keys * self.values + self._questions
        if self.length < least:
            refuse(self, "length", f"at least {least}, all needles and questions")
        if self._all_keys > _WORDS**2:
            refuse(self, "length", f"shorter: it needs more than the {_WORDS**2} keys there are")

    @property
    def _needle(self) -> int:
        return 4 + self.digits

    @property
    def _questions(self) -> int:
        return self.queries * (4 + self.values * self.digits) - 1

    @property
    def _all_keys(self) -> int:
        if self.haystack != "needles":
            return self.keys
        room = self.length - self._questions
        return room // self._needle - self.keys * (self.values - 1)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return _DIGITS + 10

    @property
    def chance(self) -> float:
        return 0.1

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        words = np.stack(np.divmod(rng.choice(_WORDS**2, self._all_keys, replace=False), _WORDS), 1)
        keys = [[_FIRST + a, _SECOND + b] for a, b in words.tolist()]
        owners = [*range(self.keys)] * self.values + [*range(self.keys, len(keys))]
        owners = rng.permutation(owners).tolist()
        values = (_DIGITS + rng.integers(0, 10, (len(owners), self.digits))).tolist()
        needles = [
            [_NEEDLE, *keys[owner], _IS, *value]
            for owner, value in zip(owners, values, strict=True)
        ]
        rest = self.length - self._questions - self._needle * len(needles)
        filler = np.arange(rest) % STATES if self.haystack != "markov" else markov(rng, rest)
        context = scattered(rng, filler, needles)
        asked: list[int] = []
        counted: list[bool] = []
        for key in rng.permutation(self.keys)[: self.queries].tolist():
            answer = [
                d
                for owner, value in zip(owners, values, strict=True)
                if owner == key
                for d in value
            ]
            asked += [_ASK, *keys[key], _IS, *answer]
            counted += [*[False] * 4, *[True] * len(answer)]
        row = completion(context, asked[:4], asked[4:])
        mask = np.concatenate([np.zeros(len(context), bool), counted])[1:]
        return dataclasses.replace(row, mask=mask)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        known: dict[tuple[int, ...], list[int]] = {}
        answers = np.zeros(len(inputs), np.int64)
        words = inputs.tolist()
        for t, word in enumerate(words):
            if word == _NEEDLE:
                known.setdefault(tuple(words[t + 1 : t + 3]), []).extend(
                    words[t + 4 : t + 4 + self.digits]
                )
            elif word == _ASK:
                found = known.get(tuple(words[t + 1 : t + 3]), [])[: len(words) - t - 3]
                answers[t + 3 : t + 3 + len(found)] = found
        return answers

    def longer(self, multiple: int) -> "NeedlesConfig":
        return dataclasses.replace(self, length=self.length * multiple)
