"""Declared types and ranges of a config's fields, checked when the config is made.

    @dataclasses.dataclass(frozen=True)
    class Config(Checked):
        width: Size
        dropout: Share = 0.0
        clip_norm: Positive | None = None

    Config(width=0)  # ValueError: Config: width=0 must be positive and below 2**31

Types mean what they say: a bool is no int, None is only where it is declared, a float is finite
unless its range says otherwise (an int will do for it), a tuple is not a list.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field takes.

    Attributes:
      rule: the same in words, after "must be".
      low, high: the ends; they belong to the range unless ``above`` or ``below`` says otherwise.
      above, below: leave the lower, the upper end out.
    """

    rule: str
    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: int | float) -> bool:
        enough = value > self.low if self.above else value >= self.low
        return enough and (value < self.high if self.below else value <= self.high)


# Sizes and counters end up in int32 arrays and in XLA's 32-bit dimensions.
Size = Annotated[int, Range("positive and below 2**31", 1, 2**31 - 1)]
Count = Annotated[int, Range("at least 0 and below 2**31", 0, 2**31 - 1)]
Seed = Annotated[int, Range("in [0, 2**32)", 0, 2**32 - 1)]
"""What JAX, with and without 64-bit types, and numpy take for a seed."""

_FINITE = {"high": math.inf, "below": True}
Positive = Annotated[float, Range("positive and finite", 0, above=True, **_FINITE)]
NonNegative = Annotated[float, Range("at least 0 and finite", 0, **_FINITE)]
Negative = Annotated[float, Range("negative and finite", -math.inf, 0, above=True, below=True)]
Share = Annotated[float, Range("in [0, 1)", 0, 1, below=True)]
Portion = Annotated[float, Range("in (0, 1]", 0, 1, above=True)]
Between = Annotated[float, Range("in (0, 1)", 0, 1, above=True, below=True)]

_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of configs: every field is checked against its declaration.

    A subclass with rules of its own calls ``super().__post_init__()`` before them.

    Raises:
      ValueError: the message names the config, the field, its value and what is allowed.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, hint in hints(kind).items():
            check(f"{type(self).__name__}: {name}", getattr(self, name), hint)


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """The declarations of a dataclass's fields, ranges included."""
    all_hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: all_hints[field.name] for field in dataclasses.fields(kind)}


def check(where: str, value: Any, hint: Any) -> None:
    """Raises ValueError, naming ``where`` and the value, unless the value is what ``hint`` says."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if origin is Annotated:
        (_check_number if args[0] in (int, float) else check)(where, value, args[0])
        for rule in args[1:]:
            if isinstance(rule, Range) and value not in rule:
                raise ValueError(f"{where}={value!r} must be {rule.rule}")
    elif is_union(hint):
        _check_union(where, value, args)
    elif origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            raise ValueError(f"{where}={value!r} is not one of {', '.join(map(repr, args))}")
    elif origin in (tuple, list):
        _check_sequence(where, value, origin, args)
    elif origin is dict:
        _check_kind(where, value, isinstance(value, Mapping), "a mapping")
        for key, item in value.items():
            check(f"{where}: a key", key, args[0])
            check(f"{where}[{key!r}]", item, args[1])
    elif hint in (int, float):
        _check_number(where, value, hint)
        _check_kind(where, value, -math.inf < value < math.inf, "finite")
    else:
        kind = _KINDS.get(hint) or ("a path" if hint is pathlib.Path else f"a {hint.__name__}")
        _check_kind(where, value, isinstance(value, hint), kind)


def is_union(hint: Any) -> bool:
    """Whether a declaration leaves a choice of types, as ``int | None`` does."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _check_kind(where: str, value: Any, fits: bool, kind: str) -> None:
    if not fits:
        raise ValueError(f"{where}={value!r} must be {kind}")


def _check_number(where: str, value: Any, kind: type) -> None:
    number = isinstance(value, int | kind) and not isinstance(value, bool)
    _check_kind(where, value, number, _KINDS[kind])
    if kind is float and isinstance(value, int):
        _check_kind(where, value, abs(value) <= sys.float_info.max, "finite")


def _check_union(where: str, value: Any, members: tuple[Any, ...]) -> None:
    if value is None and type(None) in members:
        return
    problems = []
    for member in members:
        if member is type(None):
            continue
        try:
            check(where, value, member)
        except ValueError as error:
            problems.append(str(error))
        else:
            return
    none = " or None" if type(None) in members else ""
    raise ValueError("; or ".join(problems) + none)


def _check_sequence(where: str, value: Any, kind: type, args: tuple[Any, ...]) -> None:
    _check_kind(where, value, isinstance(value, kind), f"a {kind.__name__}")
    if kind is list or (len(args) == 2 and args[1] is Ellipsis):
        args = args[:1] * len(value)
    elif len(args) != len(value):
        raise ValueError(f"{where}={value!r} must have {len(args)} entries")
    for i, (item, hint) in enumerate(zip(value, args, strict=True)):
        check(f"{where}[{i}]", item, hint)
