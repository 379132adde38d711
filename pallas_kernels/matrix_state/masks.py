"""Which tokens of a chunk meet: those of one segment, and those that part at one size of blocks.

A row is cut into chunks of C tokens. Inside a chunk tokens meet pairwise; between chunks a state
is handed on, which belongs to one document. All functions but `entering_segment` are of one chunk,
on values: for the portable path (under `jax.vmap`) and for TPU and GPU kernels alike.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SegmentMasks(NamedTuple):
    """What a chunk of C tokens knows of the documents in it.

    Attributes:
      same: `(C, C)` bool, both are real tokens of one document.
      real: `(C, 1)` bool, not padding.
      entering: `(C, 1)` bool, tokens of the document that the entering state belongs to.
      leaving: `(C, 1)` bool, tokens of the document that the leaving state belongs to.
      carried: `(1, 1)` bool, the two are one document: the entering state reaches the end.
    """

    same: jax.Array
    real: jax.Array
    entering: jax.Array
    leaving: jax.Array
    carried: jax.Array


def entering_segment(segment_index: jax.Array, size: int) -> jax.Array:
    """The run that the state entering each chunk belongs to, `(B, L) -> (B, L / size)` int32.

    Runs count up along a row and padding follows them, so it is the largest one so far.
    """
    last = segment_index.reshape(segment_index.shape[0], -1, size).max(-1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return jax.lax.cummax(jnp.maximum(before, 1), axis=1)


def segment_masks(column: jax.Array, row: jax.Array, entering_segment: jax.Array) -> SegmentMasks:
    """`SegmentMasks` of one chunk.

    Args:
      column, row: segment index of its tokens, `(C, 1)` and `(1, C)` int32, 0 on padding.
      entering_segment: what the function of this name returns, `(1, 1)`.
    """
    leaving_segment = jnp.maximum(entering_segment, row.max(axis=1, keepdims=True))
    return SegmentMasks(
        same=(column == row) & (row > 0),
        real=column > 0,
        entering=column == entering_segment,
        leaving=column == leaving_segment,
        carried=entering_segment == leaving_segment,
    )


def within(mask: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """A `(C, C)` mask restricted to pairs of one document."""
    return mask if docs is None else mask & docs.same


def token_indices(size: int) -> tuple[jax.Array, jax.Array]:
    """`(C, C)` int32: the place of the token of each row, and of each column."""
    shape = (size, size)
    return (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def level_sizes(size: int) -> list[int]:
    """Where pairs part: 1, 2, 4, ..., C / 2."""
    return [2**n for n in range(size.bit_length() - 1)]


def parted(size: int, at: int | jax.Array) -> jax.Array:
    """`(C, C)` bool: the pairs, row after column, that part at blocks of `at` tokens."""
    row, column = token_indices(size)
    # In bits, for a division of integers does not lower without a TPU at hand.
    return (row & at != 0) & (column & at == 0) & ((row ^ column) < 2 * at)
