"""Chunks of time for operators with a matrix state: which tokens see each other, and sums of decays.

A row is cut into chunks of C tokens. Inside a chunk tokens meet pairwise; between chunks a state is
handed on, which belongs to one document. All functions here are of one chunk, plain maths on
values, for the portable path (under `jax.vmap`) and for kernels alike.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# exp(MIN_LOG_DECAY) is 0 in float32. Decays are clamped to it, so that their sums stay small enough
# for differences of sums to keep their digits.
MIN_LOG_DECAY = -104.0

_HIGHEST = jax.lax.Precision.HIGHEST


class Documents(NamedTuple):
    """What a chunk of C tokens knows of the documents in it.

    Attributes:
      same: `(C, C)` bool, both are real tokens of one document.
      entering: `(C, 1)` bool, tokens of the document that the entering state belongs to.
      leaving: `(C, 1)` bool, tokens of the document that the leaving state belongs to.
      keeps: `()` or `(1, 1)` bool, the two are one document: the entering state reaches the end.
    """

    same: jax.Array
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
      entering_run: of `entering_runs`, `()` or `(1, 1)`.
    """
    leaving_run = jnp.maximum(entering_run, row.max(keepdims=entering_run.ndim == 2))
    return Documents(
        same=(column == row) & (row > 0),
        entering=column == entering_run,
        leaving=column == leaving_run,
        keeps=entering_run == leaving_run,
    )


def order(size: int) -> tuple[jax.Array, jax.Array]:
    """`(C, C)` int32: the place of the token of each row, and of each column."""
    shape = (size, size)
    return (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def within(mask: jax.Array, docs: Documents | None) -> jax.Array:
    """A `(C, C)` mask restricted to pairs of one document."""
    return mask if docs is None else mask & docs.same


def summed(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`sum_j mask_ij x_j`, `(C, C), (C, N) -> (C, N)` float32.

    A matmul: a value that is masked out leaves no trace, not even in the order of summation.
    """
    return jnp.dot(mask.astype(jnp.float32), x, precision=_HIGHEST)
