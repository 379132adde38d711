"""Compiles all named shapes of the kernels for absent chips; tables their cost.

    python -m experiments.kernels.aot                         all that is not yet known
    python -m experiments.kernels.aot --family causal_conv1d --chip v5e    only these
    python -m experiments.kernels.aot --chip v5e --no-estimate    whether they compile
    python -m experiments.kernels.aot --readme README.md    rewrite the support matrix

A cell is one shape of a family on one chip, forward and backward, and on v5e forward alone too:
whether it compiles; on v5e the compiler's static time and its multiple of the floor (every input
and output once), but for families whose loops it would simulate for hours or in more memory than
there is (their benchmark has it for a part of the length); on a GPU what ptxas says of registers
and spills. On "cpu" the portable path runs, on zeros and at most 512 tokens. Compiled ahead of time
is not run: no cell here needs a TPU or a GPU. Cells are written as they come and kept; a cell is
done again when the sources of its family have changed, or when it did not pass.
"""

import dataclasses
import hashlib
import importlib
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

from experiments import terminal
from experiments.command_line import run_command
from pallas_kernels.tools import aot
from pallas_kernels.tools.programs import MODES
from seqmodels.ranges import Checked
from seqmodels.training.metrics import write_atomically
from seqmodels.training.run_directory import environment, source_version

FAMILIES = (
    "linear_scan",
    "selective_scan",
    "diagonal_ssm",
    "causal_conv1d",
    "linear_attention",
    "delta_rule",
    "checkpoint_attention",
    "long_conv",
)
CHIPS = ("cpu", *aot.CHIPS)
ESTIMATED = "v5e"  # the chip that speed is held to
SLOW_TO_ESTIMATE = (
    "selective_scan",
    "diagonal_ssm",
    "linear_attention",
    "delta_rule",
    "checkpoint_attention",
)
WITHOUT_KERNELS = ("long_conv",)  # XLA compiles them for every chip
REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "experiments" / "results" / "kernels" / "aot.json"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


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
    estimate: bool = True
    """On v5e read the static cost too; without, only whether it compiles, which takes seconds."""
    again: bool = False
    """Do cells again that are known for these sources."""
    output: Path = RESULTS
    """The JSON file; cells are merged into it."""
    readme: Path | None = None
    """Only rewrite the support matrix of this file from the JSON."""

    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"family": FAMILIES, "chip": CHIPS, "mode": MODES}
        for name, allowed in known.items():
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name}={value!r} is unknown; one of {', '.join(allowed)}")
        shapes = self.shapes
        for shape in self.shape:
            if not any(shape in names for names in shapes.values()):
                raise ValueError(f"shape={shape!r} is in none of {', '.join(shapes)}")

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        """The named shapes of each family that is asked for."""
        return {family: tuple(_shapes(family).SHAPES) for family in self.family or FAMILIES}


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
      sources: digest of the family's files.
      commit: of the checkout; `dirty` if it had changes.
      seconds: wall time.
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
    settings = {**dataclasses.asdict(config), "output": None, "readme": None}
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


