"""Figures of the LRA experiments, as PNG files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def learning_curve(result: Mapping[str, Any], path: Path) -> None:
    """Loss and accuracy against steps, with the test accuracy and the baselines."""
    records = {
        kind: [record for record in result["curve"] if record["kind"] == kind]
        for kind in ("train", "eval")
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for kind, label in (("train", "training"), ("eval", "validation")):
            points = [r for r in records[kind] if isinstance(r[name], float | int)]
            axes.plot(
                [r["step"] for r in points],
                [r[name] for r in points],
                label=label,
                marker="." if kind == "eval" else None,
                linewidth=1,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    baseline, value = max(result["baselines"].items(), key=lambda item: item[1])
    axes.axhline(value, color="gray", linestyle="--", label=f"baseline: {baseline}")
    axes.plot(
        [result["test_step"]], [result["test_accuracy"]], "k*", markersize=9,
        label=f"test {result['test_accuracy']:.3f}",
    )  # fmt: skip
    axes.legend(fontsize=8)
    figure.suptitle(
        f"{result['task']}, {result['model']}, {result['preset']}, seed {result['seed']}"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
