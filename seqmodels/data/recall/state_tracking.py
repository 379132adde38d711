"""State tracking: the product of all group elements so far.

Merrill, Petty & Sabharwal, "The Illusion of State in State-Space Models", 2024 (arXiv:2404.08819);
Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024
(arXiv:2411.12537).
"""

import dataclasses
import functools
import itertools
from typing import ClassVar, Literal

import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, refuse
from seqmodels.ranges import Size

Group = Literal["parity", "s3", "a5", "s5"]


@functools.cache
def elements(group: Group) -> tuple[tuple[int, ...], ...]:
    """The group's permutations in lexicographic order; the first is the identity."""
    if group == "parity":
        return ((0, 1), (1, 0))
    everything = itertools.permutations(range(3 if group == "s3" else 5))
    return tuple(p for p in everything if group != "a5" or _even(p))


def _even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0


def generators(group: Group, moved: int | None = None) -> np.ndarray:
    """Ids of the elements that leave all but at most ``moved`` places as they are; None: all."""
    members = elements(group)
    if moved is None:
        return np.arange(len(members))
    places = [sum(a != b for a, b in zip(member, members[0], strict=True)) for member in members]
    return np.flatnonzero(np.array(places) <= moved)


@functools.cache
def table(group: Group) -> np.ndarray:
    """``(G, G)`` int, ``table[g, h] = g h``: first h, then g, as permutations of places."""
    members = elements(group)
    number = {member: i for i, member in enumerate(members)}
    return np.array([[number[tuple(g[i] for i in h)] for h in members] for g in members])


@dataclasses.dataclass(frozen=True)
class StateTrackingConfig(RecallConfig):
    """Elements ``x_1 x_2 ..`` of a group; the target at t is ``x_1 .. x_t``.

    Ids: the elements, and a blank.

    Attributes:
      group: "parity" (2 elements), "s3" (6), "a5" (60, not solvable) or "s5" (120).
      length: elements in a row.
      moved: places that an element of a row moves at most, as in section 5.1 of Grazzi et al.: 2
        for swaps alone (parity, s3, s5), 3 for 3-cycles too; None for all elements. Products are of
        the whole group still.
      steps: tokens for each element: itself and ``steps - 1`` blanks, with the target at the last.
        A layer that makes one reflection a token has as many for each element.
      counted: how many of the last elements are counted; None for all.
    """

    task: ClassVar[str] = "state_tracking"

    group: Group = "a5"
    length: Size = 16
    moved: Size | None = None
    steps: Size = 1
    counted: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.counted is not None and self.counted > self.length:
            refuse(self, "counted", f"at most length={self.length}")
        if len(generators(self.group, self.moved)) < 2:
            refuse(self, "moved", f"at least {3 if self.group == 'a5' else 2} for {self.group}")

    @property
    def tokens(self) -> int:
        return self.length * self.steps

    @property
    def vocabulary_size(self) -> int:
        return len(elements(self.group)) + 1

    @property
    def chance(self) -> float:
        return 1 / len(elements(self.group))

    def example(self, rng: np.random.Generator, split: Split = "train") -> Example:
        size, products = len(elements(self.group)), table(self.group)
        drawn = rng.choice(generators(self.group, self.moved), self.length)
        inputs = np.full((self.length, self.steps), size, np.int32)
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        inputs[:, 0] = drawn
        targets[:, -1] = list(itertools.accumulate(drawn, lambda so_far, x: products[so_far, x]))
        mask[-(self.counted or self.length) :, -1] = True
        return Example(inputs.ravel(), targets.ravel(), mask.ravel())

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        members = elements(self.group)
        items = list(members[0])
        answers = []
        for token in inputs.tolist():
            if token < len(members):
                # The permuted things themselves: no table of products.
                items = [items[place] for place in members[token]]
            answers.append(members.index(tuple(items)))
        return np.array(answers)

    def longer(self, multiple: int) -> "StateTrackingConfig":
        """So many times the elements, of which the last ``length`` are counted."""
        return dataclasses.replace(self, length=self.length * multiple, counted=self.length)