def sources(family: str) -> str:
    """A digest of the family's files."""
    files = sorted((REPOSITORY / "pallas_kernels" / family).glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def wanted(config: AotConfig, known: Cells) -> list[Key]:
    """The cells to do, those of one family and chip together."""
    shapes = config.shapes
    keys = [
        Key(family, shape, mode, chip)
        for family, names in shapes.items()
        for chip in config.chip or CHIPS
        for shape in names
        if not config.shape or shape in config.shape
        for mode in modes(chip)
        if not config.mode or mode in config.mode
    ]
    digests = {family: sources(family) for family in shapes}
    return [
        key
        for key in keys
        if config.again
        or key not in known
        or known[key].outcome != PASSED
        or known[key].sources != digests[key.family]
    ]


def modes(chip: str) -> tuple[str, ...]:
    """What is compiled for a chip; the program with the backward pass holds all kernels."""
    return MODES if chip == ESTIMATED else MODES[-1:]


def _shapes(family: str) -> Any:
    return importlib.import_module(f"pallas_kernels.{family}.shapes")


def measure(keys: Iterable[Key], *, estimate: bool = True) -> Iterator[Cell]:
    """The cells, each as soon as it is known; one process for each family and chip."""
    version = source_version(REPOSITORY)
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault((key.family, key.chip), []).append(key)
    for (family, chip), group in groups.items():
        digest = sources(family)
        start = time.perf_counter()
        answers = _answers(family, chip, group, estimate)
        for key, answer in zip(group, answers, strict=True):
            outcome, figures, reason = judge(answer)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            yield Cell(*key, outcome, figures, reason, digest, **version, seconds=seconds)


def _answers(family: str, chip: str, keys: list[Key], estimate: bool) -> Iterator[Any]:
    """An estimate, kernels, None (it ran) or an error for each key."""
    if chip == "cpu":
        return (_run_here(family, key) for key in keys)
    if reason := aot.missing(chip):
        return (ImportError(reason) for _ in keys)
    implementation = "tpu" if chip in aot.TPUS else "gpu"
    if chip in aot.TPUS:
        unread = chip != ESTIMATED or not estimate or family in SLOW_TO_ESTIMATE
    else:
        unread = family in WITHOUT_KERNELS
    if family in WITHOUT_KERNELS:
        implementation = "xla"
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


def _compile_here(family: str, key: Key, implementation: str) -> Exception:
    """Whether it compiles: a static cost takes the compiler minutes, and XLA's kernels are not ours
    to count registers of."""
    try:
        aot.compile_for(key.chip, *_shapes(family).case(key.shape, implementation, key.mode))
    except Exception as error:
        return RuntimeError(str(error))
    return ValueError("compiled; its cost is not read here")


def _run_here(family: str, key: Key) -> Exception | None:
    """Runs the portable path on zeros, at no more than 512 tokens."""
    module = _shapes(family)
    scale = min(1.0, 512 / module.SHAPES[key.shape].length)
    try:
        fn, *operands = module.case(key.shape, "xla", key.mode, repr(scale))
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
    """Does what is missing, writing after each cell; returns all cells of the file."""
    cells, start = load(config.output), time.perf_counter()
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


def table(cells: Iterable[Cell]) -> rich.console.Group:
    """A table of each family: what is known of a shape and mode, and on which chips."""
    rows: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.key[:3], CHIPS.index(cell.chip))):
        row = rows.setdefault(cell.key[:3], {})
        row.setdefault(describe(cell), []).append(cell.chip)
    views: dict[str, rich.table.Table] = {}
    for (family, shape, mode), known in rows.items():
        if family not in views:
            views[family] = terminal.table(family)
            terminal.add_columns(views[family], "shape", "chips", left=("shape", "chips"))
        chips = (f"{', '.join(names)}: {what}" for what, names in known.items())
        views[family].add_row(f"{shape}\n  {mode}", "; ".join(chips))
    return rich.console.Group(*views.values())


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


def matrix(cells: Iterable[Cell]) -> str:
    """The support matrix in Markdown: for each family and chip, what became of its named shapes."""
    known = {cell.key: cell.outcome for cell in cells}

    def count(family: str, chip: str) -> str:
        shapes = _shapes(family).SHAPES
        keys = [Key(family, shape, mode, chip) for shape in shapes for mode in modes(chip)]
        outcomes = [known.get(key, NOT_RUN) for key in keys]
        present = [o for o in (PASSED, FAILED, NOT_RUN) if o in outcomes]
        if present == [NOT_RUN]:
            return NOT_RUN
        return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in present)

    names = ["CPU, ran", *(f"{chip}, compiled" for chip in CHIPS[1:]), "TPU, ran", "GPU, ran"]
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for family in FAMILIES:
        row = [*(count(family, chip) for chip in CHIPS), NOT_RUN, NOT_RUN]
        lines.append(f"| `{family}` | {' | '.join(row)} |")
    return "\n".join(lines)


def with_matrix(text: str, cells: Iterable[Cell]) -> str:
    """`text` with what stands between its two markers replaced.

    Raises:
      ValueError: a marker is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the file needs the two lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{matrix(cells)}\n{END}{tail}"


def tabulate(config: AotConfig) -> None:
    """Compiles what is missing, prints and writes; or rewrites the support matrix.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    if config.readme:
        text = config.readme.read_text(encoding="utf-8")
        write_atomically(config.readme, with_matrix(text, load(config.output).values()))
        return
    console = terminal.console()
    cells = run(config, console)
    console.print(table(cells.values()))
    terminal.say(f"written to {config.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        AotConfig,
        tabulate,
        arguments,
        description=__doc__,
        prog="python -m experiments.kernels.aot",
    )


if __name__ == "__main__":
    sys.exit(main())
