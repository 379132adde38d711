"""Reading a compiled TPU program's text: what moves through HBM, what only changes layout."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # the others carry theirs in their name
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# What moves nothing: names for arrays that are already there, or waiting for a transfer.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "iota",
        "partition-id",
        "replica-id",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "copy-done",
        "slice-done",
        "async-done",
    )
)
_LOOPS = frozenset(("while", "conditional", "call"))
_MOVES = frozenset(("copy", "transpose"))


class Unreadable(ValueError):
    """The program has a loop or a branch outside its kernels."""


class Op(NamedTuple):
    """One instruction: `shape` and `attributes` as text, `operands` by name."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    attributes: str

    @property
    def bytes(self) -> int:
        """Size of the result in HBM; arrays in another memory, `S(n)`, are left out."""
        return sum(size for size, layout in self._arrays() if not re.search(r"S\([1-9]", layout))

    @property
    def size(self) -> int:
        """Size of the result in bytes, wherever it lies."""
        return sum(size for size, _ in self._arrays())

    def _arrays(self) -> list[tuple[int, str]]:
        """Bytes and layout of each array of the result."""
        return [
            (math.prod(int(d) for d in dims.split(",") if d) * _bits(dtype) // 8, layout)
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        ]

    @property
    def layout(self) -> str:
        return re.sub(r"S\(\d+\)", "", self.shape)


class Program(NamedTuple):
    """The ops of the entry computation, and the kinds of ops inside each fused computation."""

    entry: list[Op]
    inside: dict[str, set[str]]

    def traffic(self) -> int:
        """HBM bytes read and written, operands and results of each op once.

        Raises:
          Unreadable: a loop or branch, whose count is not in the text.
        """
        for op in self.entry:
            if op.kind in _LOOPS:
                raise Unreadable(
                    f"the program has an HLO {op.kind} ({op.name}): the cost of a loop or branch "
                    "outside the kernels (lax.scan, fori_loop, cond) cannot be read off"
                )
        sizes = {op.name: op.bytes for op in self.entry}
        total = 0
        for op in self.entry:
            if op.kind in _FREE:
                continue
            total += op.bytes
            if op.kind == "slice":
                total += min(op.size, sizes.get(op.operands[0], 0))  # reads what it returns
            # The result of a transfer that starts is a tuple of its source and its destination.
            elif not op.kind.endswith("-start"):
                total += sum(sizes.get(name, 0) for name in set(op.operands))
        return total

    def layout_copies(self) -> dict[str, int]:
        """Bytes written by each op that copies to another layout or transposes."""
        by_name = {op.name: op for op in self.entry}

        def moves(op: Op) -> bool:
            if op.kind == "copy":
                source = by_name.get(op.operands[0])
                return source is None or source.layout != op.layout
            if op.kind == "fusion":
                called = re.search(r"calls=%?([\w.-]+)", op.attributes)
                return bool(called and self.inside.get(called[1], set()) & _MOVES)
            return op.kind == "transpose"

        return {op.name: op.bytes for op in self.entry if moves(op)}

    def kernels(self) -> int:
        return sum('custom_call_target="tpu_custom_call"' in op.attributes for op in self.entry)


def parse(text: str) -> Program:
    """The program that `jax.stages.Compiled.as_text()` shows."""
    entry: list[Op] = []
    inside: dict[str, set[str]] = {}
    current, is_entry = "", False
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            is_entry, current = bool(header[1]), header[2]
        elif found := _OP.match(line):
            name, shape, kind, rest = found.groups()
            operands, attributes = _split_operands(rest)
            inside.setdefault(current, set()).add(kind)
            if is_entry:
                entry.append(Op(name, shape, kind, operands, attributes))
    return Program(entry, inside)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 32


def _split_operands(rest: str) -> tuple[list[str], str]:
    """Names before the parenthesis that closes the operands, and the text behind it."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return re.findall(r"%([\w.-]+)", rest[:i]), rest[i + 1 :]
    return [], rest
