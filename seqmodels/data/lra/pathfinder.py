"""Pathfinder: whether two discs lie on the same dashed contour, among others (Linsley et al. 2018).

Images are drawn by the procedure of the original program with the parameters of Long Range Arena
(Tay et al. 2021), at 32, 64, 128 (Path-X) and 256 pixels: two long contours of 14 paddles ("hard"),
9 ("intermediate") or 6 ("easy"), short distractors, a disc on one end of a long contour, and a
second disc on its other end (label 1) or on the end of the other long contour (label 0).

`generate` grows hundreds of images at the same time; an image whose long contours do not fit is
begun again, as in the original, and all tries are independent of each other, so the first that
succeed are the images.
"""

import contextlib
import functools
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from seqmodels import ranges
from seqmodels.data import cache
from seqmodels.data.examples import Examples, Scaling, TaskData
from seqmodels.data.lra import snakes
from seqmodels.data.lra.snakes import Canvases, Shape, Tables, Tips
from seqmodels.data.workers import in_order
from seqmodels.ranges import Checked, Count, Seed, Size

Difficulty = Literal["easy", "intermediate", "hard"]
CONTOUR = {"easy": 6, "intermediate": 9, "hard": 14}
"""Paddles of a long snake; a short one has a third of them."""

SHAPES = {
    32: Shape(
        32, margins=(1,), padding=1, length=2, thickness=0.5, marker_radius=1.5, seed_distance=7,
        continuity=1.0, distractor_paddles=20, snake_contrast=2.0, paddle_contrast=0.75,
    ),
    64: Shape(
        64, margins=(1,), padding=1, length=5, thickness=1.0, marker_radius=2.5, seed_distance=12,
        continuity=1.8, distractor_paddles=22, snake_contrast=0.8,
    ),
    128: Shape(
        128, margins=(2, 3), padding=1, length=5, thickness=1.5, marker_radius=3.0,
        seed_distance=20, continuity=1.8, distractor_paddles=35, snake_contrast=0.9,
    ),
    256: Shape(
        256, margins=(3,), padding=22, length=5, thickness=2.0, marker_radius=5.0,
        seed_distance=27, continuity=1.8, distractor_paddles=30, snake_contrast=1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PathfinderConfig(Checked):
    """What to generate, or which of Long Range Arena's images to read.

    Of the files, the splits are shares of what is there in the same proportion, at random.

    Attributes:
      size: 32, 64, 128 (Path-X) or 256.
      difficulty: "easy", "intermediate" or "hard".
      train, validation, test: numbers of images.
      seed: of the generated images, or of the split of the files.
      allow_partial: accept other numbers of files than 200,000.

    Raises:
      ValueError: a value is out of range.
    """

    size: Literal[32, 64, 128, 256] = 32
    difficulty: Difficulty = "hard"
    train: Size = 160_000
    validation: Count = 20_000
    test: Count = 20_000
    seed: Seed = 0
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Steps that a row has at most."""
        return self.size**2


def make(
    config: PathfinderConfig,
    *,
    workers: int = 1,
    parts: str | Path | None = None,
    progress: bool = True,
) -> TaskData:
    """Generates the splits; arguments as `generate`'s."""
    images, labels = generate(
        config.size,
        config.train + config.validation + config.test,
        seed=config.seed,
        difficulty=config.difficulty,
        processes=workers,
        parts=parts,
        progress=progress,
    )
    return task_data(config, images, labels, source="generated")


def task_data(
    config: PathfinderConfig, images: np.ndarray, labels: np.ndarray, *, source: str
) -> TaskData:
    """The splits of `(n, size, size)` images, one after another, in the config's proportion."""
    shares = np.cumsum([config.train, config.validation, config.test])
    ends = [0, *(shares * len(images) // shares[-1]).tolist()]
    every = Examples.of_arrays(images.reshape(len(images), -1, 1), labels, SCALING)
    train, validation, test = (every.between(a, b) for a, b in pairwise(ends))
    return TaskData(
        name=f"pathfinder{config.size}",
        train=train,
        validation=validation,
        test=test,
        vocabulary_size=None,
        num_classes=2,
        description={
            "source": source,
            "difficulty": config.difficulty,
            "image": [config.size, config.size],
        },
    )


# Of the random stream: a change changes the images of a seed.
_BLOCK = {32: 512, 64: 256, 128: 256, 256: 64}
_TRIES = {32: 1024, 64: 512, 128: 256, 256: 64}
_SHORT_TRIES = 5
TOTAL = 200_000
"""Images of each size and difficulty in Long Range Arena's release."""
SCALING = Scaling((127.5,), (127.5,))

Images = tuple[np.ndarray, np.ndarray]


def generate(
    size: int,
    count: int,
    *,
    seed: int,
    difficulty: str = "hard",
    processes: int | None = None,
    parts: str | Path | None = None,
    progress: bool = False,
) -> Images:
    """Draws images; fewer are the beginning of more.

    Args:
      size: 32, 64, 128 or 256 pixels.
      count: number of images.
      seed: of everything.
      difficulty: "easy", "intermediate" or "hard".
      processes: how many draw; None for one per core. The images do not depend on it. They are
        spawned, so a script that passes more than 1 needs the usual `if __name__ == "__main__":`.
      parts: a folder that keeps each finished block, so that a killed call, made again, continues.
      progress: show a progress bar.

    Returns:
      images `(count, size, size)` uint8 and labels `(count,)` int32.

    Raises:
      ValueError: an argument is out of range.
      OSError: `parts` cannot be written.
    """
    if size not in SHAPES:
        raise ValueError(f"size={size} is not one of {', '.join(map(str, SHAPES))}")
    if difficulty not in CONTOUR:
        raise ValueError(f"difficulty={difficulty!r} is not one of {', '.join(CONTOUR)}")
    ranges.check("count", count, Count)
    ranges.check("seed", seed, Seed)
    ranges.check("processes", processes, Size | None)
    images = np.empty((count, size, size), np.uint8)
    labels = np.empty(count, np.int32)
    draw = functools.partial(_block, size, difficulty, seed, parts)
    workers = min(processes or os.cpu_count() or 1, max(1, -(-count // _BLOCK[size])))
    done = 0
    with (
        contextlib.closing(in_order(draw, workers)) as blocks,
        tqdm(total=count, desc="Pathfinder", unit=" images", disable=not progress) as bar,
    ):
        while done < count:
            block, answers = next(blocks)
            some = min(len(block), count - done)
            images[done : done + some], labels[done : done + some] = block[:some], answers[:some]
            done += some
            bar.update(some)
    return images, labels


def _block(size: int, difficulty: str, seed: int, parts: str | Path | None, number: int) -> Images:
    """One block, read from `parts` where it is there and whole."""
    if parts is None:
        return draw_block(size, difficulty, seed, number)
    key = {"size": size, "difficulty": difficulty, "seed": seed, "block": number, "revision": 1}

    def build() -> cache.Contents:
        images, labels = draw_block(size, difficulty, seed, number)
        return {"images": images, "labels": labels}, {}

    arrays, _ = cache.load_or_build(parts, f"pathfinder{size}", key, build)
    return arrays["images"], arrays["labels"]


def draw_block(size: int, difficulty: str, seed: int, number: int) -> Images:
    """Some hundred images, from a random stream of their own."""
    shape = SHAPES[size]
    stream = np.random.SeedSequence(seed, spawn_key=(number,))
    rng = np.random.Generator(np.random.Philox(stream))
    count = _BLOCK[size]
    labels = rng.integers(0, 2, count)
    margins = rng.choice(shape.margins, count)
    images = np.empty((count, size, size), np.uint8)
    for margin in shape.margins:
        rows = np.flatnonzero(margins == margin)
        table = snakes.tables(shape, margin)
        images[rows] = _draw(shape, table, rng, CONTOUR[difficulty], labels[rows])
    return images, labels.astype(np.int32)


def _draw(
    shape: Shape, table: Tables, rng: np.random.Generator, contour: int, labels: np.ndarray
) -> np.ndarray:
    """`(n, size, size)` uint8, images with one margin."""
    count = len(labels)
    canvases, long = _long_snakes(shape, table, rng, contour, count)
    bright = shape.snake_contrast * shape.paddle_contrast
    pictures = np.zeros(canvases.values.shape, np.float32)
    everyone = np.arange(count)
    for paddles in long:
        for tips in paddles:
            _stamp(shape, pictures, everyone, tips.place, bright * table.lines[tips.angle])
    length = contour // 3
    for _ in range(shape.distractor_paddles // length):
        for rows, tips in _short_snake(shape, table, rng, canvases, length):
            light = shape.snake_contrast * table.lines[tips.angle]
            _stamp(shape, pictures, rows, tips.place, light)
    first = rng.integers(0, 2, count)
    other = np.where(labels == 1, first, 1 - first)
    starts = np.stack([paddles[0].place for paddles in long])[first, everyone]
    ends = np.stack([paddles[-1].place for paddles in long])[other, everyone]
    for place in (starts, ends):
        _stamp(shape, pictures, everyone, place, snakes.marker(shape.marker_radius)[None])
    inside = slice(shape.border, shape.border + shape.size)
    pictures = pictures[:, inside, inside]
    low, high = pictures.min(axis=(1, 2)), pictures.max(axis=(1, 2))
    scale = 255 / (high - low)
    return ((pictures - low[:, None, None]) * scale[:, None, None] + 0.5).astype(np.uint8)


def _stamp(
    shape: Shape, pictures: np.ndarray, rows: np.ndarray, place: np.ndarray, stamps: np.ndarray
) -> None:
    where = snakes.window(rows, place + shape.border, stamps.shape[1] // 2)
    pictures[where] = np.maximum(pictures[where], stamps)


def _long_snakes(
    shape: Shape, table: Tables, rng: np.random.Generator, contour: int, count: int
) -> tuple[Canvases, list[list[Tips]]]:
    """Both long snakes of each image: occupancies, and the paddles of one and the other."""
    grown: list[tuple[Canvases, list[list[Tips]]]] = []
    missing = count
    while missing:
        canvases, paddles = _try_long_snakes(shape, table, rng, contour)
        missing = max(0, missing - len(canvases.values))
        grown.append((canvases, paddles))
    every = Canvases(shape, 0)
    every.values = np.concatenate([canvases.values for canvases, _ in grown])[:count]
    some = np.arange(count)
    snake_paddles = [
        [
            snakes.joined([paddles[snake][i] for _, paddles in grown]).at(some)
            for i in range(contour)
        ]
        for snake in range(2)
    ]
    return every, snake_paddles


def _try_long_snakes(
    shape: Shape, table: Tables, rng: np.random.Generator, contour: int
) -> tuple[Canvases, list[list[Tips]]]:
    """Many tries at once; what comes back are those that succeeded."""
    seeds = snakes.long_seeds(shape, table, rng, _TRIES[shape.size])
    paddles = [[seed] for seed in seeds]
    canvases = Canvases(shape, len(seeds[0].angle))
    rows = np.arange(len(canvases.values))
    for _ in range(contour - 1):
        for own in paddles:
            tips, ok = snakes.extend(table, rng, canvases, rows, own[-1])
            own.append(tips)
            rows = rows[ok]
            for each in paddles:
                each[:] = [earlier.at(ok) for earlier in each]
    # The original forgets the last footprint of the first snake; so does this.
    canvases.paste(table, rows, paddles[1][-1])
    return canvases.taken(rows), paddles


def _short_snake(
    shape: Shape, table: Tables, rng: np.random.Generator, canvases: Canvases, length: int
) -> list[tuple[np.ndarray, Tips]]:
    """A short snake in every image that takes one after some tries: rows and their paddles."""
    drawn: list[tuple[np.ndarray, Tips]] = []
    waiting = np.arange(len(canvases.values))
    for _ in range(_SHORT_TRIES):
        tips, ok = snakes.short_seeds(table, rng, canvases, waiting)
        rows, paddles = waiting[ok], [tips.at(ok)]
        trial = canvases.taken(rows)
        left = np.arange(len(rows))
        for _ in range(length - 1):
            tips, ok = snakes.extend(table, rng, trial, left, paddles[-1])
            left = left[ok]
            paddles = [earlier.at(ok) for earlier in [*paddles, tips]]
        trial.paste(table, left, paddles[-1])
        canvases.values[rows[left]] = trial.values[left]
        drawn += [(rows[left], tips) for tips in paddles]
        waiting = np.setdiff1d(waiting, rows[left])
        if not len(waiting):
            break
    return drawn
