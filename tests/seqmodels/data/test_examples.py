"""Examples: laid end to end, selected, and refused when the arrays do not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmodels.data.examples import Examples, Scaling, TaskData, check_disjoint

ROWS = [[5], [1, 2, 3], [9, 9], [4, 4, 4, 4]]


def make(rows=ROWS):
    return Examples.from_sequences([np.array(row) for row in rows], list(range(len(rows))))


def test_items():
    examples = make()
    assert len(examples) == 4
    item = examples[1]
    assert item["inputs"].tolist() == [1, 2, 3]
    assert item["inputs"].dtype == np.int32
    assert (item["label"], item["index"]) == (1, 1)
    assert examples.lengths.tolist() == [1, 3, 2, 4]
    for index in (-1, 4):
        with pytest.raises(IndexError, match=str(index)):
            examples[index]


@given(st.lists(st.integers(0, 3)))
def test_select(rows):
    selected = make().select(np.array(rows, int))
    assert [selected[i]["inputs"].tolist() for i in range(len(rows))] == [ROWS[i] for i in rows]
    assert selected.labels.tolist() == rows


@pytest.mark.parametrize(
    ("tokens", "offsets", "labels", "problem"),
    [
        ([1, 2], [0, 1, 2], [0], "1 labels need one more offset, got 3"),
        ([1, 2], [0, 2, 2], [0, 0], "must increase"),
        ([1, 2], [0, 1], [0], "number of tokens, 2"),
        ([1, 2], [1, 2], [0], "must increase from 0"),
        ([1.5], [0, 1], [0], "tokens must be a 1-D integer array"),
        ([[1]], [0, 1], [0], "tokens must be a 1-D integer array"),
    ],
)
def test_arrays_that_do_not_fit(tokens, offsets, labels, problem):
    with pytest.raises(ValueError, match=problem):
        Examples(np.array(tokens), np.array(offsets), np.array(labels))


@pytest.mark.parametrize(
    ("rows", "labels", "problem"),
    [
        ([[1, 5]], [0], r"toy: token ids of the train split are in \[1, 5\].*\[1, 5\)"),
        ([[0, 4]], [0], r"token ids of the train split are in \[0, 4\]"),
        ([[1]], [2], r"labels of the train split are in \[2, 2\], they must be in \[0, 2\)"),
        ([[1]], [-1], r"labels of the train split are in \[-1, -1\]"),
    ],
)
def test_ids_and_labels_out_of_range_are_refused(rows, labels, problem):
    train = Examples.from_sequences([np.array(row) for row in rows], labels)
    empty = Examples.from_sequences([], [])
    with pytest.raises(ValueError, match=problem):
        TaskData("toy", train, empty, empty, vocabulary_size=5, num_classes=2)


REALS = Scaling((1.0, 0.0), (2.0, 4.0))


def pairs_of_rows():
    """Two examples of two parts each."""
    tokens = np.array([1, 2, 3, 4, 5, 6], np.uint8)
    return Examples(tokens, np.array([0, 1, 3, 5, 6]), np.array([0, 1]), parts=2)


def test_pairs():
    examples = pairs_of_rows()
    assert [part.tolist() for part in examples[0]["inputs"]] == [[1], [2, 3]]
    assert [part.tolist() for part in examples[1]["inputs"]] == [[4, 5], [6]]
    assert examples.lengths.tolist() == [2, 2]
    swapped = examples.select(np.array([1, 0]))
    assert [part.tolist() for part in swapped[1]["inputs"]] == [[1], [2, 3]]
    assert [part.tolist() for part in examples.between(1, 2)[0]["inputs"]] == [[4, 5], [6]]


def test_real_values():
    values = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    examples = Examples.of_arrays(values, np.array([1, 0]), REALS)
    np.testing.assert_array_equal(examples[1]["inputs"], [[2.5, 1.75], [3.5, 2.25], [4.5, 2.75]])
    assert examples[1]["inputs"].dtype == np.float32
    part = examples.between(1, 2)
    assert np.shares_memory(part.tokens, examples.tokens)
    np.testing.assert_array_equal(part[0]["inputs"], examples[1]["inputs"])
    np.testing.assert_array_equal(
        examples.select(np.array([1]))[0]["inputs"], examples[1]["inputs"]
    )


def test_what_an_example_is_must_be_the_same_everywhere():
    reals = Examples.of_arrays(np.zeros((1, 3, 2), np.uint8), np.array([0]), REALS)
    for train, test, vocabulary in ((make([[1]]), reals, 5), (reals, reals, 5)):
        with pytest.raises(ValueError, match=r"another kind|real values a scaling"):
            TaskData("toy", train, train, test, vocabulary, 2)
    with pytest.raises(ValueError, match="2 labels need one more offset, got 4 for 2 parts each"):
        Examples(np.ones(3, np.uint8), np.arange(4), np.array([0, 0]), parts=2)


def test_mixed_up_splits_are_refused():
    train, test = make([[1, 2], [3], [4]]), make([[5], [1, 2]])
    data = TaskData("toy", train, make([[6]]), test, 7, 3)
    message = r"toy: 1 of the 2 examples of the test split.*example 1 is example 0 of the train"
    with pytest.raises(ValueError, match=message):
        check_disjoint(data)
    check_disjoint(data, known=0.5)
    check_disjoint(TaskData("toy", train, make([[6]]), make([[5], [2, 1]]), 7, 3))
    a, b = pairs_of_rows(), pairs_of_rows()
    shifted = Examples(b.tokens, np.array([0, 2, 3, 5, 6]), b.labels, parts=2)
    assert len({*a.fingerprints(), *shifted.fingerprints()}) == 3  # other parts, other pairs
