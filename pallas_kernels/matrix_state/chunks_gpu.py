"""Chunks of time in GPU kernels (Triton lowering): their sums of log decays, and what they load.

The maths of `chunks`, said with what Triton has: tiles of powers of two, products of at least 16 by
16 by 16, reductions, reshapes and prefix sums; no rolls, slices or concatenations. All functions
are plain JAX as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.chunks import Documents, Sums

SMALLEST = 16  # side of a tile that Triton multiplies


def block_size(width: int, most: int) -> int:
    """The power of two that holds `width`, between `SMALLEST` and `most`."""
    return max(SMALLEST, min(most, pl.next_power_of_2(width)))


# Sums of log decays.


def _halves(size: int, s: int) -> jax.Array:
    """`(C / 2s, 2, s, 1)` bool: the token is in the second half of its block of 2s."""
    shape = (size // (2 * s), 2, s, 1)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) == 1


def _of_other_half(x: jax.Array, s: int) -> jax.Array:
    """Each token's value of the token s before it or behind it, in the other half of its block."""
    size, width = x.shape
    x = x.reshape(size // (2 * s), 2, s, width)
    second = jnp.broadcast_to(_halves(size, s), x.shape)
    zero = jnp.zeros_like(x)
    earlier = jnp.where(second, zero, x).sum(1, keepdims=True)
    later = jnp.where(second, x, zero).sum(1, keepdims=True)
    other = jnp.where(second, jnp.broadcast_to(earlier, x.shape), jnp.broadcast_to(later, x.shape))
    return other.reshape(size, width)


def _second(x: jax.Array, s: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) & s != 0


def _up(g: jax.Array) -> Sums:
    levels, prefix, suffix = [], g, jnp.zeros_like(g)
    for s in chunks.sizes(g.shape[0]):
        later, other = _second(g, s), _of_other_half(prefix + suffix, s)
        levels.append(jnp.where(later, prefix, suffix))
        prefix = prefix + jnp.where(later, other, jnp.zeros_like(g))
        suffix = suffix + jnp.where(later, jnp.zeros_like(g), other)
    return Sums(levels, prefix, suffix, g.sum(0, keepdims=True))


def _down(sums: Sums) -> jax.Array:
    zero = jnp.zeros_like(sums.into)
    dprefix, dsuffix = sums.into, sums.out
    for s, level in zip(reversed(chunks.sizes(zero.shape[0])), reversed(sums.levels), strict=True):
        later = _second(zero, s)
        # A token's prefix is in the prefixes of the later half, its suffix in the earlier's.
        dtotal = _of_other_half(jnp.where(later, dprefix, dsuffix), s)
        dprefix = dprefix + dtotal + jnp.where(later, level, zero)
        dsuffix = dsuffix + dtotal + jnp.where(later, zero, level)
    return dprefix + jnp.broadcast_to(sums.total, zero.shape)


BY_HALVES = chunks.Summation(_up, _down)
"""`chunks.by_tree` where the halves of a block are an axis of two."""


class PairSums(NamedTuple):
    """Sums of one log decay a token, for pairs of tokens.

    Attributes:
      between: `(C, C)`, of the tokens behind j up to i and with it; 0 where j >= i.
      into, out: `(C, 1)`, and `total (1, 1)`, as in `chunks.Sums`.
    """

    between: jax.Array
    into: jax.Array
    out: jax.Array
    total: jax.Array


def pair_sums(column: jax.Array, row: jax.Array) -> PairSums:
    """`PairSums` of log decays given as `(C, 1)` and as `(1, C)`.

    A sum between two tokens runs over nothing else: each column is summed for itself.
    """
    i, j = chunks.order(column.shape[0])
    total = column.sum(0, keepdims=True)
    column, row = jnp.broadcast_to(column, i.shape), jnp.broadcast_to(row, i.shape)
    zero = jnp.zeros_like(column)
    return PairSums(
        jnp.cumsum(jnp.where(i > j, column, zero), axis=0),
        jnp.where(j <= i, row, zero).sum(1, keepdims=True),
        jnp.where(j > i, row, zero).sum(1, keepdims=True),
        total,
    )


def pair_sums_transpose(sums: PairSums) -> jax.Array:
    """`(1, C)`: the gradient of the log decays from that of their `PairSums`.

    That of `between` is 0 where j >= i.
    """
    i, j = chunks.order(sums.between.shape[0])
    # Of token t: all pairs with j < t <= i.
    earlier = jnp.cumsum(sums.between, axis=1) - sums.between
    up_to = jnp.where(i >= j, earlier + sums.into, jnp.zeros_like(earlier))
    behind = jnp.where(i < j, jnp.broadcast_to(sums.out, i.shape), jnp.zeros_like(earlier))
    return (up_to + behind).sum(0, keepdims=True) + sums.total


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

    def documents(self, tokens: Span, chunk: Any) -> Documents | None:
        """Of `runs (B, L)` and `entering_run (B, chunks)`; None if rows are one document."""
        if "runs" not in self.refs:
            return None
        runs = self.load("runs", tokens)
        entering = self.load("entering_run", Span(chunk, 1))
        return chunks.documents(runs[:, None], runs[None, :], entering[:, None])
