"""What a row split over many chips costs, from programs compiled for chips that are not there.

    seqmodels scaling report                    all cells that are not yet known
    seqmodels scaling report --exchange ring --chips 4 16    only these
    seqmodels scaling report --print-only       tables of the cells that there are
    seqmodels scaling report --step gla-1.3b rat-1.3b    a whole training step

A cell is one block of one exchange, forward and backward, on so many chips with so many tokens
each: collectives by kind, how often they run and the bytes that each chip receives, forward and
backward; memory on each chip. The compiler is the chip's own: what it says is a plan, not a
measurement, and nothing runs. Cells are written as they come and kept; a command that was stopped
goes on.

A stack of blocks, each recomputed in the backward pass, needs what one block needs at its peak and
for each further block its input and its parameters' state; two blocks are compiled to see that this
holds. From the memory at some lengths follows that at any, and from that the longest row that fits.

Results go to experiments/results/scaling: report.json, report.md and report.png.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax

from experiments import places, terminal
from experiments.command_line import run_command
from experiments.errors import check_name
from experiments.scaling import tables
from experiments.scaling.cells import Cell, Cells, load, save
from experiments.scaling.plots import plot
from experiments.scaling.programs import EXCHANGES, LAYOUTS, Key, compile_cell
from experiments.scaling.step import LAYERS, MODELS, compile_step
from pallas_kernels.tools import aot
from seqmodels.ranges import Checked, Size
from seqmodels.training.metrics import write_atomically
from seqmodels.training.run_directory import source_version

RESULTS = places.output("scaling")
TOKENS = (16_384, 32_768)
"""Tokens on each chip: of the cells, and of those that tell how memory grows."""


@dataclasses.dataclass(frozen=True)
class ScalingConfig(Checked):
    """Which cells, and where they go; empty means all."""

    exchange: tuple[str, ...] = ()
    """all_gather doubling chain affine halo checkpoints ring ulysses gather channels."""
    chips: tuple[int, ...] = ()
    """4, 16, 64, 256 (v5e) and 512 (v5p)."""
    tokens: tuple[int, ...] = ()
    """16384, 32768: of each chip."""
    step: tuple[str, ...] = ()
    """Compile a training step of these models on 64 v5e chips: gla-1.3b, rat-1.3b."""
    step_layers: tuple[Size, ...] = (LAYERS,)
    """Blocks of the model that --step compiles, scanned over; from two smaller numbers all 24
    follow."""
    step_length: Size = 2**20
    """Tokens of the row of --step."""
    again: bool = False
    """Do cells again that are known."""
    print_only: bool = False
    """Only make the tables and the plot from the cells that there are."""
    output: Path = RESULTS
    """The folder."""
    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known: dict[str, Any] = {
            "exchange": tuple(EXCHANGES),
            "chips": tuple(chips for _, chips in LAYOUTS),
            "tokens": TOKENS,
            "step": MODELS,
        }
        for name, allowed in known.items():
            for value in getattr(self, name):
                check_name(name, value, allowed)


def all_keys() -> list[Key]:
    """All cells, those that say most first."""
    first, more = TOKENS
    names = tuple(EXCHANGES)
    return [
        *(Key(name, "v5e", chips, first, 1) for chips in (4, 256) for name in names),
        *(Key(name, "v5e", 4, more, 1) for name in names),
        Key("doubling", "v5e", 4, first, 2),
        *(Key(name, "v5p", 512, first, 1) for name in ("doubling", "checkpoints", "ring")),
        *(Key(name, "v5e", chips, first, 1) for chips in (64, 16) for name in names),
        *(Key(name, "v5e", 4, first, 2) for name in names if name != "doubling"),
        *(Key(name, "v5e", 64, more, 1) for name in names if EXCHANGES[name].recurrent),
    ]


def wanted(config: ScalingConfig, cells: Cells) -> list[Key]:
    """The cells to do, in order."""
    return [
        key
        for key in all_keys()
        if (not config.exchange or key.exchange in config.exchange)
        and (not config.chips or key.chips in config.chips)
        and (not config.tokens or key.tokens in config.tokens)
        and (config.again or key not in cells)
    ]


def measure(keys: Sequence[Key]) -> Iterator[Cell]:
    """The cells, each as soon as it is known, in a process that may die of them."""
    version = source_version(places.ROOT)
    pool = None
    for key in keys:
        pool = pool or _pool()
        start = time.perf_counter()
        figures: dict[str, Any] = {}
        try:
            figures, reason = pool.submit(compile_cell, key).result(), None
        except BrokenProcessPool:  # the compiler may end its process
            reason, pool = "the compiler has ended its process", None
        except Exception as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
        figures.setdefault("seconds", time.perf_counter() - start)
        yield Cell(key=key, reason=reason, figures=figures, **version)
    if pool is not None:
        pool.shutdown()


def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """One process that compiles; it looks for no accelerator of this machine."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer=_on_cpu)


def _on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


def report(config: ScalingConfig) -> None:
    """Does what is missing, then writes and prints the tables."""
    path = config.output / "report.json"
    cells, steps = load(path)
    if not config.print_only:
        chip = "v5e"
        if reason := aot.missing(chip):
            raise ValueError(reason)
        keys = [] if config.step else wanted(config, cells)
        for number, cell in enumerate(measure(keys), 1):
            cells[cell.key] = cell
            save(path, cells, steps)
            what = cell.reason or f"{cell.figures['seconds']:.0f} s"
            print(f"{number}/{len(keys)} {' '.join(map(str, cell.key))}: {what}", file=sys.stderr)
        for model in config.step:
            for layers in config.step_layers:
                with _pool() as pool:
                    compiling = pool.submit(compile_step, model, layers, config.step_length)
                    figures = compiling.result()
                steps[f"{model}/{layers}/{config.step_length}"] = figures
                save(path, cells, steps)
                print(f"{model}, {layers}: {json.dumps(figures)[:200]}", file=sys.stderr)
    if not cells:
        raise ValueError(f"no cells in {path}; make them without --print-only")
    missing = [key for key in all_keys() if key not in cells]
    text = tables.markdown(cells, steps, missing)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / "report.md", text)
    plot(cells, config.output / "report.png")
    terminal.say(f"{len(cells)} cells, {len(missing)} missing: {config.output / 'report.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        ScalingConfig,
        report,
        arguments,
        description=__doc__,
        prog="experiments.scaling.report",
    )


if __name__ == "__main__":
    sys.exit(main())
