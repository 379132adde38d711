"""What the GPU kernels work on: one chunk of one head, its products, its loads and stores.

States are `(K, V)`, keys first, as the op's. What is between two kernels is in the dtype of q, k
and v, in which it is multiplied anyway; decays are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matrix_state import masks
from pallas_kernels.matrix_state.gpu import KernelShape, Row, Span, block_size
from pallas_kernels.matrix_state.masks import SegmentMasks
from pallas_kernels.matrix_state.tile import zero_where_not

_ELIMINATION_TOKENS = 16  # tokens of a block whose inverse is found one token at a time


class Tiles(NamedTuple):
    """`chunk` tokens meet pairwise; sides of blocks of a state: `keys`, `values` and, in a program
    that walks from chunk to chunk with all keys, `state_values` values.
    """

    chunk: int
    keys: int
    values: int
    state_values: int


def all_keys(dims: KernelShape) -> int:
    """Width of a block that holds all keys."""
    return block_size(dims.key_size, 256)


# Products.


def dot(x: jax.Array, y: jax.Array, contract: str = "nn") -> jax.Array:
    """`x y` ("nn"), `x y^T` ("nt") or `x^T y` ("tn") of operands of one dtype, float32 sums.

    Of float32 operands six products of bfloat16, those of `_pieces` that float32 would not round
    away: exact on every device, and a fraction of the registers of one product in TF32.
    """
    if x.dtype == jnp.bfloat16:
        return _dot(x, y, contract)
    left, right = _pieces(x), _pieces(y)
    # The smallest first.
    total = _dot(left[2], right[0], contract) + _dot(left[0], right[2], contract)
    total = total + _dot(left[1], right[1], contract)
    total = total + (_dot(left[1], right[0], contract) + _dot(left[0], right[1], contract))
    return total + _dot(left[0], right[0], contract)


def _dot(x: jax.Array, y: jax.Array, contract: str) -> jax.Array:
    axes = (((0 if contract[0] == "t" else 1,), (1 if contract[1] == "t" else 0,)), ((), ()))
    precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _pieces(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 that add up to a finite float32."""
    pieces = []
    for _ in range(3):
        pieces.append(x.astype(jnp.bfloat16))
        x = x - pieces[-1].astype(jnp.float32)
    return pieces


def finite_if(x: jax.Array, segmented: bool) -> jax.Array:
    """`tile.finite`: what a matmul over tokens of several documents may multiply by zero."""
    return zero_where_not(jnp.abs(x) < jnp.inf, x) if segmented else x


def unit_product(unit: jax.Array, x: jax.Array, segmented: bool) -> jax.Array:
    """`unit x`, `unit` lower triangular with ones on the diagonal; NaN where `x` is not finite."""
    x = x.astype(unit.dtype)
    product = dot(unit, finite_if(x, segmented))
    return jnp.where(jnp.abs(x) < jnp.inf, product, jnp.nan) if segmented else product


def inverse(lower: jax.Array, segmented: bool) -> jax.Array:
    """`tile.inverse`, with the blocks of 16 tokens on the diagonal by elimination."""
    size = lower.shape[0]
    row, column = masks.token_indices(size)
    near = (row ^ column) < _ELIMINATION_TOKENS
    inside = zero_where_not(near, lower)

    def eliminate(place, unit):
        """Take from each block's rows what they hold of its row at `place`, which is done."""
        at = _ELIMINATION_TOKENS - 1
        factors = zero_where_not((column & at) == place, inside).sum(1, keepdims=True)
        done = zero_where_not((row & at) == place, unit).sum(0, keepdims=True)
        return unit - zero_where_not(near & (factors != 0), factors * done)

    unit = (row == column).astype(lower.dtype)
    unit = jax.lax.fori_loop(0, _ELIMINATION_TOKENS - 1, eliminate, unit)
    for s in masks.level_sizes(size):
        if s >= _ELIMINATION_TOKENS:
            corner = dot(zero_where_not(masks.parted(size, s), lower), finite_if(unit, segmented))
            unit = unit - unit_product(unit, corner, segmented)
    return unit


