"""Which of many alike tests always run; the others are marked `full` (`make test-all`)."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def one_of_many(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`; those not in ``always`` only run in `test-all`.

    A value is one argument, or a tuple of several.
    """
    values = list(values)
    assert set(always) <= set(values), f"not among {values}: {set(always) - set(values)}"

    def param(value: Any) -> Any:
        arguments = value if isinstance(value, tuple) else (value,)
        return pytest.param(*arguments, marks=() if value in always else pytest.mark.full)

    return [param(value) for value in values]
