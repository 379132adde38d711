"""Synthetic tasks of recall, copying, state tracking and counting, made on the fly.

    config = TASKS["mqar"]
    batch = next(iter(train_batches(config, seed=0, batch_size=32)))

A batch is a dict of numpy arrays:

    inputs       (B, L) int32
    targets      (B, L) int32    the answer at that position
    weights      (B, L) float32  1 where it is asked for, else 0
    segment_ids  (B, L) int32    1: rows have no padding that models must know of
    index        (B,)   int32    which examples
    allowed      (B, L, V) bool  only where several answers may be right, in evaluation

Example i of a split and a seed is always the same, whoever makes it, in whatever order.
"""

import dataclasses
import sys

import grain
import numpy as np

from seqmodels.data.recall.base import Example, RecallConfig, Split, generator, repeated
from seqmodels.data.recall.copying import CopyingConfig
from seqmodels.data.recall.disjointness import DisjointnessConfig
from seqmodels.data.recall.induction import InductionConfig
from seqmodels.data.recall.mqar import MQARConfig
from seqmodels.data.recall.passkey import PasskeyConfig
from seqmodels.data.recall.regbench import RegBenchConfig
from seqmodels.data.recall.ruler_needles import NeedlesConfig
from seqmodels.data.recall.ruler_tracing import TracingConfig
from seqmodels.data.recall.ruler_words import CommonWordsConfig, FrequentWordsConfig
from seqmodels.data.recall.selective_copy import SelectiveCopyConfig
from seqmodels.data.recall.state_tracking import StateTrackingConfig

Batch = dict[str, np.ndarray]

TaskConfig = (
    MQARConfig
    | SelectiveCopyConfig
    | InductionConfig
    | CopyingConfig
    | PasskeyConfig
    | StateTrackingConfig
    | RegBenchConfig
    | DisjointnessConfig
    | NeedlesConfig
    | TracingConfig
    | CommonWordsConfig
    | FrequentWordsConfig
)

TASKS: dict[str, TaskConfig] = {
    "mqar": MQARConfig(),
    "selective-copy": SelectiveCopyConfig(),
    "plain-copy": SelectiveCopyConfig(selective=False),
    "induction": InductionConfig(),
    "copy": CopyingConfig(),
    "copy-duplicate": CopyingConfig(kind="duplicate", shortest=6),
    "copy-prefix": CopyingConfig(kind="prefix", shortest=6),
    "copy-suffix": CopyingConfig(kind="suffix", shortest=6),
    "passkey": PasskeyConfig(),
    "parity": StateTrackingConfig(group="parity"),
    "s3": StateTrackingConfig(group="s3"),
    "a5": StateTrackingConfig(group="a5"),
    "a5-2steps": StateTrackingConfig(group="a5", steps=2),
    "s5": StateTrackingConfig(group="s5"),
    "s5-swaps": StateTrackingConfig(group="s5", moved=2),
    "regbench": RegBenchConfig(),
    "disjointness": DisjointnessConfig(),
    "disjointness-long-first": DisjointnessConfig(first=32, second=8),
    "niah-single": NeedlesConfig(),
    "niah-multikey": NeedlesConfig(keys=4),
    "niah-multikey-2": NeedlesConfig(haystack="needles"),
    "niah-multivalue": NeedlesConfig(values=4),
    "niah-multiquery": NeedlesConfig(keys=4, queries=4),
    "variable-tracking": TracingConfig(),
    "common-words": CommonWordsConfig(),
    "frequent-words": FrequentWordsConfig(),
}
"""Every task in about its published form; those from "niah-single" on are RULER's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Random access to the rows of a split.

    Attributes:
      config: the task.
      seed: of all examples.
      split: "train", "validation" or "test"; no two have an example in common by more than chance.
      count: how many there are; None for no end.
      repeats: times that the context stands in a row, see ``base.repeated``.
    """

    config: RecallConfig
    seed: int
    split: Split
    count: int | None = None
    repeats: int = 1

    def __len__(self) -> int:
        return sys.maxsize if self.count is None else self.count  # what grain takes for endless

    def example(self, index: int) -> Example:
        row = self.config.example(generator(self.seed, self.split, index), self.split)
        return row if self.repeats == 1 else repeated(row, self.repeats)

    def __getitem__(self, index: int) -> Batch:
        row = self.example(index)
        training = self.split == "train"
        asked = row.trained if training and row.trained is not None else row.mask
        fields: Batch = {
            "inputs": row.inputs.astype(np.int32),
            "targets": row.targets.astype(np.int32),
            "weights": asked.astype(np.float32),
            "segment_ids": np.ones(len(row.inputs), np.int32),
            "index": np.asarray(index % 2**31, np.int32),
        }
        if row.allowed is not None and not training:
            fields["allowed"] = row.allowed
        return fields


def train_batches(
    config: RecallConfig, *, seed: int, batch_size: int, repeats: int = 1, prefetch: int = 8
) -> grain.IterDataset[Batch]:
    """Batches without end; ``iter(...)`` has ``get_state()`` and ``set_state(state)``.

    Raises:
      ValueError: ``repeats`` is not 1 for a task without a context.
    """
    examples = Examples(config, seed, "train", repeats=repeats)
    examples.example(0)
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    return grain.MapDataset.source(examples).batch(batch_size).to_iter_dataset(options)


def eval_batches(
    config: RecallConfig,
    *,
    seed: int,
    examples: int,
    batch_size: int,
    split: Split = "validation",
    repeats: int = 1,
) -> grain.MapDataset[Batch]:
    """Batches of the first ``examples`` of a split, the last one as large as what is left.

    Raises:
      ValueError: ``repeats`` is not 1 for a task without a context.
    """
    source = Examples(config, seed, split, examples, repeats)
    source.example(0)
    return grain.MapDataset.source(source).batch(batch_size)


__all__ = ["TASKS", "Example", "Examples", "RecallConfig", "TaskConfig", "eval_batches",
           "train_batches"]  # fmt: skip
