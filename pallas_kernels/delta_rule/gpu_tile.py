"""What the GPU kernels work on: one chunk of one head, its products, its loads and stores.

States are `(K, V)`, keys first, as the op's. What is between two kernels is in the dtype of q, k
and v, in which it is multiplied anyway; decays are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, compat
from pallas_kernels.chunks import Documents
from pallas_kernels.chunks_gpu import Row, Span, block_size
from pallas_kernels.delta_rule.tile import finite
from pallas_kernels.linear_attention.tile import only

_ELIMINATED = 16  # tokens of a block whose inverse is found one token at a time


class Job(NamedTuple):
    """What is static about one call.

    `chunk` tokens meet pairwise.
    """

    batch: int
    length: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["head", "key"] | None
    segmented: bool
    scale: float
    dtype: Any
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    # Sides of blocks: all keys or some, the values of a program that walks and of others.

    @property
    def all_keys(self) -> int:
        return block_size(self.key_size, 256)

    @property
    def keys(self) -> int:
        return block_size(self.key_size, 64)

    @property
    def walked(self) -> int:
        return block_size(self.value_size, 32)

    @property
    def values(self) -> int:
        return block_size(self.value_size, 64)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_size // self.keys)

    @property
    def value_blocks(self) -> int:
        return -(-self.value_size // self.values)


# Products.


def dot(x: jax.Array, y: jax.Array, contract: str = "nn") -> jax.Array:
    """`x y` ("nn"), `x y^T` ("nt") or `x^T y` ("tn") of operands of one dtype, float32 sums.

    Of float32 operands three products in TF32: about as good as float32, on tensor cores.
    """
    precision: Any = jax.lax.Precision.DEFAULT
    if x.dtype == jnp.float32:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        if compat.interpreting():  # a host has no TF32
            precision = jax.lax.Precision.HIGHEST
    axes = (((0 if contract[0] == "t" else 1,), (1 if contract[1] == "t" else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def unit_product(unit: jax.Array, x: jax.Array, docs: Documents | None) -> jax.Array:
    """`unit x`, `unit` lower triangular with ones on the diagonal; NaN where `x` is not finite."""
    x = x.astype(unit.dtype)
    product = dot(unit, finite(x, docs))
    return product if docs is None else jnp.where(jnp.abs(x) < jnp.inf, product, jnp.nan)


def inverse(lower: jax.Array, docs: Documents | None) -> jax.Array:
    """`tile.inverse`, with the blocks of 16 tokens on the diagonal by elimination."""
    size = lower.shape[0]
    row, column = chunks.order(size)
    near = (row ^ column) < _ELIMINATED
    inside = only(near, lower)

    def eliminate(place, unit):
        """Take from each block's rows what they hold of its row at `place`, which is done."""
        at = _ELIMINATED - 1
        factors = only((column & at) == place, inside).sum(1, keepdims=True)
        done = only((row & at) == place, unit).sum(0, keepdims=True)
        return unit - only(near & (factors != 0), factors * done)

    unit = (row == column).astype(lower.dtype)
    unit = jax.lax.fori_loop(0, _ELIMINATED - 1, eliminate, unit)
    for s in chunks.sizes(size):
        if s >= _ELIMINATED:
            corner = dot(only(chunks.parted(size, s), lower), finite(unit, docs))
            unit = unit - unit_product(unit, corner, docs)
    return unit


def broken(values: jax.Array, docs: Documents | None) -> jax.Array:
    """`values`, NaN from a document's first that is not finite on."""
    if docs is None:
        return values
    row, column = chunks.order(values.shape[0])
    reach = chunks.within(row >= column, docs).astype(jnp.bfloat16)
    first = (~(jnp.abs(values) < jnp.inf)).astype(jnp.bfloat16)
    return jnp.where(dot(reach, first) > 0, jnp.nan, values)


# One decay a key: a loop over the sizes of blocks at which pairs part, see `chunks.Sums`.


def sums(which: jax.Array, x: jax.Array) -> jax.Array:
    """For each row of `which (M, C)` the sum of the rows of `x (C, N)` that it marks, `(M, N)`.

    `x`, float32 and finite, is three bfloat16 that add up to it: products of these with zeros and
    ones are exact, so that nothing is lost but by adding.
    """
    ones, total = which.astype(jnp.bfloat16), jnp.zeros((which.shape[0], x.shape[1]), jnp.float32)
    for _ in range(3):
        piece = x.astype(jnp.bfloat16)
        total, x = total + dot(ones, piece), x - piece.astype(jnp.float32)
    return total


