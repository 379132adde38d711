"""Paddles and the snakes they form: the random geometry of Pathfinder images, many images at once.

The procedure is that of Kim, Linsley, Thakkar & Serre 2020 (their program `snakes2`), including its
rounding. A paddle is a short line, drawn at twice the resolution and reduced with a Lanczos filter.
All a step depends on is the orientation of the paddle before it, one of 360 degrees for a seed and
one of the pixels on a small circle afterwards, so paddles, footprints and the odds of each next
orientation are tables (`Tables`). Occupancies are in 0 .. 255, as the original's before it divides.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

FINER = 2  # resolution at which lines and discs are drawn
DEGREES = 360
_FULL = 255
_CROSSED = 459  # 1.8 in units of 1/255: two footprints that sum to it cross
_TAKEN = 76  # 0.3: a pixel with more is not free for a seed
_DRAWS = 3  # of a next paddle, or of a seed that left the canvas, before giving up
_SAMPLES = 32  # pixels tried at random for a seed before all are looked at


@dataclass(frozen=True)
class Shape:
    """What Long Range Arena sets for a size of image; lengths in pixels.

    Attributes:
      size: of the square image.
      margins: space between paddles; an image draws one of these.
      padding: of the border that stays empty.
      length, thickness: of a paddle.
      marker_radius: of the two discs.
      seed_distance: between the first paddles of both long snakes.
      continuity: how much less likely a bend is than a straight line.
      distractor_paddles: of all short snakes together.
      snake_contrast, paddle_contrast: brightness; long snakes have the product, short ones the
        first. (The image is scaled to 0 .. 255 in the end.)
    """

    size: int
    margins: tuple[int, ...]
    padding: int
    length: int
    thickness: float
    marker_radius: float
    seed_distance: int
    continuity: float
    distractor_paddles: int
    snake_contrast: float
    paddle_contrast: float = 1.0

    @property
    def reach(self) -> int:
        """How far the footprint of a paddle extends from where it begins, at most."""
        return self.length + int(np.ceil(self.thickness)) + max(self.margins)

    @property
    def border(self) -> int:
        """Around the canvas, so that whatever is looked at near its edge exists."""
        return max(self.reach, self.length + 4 * max(self.margins) + 4)


@dataclass(frozen=True, eq=False)
class Tables:
    """What follows from an orientation: one of 360 degrees, or 360 + the number of an end point.

    Attributes:
      ends: `(K, 2)` int, pixels on the circle around a pivot where the next paddle may end.
      weights: `(360 + K, K)`, how much each is wanted after an orientation.
      steps: `(360 + K, 2)` float, from a pivot to the next.
      heads: `(360, 2)` float, from a seed's tail to its other end.
      pivots: `(360, 2)` float, from there to its pivot.
      lines, masks: `(360 + K, S, S)` uint8, a paddle and its footprint, centred on a seed's tail,
        or on the end of a later paddle.
      kernels: of each degree, `(D, 2)` int, the pixels that must be free for a seed.
      usable: `(360,)` bool. The original finds no place at all for a seed of a degree whose kernel
        lies outside of the image from one of the corners, and so does this.
      disc: `(D, 2)` int, the pixels within the margin.
    """

    ends: np.ndarray
    weights: np.ndarray
    steps: np.ndarray
    heads: np.ndarray
    pivots: np.ndarray
    lines: np.ndarray
    masks: np.ndarray
    kernels: np.ndarray
    usable: np.ndarray
    disc: np.ndarray
    margin: int
    reach: int


@functools.cache
def tables(shape: Shape, margin: int) -> Tables:
    """The tables of a shape with one of its margins."""
    length, radius = shape.length, shape.length + margin
    ends = _circle(radius)
    degrees = np.arange(-180, 180) * np.pi / 180
    angles = np.concatenate([degrees, np.arctan2(ends[:, 0], ends[:, 1])])
    bend = np.abs(angles[DEGREES:] - angles[:, None])
    bend = np.minimum(bend, 2 * np.pi - bend)
    weights = np.cos(np.minimum(bend * shape.continuity, np.pi / 2)) ** 2
    # A seed is drawn from its tail along its orientation, a later paddle from its end back.
    drawn = [*degrees, *(angles[DEGREES:] + np.pi)]
    pictures = [_paddle(shape, margin, angle) for angle in drawn]
    masks = np.stack([mask for _, mask in pictures])
    kernels = _kernels(masks[:DEGREES], radius)
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    outside = (kernels[:, None] * corners[:, None] > 0).any(axis=3)  # `(360, 4, D)`
    return Tables(
        ends=ends,
        weights=weights,
        steps=_along(angles, length + 2 * margin),
        heads=_along(degrees, length),
        pivots=_along(degrees + np.pi, radius),
        lines=np.stack([line for line, _ in pictures]),
        masks=masks,
        kernels=kernels,
        usable=~outside.all(axis=2).any(axis=1),
        disc=disc(margin),
        margin=margin,
        reach=masks.shape[1] // 2,
    )


def disc(radius: int) -> np.ndarray:
    """`(D, 2)` int, the pixels at most `radius` from the origin."""
    side = np.arange(-radius, radius + 1)
    y, x = np.meshgrid(side, side, indexing="ij")
    inside = y**2 + x**2 <= radius**2
    return np.stack([y[inside], x[inside]], axis=1)


def moved(places: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Where a move leads: rounded up where it arrives, so that the noise of a sine may count."""
    return np.ceil(places + moves).astype(int)


