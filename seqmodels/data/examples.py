"""Labelled token sequences of any length, and the three splits of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences of one split, stored end to end.

    Attributes:
      tokens: `(T,)` unsigned integers, all sequences one after another. 0 is padding and absent.
      offsets: `(n + 1,)` int64; sequence i is `tokens[offsets[i] : offsets[i + 1]]`.
      labels: `(n,)` int32.

    Raises:
      ValueError: the arrays do not fit together.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        tokens, offsets, labels = self.tokens, self.offsets, self.labels
        for name, array in (("tokens", tokens), ("offsets", offsets), ("labels", labels)):
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"{name} must be a 1-D integer array, got shape {array.shape}, {array.dtype}"
                )
        if len(offsets) != len(labels) + 1:
            raise ValueError(f"{len(labels)} labels need one more offset, got {len(offsets)}")
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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"inputs": (length,) int32, "label": int, "index": int}` of one example."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in [0, {len(self)})")
        inputs = self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int32)
        return {"inputs": inputs, "label": int(self.labels[index]), "index": int(index)}

    @property
    def lengths(self) -> np.ndarray:
        """`(n,)` int64, the number of tokens of each sequence."""
        return np.diff(self.offsets)

    def select(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        starts = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Examples(self.tokens[starts + np.arange(offsets[-1])], offsets, self.labels[rows])


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """`(n,)` lengths -> `(n + 1,)` int64 offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class TaskData:
    """A classification task: three disjoint splits and what a model must know about them.

    `vocabulary_size` counts the padding id 0; `description` says where the data come from.

    Raises:
      ValueError: a split has a token outside of the vocabulary, padding among its tokens, or a
        label that is no class.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    vocabulary_size: int
    num_classes: int
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split, examples in self.splits.items():
            for what, values, least, end in (
                ("token ids", examples.tokens, 1, self.vocabulary_size),
                ("labels", examples.labels, 0, self.num_classes),
            ):
                if len(values) and not least <= values.min() <= values.max() < end:
                    raise ValueError(
                        f"{self.name}: {what} of the {split} split are in [{values.min()}, "
                        f"{values.max()}], they must be in [{least}, {end})"
                    )

    @property
    def splits(self) -> dict[str, Examples]:
        return {"train": self.train, "validation": self.validation, "test": self.test}