def _marks(token: jax.Array, other: jax.Array, at: Any) -> jax.Array:
    """The tokens whose decays a level sums for a token, if pairs part at blocks of `at`."""
    second = (token & at) != 0
    # As one mask and another: Triton does not select between masks.
    behind = second & (other <= token) | ~second & (other > token)
    return ((token ^ other) < at) & behind


def each_level(size: int, body: Callable[..., Any], carry: Any) -> Any:
    """`body(at, carry)` for blocks of 1, 2, 4, ... tokens."""

    def level(n, carry):
        return body(jax.lax.shift_left(jnp.int32(1), n), carry)

    return jax.lax.fori_loop(0, len(chunks.sizes(size)), level, carry)


def factor_at(g: jax.Array, at: Any) -> jax.Array:
    """Each token's factor in the decay of the pairs that part at blocks of `at`, `(C, N)`."""
    return jnp.exp(sums(_marks(*chunks.order(g.shape[0]), at), g))


def factor_at_transpose(dlogs: jax.Array, at: Any) -> jax.Array:
    """The gradient of `g` from that of the logarithms of `factor_at(g, at)`."""
    token, other = chunks.order(dlogs.shape[0])
    return sums(_marks(other, token, at), dlogs)


# Loads and stores.


class Chunk(NamedTuple):
    """One chunk of one head.

    Attributes:
      job: what is static.
      row: its arrays are of tokens `(B, L, heads[, width])`, of squares `(B, H, chunks, C, C)`, of
        states `(B, chunks, H, K, V)` and of a row's ends `(B, H, K, V)`.
      head, index: which.
    """

    job: Job
    row: Row
    head: Any
    index: Any

    @property
    def span(self) -> Span:
        return Span(self.index * self.job.chunk, self.job.chunk)

    def of_head(self, name: str, lanes: Span) -> jax.Array:
        """`(C, lanes)`."""
        return self.row.load(name, self.span, self.head, lanes)

    def of_group(self, name: str, lanes: Span) -> jax.Array:
        """`(C, lanes)`: queries or keys."""
        group = jax.lax.div(self.head, jnp.int32(self.job.heads // self.job.groups))
        return self.row.load(name, self.span, group, lanes)

    def put(self, name: str, values: jax.Array, lanes: Span) -> None:
        self.row.store(name, values, self.span, self.head, lanes)

    def column(self, name: str) -> jax.Array:
        """`(C, 1)` of an array `(B, L, H)`, float32."""
        return self.row.load(name, self.span, self.head).astype(jnp.float32)[:, None]

    def put_column(self, name: str, values: jax.Array, *index: Any) -> None:
        self.row.store(name, values.reshape(self.job.chunk), self.span, self.head, *index)

    def square(self, name: str) -> jax.Array:
        return self.row.load(name, self.head, self.index, *[Span(0, self.job.chunk)] * 2)

    def put_square(self, name: str, values: jax.Array) -> None:
        self.row.store(name, values, self.head, self.index, *[Span(0, self.job.chunk)] * 2)

    def factor(self, name: str, keys: Span) -> jax.Array | None:
        """`into` or `out`, `(C, 1)` or `(C, keys)`; None where nothing decays."""
        if self.job.decay == "key":
            return self.of_head(name, keys)
        return self.column(name) if self.job.decay else None

    def keep(self, keys: Span) -> jax.Array | None:
        """The decay of the whole chunk, `(1, 1)` or `(keys, 1)`."""
        if self.job.decay is None:
            return None
        last = jnp.minimum(self.span.start + self.job.chunk, self.job.length) - 1
        if self.job.decay == "head":
            return self.row.load("into", last, Span(self.head, 1))[:, None]
        return self.row.load("into", last, self.head, keys)[:, None]

    def state(self, name: str, keys: Span, values: Span) -> jax.Array:
        return self.row.load(name, self.index, self.head, keys, values)

    def put_state(self, name: str, state: jax.Array, keys: Span, values: Span) -> None:
        self.row.store(name, state, self.index, self.head, keys, values)

    def documents(self) -> Documents | None:
        return self.row.documents(self.span, self.index)


def each_block(count: int, body: Callable[..., Any], carry: Any) -> Any:
    """`body(index, carry)` for each of `count` blocks, without a loop around a single one."""
    return body(jnp.int32(0), carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def block(index: Any, size: int) -> Span:
    return Span(index * size, size)
