"""Dataset decomposition: pieces of documents, their batches, and the order of their lengths."""

import itertools

import numpy as np
import pytest

from seqmodels.data import decomposition, text
from seqmodels.data.decomposition import decompose, odds, train_batches


def documents(count=40, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.ceil(rng.lognormal(4, 1, count)).astype(int)
    return text.encode([bytes(rng.integers(0, 256, size, np.uint8)) for size in sizes])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_pieces_are_within_documents_and_share_nothing():
    written = documents()
    pieces = decompose(written, 8, 64, seed=0)
    ends = [*written.starts[1:], len(written.tokens) - 1]
    used = np.zeros(len(written.tokens), int)
    for length, starts in pieces.items():
        for start in starts:
            document = np.searchsorted(written.starts, start, side="right") - 1
            assert start + length <= ends[document]
            used[start : start + length + 1] += 1
    boundaries = written.tokens == text.BOUNDARY  # the end of one document, the start of the next
    assert used[~boundaries].max() == 1
    assert used[boundaries].max() <= 2


def test_a_document_gives_its_longest_pieces_and_drops_its_tail():
    # With both boundaries 50 tokens: pieces of 33 and 17.
    pieces = decompose(text.encode([b"x" * 48]), 8, 64, seed=0)
    assert {k: v.tolist() for k, v in pieces.items()} == {8: [], 16: [33], 32: [0], 64: []}
    # 46: 33 and 9, and 4 are left.
    pieces = decompose(text.encode([b"x" * 44]), 8, 64, seed=0)
    assert {k: v.tolist() for k, v in pieces.items()} == {8: [33], 16: [], 32: [0], 64: []}
    assert not any(len(v) for v in decompose(text.encode([b"x" * 6]), 8, 64, seed=0).values())


def test_a_long_document_gives_equal_tokens_of_every_length():
    pieces = decompose(text.encode([b"x" * 400_000]), 8, 64, seed=0)
    tokens = np.array([length * len(starts) for length, starts in pieces.items()])
    shares = tokens / tokens.sum()
    assert np.all(np.abs(shares - 0.25) < 0.02)


def test_batches_have_one_length_and_equally_many_tokens():
    written = documents(200)
    options = {"shortest": 8, "longest": 64, "batch_size": 2}
    seen = set()
    for batch in take(iter(train_batches(written, **options)), 30):
        rows, length = batch["inputs"].shape
        assert rows * length == 2 * 64
        seen.add(length)
        assert np.all(batch["segment_ids"] == batch["segment_ids"][:, :1])
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert np.all(batch["inputs"][:, 1:] != text.BOUNDARY)
    assert len(seen) > 1


def test_a_cycle_has_every_piece_once_and_cycles_differ():
    written = documents(200)
    pieces = decompose(written, 8, 32, seed=0)
    source = decomposition.Cycles(written, pieces, 64, "grow_p2", seed=0)
    for length, starts in pieces.items():
        expected = len(starts) // (64 // length)
        found = [plan for plan in source.plan(0) if len(plan) == 64 // length]
        assert len(found) == expected > 0
        chosen = np.concatenate(found)
        assert len(set(chosen.tolist())) == len(chosen)
        assert set(chosen.tolist()) <= set(starts.tolist())
    first, second = ([plan.tolist() for plan in source.plan(cycle)] for cycle in (0, 1))
    assert first != second
    assert len(first) == len(second) == source.batches


def test_curricula_order_the_lengths():
    """By the mean place of the batches of long rows in a cycle."""
    assert odds("grow_p2", 3).tolist() == [4, 2, 1]
    assert odds("grow_linear", 3).tolist() == [3, 2, 1]
    assert odds("uniform", 3).tolist() == [1, 1, 1]
    assert odds("shrink_p2", 3).tolist() == [1, 2, 4]
    written = text.encode([b"x" * 100_000])
    pieces = decompose(written, 8, 64, seed=0)

    def place(curriculum):
        source = decomposition.Cycles(written, pieces, 128, curriculum, seed=0)
        return np.mean([i / source.batches for i, p in enumerate(source.plan(0)) if len(p) == 2])

    grow, linear, uniform, shrink = map(place, ("grow_p2", "grow_linear", "uniform", "shrink_p2"))
    assert grow > linear > uniform > shrink


def test_a_stream_of_batches_goes_on_where_it_was():
    options = {"shortest": 8, "longest": 32, "batch_size": 2, "seed": 4}
    written = documents(200)
    batches = iter(train_batches(written, **options))
    take(batches, 5)
    state = batches.get_state()
    expected = take(batches, 3)
    again = iter(train_batches(written, **options))
    again.set_state(state)
    for ours, theirs in zip(take(again, 3), expected, strict=True):
        np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest": 12}, "shortest=12 must be a power of two"),
        ({"longest": 48}, "length=48 must be a power of two"),
        ({"shortest": 128}, "shortest=128 must be at most length=64"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 10_000}, "not one batch of batch_size=10000 times length=64"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(documents(), **{"shortest": 8, "longest": 64, "batch_size": 2} | options)
