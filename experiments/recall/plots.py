"""Figures of the recall experiments, as PNG files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLUMNS = 3
_MARKERS = "osD^v<>PX*hd"
_COLOURS = 10


def _label(result: Mapping[str, Any]) -> str:
    """The mixer, and how often the context was read if not once."""
    times = result["repeats"]
    return result["mixer"] + (f", read {times} times" if times > 1 else "")


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(4.2 * columns, 7.0), height * rows + 1.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for extra in axes[count:]:
        extra.set_axis_off()
    return figure, axes[:count]


def _style(number: int) -> dict[str, Any]:
    return {
        "color": f"C{number % _COLOURS}",
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1,
        "linestyle": ("-", "--", ":")[number // _COLOURS % 3],
    }


def _finish(figure: Figure, axes: Sequence[Axes], path: Path) -> None:
    """One legend for all panels."""
    shown: dict[str, Any] = {}
    for each in axes:
        for line, label in zip(*each.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, line)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _axes(axes: Axes, task: str, chance: float) -> None:
    axes.axhline(chance, color="gray", linewidth=0.8, linestyle="--", label="chance")
    axes.set_ylim(-0.04, 1.04)
    axes.set_title(task)
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)


def _bytes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis of bytes, the same in all panels, with powers of 4 as its ticks."""
    low, high = math.floor(math.log(min(sizes), 4)), math.ceil(math.log(max(sizes), 4))
    ticks = [4**power for power in range(low, max(high, low + 1) + 1)]
    axes.set_xscale("log", base=4)
    axes.set_xlim(ticks[0] * 0.8, ticks[-1] * 1.25)
    units = ((1, ""), (2**10, " KiB"), (2**20, " MiB"), (2**30, " GiB"))
    labels = []
    for tick in ticks:
        unit, name = max((pair for pair in units if pair[0] <= tick), key=lambda pair: pair[0])
        labels.append(f"{tick // unit}{name}")
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()


def against_state(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy at the trained length against bytes of state, a panel for each task."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    labels = sorted({_label(result) for result in results})
    figure, panels = _panels(len(tasks), 3.2)
    for axes, task in zip(panels, tasks, strict=True):
        found = [result for result in results if result["task"] == task]
        for number, label in enumerate(labels):
            own = sorted(
                (r["state_bytes"], r["tests"][1]["accuracy"]) for r in found if _label(r) == label
            )
            if own:
                axes.plot(*zip(*own, strict=True), label=label, **_style(number))
        _axes(axes, task, found[0]["chance"])
        _bytes(axes, [result["state_bytes"] for result in results])
        axes.set_xlabel("state of a row in bytes")
    _finish(figure, panels, path)


def against_length(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against the length, each mixer's largest state, a panel for each task."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    labels = sorted({_label(result) for result in results})
    figure, panels = _panels(len(tasks), 3.2)
    for axes, task in zip(panels, tasks, strict=True):
        found = [result for result in results if result["task"] == task]
        for number, label in enumerate(labels):
            own = [result for result in found if _label(result) == label]
            if own:
                largest = max(own, key=lambda result: result["size"])
                points = sorted((m, test["accuracy"]) for m, test in largest["tests"].items())
                axes.plot(*zip(*points, strict=True), label=label, **_style(number))
        multiples = sorted({m for result in found for m in result["tests"]})
        _axes(axes, task, found[0]["chance"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(multiples, [f"{multiple}" for multiple in multiples])
        axes.minorticks_off()
        axes.set_xlabel("length, times the trained one")
    _finish(figure, panels, path)
