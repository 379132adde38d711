"""The inverse of `I + lower` inside a TPU kernel, float32.

`lower (C, C)` is strictly lower triangular. The blocks of the diagonal, of `block` tokens, are
inverted by forward substitution for all blocks of all heads at once: side by side in the lanes, as
`(block, C)`, one column of every block is a gather of lanes, and one row of every inverse a row.
Blocks are then merged to twice their size by matmuls:

    [L1  0 ]^-1   [   L1^-1             0   ]
    [M   L2]    = [-L2^-1 M L1^-1    L2^-1  ]

With several documents what is not finite is taken for 0 wherever it would meet the rows of another
one, as in `tile`; there it comes out as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matrix_state import masks
from pallas_kernels.matrix_state.tile import dot, zero_where_not
from pallas_kernels.matrix_state.tpu import SLAB

_HEADS_TOGETHER = 4  # enough independent work for every step of the substitution


def finite(x: jax.Array, guarded: bool) -> jax.Array:
    """`x`, 1 where it is or would be rounded to infinity, as the right operand of a matmul.

    Not 0: it meets nothing but zeros, and a matmul of a masked operand need not compile.
    """
    return operand(jnp.abs(x) < 1e38 if guarded else None, x)


def operand(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Rows of `x` as the right operand of a matmul whose left one is 0 outside of `mask`."""
    return x if mask is None else jnp.where(mask, x, 1.0)


def diagonal(lower: jax.Array, block: int) -> jax.Array:
    """The blocks of the diagonal side by side, `(C, C) -> (block, C)`."""
    size = lower.shape[0]
    row, column = masks.token_indices(size)
    return zero_where_not((row ^ column) < block, lower).reshape(-1, block, size).sum(0)


def substituted(blocks: jax.Array, guarded: bool) -> jax.Array:
    """The inverses of `I +` strictly lower triangular blocks, `(heads, s, C)`, side by side."""
    size = blocks.shape[1]
    rows = [blocks[:, n : n + SLAB] for n in range(0, size, SLAB)]
    row = jax.lax.broadcasted_iota(jnp.int32, rows[0].shape, 1)
    lane = jax.lax.broadcasted_iota(jnp.int32, rows[0].shape, 2)
    place, start = lane & (size - 1), lane & ~(size - 1)
    inverse = [(place == row + n).astype(blocks.dtype) for n in range(0, size, SLAB)]
    for j in range(size - 1):
        done = inverse[j // SLAB][:, j % SLAB : j % SLAB + 1]
        for n in range((j + 1) // SLAB, len(rows)):
            column = jnp.take_along_axis(rows[n], start | j, axis=2)
            inverse[n] = inverse[n] - column * finite(done, guarded)
    return jnp.concatenate(inverse, 1)


def spread(blocks: jax.Array) -> jax.Array:
    """The inverse of `diagonal`, `(block, C) -> (C, C)` with zeros elsewhere."""
    block, size = blocks.shape
    row, column = masks.token_indices(size)
    return zero_where_not((row ^ column) < block, _repeated(blocks))


def _repeated(rows: jax.Array) -> jax.Array:
    """`(s, C) -> (C, C)`, the same rows again and again."""
    s, size = rows.shape
    return jnp.broadcast_to(rows[None], (size // s, s, size)).reshape(size, size)


def merged(inverse: jax.Array, lower: jax.Array, guarded: bool) -> jax.Array:
    """`(I + lower)^-1` from the inverses of the blocks of its diagonal, side by side."""
    s, size = inverse.shape
    while s < size:
        lane = jax.lax.broadcasted_iota(jnp.int32, inverse.shape, 1)
        later, parted = lane & s != 0, masks.parted(size, s)
        corner = zero_where_not(parted, lower).reshape(-1, s, size).sum(0)
        joined = dot(corner, finite(spread(inverse), guarded), "nn")
        right = zero_where_not(parted, _repeated(finite(joined, guarded)))
        second = dot(zero_where_not(later, inverse), right, "nn")
        below = jnp.where(later, inverse, -second)
        inverse, s = jnp.concatenate([zero_where_not(~later, inverse), below]), 2 * s
    return inverse


def invert(ref, block: int, guarded: bool) -> None:
    """Replaces every `lower` of `ref (heads, C, C)` by `(I + lower)^-1`."""
    heads, size, _ = ref.shape
    block = min(block, size)
    for first in range(0, heads, _HEADS_TOGETHER):
        some = range(first, min(first + _HEADS_TOGETHER, heads))
        blocks = jnp.stack([diagonal(ref[h], block) for h in some])
        blocks = substituted(blocks, guarded)
        for n, h in enumerate(some):
            ref[h] = merged(blocks[n], ref[h], guarded)


class NewValues(NamedTuple):
    """What a chunk's tokens write.

    Attributes:
      u: `(C, V)`; NaN from a document's first that is not finite on.
      error: values minus what the entering state holds under their keys, `(C, V)`.
    """

    u: jax.Array
    error: jax.Array


def new_values(inverse, beta, v, retrieved, docs: masks.SegmentMasks | None) -> NewValues:
    """`NewValues` of one head.

    Args:
      inverse: `(C, C)`.
      beta: `(C, 1)`.
      v, retrieved: `(C, V)`, the values and what the entering state holds under their keys.
      docs: as everywhere.
    """
    guarded, error = docs is not None, v.astype(jnp.float32) - retrieved
    right = beta * error
    values = dot(inverse, finite(right, guarded), "nn")
    if docs is None:
        return NewValues(values, error)
    bad = jnp.where(jnp.maximum(jnp.abs(right), jnp.abs(values)) < 1e38, 0.0, 1.0)
    bad = jnp.broadcast_to(bad.max(1, keepdims=True), values.shape).astype(jnp.bfloat16)
    row, column = masks.token_indices(values.shape[0])
    reach = (docs.same & (row >= column)).astype(jnp.float32).astype(jnp.bfloat16)
    return NewValues(jnp.where(dot(reach, bad, "nn") > 0, jnp.nan, values), error)


def write_columns(ref, columns: Sequence[jax.Array]) -> None:
    """`ref (heads, C)` from a column `(C, 1)` of each head."""
    heads, size = ref.shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (size, heads), 1)
    x = jnp.zeros((size, heads), jnp.float32)
    for h, column in enumerate(columns):
        x = jnp.where(lane == h, column, x)
    ref[...] = x.T
