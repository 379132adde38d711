"""Padded batches of variable-length sequences, grouped by length, with a checkpointable position.

A batch is a dict of numpy arrays:

    inputs       (B, L) int32    token ids, 0 on padding
    segment_ids  (B, L) int32    1 on tokens, 0 on padding
    labels       (B,)   int32
    weights      (B,)   float32  1, or 0 for a row that only fills up the last evaluation batch
    index        (B,)   int32    the example's position in its split

Real values are `(B, L, C)` float32 instead of ids, 0 on padding; where an example is a pair, inputs
and segment ids are `(B, 2, L)`. `L` is one of the given `lengths`, the smallest that holds the
batch's longest row, so there are as many shapes to compile as lengths. Rows longer than the last
length keep their first tokens.
"""

import sys
from collections.abc import Sequence

import grain
import numpy as np

from seqmodels.data.examples import Examples

Batch = dict[str, np.ndarray]

_EPOCHS_REMEMBERED = 2  # prefetching looks one epoch ahead at most


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    lengths: Sequence[int],
    window: int = 50,
    prefetch: int = 16,
    own: np.ndarray | None = None,
) -> grain.IterDataset[Batch]:
    """Batches without end, epoch after epoch, each epoch in its own order.

    An epoch is shuffled, sorted by length within windows of `window` batches, cut into batches,
    and the batches are shuffled. The last partial batch is left out (of the shuffled epoch, so
    they are other examples each time). Everything follows from `seed` and the batch's number:
    `iter(...)` has `get_state()` and `set_state(state)`, where the state is a JSON-able dict, and
    restoring it takes no replay.

    Args:
      lengths: the padded lengths, increasing.
      window: how many batches are grouped by length together; 1 means not at all.
      prefetch: batches made ahead in threads; 0 makes them on demand.
      own: the rows of each batch that are made here, `(b,)` of 0 .. B - 1: what one of several
        processes reads; default all. Which batches there are, how long they are padded and the
        state do not depend on it.

    Raises:
      ValueError: an argument is out of range, or there are fewer examples than `batch_size`.
    """
    _check(batch_size, lengths)
    for name, value, least in (("seed", seed, 0), ("window", window, 1), ("prefetch", prefetch, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if batch_size > len(examples):
        raise ValueError(f"batch_size={batch_size} is more than the {len(examples)} examples")
    batches = TrainBatches(examples, batch_size, seed, tuple(lengths), window, own)
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    return grain.MapDataset.source(batches).to_iter_dataset(options)


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    lengths: Sequence[int],
    own: np.ndarray | None = None,
) -> grain.MapDataset[Batch]:
    """Batches that hold each example once, longest first; has `len()` and can be iterated again.

    The last batch is filled up with repetitions of its last example, of weight 0. `own` is as in
    `train_batches`.

    Raises:
      ValueError: an argument is out of range, or there are no examples.
    """
    _check(batch_size, lengths)
    if not len(examples):
        raise ValueError("there are no examples to evaluate")
    return grain.MapDataset.source(EvalBatches(examples, batch_size, tuple(lengths), own))


def batches_per_epoch(examples: Examples, batch_size: int) -> int:
    """The number of training batches in an epoch."""
    return len(examples) // batch_size


class TrainBatches:
    """Random access to the endless sequence of training batches; see `train_batches`."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        lengths: tuple[int, ...],
        window: int,
        own: np.ndarray | None = None,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self.window = window
        self.own = own
        self._plans: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sys.maxsize  # what grain takes for endless

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, batches_per_epoch(self.examples, self.batch_size))
        rows = self.plan(epoch)[place]
        return make_batch(self.examples, rows, self.lengths, self.own)

    def plan(self, epoch: int) -> np.ndarray:
        """The rows of each batch of an epoch, `(batches, batch_size)` int64."""
        # Threads may race here; they then compute the same plan twice.
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make_plan(epoch)
            kept = sorted(self._plans.items())[1 - _EPOCHS_REMEMBERED :]
            self._plans = dict([*kept, (epoch, plan)])
        return plan

    def _make_plan(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        count = batches_per_epoch(self.examples, self.batch_size)
        order = rng.permutation(len(self.examples))[: count * self.batch_size]
        lengths = self.examples.lengths[order]
        windows = np.arange(len(order)) // (self.window * self.batch_size)
        grouped = order[np.lexsort((lengths, windows))]
        return rng.permutation(grouped.reshape(count, self.batch_size))


class EvalBatches:
    """Random access to the evaluation batches; see `eval_batches`."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        lengths: tuple[int, ...],
        own: np.ndarray | None = None,
    ) -> None:
        self.examples = examples
        self.own = np.arange(batch_size) if own is None else own
        self.batch_size = batch_size
        self.lengths = lengths
        self._order = np.argsort(-examples.lengths, kind="stable")

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        rows = self._order[number * self.batch_size :][: self.batch_size]
        filled = np.pad(rows, (0, self.batch_size - len(rows)), mode="edge")
        batch = make_batch(self.examples, filled, self.lengths, self.own)
        batch["weights"][self.own >= len(rows)] = 0
        return batch


def make_batch(
    examples: Examples, rows: np.ndarray, lengths: Sequence[int], own: np.ndarray | None = None
) -> Batch:
    """The examples at `rows`, or at `rows[own]`, padded to the smallest of `lengths` that holds all
    of `rows`."""
    parts, channels = examples.parts, examples.tokens.shape[1:]
    sequences = rows[:, None] * parts + np.arange(parts)
    starts, ends = examples.offsets[sequences], examples.offsets[sequences + 1]
    kept = np.minimum(ends - starts, lengths[-1])
    length = lengths[np.searchsorted(lengths, kept.max())]
    mine = slice(None) if own is None else own
    rows, starts, kept = rows[mine], starts[mine].reshape(-1), kept[mine].reshape(-1)
    segment_ids = (np.arange(length) < kept[:, None]).astype(np.int32)
    inputs = np.zeros((len(starts), length, *channels), np.float32 if channels else np.int32)
    for row, start, size in zip(inputs, starts, kept, strict=True):
        row[:size] = examples.as_inputs(examples.tokens[start : start + size])
    side_by_side = (len(rows), parts) if parts > 1 else (len(rows),)
    return {
        "inputs": inputs.reshape(*side_by_side, length, *channels),
        "segment_ids": segment_ids.reshape(*side_by_side, length),
        "labels": examples.labels[rows].astype(np.int32),
        "weights": np.ones(len(rows), np.float32),
        "index": rows.astype(np.int32),
    }


def _check(batch_size: int, lengths: Sequence[int]) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not lengths or lengths[0] < 1 or any(np.diff(lengths) <= 0):
        raise ValueError(f"lengths={tuple(lengths)} must be positive and increasing")
