"""Batches: contents, grouping by length, epochs, and an exact position."""

import itertools
import json
import re

import grain.python as grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.data import batches
from seqmodels.data.batches import eval_batches, make_batch, train_batches
from seqmodels.data.examples import Examples, Scaling

LENGTHS = (4, 8, 16)


def make(n, longest=16, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 100, rng.integers(1, longest + 1)) for _ in range(n)]
    return Examples.from_sequences(rows, rng.integers(0, 10, n).tolist())


EXAMPLES = make(103)


def stream(batch_size=5, seed=7, lengths=LENGTHS, examples=EXAMPLES, **options):
    return train_batches(examples, batch_size=batch_size, seed=seed, lengths=lengths, **options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(first, second):
    return first.keys() == second.keys() and all(
        np.array_equal(first[key], second[key]) and first[key].dtype == second[key].dtype
        for key in first
    )


def check_contents(batch, examples, lengths):
    """The batch holds the examples that its index names, cut and padded."""
    rows, length = batch["inputs"].shape
    kept = np.minimum(examples.lengths[batch["index"]], lengths[-1])
    assert length == min(bucket for bucket in lengths if bucket >= kept.max())
    for row in range(rows):
        example = examples[int(batch["index"][row])]
        assert np.array_equal(batch["inputs"][row, : kept[row]], example["inputs"][:length])
        assert not batch["inputs"][row, kept[row] :].any()
        ones = np.arange(length) < kept[row]
        assert np.array_equal(batch["segment_ids"][row], ones)
        assert batch["labels"][row] == example["label"]
    dtypes = {"inputs": "int32", "segment_ids": "int32", "labels": "int32"}
    dtypes |= {"weights": "float32", "index": "int32"}
    assert {key: str(value.dtype) for key, value in batch.items()} == dtypes


@given(n=st.integers(1, 40), size=st.integers(1, 12), longest=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_evaluation_covers_each_example_once(n, size, longest):
    examples = make(n, longest, seed=n)
    made = eval_batches(examples, batch_size=size, lengths=LENGTHS)
    for _ in range(2):  # it can be iterated again
        every = list(made)
        assert len(every) == len(made) == -(-n // size)
        for batch in every:
            check_contents(batch, examples, LENGTHS)
            assert len(batch["index"]) == size
        real = [batch["index"][batch["weights"] == 1] for batch in every]
        assert sorted(np.concatenate(real)) == list(range(n))
        assert set(np.concatenate([batch["weights"] for batch in every])) <= {0.0, 1.0}
        assert all(np.all(batch["weights"] == 1) for batch in every[:-1])


@given(size=st.integers(1, 40), window=st.integers(1, 9), longest=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_an_epoch_holds_no_example_twice_and_drops_less_than_a_batch(size, window, longest):
    examples = make(60, longest, seed=size)
    iterator = iter(stream(size, window=window, examples=examples, prefetch=0))
    for _ in range(3):
        epoch = take(iterator, batches.batches_per_epoch(examples, size))
        for batch in epoch:
            check_contents(batch, examples, LENGTHS)
            assert np.all(batch["weights"] == 1)
        seen = np.concatenate([batch["index"] for batch in epoch])
        assert len(set(seen)) == len(seen) == 60 - 60 % size


def test_epochs_and_seeds_differ_and_repeat():
    def indices(seed, epochs=2):
        every = take(iter(stream(seed=seed)), 20 * epochs)
        return np.array([batch["index"] for batch in every]).reshape(epochs, 100)

    first = indices(7)
    assert np.array_equal(first, indices(7))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], indices(8)[0])
    # What an epoch leaves out is not always the same.
    left_out = [frozenset(range(103)) - set(epoch) for epoch in indices(7, epochs=5)]
    assert len(set(left_out)) > 1


def test_rows_of_a_batch_are_of_similar_length():
    def padding(window):
        every = take(iter(stream(window=window, lengths=tuple(range(1, 17)))), 20)
        return 1 - np.mean(np.concatenate([batch["segment_ids"].ravel() for batch in every]))

    assert padding(20) < 0.5 * padding(1)


def test_batches_do_not_come_in_the_order_of_length():
    every = take(iter(stream(lengths=tuple(range(1, 17)))), 20)
    lengths = [batch["inputs"].shape[1] for batch in every]
    assert 3 < sum(b < a for a, b in itertools.pairwise(lengths)) < 16


@pytest.mark.parametrize("prefetch", [0, 16])
def test_resuming_at_every_step_continues_exactly(prefetch):
    def fresh():
        return iter(stream(batch_size=25, prefetch=prefetch))

    iterator, states, expected = fresh(), [], []
    for _ in range(11):  # 4 batches an epoch: across two of its ends
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    for step, state in enumerate(states):
        resumed = fresh()
        resumed.set_state(json.loads(state))
        assert all(
            equal(a, b) for a, b in zip(take(resumed, 11 - step), expected[step:], strict=True)
        )
    # The same iterator can be set back and forth.
    for step in (7, 0, 10):
        iterator.set_state(json.loads(states[step]))
        assert equal(next(iterator), expected[step])


def test_grains_own_check_of_checkpoints():
    limited = grain.experimental.LimitIterDataset(stream(batch_size=25), 6)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


def test_a_far_position_is_reached_without_replay(monkeypatch):
    planned = []
    plan = batches.TrainBatches._make_plan
    monkeypatch.setattr(
        batches.TrainBatches,
        "_make_plan",
        lambda self, epoch: planned.append(epoch) or plan(self, epoch),
    )
    iterator = iter(stream(prefetch=0))
    iterator.set_state({"next_index": 20 * 10**6 + 3})
    check_contents(next(iterator), EXAMPLES, LENGTHS)
    assert planned == [10**6]


def test_few_plans_are_remembered():
    source = batches.TrainBatches(EXAMPLES, 5, 0, LENGTHS, 50)
    for epoch in (0, 1, 2, 3, 1, 0, 5):
        assert np.array_equal(source.plan(epoch), source._make_plan(epoch))
        assert len(source._plans) <= 2


def test_labels_stay_with_their_rows_when_shorter_than_the_last_length():
    truncated = next(iter(stream(lengths=(3,))))
    assert truncated["inputs"].shape == (5, 3)
    check_contents(truncated, EXAMPLES, (3,))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 104}, "batch_size=104 is more than the 103 examples"),
        ({"seed": -1}, "seed=-1"),
        ({"window": 0}, "window=0"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"lengths": ()}, "lengths=() must be positive and increasing"),
        ({"lengths": (8, 4)}, "lengths=(8, 4) must be positive and increasing"),
        ({"lengths": (4, 4)}, "lengths=(4, 4) must"),
        ({"lengths": (0, 4)}, "lengths=(0, 4) must"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        stream(**options)


def test_nothing_to_evaluate():
    empty = Examples.from_sequences([], [])
    with pytest.raises(ValueError, match="no examples"):
        eval_batches(empty, batch_size=2, lengths=LENGTHS)


def test_batches_of_pairs():
    tokens = np.array([1, 2, 3, 4, 5, 6], np.uint8)
    examples = Examples(tokens, np.array([0, 1, 3, 5, 6]), np.array([7, 8]), parts=2)
    batch = make_batch(examples, np.array([1, 0]), (2, 4))
    assert batch["inputs"].tolist() == [[[4, 5], [6, 0]], [[1, 0], [2, 3]]]
    assert batch["segment_ids"].tolist() == [[[1, 1], [1, 0]], [[1, 0], [1, 1]]]
    assert batch["labels"].tolist() == [8, 7]


def test_batches_of_real_values():
    flat = np.array([[10], [20], [30]], np.int16)
    scaling = Scaling((10.0,), (5.0,))
    examples = Examples(flat, np.array([0, 1, 3]), np.array([0, 1]), scaling=scaling)
    batch = make_batch(examples, np.array([0, 1]), (3,))
    assert batch["inputs"].dtype == np.float32
    assert batch["inputs"].tolist() == [[[0], [0], [0]], [[2], [4], [0]]]  # padding is 0 as well
    assert batch["segment_ids"].tolist() == [[1, 0, 0], [1, 1, 0]]
