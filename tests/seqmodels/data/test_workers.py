"""Pieces come in order, whoever makes them."""

import contextlib
import itertools

import pytest

from seqmodels.data.workers import in_order


@pytest.mark.parametrize("workers", [1, 2])
def test_order(workers):
    with contextlib.closing(in_order(abs, workers)) as pieces:
        assert list(itertools.islice(pieces, 7)) == list(range(7))


def test_workers_must_be_positive():
    with pytest.raises(ValueError, match="workers=0"):
        next(in_order(abs, 0))
