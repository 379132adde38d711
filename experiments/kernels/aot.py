"""Compiles all named shapes of the kernels for absent chips; tables their cost.

    seqmodels kernels aot                         all that is not yet known
    seqmodels kernels aot --family causal_conv1d --chip v5e    only these
    seqmodels kernels aot --chip v5e --no-estimate    whether they compile
    seqmodels kernels aot --representatives     one shape of each kind
    seqmodels kernels aot --check     what is stale, failed or missing; 1 if anything is

A cell is one shape of a family on one chip, forward and backward, and on v5e forward alone too:
whether it compiles; on v5e the compiler's static time and its multiple of the floor (every input
and output once), but for families whose loops it would simulate for hours or in more memory than
there is (their benchmark has it for a part of the length); on a GPU what ptxas says of registers
and spills. On "cpu" the portable path runs, on zeros and at most 512 tokens. Compiled ahead of time
is not run: no cell here needs a TPU or a GPU. Cells are written as they come and kept. A cell is
stale when its shape, or code that its op imports, has changed since in more than words. Then its
program is traced: where it is the one that was compiled, the cell holds for the new code too;
otherwise, or when it did not pass, it is done again. The support matrix of the documentation is
made of the cells by `experiments.pages`.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table

from experiments import places, terminal
from experiments.command_line import run_command
from experiments.errors import check_name
from pallas_kernels.tools import aot, programs
from pallas_kernels.tools import sources as code
from pallas_kernels.tools.families import TABULATED
from pallas_kernels.tools.programs import MODES
from seqmodels.ranges import Checked
from seqmodels.training.metrics import write_atomically
from seqmodels.training.run_directory import environment, source_version

CHIPS = ("cpu", *aot.CHIPS)
ESTIMATED = "v5e"  # the chip that speed is held to
RESULTS = places.output("kernels") / "aot.json"

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
STALE, MISSING = "stale", "missing"  # what a cell may be besides its own outcome


@dataclasses.dataclass(frozen=True)
class AotConfig(Checked):
    """Which cells, and where they are kept; empty means all."""

    family: tuple[str, ...] = ()
    """Families of kernels."""
    chip: tuple[str, ...] = ()
    """cpu v5e v5p v6e tpu7x a100 h100 h200 b200."""
    shape: tuple[str, ...] = ()
    """Named shapes."""
    mode: tuple[str, ...] = ()
    """forward, forward+backward."""
    representatives: bool = False
    """Only one shape of each kind of program."""
    estimate: bool = True
    """On v5e read the static cost too; without, only whether it compiles, which takes seconds."""
    again: bool = False
    """Do cells again that are known for these sources."""
    output: Path = RESULTS
    """The JSON file; cells are merged into it."""
    check: bool = False
    """Only name the cells that are stale, failed or missing; exits with 1 if there are any."""

    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"family": tuple(TABULATED), "chip": CHIPS, "mode": MODES}
        for name, allowed in known.items():
            for value in getattr(self, name):
                check_name(name, value, allowed)
        shapes = self.shapes
        for shape in self.shape:
            if not any(shape in names for names in shapes.values()):
                raise ValueError(f"shape={shape!r} is in none of {', '.join(shapes)}")

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        """The named shapes of each family that is asked for."""
        chosen = [TABULATED[name] for name in self.family or TABULATED]
        return {f.name: f.representatives if self.representatives else (*f.shapes,) for f in chosen}


class Key(NamedTuple):
    """What names a cell."""

    family: str
    shape: str
    mode: str
    chip: str


@dataclasses.dataclass(frozen=True)
class Cell(Checked):
    """What is known of a shape on a chip.

    Attributes:
      outcome: PASSED, FAILED or NOT_RUN (its compiler is not installed).
      figures: of a TPU the static cost, of a GPU registers and spilled bytes, by name; if there are
        none, `reason` says why.
      sources: digest of what decided it, as `digests` gives it.
      commit: of the checkout; `dirty` if it had changes.
      seconds: wall time.
      program: fingerprint of what was compiled; None of cells older than fingerprints.
    """

    family: str
    shape: str
    mode: str
    chip: str
    outcome: str
    figures: dict[str, float]
    reason: str | None
    sources: str
    commit: str | None
    dirty: bool | None
    seconds: float
    program: str | None = None

    @property
    def key(self) -> Key:
        return Key(self.family, self.shape, self.mode, self.chip)


Cells = dict[Key, Cell]


def load(path: Path) -> Cells:
    """The cells of a JSON file; none if there is no file, ValueError if it holds something else."""
    if not path.exists():
        return {}
    try:
        cells = [Cell(**cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of experiments.kernels.aot: {error}") from error
    return {cell.key: cell for cell in cells}


def save(path: Path, cells: Cells, config: AotConfig, wall_s: float) -> None:
    """Writes all cells, in order, with what the last invocation was."""
    settings = {**dataclasses.asdict(config), "output": None}
    del settings["traceback"]
    ordered = sorted(cells.values(), key=lambda c: (c.family, c.shape, c.mode, CHIPS.index(c.chip)))
    record = {
        "config": settings,
        **environment(),
        "wall_s": wall_s,
        "cells": [dataclasses.asdict(cell) for cell in ordered],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def digests(families: Iterable[str] = tuple(TABULATED)) -> dict[tuple[str, str], str]:
    """For each family and shape a digest of the program: the op's arguments, and all code of
    `pallas_kernels` that it imports, at any depth."""
    found = {}
    for name in families:
        family = TABULATED[name]
        program = code.digest([family.op.__module__, "pallas_kernels.tools.programs"])
        for shape in family.shapes.values():
            arrays = [(n, x.shape, x.dtype.name) for n, x in shape.operands().items()]
            text = repr((program, arrays, shape.options()))
            found[name, shape.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def state(key: Key, cells: Cells, now: dict[tuple[str, str], str]) -> str:
    """PASSED, FAILED, NOT_RUN, STALE or MISSING; `now` is what `digests` gives."""
    if key not in cells:
        return MISSING
    return cells[key].outcome if cells[key].sources == now[key.family, key.shape] else STALE


def asked(config: AotConfig) -> list[Key]:
    """All cells that the settings name, those of one family and chip together."""
    return [
        Key(family, shape, mode, chip)
        for family, names in config.shapes.items()
        for chip in config.chip or CHIPS
        for shape in names
        if not config.shape or shape in config.shape
        for mode in modes(chip)
        if not config.mode or mode in config.mode
    ]


def wanted(config: AotConfig, known: Cells) -> list[Key]:
    """The cells to do, in the order of `asked`."""
    now = digests(config.family or TABULATED)
    return [key for key in asked(config) if config.again or state(key, known, now) != PASSED]


def modes(chip: str) -> tuple[str, ...]:
    """What is compiled for a chip; the program with the backward pass holds all kernels."""
    return MODES if chip == ESTIMATED else MODES[-1:]


def measure(keys: Iterable[Key], *, estimate: bool = True) -> Iterator[Cell]:
    """The cells, each as soon as it is known; one process for each family and chip."""
    version = source_version(places.ROOT)
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault((key.family, key.chip), []).append(key)
    for (family, chip), group in groups.items():
        now = digests([family])
        start = time.perf_counter()
        answers = _answers(family, chip, group, estimate)
        for key, answer in zip(group, answers, strict=True):
            outcome, figures, reason = judge(answer)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            digest = now[family, key.shape]
            yield Cell(
                *(*key, outcome, figures, reason, digest),
                **version,
                seconds=seconds,
                program=fingerprint(key),
            )


def fingerprint(key: Key) -> str | None:
    """Fingerprint of a cell's program; None if it cannot be traced."""
    implementation, scale = _implementation(key.family, key.chip), _scale(key)
    return _fingerprint(*key[:3], implementation, scale)


