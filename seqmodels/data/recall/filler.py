"""Text that means nothing, in which the tests of RULER hide what they ask for."""

import functools

import numpy as np

STATES = 64
"""Ids that the filler takes, from 0."""


@functools.cache
def _cumulative(seed: int) -> list[list[float]]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, STATES])))
    rows: list[list[float]] = np.cumsum(
        rng.dirichlet(np.full(STATES, 0.1), STATES), axis=1
    ).tolist()
    return rows


def markov(rng: np.random.Generator, size: int, seed: int = 0) -> np.ndarray:
    """``(size,)`` ids of a Markov chain of order 1; its transitions, few, follow from ``seed``."""
    rows, state = _cumulative(seed), int(rng.integers(STATES))
    found = np.empty(size, np.int64)
    for t, draw in enumerate(rng.random(size)):
        state = min(int(np.searchsorted(rows[state], draw)), STATES - 1)
        found[t] = state
    return found


def scattered(rng: np.random.Generator, filler: np.ndarray, pieces: list[list[int]]) -> np.ndarray:
    """The filler with the pieces in it, whole and in their order, at random places."""
    places = np.sort(rng.integers(0, len(filler) + 1, len(pieces)))
    parts: list[np.ndarray] = []
    before = 0
    for place, piece in zip(places, pieces, strict=True):
        parts += [filler[before:place], np.asarray(piece)]
        before = place
    return np.concatenate([*parts, filler[before:]])
