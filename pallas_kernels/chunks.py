"""Chunks of time for operators with a matrix state: who sees whom, and sums of log decays.

A row is cut into chunks of C tokens. Inside a chunk tokens meet pairwise; between chunks a state
is handed on, which belongs to one document. All functions here are of one chunk, plain maths on
values, for the portable path (under `jax.vmap`) and for kernels alike.

Log decays are summed in a binary tree. In an aligned block of s tokens, token i keeps the sum over
the block's tokens up to i (its prefix) and the sum over those behind i (its suffix); two blocks
make one of 2s by additions alone. A later token i and an earlier token j part at some s, where i
is in the second half of a block of 2s and j in the first: the decay between them is

    exp(prefix_i) exp(suffix_j)    at that s,

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


def parted(size: int, at: int) -> jax.Array:
    """`(C, C)` bool: the pairs, row behind column, that part at blocks of `at` tokens."""
    row, column = order(size)
    return (
        (row // (2 * at) == column // (2 * at)) & (row % (2 * at) >= at) & (column % (2 * at) < at)
    )


class Sums(NamedTuple):
    """Sums over the aligned block of s tokens that each token is in."""

    prefix: jax.Array  # up to the token and with it
    suffix: jax.Array  # behind it


Roll = Callable[[jax.Array, int, int], jax.Array]


def tree(g: jax.Array, axis: int = 0, roll: Roll = jnp.roll) -> list[Sums]:
    """`Sums` of log decays over blocks of 1, 2, 4, ..., C tokens along `axis`.

    Args:
      g: non-positive, float32; C, the size of `axis`, is a power of two.
      roll: `jnp.roll`, or what a kernel has in its place.
    """
    size = g.shape[axis]
    place = jax.lax.broadcasted_iota(jnp.int32, g.shape, axis)
    sums = [Sums(g, jnp.zeros_like(g))]
    for s in sizes(size):
        prefix, suffix = sums[-1]
        total, second = prefix + suffix, place % (2 * s) >= s
        sums.append(
            Sums(
                prefix + jnp.where(second, roll(total, s, axis), 0.0),
                suffix + jnp.where(second, 0.0, roll(total, size - s, axis)),
            )
        )
    return sums


def tree_transpose(cotangents: list[Sums], axis: int = 0, roll: Roll = jnp.roll) -> jax.Array:
    """The gradient of `g` from those of `tree(g)`; additions alone."""
    size = cotangents[-1].prefix.shape[axis]
    place = jax.lax.broadcasted_iota(jnp.int32, cotangents[-1].prefix.shape, axis)
    dprefix, dsuffix = cotangents[-1]
    for s, (more_prefix, more_suffix) in zip(
        reversed(sizes(size)), reversed(cotangents[:-1]), strict=True
    ):
        second = place % (2 * s) >= s
        dtotal = jnp.where(second, roll(dsuffix, s, axis), roll(dprefix, size - s, axis))
        dprefix = dprefix + dtotal + more_prefix
        dsuffix = dsuffix + dtotal + more_suffix
    return dprefix


def clamp(g: jax.Array, docs: Documents | None) -> jax.Array:
    """Log decays `(C, N)` ready to be summed: above `MIN_LOG_DECAY`, 0 on padding."""
    g = jnp.maximum(g, MIN_LOG_DECAY)
    return g if docs is None else jnp.where(docs.real, g, 0.0)


def clamp_transpose(g: jax.Array, dg: jax.Array, docs: Documents | None) -> jax.Array:
    """The gradient of `g` from that of `clamp(g)`."""
    live = g > MIN_LOG_DECAY
    return jnp.where(live if docs is None else live & docs.real, dg, 0.0)
