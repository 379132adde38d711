"""Labelled token sequences of any length, and the three splits of a task."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scaling:
    """How stored numbers become inputs: `(value - centre) / width`, for each channel or for all."""

    centre: tuple[float, ...]
    width: tuple[float, ...]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """`(..., C)` of any dtype -> float32."""
        centre, width = (np.asarray(x, np.float32) for x in (self.centre, self.width))
        return (values.astype(np.float32) - centre) / width


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences of one split, stored end to end.

    Attributes:
      tokens: `(T,)` unsigned integers, all sequences one after another, where 0 is padding and
        absent; or, with `scaling`, `(T, C)` integers that stand for real values.
      offsets: `(n parts + 1,)` int64; sequence i is `tokens[offsets[i] : offsets[i + 1]]`.
      labels: `(n,)` int32.
      parts: sequences of one example, which follow one another: 2 where inputs come in pairs.
      scaling: what the real values are; None for token ids.

    Raises:
      ValueError: the arrays do not fit together.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    parts: int = 1
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        tokens, offsets, labels = self.tokens, self.offsets, self.labels
        dimensions = {"tokens": 1 if self.scaling is None else 2, "offsets": 1, "labels": 1}
        for name, number in dimensions.items():
            array = getattr(self, name)
            if array.ndim != number or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"{name} must be a {number}-D integer array, got shape {array.shape}, "
                    f"{array.dtype}"
                )
        if len(offsets) != len(labels) * self.parts + 1:
            raise ValueError(
                f"{len(labels)} labels need one more offset, got {len(offsets)}"
                + (f" for {self.parts} parts each" if self.parts > 1 else "")
            )
        if offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(np.diff(offsets) <= 0):
            raise ValueError(
                f"offsets must increase from 0 to the number of tokens, {len(tokens)}, "
                f"with at least one token a sequence; they run {offsets[0]} .. {offsets[-1]}"
            )

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[np.ndarray], labels: Sequence[int], dtype: Any = np.uint8
    ) -> "Examples":
        """Lays 1-D integer arrays end to end."""
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        tokens = np.concatenate([np.zeros(0, dtype), *sequences], dtype=dtype, casting="unsafe")
        return cls(tokens, offsets_of(lengths), np.asarray(labels, np.int32).reshape(-1))

    @classmethod
    def of_arrays(cls, values: np.ndarray, labels: np.ndarray, scaling: Scaling) -> "Examples":
        """Rows of one length: `(n, L, C)` integers, which stand for real values."""
        offsets = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
        flat = values.reshape(-1, values.shape[2])
        return cls(flat, offsets, labels.astype(np.int32), scaling=scaling)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"inputs": ..., "label": int, "index": int}` of one example.

        Its inputs are `(length,)` int32, `(length, C)` float32, or a list of `parts` of these.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in [0, {len(self)})")
        inputs = [
            self.tokens[self.offsets[i] : self.offsets[i + 1]]
            for i in range(index * self.parts, (index + 1) * self.parts)
        ]
        inputs = [self.as_inputs(values) for values in inputs]
        return {
            "inputs": inputs if self.parts > 1 else inputs[0],
            "label": int(self.labels[index]),
            "index": int(index),
        }

    def as_inputs(self, values: np.ndarray) -> np.ndarray:
        """Token ids as int32, or real values as float32."""
        return values.astype(np.int32) if self.scaling is None else self.scaling(values)

    @property
    def lengths(self) -> np.ndarray:
        """`(n,)` int64, the number of tokens of each example, of its longest part."""
        return np.diff(self.offsets).reshape(-1, self.parts).max(axis=1)

    def select(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        sequences = (np.asarray(rows)[:, None] * self.parts + np.arange(self.parts)).reshape(-1)
        lengths = np.diff(self.offsets)[sequences]
        offsets = offsets_of(lengths)
        starts = np.repeat(self.offsets[:-1][sequences] - offsets[:-1], lengths)
        tokens = self.tokens[starts + np.arange(offsets[-1])]
        return replace(self, tokens=tokens, offsets=offsets, labels=self.labels[rows])

    def between(self, start: int, end: int) -> "Examples":
        """The examples from `start` up to `end`, without a copy."""
        offsets = self.offsets[start * self.parts : end * self.parts + 1]
        tokens = self.tokens[offsets[0] : offsets[-1]]
        return replace(
            self, tokens=tokens, offsets=offsets - offsets[0], labels=self.labels[start:end]
        )

    def fingerprints(self) -> list[bytes]:
        """A short hash of each example's inputs; equal ones have the same."""
        hashes = []
        for i in range(len(self)):
            offsets = self.offsets[i * self.parts : (i + 1) * self.parts + 1]
            values = self.tokens[offsets[0] : offsets[-1]].tobytes()
            digest = hashlib.blake2b(values, digest_size=16)
            digest.update((offsets - offsets[0]).tobytes())
            hashes.append(digest.digest())
        return hashes


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """`(n,)` lengths -> `(n + 1,)` int64 offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class TaskData:
    """A classification task: three disjoint splits and what a model must know about them.

    `vocabulary_size` counts the padding id 0, and is None where inputs are real values;
    `description` says where the data come from.

    Raises:
      ValueError: a split has a token outside of the vocabulary, padding among its tokens, or a
        label that is no class; or splits differ in what an example is.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    vocabulary_size: int | None
    num_classes: int
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split, examples in self.splits.items():
            facts = (examples.parts, examples.scaling)
            if facts != (self.train.parts, self.train.scaling):
                raise ValueError(f"{self.name}: the {split} split is of another kind than training")
            if (examples.scaling is None) != (self.vocabulary_size is not None):
                raise ValueError(
                    f"{self.name}: vocabulary_size={self.vocabulary_size}, scaling="
                    f"{examples.scaling}: token ids have a vocabulary, real values a scaling"
                )
            self._check("labels", split, examples.labels, 0, self.num_classes)
            if self.vocabulary_size is not None:
                self._check("token ids", split, examples.tokens, 1, self.vocabulary_size)

    def _check(self, what: str, split: str, values: np.ndarray, least: int, end: int) -> None:
        if len(values) and not least <= values.min() <= values.max() < end:
            raise ValueError(
                f"{self.name}: {what} of the {split} split are in [{values.min()}, "
                f"{values.max()}], they must be in [{least}, {end})"
            )

    @property
    def splits(self) -> dict[str, Examples]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def check_disjoint(data: TaskData, known: float = 0.0) -> None:
    """Refuses splits that share examples.

    Args:
      data: the task.
      known: the share of a split that may be in an earlier one, in data that came that way.

    Raises:
      ValueError: names the splits, how many they share, and the first.
    """
    earlier: dict[bytes, tuple[str, int]] = {}
    for split, examples in data.splits.items():
        own = examples.fingerprints()
        shared = [i for i, each in enumerate(own) if each in earlier]
        if len(shared) > known * len(own):
            first, number = earlier[own[shared[0]]]
            raise ValueError(
                f"{data.name}: {len(shared)} of the {len(own)} examples of the {split} split are "
                f"in an earlier split too (example {shared[0]} is example {number} of the {first} "
                "split): the splits are mixed up, get the data anew"
            )
        for i, each in enumerate(own):
            earlier.setdefault(each, (split, i))
