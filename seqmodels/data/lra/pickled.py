"""The data in a pickle, taken out without running it.

A pickle is a program; Python's own reader runs it and calls whatever it names. This reads the
instructions that plain data and numpy arrays consist of, remembers by name what they would have
called, and knows what three of those names mean. Nothing is imported or called.
"""

import pickletools
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


def _interpret(opcodes: list[tuple[Any, Any, Any]]) -> Any:
    stack: list[Any] = []
    memory: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in opcodes:
        name = opcode.name
        if name in _PUSH:
            stack.append(argument)
        elif name in _TEXT:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _SMALL:
            count = _SMALL[name]
            items = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("TUPLE", "LIST", "DICT"):
            items = since_mark()
            pairs = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}
            stack.append(pairs[name](items))
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "APPEND":
            stack[-2].append(stack.pop())
        elif name == "SETITEMS":
            items = since_mark()
            stack[-1].update(_pairs(items))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memory[argument] = stack[-1]
        elif name == "MEMOIZE":
            memory[len(memory)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memory[argument])
        elif name == "GLOBAL":
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
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"a pickle of plain data has no instruction {name}")
    raise ValueError("the pickle is cut")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


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
