"""Times layers and models on this machine's CPU; every ratio is of one run.

    seqmodels models bench                        everything
    seqmodels models bench --only mamba-block     against transformers'
    seqmodels models bench --only mamba-decode    against transformers'
    seqmodels models bench --only hybrids         against transformers'
    seqmodels models bench --only mixers          every mixer at one size
    seqmodels models bench --only s5-layer        with associative_scan
    seqmodels models bench --only token-time      by length of the context
    seqmodels models bench --only memory          longest rows that train in 4 GiB

The dev extra has what it needs: torch, transformers, mambapy.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from experiments import places, terminal
from experiments.command_line import run_command
from experiments.kernels.bench import run, table
from experiments.kernels.results import Result
from experiments.models import block, decode, hybrids, memory, mixers, s5, token_time
from seqmodels.ranges import Checked, Seed, Size

RESULTS = places.output("models")
PARTS: dict[str, Callable[[int, int], Iterator[Result]]] = {
    "mamba-block": block.results,
    "mamba-decode": decode.results,
    "hybrids": hybrids.results,
    "mixers": mixers.results,
    "s5-layer": s5.results,
    "token-time": token_time.results,
    "memory": memory.results,
}


@dataclasses.dataclass(frozen=True)
class ModelBenchConfig(Checked):
    """What to measure."""

    only: (
        Literal[
            "mamba-block", "mamba-decode", "hybrids", "mixers", "s5-layer", "token-time", "memory"
        ]
        | None
    ) = None
    """Only this part."""
    repetitions: Size = 3
    """Interleaved repetitions of every timed program; medians are reported."""
    seed: Seed = 0
    """Seed of weights and inputs."""
    output: Path | None = None
    """The JSON file. By default experiments/results/models/<only, or all>-cpu.json."""

    traceback: bool = False
    """Show the whole traceback of an error."""

    @property
    def path(self) -> Path:
        return self.output or RESULTS / f"{self.only or 'all'}-cpu.json"


def measure(config: ModelBenchConfig) -> Iterator[Result]:
    """The rows, each as soon as it is known."""
    for name, part in PARTS.items():
        if config.only in (None, name):
            yield from part(config.repetitions, config.seed)


def bench(config: ModelBenchConfig) -> None:
    """Measures, prints and writes.

    Raises:
      ValueError, OSError: with a message for the user.
    """
    # transformers must not look for kernels, or anything else, on a network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    console = terminal.console()
    rows = run(config, measure(config), console, ("torch", "transformers", "mambapy"))
    console.print(table(rows))
    terminal.say(f"written to {config.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        ModelBenchConfig,
        bench,
        arguments,
        description=__doc__,
        prog="experiments.models.bench",
    )


if __name__ == "__main__":
    sys.exit(main())
