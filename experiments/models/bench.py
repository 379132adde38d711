"""Times Mamba against transformers' on this machine's CPU; every ratio is of one run.

python -m experiments.models.bench                 both parts
python -m experiments.models.bench --only block    one block, forward and backward
python -m experiments.models.bench --only decode   greedy decoding, one row

The dev extra has what it needs: torch, transformers, mambapy.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import rich.console
import tyro

from experiments.kernels.bench import run, table
from experiments.kernels.results import Result
from experiments.models import block, decode

RESULTS = Path(__file__).parents[1] / "results" / "models"
PARTS: dict[str, Callable[[int, int], Iterator[Result]]] = {
    "block": block.results,
    "decode": decode.results,
}


@dataclasses.dataclass(frozen=True)
class ModelBenchConfig:
    """What to measure."""

    only: Literal["block", "decode"] | None = None
    """Only this part."""
    repetitions: int = 3
    """Interleaved repetitions of every timed program; medians are reported."""
    seed: int = 0
    """Of weights and inputs."""
    output: Path | None = None
    """The JSON file. By default experiments/results/models/mamba.json, with `-<only>` added."""

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise ValueError(f"repetitions={self.repetitions} must be at least 1")

    @property
    def path(self) -> Path:
        suffix = f"-{self.only}" if self.only else ""
        return self.output or RESULTS / f"mamba{suffix}-cpu.json"


def measure(config: ModelBenchConfig) -> Iterator[Result]:
    """The rows, each as soon as it is known."""
    for name, part in PARTS.items():
        if config.only in (None, name):
            yield from part(config.repetitions, config.seed)


def main() -> None:
    config = tyro.cli(
        ModelBenchConfig, description=__doc__, prog="python -m experiments.models.bench"
    )
    # transformers must not look for kernels, or anything else, on a network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    rows = run(config, measure(config), console, ("torch", "transformers", "mambapy"))
    console.print(table(rows))
    console.print(f"written to {config.path}")


if __name__ == "__main__":
    main()
