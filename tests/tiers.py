"""Which of many alike tests always run, the others being marked `full` (`make test-all`), and which
are always compiled as users compile them.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


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


def compiled_as_users(values: Iterable[Any], chosen: Callable[..., bool]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`, marked `optimised` where ``chosen`` says so.

    Values are as for `one_of_many`, or `pytest.param`; ``chosen`` is called with their arguments.
    """

    def param(value: Any) -> Any:
        if not isinstance(value, ParameterSet):
            value = pytest.param(*(value if isinstance(value, tuple) else (value,)))
        marks = (*value.marks, *[pytest.mark.optimised] * bool(chosen(*value.values)))
        return pytest.param(*value.values, marks=marks, id=value.id)

    return [param(value) for value in values]
