"""Chunks of time for operators with a matrix state: who sees whom, and sums of log decays.

A row is cut into chunks of C tokens. Inside a chunk tokens meet pairwise; between chunks a state
is handed on, which belongs to one document. All functions here are of one chunk, plain maths on
values, for the portable path (under `jax.vmap`) and for kernels alike.

Log decays are summed in aligned blocks of s = 1, 2, 4, ... tokens. A later token i and an earlier
token j part at one s: i is in the second half of a block of 2s and j in the first. The decay
between them is

    exp(sum of the half's tokens up to i) exp(sum of the half's tokens behind j)

two exponentials of sums of non-positive numbers. Nothing is ever subtracted, so an extreme decay
takes no digits from its neighbours; and the sums that a pair needs run only over tokens between
the two, so documents are kept apart by masks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# exp(MIN_LOG_DECAY) is 0 in float32; what lies below is clamped, its gradient is 0.
MIN_LOG_DECAY = -104.0


class Documents(NamedTuple):
    """What a chunk of C tokens knows of the documents in it.

    Attributes:
      same: `(C, C)` bool, both are real tokens of one document.
      real: `(C, 1)` bool, not padding.
      entering: `(C, 1)` bool, tokens of the document that the entering state belongs to.
      leaving: `(C, 1)` bool, tokens of the document that the leaving state belongs to.
      keeps: `(1, 1)` bool, the two are one document: the entering state reaches the end.
    """

    same: jax.Array
    real: jax.Array
    entering: jax.Array
    leaving: jax.Array
    keeps: jax.Array


def entering_runs(runs: jax.Array, size: int) -> jax.Array:
    """The run that the state entering each chunk belongs to, `(B, L) -> (B, L / size)` int32.

    Runs count up along a row and padding follows them, so it is the largest one so far.
    """
    last = runs.reshape(runs.shape[0], -1, size).max(-1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return jax.lax.cummax(jnp.maximum(before, 1), axis=1)


def documents(column: jax.Array, row: jax.Array, entering_run: jax.Array) -> Documents:
    """`Documents` of one chunk.

    Args:
      column, row: the runs of its tokens, `(C, 1)` and `(1, C)` int32, 0 on padding.
      entering_run: of `entering_runs`, `(1, 1)`.
    """
    leaving_run = jnp.maximum(entering_run, row.max(axis=1, keepdims=True))
    return Documents(
        same=(column == row) & (row > 0),
        real=column > 0,
        entering=column == entering_run,
        leaving=column == leaving_run,
        keeps=entering_run == leaving_run,
    )


def within(mask: jax.Array, docs: Documents | None) -> jax.Array:
    """A `(C, C)` mask restricted to pairs of one document."""
    return mask if docs is None else mask & docs.same


def order(size: int) -> tuple[jax.Array, jax.Array]:
    """`(C, C)` int32: the place of the token of each row, and of each column."""
    shape = (size, size)
    return (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def sizes(size: int) -> list[int]:
    """Where pairs part: 1, 2, 4, ..., C / 2."""
    return [2**n for n in range(size.bit_length() - 1)]


def parted(size: int, at: int | jax.Array) -> jax.Array:
    """`(C, C)` bool: the pairs, row behind column, that part at blocks of `at` tokens."""
    row, column = order(size)
    # In bits, for a division of integers does not lower without a TPU at hand.
    return (row & at != 0) & (column & at == 0) & ((row ^ column) < 2 * at)


class Sums(NamedTuple):
    """Sums of log decays in a chunk of C tokens, of `N` kinds.

    Attributes:
      levels: for each s of `sizes(C)`, `(C, N)`: of a token in the second half of its block of 2s
        the half's sum up to the token and with it; of one in the first half, that behind it.
      into: `(C, N)`, from the chunk's start up to the token and with it.
      out: `(C, N)`, behind the token up to the chunk's end.
      total: `(1, N)`, of the whole chunk.
    """

    levels: list[jax.Array]
    into: jax.Array
    out: jax.Array
    total: jax.Array


class Summation(NamedTuple):
    """A way to sum: `up(g (C, N)) -> Sums`, and `down(Sums) -> dg`, its transpose.

    `g` is non-positive, float32 or float64; C is a power of two.
    """

    up: Callable[[jax.Array], Sums]
    down: Callable[[Sums], jax.Array]


def visible(x: jax.Array) -> jax.Array:
    """`x` with what is not finite made huge, for a product with a matrix of zeros and ones.

    Zero times infinity would carry one document's overflow into the next; this stays in its own.
    """
    return jnp.where(jnp.isfinite(x), x, 1e38)


def halves(x: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    """First and second halves of the blocks of 2s tokens of `x (C, N)`, each `(C / 2s, s, N)`."""
    x = x.reshape(-1, 2, s, x.shape[1])
    return x[:, 0], x[:, 1]


def joined(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `halves`; stacked, so that XLA sees through `halves` of it."""
    return jnp.stack([first, second], axis=1).reshape(-1, first.shape[2])


