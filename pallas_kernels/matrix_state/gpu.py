"""Chunks of time in GPU kernels (Triton lowering): their sums of log decays, and what they load.

Triton has tiles of powers of two, products of at least 16 by 16 by 16, reductions, reshapes and
prefix sums; no rolls, slices or concatenations. So `decay_sums.scan` runs with an exchange of
halves by reductions, and one decay of all keys has sums of its own, `pair_sums`: a prefix sum for
each pair of tokens, in place of log C such exchanges. All functions are plain JAX as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.matrix_state.masks import SegmentMasks

SMALLEST = 16  # side of a tile that Triton multiplies


def block_size(width: int, most: int) -> int:
    """The power of two that holds `width`, between `SMALLEST` and `most`."""
    return max(SMALLEST, min(most, pl.next_power_of_2(width)))


# Sums of log decays.


def _other_half(x: jax.Array, y: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    """`decay_sums.Exchange.other_half`, where the halves of a block are an axis of two."""
    size, width = x.shape
    if x is not y:
        later = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) & s != 0
        x = jnp.where(later, y, x)
    x = x.reshape(size // (2 * s), 2, s, width)
    second = jax.lax.broadcasted_iota(jnp.int32, (size // (2 * s), 2, s, 1), 1) == 1
    second = jnp.broadcast_to(second, x.shape)
    zero = jnp.zeros_like(x)
    earlier = jnp.where(second, zero, x).sum(1, keepdims=True)
    later = jnp.where(second, x, zero).sum(1, keepdims=True)
    other = jnp.where(second, jnp.broadcast_to(earlier, x.shape), jnp.broadcast_to(later, x.shape))
    other = other.reshape(size, width)
    return other, other


SUMMATION = decay_sums.summation(decay_sums.Exchange(_other_half))


class PairSums(NamedTuple):
    """Sums of one log decay a token, for pairs of tokens.

    Attributes:
      g_between: `(C, C)`, of the tokens after j up to i, inclusive; 0 where j >= i.
      g_cumsum, g_to_end: `(C, 1)`, and `g_last (1, 1)`, as in `decay_sums.DecaySums`.
    """

    g_between: jax.Array
    g_cumsum: jax.Array
    g_to_end: jax.Array
    g_last: jax.Array


def pair_sums(column: jax.Array, row: jax.Array) -> PairSums:
    """`PairSums` of log decays given as `(C, 1)` and as `(1, C)`.

    A sum between two tokens runs over nothing else: each column is summed for itself.
    """
    i, j = masks.token_indices(column.shape[0])
    total = column.sum(0, keepdims=True)
    column, row = jnp.broadcast_to(column, i.shape), jnp.broadcast_to(row, i.shape)
    zero = jnp.zeros_like(column)
    return PairSums(
        jnp.cumsum(jnp.where(i > j, column, zero), axis=0),
        jnp.where(j <= i, row, zero).sum(1, keepdims=True),
        jnp.where(j > i, row, zero).sum(1, keepdims=True),
        total,
    )


def pair_sums_vjp(sums: PairSums) -> jax.Array:
    """`(1, C)`: the gradient of the log decays from that of their `PairSums`.

    That of `g_between` is 0 where j >= i.
    """
    i, j = masks.token_indices(sums.g_between.shape[0])
    # Token t is in the sums of all pairs with j < t <= i.
    earlier = jnp.cumsum(sums.g_between, axis=1) - sums.g_between
    up_to = jnp.where(i >= j, earlier + sums.g_cumsum, jnp.zeros_like(earlier))
    after = jnp.where(i < j, jnp.broadcast_to(sums.g_to_end, i.shape), jnp.zeros_like(earlier))
    return (up_to + after).sum(0, keepdims=True) + sums.g_last


# Loads and stores.


class Span(NamedTuple):
    """`size` places of an axis from `start`; `backwards`, the last first and each `by` further."""

    start: Any
    size: int
    backwards: bool = False
    by: int = 0

    @property
    def places(self) -> jax.Array:
        count = jnp.arange(self.size)
        return self.start + (self.size - 1 + self.by - count if self.backwards else count)

    def exists(self, limit: int) -> jax.Array:
        """Which places are on an axis of `limit` and in the span."""
        if not self.backwards:
            return self.places < limit
        return self.places < jnp.minimum(self.start + self.size, limit)


class Row(NamedTuple):
    """One row of a batch in named references to whole arrays `(B, ...)`.

    Indices are those of the other axes: a number, or a `Span`, at most two of them. What a span
    takes beyond its axis is 0 when loaded and is not stored.
    """

    refs: Mapping[str, Any]
    row: jax.Array

    def load(self, name: str, *index: Any) -> jax.Array:
        at, mask = self._at(name, index)
        return compat.triton.load(at, mask=mask, other=0)

    def store(self, name: str, values: jax.Array, *index: Any) -> None:
        at, mask = self._at(name, index)
        compat.triton.store(at, values.astype(self.refs[name].dtype), mask=mask)

    def _at(self, name: str, index: tuple[Any, ...]):
        ref = self.refs[name]
        spans = [(x, n) for x, n in zip(index, ref.shape[1:], strict=True) if isinstance(x, Span)]
        masks = [span.exists(limit) for span, limit in spans]
        mask = masks[0] if len(masks) == 1 else masks[0][:, None] & masks[1][None, :]
        if not any(span.backwards for span, _ in spans):
            places = [pl.ds(x.start, x.size) if isinstance(x, Span) else x for x in index]
            return ref.at[(self.row, *places)], mask
        columns = [span.places for span, _ in spans]
        if len(columns) == 2:
            columns = [columns[0][:, None], columns[1][None, :]]
        rest = iter(columns)
        places = [next(rest) if isinstance(x, Span) else x for x in index]
        return ref.at[(self.row, *places)], mask

    def documents(self, tokens: Span, chunk: Any) -> SegmentMasks | None:
        """The masks by `runs (B, L)` and `entering_run (B, chunks)`; None without segments."""
        if "runs" not in self.refs:
            return None
        runs = self.load("runs", tokens)
        entering = self.load("entering_run", Span(chunk, 1))
        return masks.segment_masks(runs[:, None], runs[None, :], entering[:, None])
