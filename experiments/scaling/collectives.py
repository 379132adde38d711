"""What a compiled program moves between devices: read from its text."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from pallas_kernels.tools import hlo

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
DIRECTIONS = ("forward", "backward")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# A collective in pieces, each fused with work that need not wait for it.
_CHAIN = re.compile(r'channel_id=(\d+),.*chain_id="(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and direction of a program, on one device.

    Attributes:
      kind: as XLA calls it.
      direction: "forward", or "backward" with what that recomputes.
      count: how often it runs.
      bytes: that the device receives, all together.
    """

    kind: str
    direction: str
    count: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives of the program that ``jax.stages.Compiled.as_text()`` shows.

    What stands in a loop counts as often as the loop runs; of a branch, every side. Bytes are those
    that a device receives: of an all-gather and an all-to-all of P devices (P - 1) / P of its
    result, of a reduce-scatter P - 1 times its result, of an all-reduce 2 (P - 1) / P of it (a ring
    of two passes), of a permutation its result.

    Raises:
      hlo.Unreadable: a loop with a collective whose number of turns is not in the text.
    """
    computations, entry = _computations(text)
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    chains = set()
    for times, line in _runs(computations, entry, 1):
        if chain := _CHAIN.search(line):
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())
        found = _OP.match(line)
        assert found is not None
        kind = found[3].removesuffix("-start")
        key = kind, "backward" if "transpose(" in _name(line) else "forward"
        counts[key] += times
        sizes[key] += times * _received(kind, found[2], found[3].endswith("-start"), line)
    return [Collective(*key, counts[key], sizes[key]) for key in sorted(counts)]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, and the name of the one that is entered."""
    computations: dict[str, list[str]] = {}
    current = entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            entry = current if header[1] else entry
            computations[current] = []
        elif _OP.match(line):
            computations.setdefault(current, []).append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[int, str]]:
    """Each collective that a computation runs, and how often."""
    for line in computations.get(name, ()):
        found = _OP.match(line)
        assert found is not None
        kind = found[3]
        if kind.removesuffix("-start") in KINDS:
            yield times, line
            continue
        if kind in ("async-update", "async-done"):  # they name what the start has begun
            continue
        called = [inner for how, inner in _CALLED.findall(line) if how != "to_apply"]
        if kind == "call":
            called += [inner for how, inner in _CALLED.findall(line) if how == "to_apply"]
        for branches in _BRANCHES.findall(line):
            called += [branch.strip(" %") for branch in branches.split(",")]
        for inner in called:
            turns = 1
            if kind == "while" and any(True for _ in _runs(computations, inner, 1)):
                trips = _TRIPS.search(line)
                if trips is None:
                    raise hlo.Unreadable(f"the loop {found[1]} does not say how often it turns")
                turns = int(trips[1])
            yield from _runs(computations, inner, times * turns)


def _name(line: str) -> str:
    """Where an instruction comes from in the traced program."""
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _received(kind: str, shape: str, starts: bool, line: str) -> int:
    parts = [part for part in _arrays(shape) if not part.startswith("u32[]")]  # no semaphores
    arrays = [hlo.Op("", part, kind, [], "").size for part in parts]
    if starts and kind in ("all-gather", "collective-permute") and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :]  # a start names what is sent, then what is received
    size = sum(arrays)
    if kind == "collective-permute":
        return size
    devices = _devices(line)
    if kind == "reduce-scatter":
        return size * (devices - 1)
    return size * (devices - 1) * (2 if kind == "all-reduce" else 1) // devices


def _arrays(shape: str) -> list[str]:
    return [found[0] for found in re.finditer(r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", shape)]


def _devices(line: str) -> int:
    """How many devices take part: [groups,devices], a list of groups, or axes of a mesh."""
    if axes := _AXES.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    found = _GROUPS.search(line)
    if found is None:
        raise hlo.Unreadable(f"a collective without replica_groups: {line.strip()[:200]}")
    return int(found[2]) if found[2] else len(found[3].split(","))
