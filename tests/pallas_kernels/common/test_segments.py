"""Segment ids to segment index, positions and step codes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.common import segments
from pallas_kernels.common.segments import CONTINUE, ENTER, RESET, SKIP


def test_a_repeated_id_is_another_document():
    ids = jnp.array([[1, 1, 2, 1, 0], [5, 5, 5, 5, 5], [0, 0, 0, 0, 0]], jnp.int32)
    segment_index = segments.index(ids)
    np.testing.assert_array_equal(
        segment_index, [[1, 1, 2, 3, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        segments.positions(segment_index), [[0, 1, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        segments.starts(segment_index)[0], [True, False, True, True, False]
    )


def test_step_codes_in_both_directions():
    segment_index = jnp.array([[1, 1, 2, 3, 0]], jnp.int32)
    np.testing.assert_array_equal(
        segments.step_codes(segment_index)[0], [ENTER, CONTINUE, RESET, RESET, SKIP]
    )
    np.testing.assert_array_equal(
        segments.step_codes(segment_index, reverse=True)[0], [CONTINUE, RESET, RESET, ENTER, SKIP]
    )


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), max_size=6))
def test_positions_count_from_each_start(documents):
    ids = [i for i, n in documents for _ in range(n)]
    ids += [0] * (31 - len(ids))  # one length: compiled once
    expected, count, before = [], 0, 0
    for i in ids:
        count = count + 1 if i == before and i else 0
        expected.append(count)
        before = i
    segment_index = segments.index(jnp.array([ids], jnp.int32))
    np.testing.assert_array_equal(segments.positions(segment_index)[0], expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 0, 1]], "real token after padding at 2"),
        ([[1, -2, 0]], "got -2 in row 0 at token 1"),
        ([1, 1], r"shape \(B, L\)"),
        ([[1.0, 1.0]], "integers"),
    ],
)
def test_check_names_what_is_wrong(ids, message):
    with pytest.raises(ValueError, match=message):
        segments.check(np.array(ids))


def test_check_accepts_packed_rows():
    segments.check(np.array([[3, 3, 1, 0], [0, 0, 0, 0], [1, 2, 1, 2]]))
