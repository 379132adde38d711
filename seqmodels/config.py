"""Frozen dataclass configs <-> plain dicts that JSON can hold.

Mixer configs carry their registered name under "mixer"; where a field's type leaves a choice of
several dataclasses, the chosen one's name is under "type".
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from seqmodels import ranges
from seqmodels.mixers import READERS, REGISTRY, MixerConfig

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists of JSON's scalars; ``from_dict`` inverts it."""
    tag = {"mixer": config.mixer} if isinstance(config, MixerConfig) else {}
    hints = typing.get_type_hints(type(config))
    return tag | {
        field.name: _write(getattr(config, field.name), hints[field.name])
        for field in dataclasses.fields(config)
    }


def from_dict(kind: type[C], data: Any, *, where: str = "") -> C:
    """Builds ``kind`` from the mapping ``data`` (see ``to_dict``); absent keys take their defaults.

    ``where`` is the path of ``data`` within a larger config, for messages.

    Raises:
      ValueError: a key that ``kind`` lacks (the message lists those it has), a required key that
        is absent, an unknown mixer, a value that is not of the field's type and range, or one the
        config itself refuses.
    """
    label = where or kind.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{label}: expected the fields of {kind.__name__}, got {data!r}")
    data = dict(data)
    if issubclass(kind, MixerConfig):
        kind = _mixer_class(kind, data, label)
    hints = ranges.hints(typing.cast(Any, kind))
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    unknown = [key for key in data if key not in fields]
    if unknown:
        raise ValueError(
            f"{label}: unknown key {', '.join(map(repr, unknown))}; "
            f"{kind.__name__} has {', '.join(fields)}"
        )
    missing = [
        name
        for name, field in fields.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{label}: missing key {', '.join(map(repr, missing))}")
    values = {name: _read(hints[name], data[name], f"{label}.{name}") for name in data}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _mixer_class(kind: type, data: dict[str, Any], label: str) -> Any:
    name = data.pop("mixer", None) or getattr(kind, "mixer", None)
    known = REGISTRY | READERS
    if name not in known:
        raise ValueError(f"{label}: mixer={name!r} is not registered; known: {', '.join(known)}")
    found = known[name][0]
    if not issubclass(found, kind):
        raise ValueError(f"{label}: mixer={name!r} is a {found.__name__}, not a {kind.__name__}")
    return found


def _choices(hint: Any) -> list[Any]:
    """The dataclasses that a union offers."""
    members = typing.get_args(hint) if ranges.is_union(hint) else (hint,)
    return [member for member in members if dataclasses.is_dataclass(member)]


def _write(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {"type": type(value).__name__} if len(_choices(hint)) > 1 else {}
        return tag | to_dict(value)
    if isinstance(value, tuple | list):
        args = [arg for arg in typing.get_args(hint) if arg is not Ellipsis]
        hints = args if len(args) == len(value) else args[:1] * len(value)
        return [_write(item, h) for item, h in zip(value, hints or [Any] * len(value), strict=True)]
    if isinstance(value, Mapping):
        inner = (typing.get_args(hint) or (Any, Any))[1]
        return {key: _write(item, inner) for key, item in value.items()}
    return value


def _read(hint: Any, value: Any, where: str) -> Any:
    """JSON's value as the declaration ``hint`` has it, or ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if ranges.is_union(hint):
        return _read_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin in (tuple, list):
        return _read_sequence(origin, args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r} must be a mapping")
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in value.items()}
    ranges.check(where, value, hint)
    plain = args[0] if origin is Annotated else hint
    return float(value) if plain is float else value


def _read_union(hint: Any, value: Any, where: str) -> Any:
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    optional = len(members) < len(typing.get_args(hint))
    if value is None and optional:
        return None
    choices = {choice.__name__: choice for choice in _choices(hint)}
    if len(choices) > 1 and isinstance(value, Mapping):
        name = value.get("type")
        if name not in choices:
            raise ValueError(f"{where}: type={name!r} is not one of {', '.join(choices)}")
        return from_dict(
            choices[name], {k: v for k, v in value.items() if k != "type"}, where=where
        )
    errors = []
    for member in members:
        try:
            return _read(member, value, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors) + (" or None" if optional else ""))


def _read_sequence(origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{where}={value!r} must be a list")
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        hints = list(args[:1]) * len(value)
    elif len(args) != len(value):
        raise ValueError(f"{where}={value!r} must have {len(args)} entries")
    else:
        hints = list(args)
    return origin(
        _read(h, item, f"{where}[{i}]")
        for i, (h, item) in enumerate(zip(hints, value, strict=True))
    )
