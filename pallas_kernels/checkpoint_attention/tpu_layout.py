"""What a grid step of the TPU kernels sees: tiles, strips and the blocks of every array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.compat import pl
from pallas_kernels.common.tpu import LANES, SUBLANES, VMEM_BUDGET, round_up


class Limits(NamedTuple):
    """What a call may take of a chip.

    Attributes:
      tokens, slots: of a step of the grid, at most.
      strip: slots kept in VMEM at most; None for as many as fit.
      lanes: of a register, the unit of all sizes.
      vmem_bytes: see the function of this name.
    """

    tokens: int = 1024
    slots: int = 512
    strip: int | None = None
    lanes: int = LANES
    vmem_bytes: int = VMEM_BUDGET


class Tiles(NamedTuple):
    """`tokens` and `slots` of a step of the grid, and `strip` slots kept in VMEM."""

    tokens: int
    slots: int
    strip: int


class KernelShape(NamedTuple):
    """What is static about one call; lengths in whole tiles, widths in whole tiles of lanes."""

    batch: int
    length: int
    slots: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    interval: int
    scale: float
    own: bool  # tokens see themselves
    plain: bool  # one document from its start
    dtype: Any
    tiles: Tiles
    lanes: int = LANES

    @property
    def group_heads(self) -> int:
        return self.heads // self.groups

    @property
    def blocks(self) -> int:
        return self.length // self.tiles.tokens

    @property
    def strips(self) -> int:
        return self.slots // self.tiles.strip

    @property
    def steps(self) -> int:
        """Blocks of a strip."""
        return self.tiles.strip // self.tiles.slots

    @property
    def grid(self) -> tuple[int, ...]:
        return self.batch, self.groups, self.blocks, self.group_heads, self.strips, self.steps


class Place(NamedTuple):
    """A step of the grid: row, group, block of tokens, head of the group, strip and its block."""

    row: Any
    group: Any
    block: Any
    head: Any
    strip: Any
    step: Any

    def heads(self, dims: KernelShape) -> Any:
        """The head among all heads."""
        return self.group * dims.group_heads + self.head


def vmem_bytes(dims: KernelShape) -> int:
    """Bytes of VMEM of the backward kernel, the larger one.

    Blocks count twice, so that the next is fetched while one is worked on; scratch counts once.
    """
    width = jnp.dtype(dims.dtype).itemsize
    keys, values = dims.key_size, dims.value_size
    summed = 4 if dims.strips > 1 else width
    tokens = dims.tiles.tokens * ((3 * keys + 4 * values) * width + keys * summed)
    tokens += 4 * dims.tiles.tokens * 4 * SUBLANES  # first, last, lse and its cotangent
    strip = dims.tiles.strip * (3 * keys + 2 * values) * width
    scratch = 4 * dims.tiles.strip * (keys + values)
    scratch += 4 * dims.tiles.tokens * (2 * keys + values + 2 * SUBLANES)
    between = 5 * 4 * dims.tiles.tokens * dims.tiles.slots  # scores and what is made of them
    return 2 * (tokens + strip) + scratch + between


def choose_tiles(dims: KernelShape, limits: Limits) -> Tiles:
    """The longest strip within the limits: of all slots, or a share of them in whole blocks.

    Raises:
      ValueError: the smallest does not fit.
    """
    blocks = -(-dims.slots // dims.tiles.slots)
    for strips in range(1, blocks + 1):
        tiles = dims.tiles._replace(strip=-(-blocks // strips) * dims.tiles.slots)
        short = limits.strip is None or tiles.strip <= limits.strip
        whole = dims._replace(tiles=tiles, slots=round_up(dims.slots, tiles.strip))
        if short and vmem_bytes(whole) <= limits.vmem_bytes:
            return tiles
    raise ValueError(
        f"checkpoint_attention: a head of K={dims.key_size} and V={dims.value_size} does not fit a "
        "TPU's memory; use implementation='xla'"
    )


# Tile bookkeeping: which block of which array a grid step sees.


def _spec(dims: KernelShape, shape, index: Callable[[Place], Any]) -> pl.BlockSpec:
    return pl.BlockSpec(block_shape=shape, index_map=lambda *ids: index(Place(*ids)))


def queries_spec(dims: KernelShape, width: int) -> pl.BlockSpec:
    """Block of an array `(B, L, H * width)`."""
    shape = (None, dims.tiles.tokens, width)
    return _spec(dims, shape, lambda at: (at.row, at.block, at.heads(dims)))


def keys_spec(dims: KernelShape, width: int) -> pl.BlockSpec:
    """Block of an array `(B, L, G * width)`."""
    shape = (None, dims.tiles.tokens, width)
    return _spec(dims, shape, lambda at: (at.row, at.block, at.group))


def strips_spec(dims: KernelShape, width: int) -> pl.BlockSpec:
    """Block of an array `(B, M, G * width)`."""
    shape = (None, dims.tiles.strip, width)
    return _spec(dims, shape, lambda at: (at.row, at.strip, at.group))


def strips_across_spec(dims: KernelShape, width: int) -> pl.BlockSpec:
    """Block of an array `(B, G * width, M)`."""
    shape = (None, width, dims.tiles.strip)
    return _spec(dims, shape, lambda at: (at.row, at.group, at.strip))


def rows_spec(dims: KernelShape) -> pl.BlockSpec:
    """Block of an array `(B, H, 1, L)`."""
    shape = (None, None, 1, dims.tiles.tokens)
    return _spec(dims, shape, lambda at: (at.row, at.heads(dims), 0, at.block))


def _tokens(dims: KernelShape) -> pl.BlockSpec:
    """Block of an array `(B, 1, L)`."""
    shape = (None, 1, dims.tiles.tokens)
    return _spec(dims, shape, lambda at: (at.row, 0, at.block))


def ranges(dims: KernelShape, first, last) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """`first` and `last` of each token, and the least and the greatest of each block."""
    if dims.plain:
        return {}
    some = last > first
    by_block = (dims.batch, dims.blocks, dims.tiles.tokens)
    least = jnp.where(some, first, dims.slots).reshape(by_block).min(-1)
    greatest = jnp.where(some, last, 0).reshape(by_block).max(-1)
    reach = jnp.stack([least, greatest], -1).reshape(-1)
    return {
        "first": (first[:, None], _tokens(dims)),
        "last": (last[:, None], _tokens(dims)),
        "reach": (reach, pl.BlockSpec(memory_space=compat.tpu.SMEM)),
    }
