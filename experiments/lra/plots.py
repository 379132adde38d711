"""Figures of the LRA experiments, as PNG files."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

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


@dataclasses.dataclass(frozen=True)
class Dot:
    """A row of ours: its name, percent, and whether it may be read against published rows."""

    name: str
    accuracy: float
    comparable: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """A run's evaluations (tokens, minutes, percent) and its training loss (tokens, loss)."""

    name: str
    tokens: Sequence[float]
    minutes: Sequence[float]
    accuracy: Sequence[float]
    loss_tokens: Sequence[float]
    loss: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Rows of ours on the same data.

    Attributes:
      title: what stands over it.
      task: names the published column.
      dots, lines: of the rows.
      baseline: percent of the best trivial predictor.
    """

    title: str
    task: str
    dots: Sequence[Dot]
    lines: Sequence[Line]
    baseline: float


def overview(
    panels: Sequence[Panel],
    published: Sequence[Row],
    path: Path | io.BytesIO,
    texts: Sequence[str] = (),
) -> None:
    """The report's picture: by task the accuracies, and how ours came about.

    Args:
      panels: our rows.
      published: rows of other authors.
      path: the PNG file, or where to write its bytes.
      texts: what stands above, side by side, in type of one width.
    """
    heights = [_height(panel, published) for panel in panels]
    lines = max((text.count("\n") + 3 for text in texts), default=0)
    ratios = [0.165 * lines] * bool(texts) + heights
    figure = Figure(figsize=(16, sum(ratios)), layout="constrained")
    parts = figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0].tolist()
    if texts:
        above = parts.pop(0)
        for number, text in enumerate(texts):
            place = 0.01 + number / len(texts)
            above.text(place, 0.98, text, va="top", family="monospace", fontsize=9)
    for part, panel in zip(parts, panels, strict=True):
        part.suptitle(panel.title, fontweight="bold")
        axes = part.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
        _dots(axes[0], panel, published)
        _lines(axes[1:], panel)
    figure.savefig(path, dpi=100, format="png", metadata={"Software": None})


def _height(panel: Panel, published: Sequence[Row]) -> float:
    """Inches that the names and the legend need."""
    theirs = sum(row.accuracy(panel.task) is not None for row in published)
    return max(0.19 * (theirs + len(panel.dots)) + 1.6, 0.2 * len(panel.lines) + 3.4)


def _dots(axes: Axes, panel: Panel, published: Sequence[Row]) -> None:
    """Accuracies, one a line: published ones from the highest, then ours."""
    found = ((row.accuracy(panel.task), row.model) for row in published)
    theirs = sorted(((a, name) for a, name in found if a is not None), reverse=True)
    ours = sorted(panel.dots, key=lambda dot: -dot.accuracy)
    names = [name for _, name in theirs] + [dot.name for dot in ours]
    axes.plot([value for value, _ in theirs], range(len(theirs)), "o", color="gray")
    for place, dot in enumerate(ours, len(theirs)):
        face = "tab:blue" if dot.comparable else "white"
        axes.plot(dot.accuracy, place, "o", markeredgecolor="tab:blue", markerfacecolor=face)
    axes.axhline(len(theirs) - 0.5, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.05)
    axes.grid(alpha=0.3)
    axes.set_xlabel("test accuracy in %")
    kinds = {"published": ("gray", "gray")} if theirs else {}
    if any(dot.comparable for dot in ours):
        kinds["ours"] = ("tab:blue", "tab:blue")
    if not all(dot.comparable for dot in ours):
        kinds["ours, below the paper's scale"] = ("tab:blue", "white")
    handles = [
        Line2D([], [], marker="o", linestyle="", markeredgecolor=edge, markerfacecolor=face)
        for edge, face in kinds.values()
    ]
    axes.legend(
        handles, kinds, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(kinds)
    )


def _lines(axes: Sequence[Axes], panel: Panel) -> None:
    """Training loss and validation accuracy by tokens, and the latter by minutes."""
    by_loss, by_tokens, by_minutes = axes
    for number, line in enumerate(panel.lines):
        style: Any = {
            "color": f"C{number % 10}",
            "linestyle": ("-", "--", ":", "-.")[number // 10 % 4],
            "linewidth": 1,
        }
        by_loss.plot([n / 1e6 for n in line.loss_tokens], line.loss, **style)
        by_tokens.plot([n / 1e6 for n in line.tokens], line.accuracy, marker=".", **style)
        by_minutes.plot(line.minutes, line.accuracy, marker=".", label=line.name, **style)
    for axis in (by_tokens, by_minutes):
        axis.axhline(panel.baseline, color="gray", linestyle="--", linewidth=1)
        axis.set_ylabel("validation accuracy in %")
    by_loss.set_ylabel("training loss")
    by_loss.set_xlabel("million tokens")
    by_tokens.set_xlabel("million tokens")
    by_minutes.set_xlabel("minutes of training")
    ends = [line.minutes[-1] for line in panel.lines]
    logarithmic = bool(ends) and max(ends) > 4 * min(ends) > 0
    if logarithmic:
        by_minutes.set_xscale("log")
        by_minutes.xaxis.set_major_formatter("{x:g}")
        by_minutes.xaxis.set_minor_formatter(NullFormatter())
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis is not by_minutes or not logarithmic:
            axis.set_xlim(left=0)
    handles, names = by_minutes.get_legend_handles_labels()
    handles.append(Line2D([], [], color="gray", linestyle="--", linewidth=1))
    names.append("best trivial baseline")
    by_minutes.legend(handles, names, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))


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