def _along(angles: np.ndarray, distance: int | float) -> np.ndarray:
    """`(n, 2)` float, a move by a distance along each angle."""
    return distance * np.stack([np.sin(angles), np.cos(angles)], axis=1)


def _circle(radius: int) -> np.ndarray:
    """`(K, 2)` int, distinct pixels on a circle that is sampled once per pixel of arc."""
    per_pixel = 360.0 / (2 * radius * np.pi)
    angles = np.arange(0, 360, per_pixel) * np.pi / 180
    far = 100  # from 0, where noise does not count
    return np.unique(np.floor(far + _along(angles, radius)) - far, axis=0).astype(int)


def _paddle(shape: Shape, margin: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A line from the centre along the angle, and its surroundings within the margin."""
    reach = shape.length + int(np.ceil(shape.thickness)) + margin
    centre, side = reach * FINER, 2 * reach * FINER + 1
    y, x = moved(np.array([centre, centre]), _along(np.array([angle]), shape.length * FINER)[0])
    line = Image.new("L", (side, side))
    width = round(shape.thickness * FINER)
    ends = [(centre, centre), (int(x), int(y))]
    ImageDraw.Draw(line).line(ends, fill=_FULL, width=width)
    mask = Image.fromarray(_dilated(np.asarray(line), disc(margin * FINER)))
    small = (2 * reach + 1, 2 * reach + 1)
    reduced = (image.resize(small, Image.Resampling.LANCZOS) for image in (line, mask))
    first, second = (np.asarray(image) for image in reduced)
    return first, second


def _dilated(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The greatest value at any of the offsets; there is nothing outside of the image."""
    far = int(np.abs(offsets).max(initial=0))
    padded = np.pad(image, far)
    height, width = image.shape
    return functools.reduce(
        np.maximum,
        (padded[far + y :, far + x :][:height, :width] for y, x in offsets.tolist()),
    )


def _kernels(masks: np.ndarray, radius: int) -> np.ndarray:
    """`(360, D, 2)` int, where each seed's footprint is full; the last one repeats to fill up.

    The original centres the footprint one pixel off and cuts it to `radius`; so does this.
    """
    reach = masks.shape[1] // 2
    found = []
    for mask in masks:
        offsets = np.argwhere(mask == _FULL) - reach + 1
        found.append(offsets[(np.abs(offsets) <= radius).all(axis=1)])
    most = max(map(len, found))
    return np.stack([np.pad(each, ((0, most - len(each)), (0, 0)), mode="edge") for each in found])


def marker(radius: float) -> np.ndarray:
    """`(S, S)` uint8, a disc in the centre."""
    reach = int(np.ceil(radius)) + 3
    blown = np.zeros((2 * (reach + 1) * FINER,) * 2, np.uint8)
    centre = FINER * reach
    y, x = np.ogrid[: len(blown), : len(blown)]
    blown[(y - centre) ** 2 + (x - centre) ** 2 <= (radius * FINER) ** 2] = _FULL
    side = len(blown) // FINER
    small = Image.fromarray(blown).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)[:-1, :-1]


@dataclass(frozen=True)
class Tips:
    """The last paddle of one snake in each of n images.

    Attributes:
      pivot: `(n, 2)` int, about which it lies.
      angle: `(n,)` int, its orientation, a row of `Tables`.
      place: `(n, 2)` int, where its picture is centred.
    """

    pivot: np.ndarray
    angle: np.ndarray
    place: np.ndarray

    def at(self, rows: np.ndarray) -> "Tips":
        """The tips of some of the images."""
        return Tips(self.pivot[rows], self.angle[rows], self.place[rows])


