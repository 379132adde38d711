"""What is wrong with a command line, and the name that was perhaps meant."""

import difflib
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """The command line asks for something that does not exist."""

    exit_code = 2


def check_name(what: str, name: Any, known: Iterable[Any]) -> None:
    """Raises UsageError, with the nearest known name, unless ``name`` is one."""
    known = list(known)
    if name not in known:
        names = [str(each) for each in known]
        near = difflib.get_close_matches(str(name), names, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"{what}={name!r} is not known{meant}; choose one of {', '.join(names)}")
