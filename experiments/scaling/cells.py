"""The cells of the report, and their JSON file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from experiments.run import read_object
from experiments.scaling.collectives import Collective
from experiments.scaling.programs import Key, Memory
from seqmodels.training.metrics import write_atomically


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the compiler says of a block.

    Attributes:
      key: which.
      reason: why there are no figures; None where there are.
      figures: as ``programs.compile_cell`` gives them.
      commit, dirty: the checkout, and whether it had changes.
    """

    key: Key
    reason: str | None
    figures: dict[str, Any]
    commit: str | None
    dirty: bool | None

    @property
    def memory(self) -> Memory | None:
        """On each chip; None where it does not fit, or is not known."""
        found = self.figures.get("memory")
        return None if found is None else Memory(**found)

    @property
    def bytes(self) -> int | None:
        """Memory that each chip needs, also where it has less; None where that is not known."""
        return self.figures.get("needs") if self.memory is None else self.memory.total

    @property
    def collectives(self) -> list[Collective]:
        return [Collective(**each) for each in self.figures.get("collectives", ())]

    def exchanged(self, direction: str) -> int:
        """Bytes that each chip receives of the others' tokens and states.

        An all-reduce is left out: it sums gradients of parameters, and is what splitting rows costs
        too, or gives all shards the last state.
        """
        return sum(
            c.bytes for c in self.collectives if c.direction == direction and c.kind != "all-reduce"
        )


Cells = dict[Key, Cell]


def load(path: Path) -> tuple[Cells, dict[str, Any]]:
    """The cells and training steps of a file; none if there is no file.

    Raises:
      ValueError: it holds something else.
    """
    if not path.exists():
        return {}, {}
    record = read_object(path)
    try:
        cells = [Cell(**{**cell, "key": Key(**cell["key"])}) for cell in record["cells"]]
        return {cell.key: cell for cell in cells}, dict(record["steps"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of experiments.scaling: {error}") from error


def save(path: Path, cells: Cells, steps: dict[str, Any]) -> None:
    """Writes all cells, in order."""
    record = {
        "jax": jax.__version__,
        "cells": [
            {**dataclasses.asdict(cell), "key": cell.key._asdict()}
            for _, cell in sorted(cells.items())
        ],
        "steps": steps,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