class Canvases:
    """Occupancies of n images, each with a border around it that nothing stands on.

    Attributes:
      shape: of the images.
      values: `(n, side, side)` uint8.
    """

    def __init__(self, shape: Shape, count: int) -> None:
        self.shape = shape
        self.values = np.repeat(_empty(shape)[None], count, axis=0)

    def taken(self, rows: np.ndarray) -> "Canvases":
        """A copy of some of them."""
        copy = Canvases(self.shape, 0)
        copy.values = self.values[rows]
        return copy

    def window(self, rows: np.ndarray, centre: np.ndarray, reach: int) -> tuple[np.ndarray, ...]:
        """An index for the square around a pixel of each of the rows, `(n, S, S)`."""
        return window(rows, centre + self.shape.border, reach)

    def paste(self, table: Tables, rows: np.ndarray, tips: Tips) -> None:
        """Adds the footprints of the last paddles of the images in `rows`."""
        where = self.window(rows, tips.place, table.reach)
        self.values[where] = np.maximum(self.values[where], table.masks[tips.angle])


@functools.cache
def _empty(shape: Shape) -> np.ndarray:
    """The occupancy of an image with nothing but its dead border."""
    canvas = np.zeros((shape.size + 2 * shape.border,) * 2, np.uint8)
    inside = slice(shape.border, shape.border + shape.size)
    free = slice(shape.border + shape.padding, shape.border + shape.size - shape.padding)
    canvas[inside, inside] = _FULL
    canvas[free, free] = 0
    return canvas


def window(rows: np.ndarray, centre: np.ndarray, reach: int) -> tuple[np.ndarray, ...]:
    """Index arrays of the square of `2 reach + 1` around a pixel in each of the rows."""
    side = np.arange(-reach, reach + 1)
    y, x = centre[:, 0, None] + side, centre[:, 1, None] + side
    return rows[:, None, None], y[:, :, None], x[:, None, :]


def extend(
    table: Tables, rng: np.random.Generator, canvases: Canvases, rows: np.ndarray, tips: Tips
) -> tuple[Tips, np.ndarray]:
    """Gives one snake of each image another paddle; the one before becomes an obstacle.

    Args:
      canvases: changed where it succeeds.
      rows: `(n,)` which of them.
      tips: of the snakes.

    Returns:
      The new last paddles, and `(n,)` bool, which there are.
    """
    shape, margin = canvases.shape, table.margin
    radius = shape.length + margin
    pivot = moved(tips.pivot, table.steps[tips.angle])
    around = canvases.values[canvases.window(rows, pivot, radius + margin)]
    side = 2 * radius + 1
    near = functools.reduce(
        np.maximum,
        (around[:, margin + y :, margin + x :][:, :side, :side] for y, x in table.disc.tolist()),
    )
    near = near[:, radius + table.ends[:, 0], radius + table.ends[:, 1]]
    places = pivot[:, None] + table.ends
    inside = ((places >= 0) & (places < shape.size)).all(axis=2)
    odds = table.weights[tips.angle] * (1 - near / _FULL) * inside
    total = odds.sum(axis=1)
    possible = np.flatnonzero(total >= 1e-4)
    sums = np.cumsum(odds[possible] / total[possible, None], axis=1)
    chosen = np.full(len(rows), -1)
    for draw in rng.random((_DRAWS, len(rows))):
        end = np.argmax(sums > draw[possible, None], axis=1)
        place = places[possible, end]
        there = canvases.values[canvases.window(rows[possible], place, table.reach)]
        crossing = there.astype(np.int16) + table.masks[DEGREES + end]
        free = crossing.max(axis=(1, 2)) < _CROSSED
        chosen[possible[free]] = end[free]
        possible, sums = possible[~free], sums[~free]
    ok = chosen >= 0
    canvases.paste(table, rows[ok], tips.at(ok))
    return Tips(pivot, DEGREES + chosen, pivot + table.ends[chosen]), ok


