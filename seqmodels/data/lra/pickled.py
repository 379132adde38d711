"""The data in a pickle, taken out without running it.

A pickle is a program; Python's own reader runs it and calls whatever it names. This reads the
instructions that plain data and numpy arrays consist of, remembers by name what they would have
called, and knows what three of those names mean. Nothing is imported or called.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_MARK = object()
_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_TYPES = {"u1": np.uint8, "i4": np.int32, "i8": np.int64}
_PUSH = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE",
}  # fmt: skip
_TEXT = {"BINSTRING", "SHORT_BINSTRING", "STRING"}  # bytes, in pickles of Python 2
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SMALL = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple, "LIST": list, "DICT": _pairs, "APPENDS": list, "SETITEMS": _pairs,
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}


@dataclass
class _Name:
    name: str


@dataclass
class _Call:
    """What a pickle would have made by calling a name."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = field(default=None)


def read(content: bytes) -> Any:
    """Dicts, lists, tuples, numbers, text, bytes and arrays of uint8, int32 or int64.

    Raises:
      ValueError: it is cut or no pickle, or holds anything else.
    """
    try:
        opcodes = list(pickletools.genops(content))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"the pickle is cut, or is none ({error})") from None
    try:
        return _plain(_interpret(opcodes))
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"not a pickle of plain data ({error!r})") from None


class _Machine:
    """The stack and the memory of a pickle's program."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _TEXT:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _SMALL:
            self.replace(_SMALL[name], tuple)
        elif name in _FROM_MARK:
            marks = [i for i, item in enumerate(stack) if item is _MARK]
            del stack[marks[-1]]
            self.replace(len(stack) - marks[-1], _FROM_MARK[name])
            if name in ("APPENDS", "SETITEMS"):
                self.add(stack.pop())
        elif name in ("APPEND", "SETITEM"):
            self.replace(1 + (name == "SETITEM"), list if name == "APPEND" else _pairs)
            self.add(stack.pop())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memory[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memory[argument])
        else:
            self.name_or_call(name, argument)

    def name_or_call(self, name: str, argument: Any) -> None:
        """An instruction about what is no plain data; it is noted, not followed."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module} {attribute}"))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_Call(called.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"a pickle of plain data has no instruction {name}")

    def replace(self, count: int, make: Callable[[list[Any]], Any]) -> None:
        """Puts what is made of the last so many items in their place."""
        start = len(self.stack) - count
        items = self.stack[start:]
        self.stack[start:] = [make(items)]

    def add(self, items: Any) -> None:
        """Adds items to the list or the dict on top."""
        if isinstance(items, dict):
            self.stack[-1].update(items)
        else:
            self.stack[-1].extend(items)


def _interpret(opcodes: list[tuple[Any, Any, Any]]) -> Any:
    machine = _Machine()
    for opcode, argument, _ in opcodes:
        if opcode.name == "STOP":
            return machine.stack.pop()
        if opcode.name == "MARK":
            machine.stack.append(_MARK)
        elif opcode.name in _EMPTY:
            machine.stack.append(_EMPTY[opcode.name]())
        else:
            machine.step(opcode.name, argument)
    raise ValueError("the pickle is cut")


def _plain(value: Any) -> Any:
    """The value with what names stand for in place of calls of them."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if not isinstance(value, _Call):
        if isinstance(value, _Name):
            raise ValueError(f"the pickle holds {value.name}, which is no data")
        return value
    if value.name == "_codecs encode" and value.arguments[1:] == ("latin1",):
        return value.arguments[0].encode("latin-1")
    if value.name in _ARRAYS:
        _, shape, dtype, fortran, content = value.state
        kind = _TYPES.get(as_text(dtype.arguments[0])) if dtype.name == "numpy dtype" else None
        if kind is None or fortran:
            raise ValueError("the pickle holds an array that is not of plain integers")
        return np.frombuffer(_plain(content), kind).reshape(shape)
    raise ValueError(f"the pickle calls {value.name}, which plain data does not")


def as_text(value: str | bytes) -> str:
    """Text, also where Python 2 wrote it as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else value
