"""Dataset decomposition: rows of many lengths, none of which holds more than one document.

Pouransari et al., "Dataset Decomposition: Faster LLM Training with Variable Sequence Length
Curriculum", NeurIPS 2024 (arXiv:2405.13226). Every document is cut into pieces of ``2^k + 1``
tokens, which make rows of ``2^k``; rows of one length form a bucket. A batch comes from one bucket
and has as many rows as make the same number of tokens in each.
"""

import dataclasses
import sys
from typing import Literal

import grain
import numpy as np

from seqmodels.data.text import Batch, Text, rows

Curriculum = Literal["uniform", "grow_linear", "grow_p2", "shrink_p2"]
"""Odds of the buckets, from the shortest rows to the longest of n: all 1; n, .., 2, 1; 2^(n-1), ..,
2, 1; or these the other way around. Where short rows are likelier they run out first, and rows grow
towards the end of a cycle; "grow_p2" is the authors' choice."""


def odds(curriculum: Curriculum, count: int) -> np.ndarray:
    """``(count,)``, from the shortest rows to the longest."""
    places = np.arange(count)
    return {
        "uniform": np.ones(count),
        "grow_linear": count - places.astype(float),
        "grow_p2": 2.0 ** (count - 1 - places),
        "shrink_p2": 2.0**places,
    }[curriculum]


def check_lengths(shortest: int, longest: int) -> None:
    """Raises ValueError unless both are powers of two, the first at most the second."""
    for name, value in (("shortest", shortest), ("length", longest)):
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two for a decomposition")
    if shortest > longest:
        raise ValueError(f"shortest={shortest} must be at most length={longest}, the longest rows")


def decompose(text: Text, shortest: int, longest: int, seed: int) -> dict[int, np.ndarray]:
    """Where the pieces of each length start.

    A document, with the boundaries at both of its ends, gives its longest piece first; one longer
    than ``longest`` gives pieces of all lengths, equal numbers of tokens of each in expectation. A
    tail shorter than the shortest piece is left out.

    Args:
      text: the documents.
      shortest, longest: lengths of rows, powers of two.
      seed: of the lengths that are drawn.

    Returns:
      Length of the rows -> ``(pieces,)`` int64; pieces share no token but a boundary between two
      documents.

    Raises:
      ValueError: see ``check_lengths``.
    """
    check_lengths(shortest, longest)
    low, high = shortest.bit_length() - 1, longest.bit_length() - 1
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, low, high])))
    weights = 2.0 ** (high - np.arange(low, high + 1))
    weights /= weights.sum()
    found: dict[int, list[int]] = {2**k: [] for k in range(low, high + 1)}
    ends = np.append(text.starts[1:], len(text.tokens) - 1)
    for start, end in zip(text.starts.tolist(), ends.tolist(), strict=True):
        while (rest := end + 1 - start) > shortest:
            k = (rest - 1).bit_length() - 1
            if k > high:
                k = low + int(rng.choice(len(weights), p=weights))
            found[2**k].append(start)
            start += 2**k + 1
    return {length: np.array(starts, np.int64) for length, starts in found.items()}


def train_batches(
    text: Text,
    *,
    shortest: int,
    longest: int,
    batch_size: int,
    curriculum: Curriculum = "grow_p2",
    seed: int = 0,
    prefetch: int = 8,
) -> grain.IterDataset[Batch]:
    """Batches without end, as those of ``seqmodels.data.text`` but for their shapes.

    A batch has ``batch_size * longest / length`` rows of ``length`` tokens. A cycle holds every
    piece once, but for those that fill no batch; a bucket is drawn with the odds of the curriculum
    times what it has left, and each cycle in its own order. Everything follows from ``seed`` and
    the batch's number: every host draws the same bucket.

    Raises:
      ValueError: an argument is out of range, or the text has not one batch.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1), ("seed", seed, 0), ("prefetch", prefetch, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    pieces = decompose(text, shortest, longest, seed)
    source = Cycles(text, pieces, batch_size * longest, curriculum, seed)
    if not source.batches:
        raise ValueError(
            f"the documents give not one batch of batch_size={batch_size} times length={longest} "
            "tokens; take a longer text, smaller values, or a smaller shortest"
        )
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    return grain.MapDataset.source(source).to_iter_dataset(options)


@dataclasses.dataclass(eq=False)
class Cycles:
    """Random access to the endless batches; see ``train_batches``.

    Attributes:
      text: the documents.
      pieces: length of rows -> where they start.
      tokens: of a batch.
      curriculum: odds of the buckets.
      seed: of the order.
    """

    text: Text
    pieces: dict[int, np.ndarray]
    tokens: int
    curriculum: Curriculum
    seed: int

    def __post_init__(self) -> None:
        self.counts = {
            length: len(starts) // (self.tokens // length) for length, starts in self.pieces.items()
        }
        self.batches = sum(self.counts.values())
        self._plans: dict[int, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return sys.maxsize  # what grain takes for endless

    def __getitem__(self, number: int) -> Batch:
        cycle, place = divmod(number, self.batches)
        starts = self.plan(cycle)[place]
        return rows(self.text, starts, self.tokens // len(starts))

    def plan(self, cycle: int) -> list[np.ndarray]:
        """Where the rows of each batch of a cycle start."""
        # Threads may race here; they then compute the same plan twice.
        plan = self._plans.get(cycle)
        if plan is None:
            plan = self._make_plan(cycle)
            kept = sorted(self._plans.items())[-1:]  # prefetching looks one cycle ahead at most
            self._plans = dict([*kept, (cycle, plan)])
        return plan

    def _make_plan(self, cycle: int) -> list[np.ndarray]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, cycle])))
        waiting = []
        for length, starts in self.pieces.items():
            count = self.counts[length]
            chosen = rng.permutation(starts)[: count * (self.tokens // length)]
            waiting.append(list(chosen.reshape(count, self.tokens // length)))
        weights = odds(self.curriculum, len(waiting))
        plan = []
        for _ in range(self.batches):
            left = weights * [len(bucket) for bucket in waiting]
            plan.append(waiting[rng.choice(len(waiting), p=left / left.sum())].pop())
        return plan
