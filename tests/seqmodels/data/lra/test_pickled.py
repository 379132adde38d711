"""Pickles taken apart: as Python reads them where they are data, and refused where they are not."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmodels.data.lra import pickled

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(min_size=1, max_size=300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_data(value, protocol):
    assert pickled.read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays(dtype, protocol):
    array = np.arange(12).astype(dtype).reshape(3, 4)
    found = pickled.read(pickle.dumps({"data": array}, protocol))["data"]
    assert found.dtype == dtype
    assert np.array_equal(found, array)


def test_bytes_of_python_2():
    # {'data': 'ab', 'labels': [1, 2]} as Python 2 wrote it
    content = b"\x80\x02}q\x00(U\x04dataq\x01U\x02abq\x02U\x06labelsq\x03]q\x04(K\x01K\x02eu."
    assert pickled.read(content) == {b"data": b"ab", b"labels": [1, 2]}


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_run(tmp_path, protocol):
    content = pickle.dumps({"data": Harmful(str(tmp_path / "made"))}, protocol)
    with pytest.raises(ValueError, match=r"mkdir|no instruction"):
        pickled.read(content)
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists()  # so it would have been


@pytest.mark.parametrize(
    "value", [np.zeros(2, np.float32), np.zeros(2, object), np.dtype("u1"), os.getcwd, Harmful]
)
def test_what_is_no_plain_data(value):
    with pytest.raises(ValueError, match="pickle"):
        pickled.read(pickle.dumps({"data": value}))


@given(st.binary(max_size=60))
def test_rubbish(content):
    try:
        pickled.read(content)
    except ValueError:
        return


def test_cut():
    content = pickle.dumps({"data": [1, 2, "three"]}, 2)
    for end in range(len(content)):
        with pytest.raises(ValueError, match="pickle"):
            pickled.read(content[:end])
