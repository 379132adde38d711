"""Examples: laid end to end, selected, and refused when the arrays do not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmodels.data.examples import Examples, TaskData

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
