"""config.json: every field is read, known to change nothing, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind", int, float, bool, str, list, dict)

_MISSING = object()
_NO_CHANGE = frozenset({
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "model_type",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
})  # fmt: skip
"""Fields of any model that change neither its parameters nor its outputs."""


class Fields:
    """The fields of one config.json, from which a family takes those it knows."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        self.taken: set[str] = set(_NO_CHANGE)

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """Raises ValueError for a file that is not there or is not a JSON object."""
        return cls(read_json(path), str(path))

    def take(self, name: str, kind: type[Kind], default: Any = _MISSING) -> Any:
        """The field called ``name``, or ``default``; ValueError if it is not of ``kind``."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is _MISSING:
            raise ValueError(f"{self.source}: the field {name!r} is missing")
        if value is default:
            return value
        value = _plain(value)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.source}: {name}={value!r} is not a {kind.__name__}")
        return value

    def require(self, name: str, only: Any) -> None:
        """Refuses any value but ``only`` for a field that may be absent."""
        self.taken.add(name)
        if name in self.values and _plain(self.values[name]) != only:
            raise ValueError(
                f"{self.source}: {name}={self.values[name]!r} is not supported, only {only!r} is"
            )

    def ignore(self, *names: str) -> None:
        """Fields that this family has and that change nothing here."""
        self.taken.update(names)

    def finish(self) -> None:
        """Raises ValueError for fields that nobody took, unless they are off or empty."""
        unknown = {
            name: value
            for name, value in self.values.items()
            if name not in self.taken and value not in (None, False, [], {}, "")
        }
        if unknown:
            name, value = next(iter(unknown.items()))
            raise ValueError(
                f"{self.source}: {name}={value!r} is not supported"
                + (f"; nor are {', '.join(list(unknown)[1:])}" if len(unknown) > 1 else "")
            )

    def checked(self, build: Callable[[], Any]) -> Any:
        """What ``build`` makes of the fields; its ValueError names the file too."""
        try:
            return build()
        except ValueError as error:
            if str(error).startswith(self.source):
                raise
            raise ValueError(f"{self.source}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _plain(value: Any) -> Any:
    """``value`` without transformers' wrapping of infinities."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value
