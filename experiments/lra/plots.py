"""Figures of the LRA experiments, as PNG files."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.lra.published import Row
from seqmodels.data.examples import TaskData


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


def comparison(
    results: Sequence[tuple[Mapping[str, Any], str, bool]], published: Sequence[Row], path: Path
) -> None:
    """Accuracies of each task as bars.

    Args:
      results: our results, each with its name, which begins with the task's, and whether it may be
        compared with the published ones; those that may not are hatched.
      published: rows of other authors.
      path: the PNG file.
    """
    tasks = sorted({result["task"] for result, _, _ in results})
    most = max(sum(result["task"] == task for result, _, _ in results) for task in tasks)
    height = 0.24 * (len(published) + most) + 1.4
    figure = Figure(figsize=(5.5 * len(tasks), height), layout="constrained")
    theirs_style: dict[str, Any] = {"facecolor": "lightgray"}
    ours_style: dict[str, Any] = {"facecolor": "tab:blue", "edgecolor": "white"}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        theirs = [(row.model, value) for row in published if (value := row.accuracy(task))]
        ours = [each for each in results if each[0]["task"] == task]
        names = [name for name, _ in theirs]
        axes.barh(range(len(theirs)), [value for _, value in theirs], **theirs_style)
        for result, name, comparable in ours:
            hatch = None if comparable else "//"
            value = 100 * result["test_accuracy"]
            axes.barh(len(names), value, hatch=hatch, **ours_style)  # by place: names may repeat
            names.append(name.removeprefix(task).strip())
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(task)
        axes.set_xlabel("test accuracy in %")
    shown = {
        "published": Patch(**theirs_style),
        "ours": Patch(**ours_style),
        "ours, not the published task or recipe": Patch(**ours_style, hatch="//"),
    }
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(tasks) + 1)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def samples(data: TaskData, path: Path, columns: int = 6, rows: int = 4) -> None:
    """A page of training examples with their labels: as images, as waves or as text.

    Args:
      data: the task; its description says what images or ids are.
      path: the PNG file.
      columns, rows: of images; there are as many waves and texts as rows.
    """
    image = data.description.get("image")
    columns = columns if image else 1
    count = min(columns * rows, len(data.train))
    chosen = np.linspace(0, len(data.train) - 1, count).astype(int)
    names = data.description.get("classes")
    size = (1.6 * columns, 1.8 * rows) if image else (10, 1.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, index in zip(grid, chosen.tolist(), strict=False):
        label = int(data.train.labels[index])
        axes.set_title(str(names[label]) if names else f"label {label}", fontsize=8, loc="left")
        _sample(axes, data, index)
    figure.suptitle(data.name)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _sample(axes: Axes, data: TaskData, index: int) -> None:
    """One example."""
    examples = data.train
    offsets = examples.offsets[index * examples.parts : (index + 1) * examples.parts + 1]
    parts = [examples.tokens[a:b] for a, b in pairwise(offsets.tolist())]
    shape = data.description.get("image")
    if shape:
        pixels = parts[0]
        if "order" in data.description:  # permuted
            pixels = pixels[np.argsort(data.description["order"])]
        values = pixels.reshape(*shape, -1)
        axes.imshow(values if values.shape[2] == 3 else values[..., 0], cmap="gray")
    elif examples.scaling is not None:
        axes.plot(examples.as_inputs(parts[0])[:, 0], linewidth=0.4)
    else:
        symbols = data.description.get("symbols")
        texts = [_text(part[:1000].tolist(), symbols) for part in parts]
        lines = [line for text in texts for line in [*wrap(text, 110)[: 6 // len(texts)], ""]]
        axes.text(
            0, 1, "\n".join(lines), va="top", fontsize=7, family="monospace",
            parse_math=False, transform=axes.transAxes,
        )  # fmt: skip


def _text(ids: Sequence[int], symbols: Sequence[str] | None) -> str:
    """What ids stand for: symbols, or bytes plus one."""
    if symbols:
        return " ".join(symbols[i] for i in ids)
    return ascii(bytes(i - 1 for i in ids).decode("utf-8", errors="replace"))[1:-1]
