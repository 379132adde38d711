"""GPU kernels with a matrix state a head (Triton lowering): calls, sums of log decays, loads.

Triton has tiles of powers of two, products of at least 16 by 16 by 16, reductions, reshapes and
prefix sums; no rolls, slices or concatenations. So `decay_sums.scan` runs with an exchange of
halves by reductions, and one decay of all keys has sums of its own, `pair_sums`: a prefix sum for
each pair of tokens, in place of log C such exchanges. All functions are plain JAX as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.gpu import beyond_addresses, masked_places
from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.masks import SegmentMasks

SMALLEST = 16  # side of a tile that Triton multiplies


def block_size(width: int, most: int) -> int:
    """The power of two that holds `width`, between `SMALLEST` and `most`."""
    return max(SMALLEST, min(most, pl.next_power_of_2(width)))


class KernelShape(NamedTuple):
    """What is static about one call.

    Attributes:
      tiles: the family's, with `chunk` tokens and blocks of `keys` and `values`.
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
    tiles: Any

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.tiles.chunk)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.key_size, self.tiles.keys)

    @property
    def value_blocks(self) -> int:
        return pl.cdiv(self.value_size, self.tiles.values)


def kernel_shape(
    config: Config,
    q: Any,
    v: Any,
    log_decay: Any,
    segment_index: Any,
    choose_tiles: Callable[..., Any],
) -> KernelShape:
    """`KernelShape` of a call, with tiles of `choose_tiles(shape)` where `config` has none."""
    batch, length, heads, value_size = v.shape
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    dims = KernelShape(
        batch, length, q.shape[2], heads, q.shape[3], value_size, decay, segment_index is not None,
        config.scale, v.dtype, None,
    )  # fmt: skip
    tiles = config.tiles or choose_tiles(dims)
    return dims._replace(tiles=tiles._replace(chunk=config.chunk) if config.chunk else tiles)


def call(
    kernel: Callable[[KernelShape, Mapping[str, Any]], None],
    dims: KernelShape,
    name: str,
    grid: tuple[int, int, int],
    operands: Mapping[str, Any],
    outputs: Mapping[str, tuple[tuple[int, ...], Any]],
    *,
    warps: int,
    stages: int = 1,
    flops: int,
) -> dict[str, jax.Array]:
    """Run a kernel on named operands, None left out; `outputs` are shapes and dtypes by name.

    `flops` are those of a token and head.
    """
    operands = {key: x for key, x in operands.items() if x is not None}
    names = (*operands, *outputs)
    out = compat.pallas_call(
        lambda *refs: kernel(dims, dict(zip(names, refs, strict=True))),
        backend="gpu",
        name=name,
        grid=grid,
        out_shape=[compat.out_struct(*x, *operands.values()) for x in outputs.values()],
        compiler_params=compat.triton.CompilerParams(num_warps=warps, num_stages=stages),
        flops=flops * dims.batch * dims.length * dims.heads,
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))


def run_operands(dims: KernelShape, segment_index: jax.Array | None) -> dict[str, jax.Array]:
    """The operands that `Row.documents` needs; none without segments."""
    if segment_index is None:
        return {}
    size = dims.tiles.chunk
    filled = jnp.pad(segment_index, ((0, 0), (0, dims.chunks * size - dims.length)))
    return {
        "segment_index": segment_index,
        "entering_segment": masks.entering_segment(filled, size),
    }


def sum_over_group(dx: jax.Array, like: jax.Array) -> jax.Array:
    """Gradients `(B, L, n G, K)` summed over the heads of a group, as `like (B, L, G, K)`."""
    if dx.shape == like.shape:
        return dx
    return dx.reshape(*like.shape[:3], -1, like.shape[3]).sum(3).astype(like.dtype)


def unsupported(batch: int, v: Any, largest_array: Callable[[], int]) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(v) or beyond_addresses(batch, largest_array)


# Inside a kernel.


def each_block(count: int, body: Callable[..., Any], carry: Any) -> Any:
    """`body(index, carry)` for each of `count` blocks, without a loop around a single one."""
    return body(jnp.int32(0), carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def block(index: Any, size: int) -> Span:
    """The index-th block of an axis."""
    return Span(index * size, size)


def scaled(dims: KernelShape, do: jax.Array) -> jax.Array:
    """The cotangent of the outputs before they are scaled, an operand."""
    return (dims.scale * do.astype(jnp.float32)).astype(do.dtype)


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
            places = [
                masked_places(x.start, x.size, limit, self.row) if isinstance(x, Span) else x
                for x, limit in zip(index, ref.shape[1:], strict=True)
            ]
            return ref.at[(self.row, *places)], mask
        columns = [span.places for span, _ in spans]
        if len(columns) == 2:
            columns = [columns[0][:, None], columns[1][None, :]]
        rest = iter(columns)
        places = [next(rest) if isinstance(x, Span) else x for x in index]
        return ref.at[(self.row, *places)], mask

    def documents(self, tokens: Span, chunk: Any) -> SegmentMasks | None:
        """Masks from `segment_index (B, L)` and `entering_segment (B, chunks)`; None without."""
        if "segment_index" not in self.refs:
            return None
        segment_index = self.load("segment_index", tokens)
        entering = self.load("entering_segment", Span(chunk, 1))
        return masks.segment_masks(
            segment_index[:, None], segment_index[None, :], entering[:, None]
        )