@functools.cache
def _fingerprint(family: str, shape: str, mode: str, implementation: str, scale: str) -> str | None:
    try:
        return programs.fingerprint(*TABULATED[family].case(shape, implementation, mode, scale))
    except Exception:  # whatever it is, compiling says it
        return None


def renewed(cells: Cells, keys: Iterable[Key]) -> Iterator[Cell]:
    """The cells of `keys` that passed and whose program is still the same, with today's sources."""
    now = digests({key.family for key in keys})
    for key in keys:
        cell = cells.get(key)
        if cell and cell.outcome == PASSED and cell.program and cell.program == fingerprint(key):
            yield dataclasses.replace(cell, sources=now[key.family, key.shape])


def _answers(family: str, chip: str, keys: list[Key], estimate: bool) -> Iterator[Any]:
    """An estimate, kernels, None (it ran) or an error for each key."""
    if chip == "cpu":
        return (_run_here(family, key) for key in keys)
    if reason := aot.missing(chip):
        return (ImportError(reason) for _ in keys)
    known, implementation = TABULATED[family], _implementation(family, chip)
    if chip in aot.TPUS:
        unread = chip != ESTIMATED or not estimate or known.slow_to_estimate
    else:
        unread = not known.has_kernels
    if unread:
        return (_compile_here(family, key, implementation) for key in keys)
    arguments = [[key.shape, implementation, key.mode] for key in keys]
    answers = aot.each(chip, f"pallas_kernels.{family}.shapes:case", arguments)
    if chip != ESTIMATED:
        return answers
    return (
        # What broke may be the profile, which takes gigabytes, not the program.
        _compile_here(family, key, implementation) if isinstance(answer, RuntimeError) else answer
        for key, answer in zip(keys, answers, strict=True)
    )


