"""RegBench: the next letter of strings of an automaton that only the strings themselves tell of.

Akyürek, Wang, Kim & Andreas, "In-Context Language Learning: Architectures and Algorithms", 2024
(arXiv:2401.12973). Differences: rows are filled with strings to their length; duplicates and splits
are told apart by the automaton itself, which the authors' code does not do.
"""

import dataclasses
import hashlib
from typing import ClassVar, Literal

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, refuse
from seqmodels.ranges import Size

Automaton = tuple[dict[int, int], ...]
"""For each state, the letters that may come and the states that they lead to; 0 is the first."""

_SHARES = 8  # of all automata, one for validation and one for the test


@dataclasses.dataclass(frozen=True)
class RegBenchConfig(RecallConfig):
    """Strings of one random automaton a row, with ``|`` after each; automata of splits differ.

    The loss is at every letter. Counted are those whose string began as an earlier one did, which
    went on: then the strings say what may come, and any letter that the automaton allows is right.

    Attributes:
      length: L.
      letters: different ones.
      fewest, most: states of an automaton before equal ones are merged.
      fewest_letters: of an automaton.
      degree: most letters that a state allows.
      longest: letters of the longest string; lengths are uniform from 1.
      counted: "told", see above; or "all" letters, also those that nothing says so far.
    """

    task: ClassVar[str] = "regbench"

    length: Size = 1024
    letters: Size = 18
    fewest: Size = 4
    most: Size = 12
    fewest_letters: Size = 4
    degree: Size = 3
    longest: Size = 49
    counted: Literal["told", "all"] = "told"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.fewest <= self.most:
            refuse(self, "fewest", f"in [2, most={self.most}]")
        if not self.degree <= self.fewest_letters <= self.letters:
            refuse(self, "fewest_letters", f"in [degree={self.degree}, letters={self.letters}]")
        if self.length < 2 * self.longest + 2:
            least = 2 * self.longest + 2
            refuse(self, "length", f"at least {least}, two of the longest strings")

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def vocabulary_size(self) -> int:
        return self.letters + 1

    @property
    def chance(self) -> float:
        return (1 + self.degree) / 2 / self.letters

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        automaton = self.automaton(rng, split)
        bar, size = self.letters, self.length + 1
        tokens = np.full(size, bar, np.int32)
        allowed = np.zeros((size, self.vocabulary_size), bool)
        place = 0
        while place < size:
            state = 0
            for _ in range(min(int(rng.integers(1, self.longest + 1)), size - place)):
                choices = list(automaton[state])
                allowed[place, choices] = True
                tokens[place] = choices[rng.integers(len(choices))]
                state = automaton[state][int(tokens[place])]
                place += 1
            place += 1  # the bar
        letters = tokens[1:] != bar
        told = _continuations(tokens[:-1], bar) >= 0
        return Example(
            inputs=tokens[:-1],
            targets=tokens[1:],
            mask=letters & told if self.counted == "told" else letters,
            trained=letters,
            allowed=allowed[1:],
        )

    def automaton(self, rng: np.random.Generator, split: Split) -> Automaton:
        """A random automaton of the split, without states that are equal or out of reach."""
        while True:
            found = minimal(self._draw(rng))
            share = int.from_bytes(hashlib.blake2b(repr(found).encode(), digest_size=4).digest())
            belongs = {0: "validation", 1: "test"}.get(share % _SHARES, "train")
            if belongs == split and len(found) > 1:
                return found

    def _draw(self, rng: np.random.Generator) -> Automaton:
        states = int(rng.integers(self.fewest, self.most + 1))
        alphabet = rng.choice(
            self.letters, rng.integers(self.fewest_letters, self.letters + 1), replace=False
        )
        automaton = []
        for state in range(states):
            degree = int(rng.integers(1, min(self.degree, states - 1) + 1))
            letters = sorted(rng.choice(alphabet, degree, replace=False).tolist())
            others = rng.choice(states - 1, degree, replace=False)
            targets = (others + (others >= state)).tolist()
            automaton.append(dict(zip(letters, targets, strict=True)))
        return tuple(automaton)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """Strings that begin alike lead to one state: says the next letter of an earlier one."""
        strings = [""]
        answers = []
        for token in inputs.tolist():
            if token == self.letters:
                strings.append("")
            else:
                strings[-1] += chr(token)
            now = strings[-1]
            earlier = (s for s in strings[:-1] if s.startswith(now) and len(s) > len(now))
            answers.append(ord(next(earlier, chr(0))[len(now) :][:1] or chr(0)))
        return np.array(answers)

    def longer(self, multiple: int) -> "RegBenchConfig":
        """So many times the strings."""
        return dataclasses.replace(self, length=self.length * multiple)


def minimal(automaton: Automaton) -> Automaton:
    """The smallest equal automaton, its states numbered in the order in which they are met."""
    classes = [0] * len(automaton)
    while True:
        kinds = [
            (classes[state], tuple((a, classes[b]) for a, b in sorted(edges.items())))
            for state, edges in enumerate(automaton)
        ]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        refined = [numbers[kind] for kind in kinds]
        if len(numbers) == len(set(classes)):
            break
        classes = refined
    order, merged = {classes[0]: 0}, []
    waiting = [0]
    while waiting:
        edges = {}
        for letter, target in sorted(automaton[waiting.pop(0)].items()):
            if classes[target] not in order:
                order[classes[target]] = len(order)
                waiting.append(target)
            edges[letter] = order[classes[target]]
        merged.append(edges)
    return tuple(merged)


def _continuations(inputs: np.ndarray, bar: int) -> np.ndarray:
    """``(L,)``: after each token a letter that followed its string's beginning before, or -1."""
    seen: dict[tuple[int, int], int] = {}  # node and letter -> node
    after: dict[int, int] = {}
    found = np.full(len(inputs), -1)
    node = 0
    for t, token in enumerate(inputs.tolist()):
        if token == bar:
            node = 0
        else:
            after.setdefault(node, token)
            node = seen.setdefault((node, token), len(seen) + 1)
        found[t] = after.get(node, -1)
    return found
