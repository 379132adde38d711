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
      kind: as XLA calls it; "reduce-scatter*" is one that the compiler has made an all-reduce of.
      direction: "forward", or "backward" with what that recomputes, and with "reduce-scatter*",
        which is of the gradient of an all-gather.
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
    chains: set[tuple[str, ...]] = set()
    for times, line in _runs(computations, entry, 1):
        if chain := _CHAIN.search(line):
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())
        _, shape, issued, _ = _parts(line)
        kind = issued.removesuffix("-start")
        came_from = _name(line)
        backward = not came_from or "transpose(" in came_from
        scattered = kind == "all-reduce" and 'from-cross-replica-sharding="true"' in line
        key = "reduce-scatter*" if scattered else kind, "backward" if backward else "forward"
        counts[key] += times
        sizes[key] += times * _received(kind, shape, issued != kind, line)
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
        kind = _parts(line)[2]
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
                turns = _turns(computations, computations[name], line)
            yield from _runs(computations, inner, times * turns)


def _turns(computations: dict[str, list[str]], around: list[str], loop: str) -> int:
    """How often a loop turns: as the compiler says, or from its counter's two ends."""
    if trips := _TRIPS.search(loop):
        return int(trips[1])
    condition = dict(_CALLED.findall(loop)).get("condition", "")
    inside = {name: (kind, rest) for name, _, kind, rest in map(_parts, computations[condition])}
    compared = [rest for kind, rest in inside.values() if kind == "compare" and "=LT" in rest]
    if len(compared) == 1:
        counter, end = re.findall(r"%([\w.-]+)", compared[0])[:2]
        place = re.search(r"index=(\d+)", inside[counter][1])
        outside = {name: (kind, rest) for name, _, kind, rest in map(_parts, around)}
        if place and inside[end][0] == "constant":
            start = outside[_operands(loop)[0]]
            for _ in range(4):  # a constant may have been copied
                if start[0] == "constant":
                    return int(inside[end][1].split(")")[0]) - int(start[1].split(")")[0])
                names = re.findall(r"%([\w.-]+)", start[1].split("), ")[0])
                start = outside[names[int(place[1]) if start[0] == "tuple" else 0]]
    raise hlo.Unreadable(f"the loop {_parts(loop)[0]} does not say how often it turns")


def _parts(line: str) -> tuple[str, str, str, str]:
    """Name, shape, kind and the rest of an instruction."""
    found = _OP.match(line)
    assert found is not None
    return found[1], found[2], found[3], found[4]


def _operands(line: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", _parts(line)[3].split("), ")[0])


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
