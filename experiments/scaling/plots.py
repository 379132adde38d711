"""The report's figure."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.scaling.cells import Cells
from experiments.scaling.collectives import DIRECTIONS
from experiments.scaling.programs import EXCHANGES


def plot(cells: Cells, path: Path) -> None:
    """Bytes received and memory on each chip, against the number of chips."""
    tokens = min((key.tokens for key in cells), default=0)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    moved, kept = figure.subplots(1, 2)
    for name in EXCHANGES:
        found = sorted(
            (key.chips, cell)
            for key, cell in cells.items()
            if (key.exchange, key.chip, key.tokens, key.layers) == (name, "v5e", tokens, 1)
            and key.chips > 1
            and not cell.reason
        )
        chips = [number for number, _ in found]
        total = [sum(cell.exchanged(d) for d in DIRECTIONS) for _, cell in found]
        moved.plot(chips, [b / 2**20 for b in total], marker=".", label=name)
        kept.plot(chips, [(cell.bytes or 0) / 2**30 for _, cell in found], marker=".", label=name)
    for axes, label in ((moved, "MiB received by a chip, a layer"), (kept, "GiB on a chip")):
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.set_xlabel(f"v5e chips; {tokens} tokens on each")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    kept.legend(fontsize=7, ncols=2)
    figure.suptitle(
        "One block, forward and backward, a row split over all chips; compiled, not run"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