def long_seeds(shape: Shape, table: Tables, rng: np.random.Generator, count: int) -> list[Tips]:
    """The first paddles of both long snakes, of as many of `count` tries as succeed."""
    angle = rng.integers(0, DEGREES, count)
    free, numbers = _central(shape, table)
    ok = numbers[angle] > 0
    angle = angle[ok]
    pick = np.floor(rng.random(count)[ok] * numbers[angle]).astype(int)
    first = free[angle, pick]
    towards = rng.integers(0, DEGREES, count)[ok] * np.pi / 180
    move = shape.seed_distance * np.stack([np.sin(towards), np.cos(towards)], axis=1)
    second = np.round(first + move).astype(int)
    other = rng.integers(0, DEGREES, count)[ok]
    return [
        Tips(moved(moved(tail, table.heads[degree]), table.pivots[degree]), degree, tail)
        for tail, degree in ((first, angle), (second, other))
    ]


@functools.cache
def _central(shape: Shape, table: Tables) -> tuple[np.ndarray, np.ndarray]:
    """Where a first seed of each degree may begin, `(360, most, 2)`, and in how many places."""
    lined = _empty(shape).copy()
    frame = shape.border + 2 * shape.seed_distance
    lined[:frame] = lined[-frame:] = lined[:, :frame] = lined[:, -frame:] = _FULL
    found = [_free(shape, lined, kernel) for kernel in table.kernels]
    numbers = np.array([len(each) for each in found]) * table.usable
    padded = np.zeros((DEGREES, max(map(len, found)), 2), int)
    for row, each in zip(padded, found, strict=True):
        row[: len(each)] = each
    return padded, numbers


def _free(shape: Shape, canvas: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`(n, 2)` int, the pixels around which all of the kernel is free."""
    border = shape.border
    inside = slice(border, border + shape.size)
    blocked = np.zeros((shape.size, shape.size), bool)
    taken = canvas > _TAKEN
    for y, x in {tuple(offset) for offset in kernel.tolist()}:
        blocked |= taken[inside.start + y : inside.stop + y, inside.start + x : inside.stop + x]
    return np.argwhere(~blocked)


def short_seeds(
    table: Tables, rng: np.random.Generator, canvases: Canvases, rows: np.ndarray
) -> tuple[Tips, np.ndarray]:
    """The first paddle of a short snake in each image, anywhere among what is free.

    Returns:
      The paddles, and `(n,)` bool, which there are.
    """
    shape = canvases.shape
    inside = slice(shape.border, shape.border + shape.size)
    free = (canvases.values[rows][:, inside, inside] <= _TAKEN).mean(axis=(1, 2))
    angle = np.zeros(len(rows), int)
    tail, pivot = np.zeros((2, len(rows), 2), int)
    ok = np.zeros(len(rows), bool)
    waiting = np.flatnonzero(free >= 0.01)
    for _ in range(_DRAWS):
        angle[waiting] = rng.integers(0, DEGREES, len(waiting))
        tail[waiting], found = _pick(table, rng, canvases, rows[waiting], angle[waiting])
        waiting = waiting[found]
        head = moved(tail[waiting], table.heads[angle[waiting]])
        pivot[waiting] = moved(head, table.pivots[angle[waiting]])
        ends = np.stack([head, pivot[waiting]])
        fits = ((ends >= 0) & (ends < shape.size)).all(axis=(0, 2))
        ok[waiting[fits]] = True
        waiting = waiting[~fits]
    return Tips(pivot, angle, tail), ok


def _pick(
    table: Tables,
    rng: np.random.Generator,
    canvases: Canvases,
    rows: np.ndarray,
    angle: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A free pixel of each row, uniform among all, and whether there is one."""
    shape = canvases.shape
    tries = rng.integers(0, shape.size, (len(rows), _SAMPLES, 2))
    last = rng.random(len(rows))
    seen = shape.border + tries[:, :, None] + table.kernels[angle][:, None]
    taken = canvases.values[rows[:, None, None], seen[..., 0], seen[..., 1]] > _TAKEN
    good = ~taken.any(axis=2)
    place = tries[np.arange(len(rows)), good.argmax(axis=1)]
    usable = table.usable[angle]
    found = good.any(axis=1) & usable
    for i in np.flatnonzero(~found & usable):
        every = _free(shape, canvases.values[rows[i]], table.kernels[angle[i]])
        found[i] = len(every) > 0
        if found[i]:
            place[i] = every[int(last[i] * len(every))]
    return place, found


def joined(parts: list[Tips]) -> Tips:
    """The paddles of several lots of images, one after another."""
    fields = [field.name for field in dataclasses.fields(Tips)]
    return Tips(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
