"""Variable tracking, one of RULER's tests: which names lead to a value?

Hsieh et al., "RULER", 2024 (arXiv:2404.06654), section 3, with tokens in place of its texts.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, completion, refuse
from seqmodels.data.recall.filler import STATES, markov, scattered
from seqmodels.ranges import Size

_VAR, _IS, _ASK = range(STATES, STATES + 3)
_NAMES = STATES + 3


@dataclasses.dataclass(frozen=True)
class TracingConfig(RecallConfig):
    """``[var] X1 [is] value``, ``[var] X2 [is] X1``, .. among other tokens, then ``[ask] value``.

    The answer is all names of the chain, in their order. Statements of different chains are mixed;
    those of one stay in order.

    Attributes:
      length: L.
      chains: chains in a row; one of them is asked for.
      hops: names of a chain, less one.
      names: different names; there are as many values.
    """

    task: ClassVar[str] = "tracing"

    length: Size = 256
    chains: Size = 2
    hops: Size = 4
    names: Size = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        used = self.chains * (self.hops + 1)
        if self.names < used:
            refuse(self, "names", f"at least chains * (hops + 1) = {used}")
        least = 4 * used + self.hops + 2
        if self.length < least:
            refuse(self, "length", f"at least {least}, all statements and the answer")

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return _NAMES + 2 * self.names

    @property
    def chance(self) -> float:
        return 1 / (self.chains * (self.hops + 1))

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        size = self.hops + 1
        drawn = rng.choice(self.names, self.chains * size, replace=False).reshape(-1, size)
        names = (_NAMES + drawn).tolist()
        values = _NAMES + self.names + rng.choice(self.names, self.chains, replace=False)
        made = [0] * self.chains
        statements = []
        for chain in rng.permutation(np.repeat(np.arange(self.chains), size)).tolist():
            place = made[chain]
            source = names[chain][place - 1] if place else int(values[chain])
            statements.append([_VAR, names[chain][place], _IS, source])
            made[chain] += 1
        rest = self.length - 4 * len(statements) - size - 1
        context = scattered(rng, markov(rng, rest), statements)
        asked = int(rng.integers(self.chains))
        return completion(context, [_ASK, values[asked]], names[asked])

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        words = inputs.tolist()
        source = {words[t + 1]: words[t + 3] for t, word in enumerate(words) if word == _VAR}
        value = words[words.index(_ASK) + 1]

        def root(name: int) -> int:
            while name in source:
                name = source[name]
            return name

        chain = [name for name in source if root(name) == value]  # in the order of the row
        answers = np.zeros(len(words), np.int64)
        answers[-len(chain) :] = chain
        return answers

    def longer(self, multiple: int) -> "TracingConfig":
        return dataclasses.replace(self, length=self.length * multiple)