def _implementation(family: str, chip: str) -> str:
    """What is compiled for a chip."""
    if chip == "cpu" or not TABULATED[family].has_kernels:
        return "xla"
    return "tpu" if chip in aot.TPUS else "gpu"


def _scale(key: Key) -> str:
    """Factor on the length: of all, but at most 512 tokens where the program is run."""
    length = TABULATED[key.family].shapes[key.shape].length
    return repr(min(1.0, 512 / length)) if key.chip == "cpu" else "1"


def _compile_here(family: str, key: Key, implementation: str) -> Exception:
    """Whether it compiles: a static cost takes the compiler minutes, and XLA's kernels are not ours
    to count registers of."""
    try:
        aot.compile_for(key.chip, *TABULATED[family].case(key.shape, implementation, key.mode))
    except Exception as error:
        return RuntimeError(str(error))
    return ValueError("compiled; its cost is not read here")


def _run_here(family: str, key: Key) -> Exception | None:
    """Runs the portable path on zeros, at no more than 512 tokens."""
    try:
        fn, *operands = TABULATED[family].case(key.shape, "xla", key.mode, _scale(key))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), operands)
        jax.block_until_ready(jax.jit(fn)(*zeros))
    except Exception as error:
        return error
    return None


def judge(answer: Any) -> tuple[str, dict[str, float], str | None]:
    """`(outcome, figures, reason)` of an estimate, of kernels, of None or of an error."""
    if answer is None:
        return PASSED, {}, None
    if isinstance(answer, aot.Estimate):
        names = ("cycles", "us", "floor_us", "times_floor", "temp_bytes", "kernels")
        copies = sum(answer.layout_copies.values())
        figures = {name: getattr(answer, name) for name in names}
        return PASSED, {**figures, "layout_copy_bytes": copies}, None
    if isinstance(answer, ImportError):
        return NOT_RUN, {}, str(answer)
    if isinstance(answer, ValueError):  # it compiles, but what a loop costs cannot be read off
        return PASSED, {}, str(answer)
    if isinstance(answer, Exception):
        return FAILED, {}, str(answer).strip().splitlines()[-1][:500]
    figures = {
        "registers": max(kernel.registers for kernel in answer),
        "spilled_bytes": _spilled(answer),
        "forward_spilled_bytes": _spilled(k for k in answer if _FORWARD.search(k.name)),
        "kernels": len(answer),
    }
    return PASSED, figures, None


_FORWARD = re.compile("forward|reduce|chain")  # what the kernels of a forward pass are called


def _spilled(kernels: Iterable[aot.Kernel]) -> int:
    return sum(kernel.spill_stores + kernel.spill_loads for kernel in kernels)


def run(config: AotConfig, console: rich.console.Console) -> Cells:
    """Does what is missing, if anything, writing after each cell; returns all cells of the file."""
    exist = {*asked(AotConfig())}
    cells = {key: cell for key, cell in load(config.output).items() if key in exist}
    start = time.perf_counter()
    keys = wanted(config, cells)
    if not keys:
        return cells
    if not config.again:
        cells |= {cell.key: cell for cell in renewed(cells, keys)}
        save(config.output, cells, config, time.perf_counter() - start)
        keys = wanted(config, cells)
    for cell in rich.progress.track(
        measure(keys, estimate=config.estimate),
        total=len(keys),
        description="compiling",
        console=console,
    ):
        cells[cell.key] = cell
        save(config.output, cells, config, time.perf_counter() - start)
    return cells


