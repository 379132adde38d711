"""What people see of a printed text and of a figure."""

import itertools
import re

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def too_long(printed, width=80):
    """The lines that a terminal would break."""
    return [line for line in printed.splitlines() if len(line.rstrip()) > width]


def words(text):
    """What must not be cut: numbers with their commas, names with their underscores."""
    return set(re.findall(r"[\w.,+-]*\w", text))


def _labels(axis):
    """The tick labels that are drawn: those of ticks within the view."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]


def texts(figure):
    """All texts that a figure shows, with their boxes in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    of_ticks = {
        id(label)
        for axis in axes
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for label in (tick.label1, tick.label2)
    }
    found = [text for text in figure.findobj(Text) if id(text) not in of_ticks]
    found += [label for axis in axes for label in _labels(axis)]
    shown = (text for text in found if text.get_visible() and text.get_text().strip())
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


def illegible(figure):
    """Texts that are cut at the figure's edge, and pairs that overlap."""
    boxes = texts(figure)
    edge = figure.bbox
    cut = [
        text
        for text, box in boxes
        if box.x0 < edge.x0 or box.y0 < edge.y0 or box.x1 > edge.x1 or box.y1 > edge.y1
    ]
    overlapping = [
        (a, b)
        for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2)
        if min(box_a.x1, box_b.x1) > max(box_a.x0, box_b.x0)
        and min(box_a.y1, box_b.y1) > max(box_a.y0, box_b.y0)
    ]
    return cut + overlapping
