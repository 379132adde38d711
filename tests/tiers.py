"""Which of many alike tests always run; the others are marked `full` (`make test-all`)."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def one_of_many(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`; those not in ``always`` only run in `test-all`."""
    values = list(values)
    assert set(always) <= set(values), f"not among {values}: {set(always) - set(values)}"
    return [
        value if value in always else pytest.param(value, marks=pytest.mark.full)
        for value in values
    ]