def table(cells: Cells) -> rich.console.Group:
    """A table of each family: what is known of a shape and mode, and on which chips."""
    now = digests()
    rows: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for key, cell in sorted(cells.items(), key=lambda item: (item[0][:3], _place(item[0]))):
        stale = state(key, cells, now) == STALE
        row = rows.setdefault(key[:3], {})
        row.setdefault(STALE if stale else describe(cell), []).append(cell.chip)
    views: dict[str, rich.table.Table] = {}
    for (family, shape, mode), known in rows.items():
        if family not in views:
            views[family] = terminal.table(family)
            terminal.add_columns(views[family], "shape", "chips", left=("shape", "chips"))
        chips = (f"{', '.join(names)}: {what}" for what, names in known.items())
        views[family].add_row(f"{shape}\n  {mode}", "; ".join(chips))
    return rich.console.Group(*views.values())


def _place(key: Key) -> int:
    return CHIPS.index(key.chip)


def describe(cell: Cell) -> str:
    """A cell of the table: times the floor and static microseconds, or registers and spills."""
    if cell.outcome != PASSED:
        return cell.outcome
    if cell.chip == "cpu":
        return "ran"
    if not cell.figures:
        return "compiled, cost unknown"
    if cell.chip in aot.TPUS:
        return f"{cell.figures['times_floor']:.2f}x {cell.figures['us']:.0f} us"
    spilled = cell.figures["spilled_bytes"]
    return f"{cell.figures['registers']:.0f} registers" + f", {spilled:.0f} B spilled" * bool(
        spilled
    )


def matrix(cells: Cells) -> str:
    """The support matrix in Markdown: for each family and chip, what became of its named shapes."""
    now = digests()

    def count(family: str, chip: str) -> str:
        shapes = TABULATED[family].shapes
        keys = [Key(family, shape, mode, chip) for shape in shapes for mode in modes(chip)]
        states = [state(key, cells, now) for key in keys]
        outcomes = [NOT_RUN if s == MISSING else s for s in states]
        present = [o for o in (PASSED, STALE, FAILED, NOT_RUN) if o in outcomes]
        if present == [NOT_RUN]:
            return NOT_RUN
        return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in present)

    names = ["CPU, ran", *(f"{chip}, compiled" for chip in CHIPS[1:]), "TPU, ran", "GPU, ran"]
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for family in TABULATED:
        row = [*(count(family, chip) for chip in CHIPS), NOT_RUN, NOT_RUN]
        lines.append(f"| `{family}` | {' | '.join(row)} |")
    return "\n".join(lines)


def check(config: AotConfig) -> list[str]:
    """Lines that name the cells asked for which are stale, failed, not run or missing."""
    now, cells = digests(), load(config.output)
    found: dict[str, list[Key]] = {}
    for key in asked(config):
        found.setdefault(state(key, cells, now), []).append(key)
    lines = []
    for what in (STALE, FAILED, NOT_RUN, MISSING):
        if what in found:
            lines += [f"{what}: {len(found[what])} cells", *_grouped(found[what])]
    return lines


def _grouped(keys: Iterable[Key]) -> Iterator[str]:
    """The keys, in a line those of a family that are wanting on the same chips."""
    chips_of: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        label = f"{key.chip} {MODES[0]}" if key.mode == MODES[0] else key.chip
        chips_of.setdefault((key.family, key.shape), []).append(label)
    shapes: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (family, shape), labels in chips_of.items():
        shapes.setdefault((family, tuple(labels)), []).append(shape)
    everywhere = sum(len(modes(chip)) for chip in CHIPS)
    for (family, chips), names in shapes.items():
        where = "every chip" if len(chips) == everywhere else ", ".join(chips)
        every = len(names) == len(TABULATED[family].shapes)
        yield f"  {family} on {where}: {'all shapes' if every else ', '.join(names)}"


def tabulate(config: AotConfig) -> None:
    """Compiles what is missing, prints and writes; or checks.

    Raises:
      SystemExit: with 1, where `check` finds a problem.
      ValueError, OSError: with a message for the user.
    """
    if config.check:
        if problems := check(config):
            for line in problems:
                terminal.say(line)
            raise SystemExit(1)
        terminal.say(f"{config.output} is complete: all cells passed with the sources as they are")
        return
    console = terminal.console()
    console.print(table(run(config, console)))
    terminal.say(f"written to {config.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        AotConfig,
        tabulate,
        arguments,
        description=__doc__,
        prog="experiments.kernels.aot",
    )


if __name__ == "__main__":
    sys.exit(main())
