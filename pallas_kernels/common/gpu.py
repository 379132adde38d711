"""What GPU kernels share; most of it is of those that walk strips of channels through time.

A program of such a kernel takes the channels of one strip through one chunk of one row. References
are whole arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, dispatch, segments, symbolic
from pallas_kernels.common.compat import pl


class Tiles(NamedTuple):
    """`steps` of time a chunk, `width` channels a program, `unroll` steps loaded together."""

    steps: int
    width: int
    unroll: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripShape:
    """What is static about one kernel; a family adds its own."""

    batch: int
    length: int
    width: int
    tiles: Tiles
    segmented: bool
    reverse: bool = False  # the direction of travel of this kernel

    @property
    def chunks(self) -> int:
        return -(-self.length // self.tiles.steps)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.chunks, self.batch, -(-self.width // self.tiles.width)

    @property
    def groups(self) -> int:
        return -(-self.tiles.steps // self.tiles.unroll)

    @property
    def guarded(self) -> bool:
        """Some steps of the walk lie outside the row or the chunk."""
        return self.length % self.tiles.steps != 0 or self.tiles.steps % self.tiles.unroll != 0


class Strip(NamedTuple):
    """The channels of one program. Arrays are `(..., D)`, or `(..., N, D)` with states before the
    channels; `index` is of the axes before these."""

    row: jax.Array  # which sequence
    lanes: slice | pl.Slice  # which channels
    valid: jax.Array  # channels that exist, (width,)

    def load(self, ref, index=(), live=True) -> jax.Array:
        """`(width,)` or `(N, width)`, float32."""
        states = ref.ndim - len(index) - 1
        mask = self.valid[None] if states else self.valid & live
        mask = jnp.broadcast_to(mask, (*ref.shape[len(index) : -1], mask.shape[-1]))
        at = (*index, *[slice(None)] * states, self.lanes)
        return compat.triton.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32)

    def store(self, ref, index, value, live=True) -> None:
        states = value.ndim - 1
        mask = jnp.broadcast_to(self.valid[None], value.shape) if states else self.valid & live
        at = (*index, *[slice(None)] * states, self.lanes)
        compat.triton.store(ref.at[at], value.astype(ref.dtype), mask=mask)

    def load_planes(self, refs, index=(), live=True) -> tuple[jax.Array, ...]:
        return tuple(self.load(ref, index, live) for ref in refs)

    def store_planes(self, refs, index, values, live=True) -> None:
        for ref, value in zip(refs, values, strict=True):
            self.store(ref, index, value, live)


def strip(dims: StripShape, row_axis: int = 1) -> Strip:
    """That of this program; the grid's axis of rows comes before that of strips."""
    start = pl.program_id(row_axis + 1) * dims.tiles.width
    valid = start + jnp.arange(dims.tiles.width) < dims.width
    return Strip(pl.program_id(row_axis), pl.ds(start, dims.tiles.width), valid)


def masked_places(start: Any, size: int, limit: int, row: jax.Array) -> slice | pl.Slice:
    """`size` places of an axis of `limit` from `start`; what lies beyond it has to be masked.

    A start that is known may not reach beyond the axis since jax 0.12, one that is computed may:
    here from `row`, which any integer that is known only at run time can be.
    """
    if isinstance(start, int) and start + size > limit:
        start = start + 0 * row
    return pl.ds(start, size)


def token(dims: StripShape, chunk, i, j: int, row, codes_ref):
    """`(t, live, code)` of step j of group i of a walk: its token, whether it exists, its code.

    The code is None where every step is a plain one.
    """
    place = i * dims.tiles.unroll + j
    place = dims.groups * dims.tiles.unroll - 1 - place if dims.reverse else place
    t = chunk * dims.tiles.steps + place
    live: jax.Array | bool = True
    code, mask, other = None, None, None
    if dims.guarded:
        live = mask = (place < dims.tiles.steps) & (t < dims.length)
        code = jnp.where(live, jnp.int32(segments.CONTINUE), jnp.int32(segments.SKIP))
        other = segments.SKIP
    if dims.segmented:
        code = compat.triton.load(codes_ref.at[row, t], mask=mask, other=other)
    return t, live, code


def by_chunks(
    op: str, count: int, whole: Callable[..., Any], chained: Callable[..., Any], *args: Any
) -> Any:
    """How GPU kernels find the state that enters each of `count` chunks, for `explain`.

    Where rows fill the GPU there is one chunk, and `whole(*args)` has nothing to do; else
    `chained(*args)` reduces all chunks at once and chains what they do to a state.
    """
    return dispatch.choose(
        f"{op} chunks",
        {"chained": chained, "whole rows": whole},
        *args,
        default="chained",
        everywhere="whole rows",
        unsupported={"whole rows": f"it takes {count} chunks to fill a GPU"} if count > 1 else {},
        platforms=("cuda",),
    )


def beyond_addresses(batch: int, largest: Callable[[], int]) -> str | None:
    """Why the GPU kernels cannot serve a call.

    Args:
      batch: size of the batch, which may be a symbol.
      largest: elements of the largest array that a kernel addresses; not called for a symbol.
    """
    if symbolic.is_symbol(batch):
        return f"Triton needs a grid that is known when it is traced, the batch is {batch}"
    if (count := largest()) >= 2**31:
        return f"an array has {count} elements, its addresses hold 2**31"
    return None