def _up(g: jax.Array) -> Sums:
    prefix, suffix, levels = g, jnp.zeros_like(g), []
    for s in sizes(g.shape[0]):
        (before, prefix), (suffix, after) = halves(prefix, s), halves(suffix, s)
        levels.append(joined(suffix, prefix))
        suffix, prefix = suffix + prefix[:, -1:], prefix + before[:, -1:]
        prefix, suffix = joined(before, prefix), joined(suffix, after)
    return Sums(levels, prefix, suffix, prefix[-1:])


def _down(sums: Sums) -> jax.Array:
    dprefix, dsuffix = sums.into.at[-1:].add(sums.total), sums.out
    for s, level in zip(reversed(sizes(dprefix.shape[0])), reversed(sums.levels), strict=True):
        (dbefore, dprefix), (dsuffix, dafter) = halves(dprefix, s), halves(dsuffix, s)
        dfirst, dsecond = halves(level, s)
        # The sum of a half is in all prefixes of the later half, or all suffixes of the earlier.
        dbefore = dbefore.at[:, -1].add(dprefix.sum(1))
        dprefix = (dprefix + dsecond).at[:, -1].add(dsuffix.sum(1))
        dprefix, dsuffix = joined(dbefore, dprefix), joined(dsuffix + dfirst, dafter)
    return dprefix


BY_HALVES = Summation(_up, _down)
"""Additions of halves, log C of them, for the portable path: a CPU is 1.2 to 1.4 times faster with
them, forward and backward through an op, than with products with matrices of zeros and ones."""


def by_tree(roll: Callable[[jax.Array, int, int], jax.Array], axis: int = 0) -> Summation:
    """Sums by additions of halves, log C of them, for kernels.

    Args:
      roll: `jnp.roll`, or what a kernel has in its place.
      axis: where the tokens are; 1 for `g (N, C)`, and all of `Sums` transposed likewise.
    """

    def second(g: jax.Array, s: int) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, g.shape, axis) & s != 0

    def up(g: jax.Array) -> Sums:
        size, levels = g.shape[axis], []
        prefix, suffix = g, jnp.zeros_like(g)
        for s in sizes(size):
            later, total = second(g, s), prefix + suffix
            levels.append(jnp.where(later, prefix, suffix))
            prefix = prefix + jnp.where(later, roll(total, s, axis), 0.0)
            suffix = suffix + jnp.where(later, 0.0, roll(total, size - s, axis))
        total = jax.lax.slice_in_dim(prefix + suffix, 0, 1, axis=axis)
        return Sums(levels, prefix, suffix, total)

    def down(sums: Sums) -> jax.Array:
        size = sums.into.shape[axis]
        first = jax.lax.broadcasted_iota(jnp.int32, sums.into.shape, axis) == 0
        dtotal = jnp.where(first, jnp.broadcast_to(sums.total, sums.into.shape), 0.0)
        dprefix, dsuffix = sums.into + dtotal, sums.out + dtotal
        for s, level in zip(reversed(sizes(size)), reversed(sums.levels), strict=True):
            later = second(dprefix, s)
            dtotal = jnp.where(later, roll(dsuffix, s, axis), roll(dprefix, size - s, axis))
            dprefix = dprefix + dtotal + jnp.where(later, level, 0.0)
            dsuffix = dsuffix + dtotal + jnp.where(later, 0.0, level)
        return dprefix

    return Summation(up, down)


def clamp(g: jax.Array, docs: Documents | None) -> jax.Array:
    """Log decays `(C, N)` ready to be summed: above `MIN_LOG_DECAY`, 0 on padding."""
    g = jnp.maximum(g, MIN_LOG_DECAY)
    return g if docs is None else jnp.where(docs.real, g, 0.0)


def clamp_transpose(g: jax.Array, dg: jax.Array, docs: Documents | None) -> jax.Array:
    """The gradient of `g` from that of `clamp(g)`."""
    live = g > MIN_LOG_DECAY
    return jnp.where(live if docs is None else live & docs.real, dg, 0.0)