def broken(values: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """`values`, NaN from a document's first that is not finite on."""
    if docs is None:
        return values
    row, column = masks.token_indices(values.shape[0])
    reach = masks.within(row >= column, docs).astype(jnp.bfloat16)
    first = (~(jnp.abs(values) < jnp.inf)).astype(jnp.bfloat16)
    return jnp.where(dot(reach, first) > 0, jnp.nan, values)


# One decay a key: a loop over the sizes of blocks at which pairs part. Not `decay_sums.scan`, whose
# log C sums of a block of keys would all be live beside the two `(C, C)` scores that they enter:
# here one level is made at a time, by a product with a mask, so that a loop has one body.


def sums(which: jax.Array, x: jax.Array) -> jax.Array:
    """For each row of `which (M, C)` the sum of the rows of `x (C, N)` that it marks, `(M, N)`.

    `x` is float32 and finite; zeros and ones times `_pieces` are exact.
    """
    ones = which.astype(jnp.bfloat16)
    high, middle, low = (_dot(ones, piece, "nn") for piece in _pieces(x))
    return low + middle + high


def _marks(token: jax.Array, other: jax.Array, at: Any) -> jax.Array:
    """The tokens whose decays a level sums for a token, if pairs part at blocks of `at`."""
    second = (token & at) != 0
    # As one mask and another: Triton does not select between masks.
    summed = second & (other <= token) | ~second & (other > token)
    return ((token ^ other) < at) & summed


def each_level(size: int, body: Callable[..., Any], carry: Any) -> Any:
    """`body(at, carry)` for blocks of 1, 2, 4, ... tokens."""

    def level(n, carry):
        return body(jax.lax.shift_left(jnp.int32(1), n), carry)

    return jax.lax.fori_loop(0, len(masks.level_sizes(size)), level, carry)


def factor_at(g: jax.Array, at: Any) -> jax.Array:
    """Each token's factor in the decay of the pairs that part at blocks of `at`, `(C, N)`."""
    return jnp.exp(sums(_marks(*masks.token_indices(g.shape[0]), at), g))


def factor_at_transpose(dlogs: jax.Array, at: Any) -> jax.Array:
    """The gradient of `g` from that of the logarithms of `factor_at(g, at)`."""
    token, other = masks.token_indices(dlogs.shape[0])
    return sums(_marks(other, token, at), dlogs)


# Loads and stores.


class Chunk(NamedTuple):
    """One chunk of one head.

    Attributes:
      dims: what is static.
      row: its arrays are of tokens `(B, L, heads[, width])`, of squares `(B, H, chunks, C, C)`, of
        states `(B, chunks, H, K, V)` and of a row's ends `(B, H, K, V)`.
      head, index: which.
    """

    dims: KernelShape
    row: Row
    head: Any
    index: Any

    @property
    def span(self) -> Span:
        return Span(self.index * self.dims.tiles.chunk, self.dims.tiles.chunk)

    def of_head(self, name: str, lanes: Span) -> jax.Array:
        """`(C, lanes)`."""
        return self.row.load(name, self.span, self.head, lanes)

    def of_group(self, name: str, lanes: Span) -> jax.Array:
        """`(C, lanes)`: queries or keys."""
        group = jax.lax.div(self.head, jnp.int32(self.dims.heads // self.dims.groups))
        return self.row.load(name, self.span, group, lanes)

    def put(self, name: str, values: jax.Array, lanes: Span) -> None:
        self.row.store(name, values, self.span, self.head, lanes)

    def column(self, name: str) -> jax.Array:
        """`(C, 1)` of an array `(B, L, H)`, float32."""
        return self.row.load(name, self.span, self.head).astype(jnp.float32)[:, None]

    def put_column(self, name: str, values: jax.Array, *index: Any) -> None:
        self.row.store(name, values.reshape(self.dims.tiles.chunk), self.span, self.head, *index)

    def square(self, name: str) -> jax.Array:
        return self.row.load(name, self.head, self.index, *[Span(0, self.dims.tiles.chunk)] * 2)

    def put_square(self, name: str, values: jax.Array) -> None:
        self.row.store(name, values, self.head, self.index, *[Span(0, self.dims.tiles.chunk)] * 2)

    def factor(self, name: str, keys: Span) -> jax.Array | None:
        """`from_start` or `to_end`, `(C, 1)` or `(C, keys)`; None where nothing decays."""
        if self.dims.decay == "key":
            return self.of_head(name, keys)
        return self.column(name) if self.dims.decay else None

    def chunk_decay(self, keys: Span) -> jax.Array | None:
        """The decay of the whole chunk, `(1, 1)` or `(keys, 1)`."""
        if self.dims.decay is None:
            return None
        last = jnp.minimum(self.span.start + self.dims.tiles.chunk, self.dims.length) - 1
        if self.dims.decay == "head":
            return self.row.load("from_start", last, Span(self.head, 1))[:, None]
        return self.row.load("from_start", last, self.head, keys)[:, None]

    def state(self, name: str, keys: Span, values: Span) -> jax.Array:
        return self.row.load(name, self.index, self.head, keys, values)

    def put_state(self, name: str, state: jax.Array, keys: Span, values: Span) -> None:
        self.row.store(name, state, self.index, self.head, keys, values)

    def documents(self) -> SegmentMasks | None:
        return self.row.documents(self.span, self.index)
