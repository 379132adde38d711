"""What arrays look like to the TPU kernels, and how numbers are brought into that shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.compat import pl
from pallas_kernels.common.tpu import LANES, SUBLANES, round_up
from pallas_kernels.selective_scan import tile

_HALF = SUBLANES // 2


class Tiles(NamedTuple):
    """`(steps, width)` of a block, in which the forward pass unrolls `group` steps at a time."""

    steps: int
    width: int
    group: int = 16


class KernelShape(NamedTuple):
    """What is static about one kernel."""

    batch: int
    length: int
    width: int
    states: int
    tiles: Tiles
    group: int  # steps unrolled at a time
    softplus: bool
    reverse: bool
    segmented: bool

    @property
    def blocks(self) -> int:
        return -(-self.length // self.tiles.steps)

    @property
    def strips(self) -> int:
        return -(-self.width // self.tiles.width)

    @property
    def rows(self) -> int:
        """Lane tiles of a strip: a state is `(rows, 128)`."""
        return self.tiles.width // LANES

    @property
    def groups(self) -> int:
        return self.tiles.steps // self.group

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.strips, self.blocks

    @property
    def coded(self) -> bool:
        """Some tokens begin a document, are padding or do not exist."""
        return self.segmented or self.length % self.tiles.steps != 0

    @property
    def shared(self) -> int:
        """Numbers of a token that all channels share: B, C and its step code."""
        return 2 * self.states + self.coded

    @property
    def order(self) -> list[int]:
        """The steps of a group in the direction of travel."""
        return list(range(self.group))[:: -1 if self.reverse else 1]

    def place(self, i):
        """The group of a block that is the i-th in the direction of travel."""
        return self.groups - 1 - i if self.reverse else i


# Tile bookkeeping: the shape of an array, and which block of it a grid step sees.


class Specs(NamedTuple):
    """Block specs; `time` says which block of time the i-th grid step sees."""

    dims: KernelShape
    backward: bool

    def time(self, i):
        last = self.backward != self.dims.reverse
        return self.dims.blocks - 1 - i if last else i

    def tokens(self) -> pl.BlockSpec:
        """Block of an array `(B, L, D)`."""
        steps, width, _ = self.dims.tiles
        return pl.BlockSpec(
            block_shape=(None, steps, width), index_map=lambda b, d, i: (b, self.time(i), d)
        )

    def shared(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, None, self.dims.shared, self.dims.tiles.steps),
            index_map=lambda b, d, i: (b, self.time(i), 0, 0),
        )

    def shared_gradient(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, None, None, 2 * self.dims.states, self.dims.tiles.steps),
            index_map=lambda b, d, i: (d, b, self.time(i), 0, 0),
        )

    def decays(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, self.dims.states, self.dims.rows, LANES),
            index_map=lambda b, d, i: (d, 0, 0, 0),
        )

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, None, self.dims.states, self.dims.rows, LANES),
            index_map=lambda b, d, i: (b, d, 0, 0, 0),
        )

    def boundaries(self) -> pl.BlockSpec:
        """Block of the states that enter each block of time."""
        return pl.BlockSpec(
            block_shape=(None, None, None, self.dims.states, self.dims.rows, LANES),
            index_map=lambda b, d, i: (b, self.time(i), d, 0, 0, 0),
        )

    def channels(self) -> pl.BlockSpec:
        """Block of an array `(1, D)`."""
        return pl.BlockSpec(
            block_shape=(1, self.dims.tiles.width), index_map=lambda b, d, i: (0, d)
        )

    def channel_sums(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, self.dims.group, self.dims.tiles.width),
            index_map=lambda b, d, i: (b, 0, d),
        )


def tiled(dims: KernelShape, x: jax.Array) -> jax.Array:
    """`(..., D, N)` to `(..., strips, N, rows, 128)`, padded with zeros."""
    fill = dims.strips * dims.tiles.width - dims.width
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, fill), (0, 0)])
    x = jnp.swapaxes(x, -1, -2)
    x = x.reshape(*x.shape[:-1], dims.strips, dims.rows, LANES)
    return jnp.moveaxis(x, -3, -4)


def untiled(dims: KernelShape, x: jax.Array) -> jax.Array:
    """The inverse of `tiled`."""
    x = jnp.moveaxis(x, -4, -3)
    x = x.reshape(*x.shape[:-3], dims.strips * dims.tiles.width)
    return jnp.swapaxes(x[..., : dims.width], -1, -2)


def pack_shared(dims: KernelShape, B, C, segment_index) -> jax.Array:
    """B, C and the step codes of each block, tokens last: `(B, blocks, shared, steps)`."""
    fill = dims.blocks * dims.tiles.steps - dims.length

    def pad(x, value):
        return jnp.pad(x.astype(jnp.float32), ((0, 0), (0, fill), (0, 0)), constant_values=value)

    parts = [pad(B, 0), pad(C, 0)]
    if dims.coded:
        codes = jnp.full(B.shape[:2], segments.CONTINUE, jnp.int32)
        if segment_index is not None:
            codes = segments.step_codes(segment_index, reverse=dims.reverse)
        parts.append(pad(codes[:, :, None], segments.SKIP))
    x = jnp.concatenate(compat.match_vma(*parts), axis=2)
    x = x.reshape(dims.batch, dims.blocks, dims.tiles.steps, dims.shared)
    return jnp.swapaxes(x, 2, 3)


def unpack_shared(dims: KernelShape, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dB and dC `(B, L, N)` from their sums over each strip `(strips, B, blocks, 2 N, steps)`."""
    x = jnp.swapaxes(x.sum(0), 2, 3).reshape(dims.batch, -1, 2 * dims.states)[:, : dims.length]
    return x[:, :, : dims.states], x[:, :, dims.states :]


# Loads and stores.


class Staged(NamedTuple):
    """A staging area for the tokens of a group, `(group * rows, 128)`.

    Eight tokens of each lane tile follow each other: a load with a longer stride is slower.
    """

    ref: Any
    dims: KernelShape
    first: Any = 0  # the group's first token, if the area holds a block

    def _row(self, k: int, j: int):
        row = (k // SUBLANES * self.dims.rows + j) * SUBLANES + k % SUBLANES
        return self.first * self.dims.rows + row

    def put(self, j: int, x: jax.Array) -> None:
        """The tokens of lane tile j."""
        for k in range(0, self.dims.group, SUBLANES):
            self.ref[pl.ds(self._row(k, j), SUBLANES), :] = x[k : k + SUBLANES]

    def get(self, j: int) -> jax.Array:
        starts = range(0, self.dims.group, SUBLANES)
        parts = [self.ref[pl.ds(self._row(k, j), SUBLANES), :] for k in starts]
        return jnp.concatenate(parts, axis=0)

    def put_token(self, k: int, x: jax.Array) -> None:
        """Token k of all lane tiles, `(rows, 128)`."""
        self.ref[pl.ds(self._row(k, 0), self.dims.rows, stride=SUBLANES), :] = x

    def token(self, k: int) -> jax.Array:
        return self.ref[pl.ds(self._row(k, 0), self.dims.rows, stride=SUBLANES), :]

    def row(self, k: int, j: int, count: int) -> jax.Array:
        """Token k of lane tile j, `count` times."""
        row = self.ref[pl.ds(self._row(k, j), 1), :]
        return jnp.broadcast_to(row, (count, LANES))


class States(NamedTuple):
    """States of a token one after the other, each `(rows, 128)`.

    Sums over channels want a lane tile of all states at once. A load whose stride is longer than
    four rows takes two, so if there are more, one load gets the two lane tiles `j` and
    `j + rows / 2` of each state, in turns: `fold` of them.
    """

    ref: Any
    dims: KernelShape
    first: Any = 0  # the token's first row

    @staticmethod
    def fold(dims: KernelShape) -> int:
        return 2 if dims.rows > _HALF and dims.rows % 2 == 0 else 1

    @property
    def stride(self) -> int:
        return self.dims.rows // self.fold(self.dims)

    def _row(self, n: int):
        return self.first + n * self.dims.rows

    def put(self, n: int, x: jax.Array) -> None:
        self.ref[pl.ds(self._row(n), self.dims.rows), :] = x

    def get(self, n: int) -> jax.Array:
        return self.ref[pl.ds(self._row(n), self.dims.rows), :]

    def lane_tiles(self, j: int) -> jax.Array:
        """`(N * fold, 128)`."""
        count = self.dims.states * self.fold(self.dims)
        return self.ref[pl.ds(self._row(0) + j, count, stride=self.stride), :]

    def alike(self, area: Staged, k: int, j: int) -> jax.Array:
        """Token k of `area` in the shape of `lane_tiles(j)`."""
        rows = [area.row(k, j + p * self.stride, SUBLANES) for p in range(self.fold(self.dims))]
        tile = rows[0]
        if len(rows) == 2:
            odd = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) % 2 == 1
            tile = jnp.where(odd, rows[1], tile)
        count = self.dims.states * self.fold(self.dims)
        return jnp.concatenate([tile] * -(-count // SUBLANES), axis=0)[:count]


class Spread(NamedTuple):
    """The shared numbers of a group, each over 128 lanes: `(group * height, 128)`."""

    ref: Any
    dims: KernelShape
    first: Any = 0  # the group's first token, if the area holds a block

    @property
    def height(self) -> int:
        return round_up(self.dims.shared, SUBLANES)

    def _row(self, k: int, i: int):
        return (self.first + k) * self.height + i

    def fill(self, shared_ref: Any, start) -> None:
        """Spread the tokens from `start` of a block."""
        x = shared_ref[...]
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) - start
        for k in range(self.dims.group):
            one = jnp.sum(jnp.where(lane == k, x, 0.0), axis=1, keepdims=True)
            spread = jnp.broadcast_to(one, (self.dims.shared, LANES))
            self.ref[pl.ds(self._row(k, 0), self.dims.shared), :] = spread

    def _over_channels(self, k: int, i: int) -> jax.Array:
        row = self.ref[pl.ds(self._row(k, i), 1), :]
        return jnp.broadcast_to(row, (self.dims.rows, LANES))

    def B(self, k: int, n: int) -> jax.Array:
        return self._over_channels(k, n)

    def C(self, k: int, n: int) -> jax.Array:
        return self._over_channels(k, self.dims.states + n)

    def inside(self, k: int) -> jax.Array | None:
        """False where token k begins a document; None if none does."""
        if not self.dims.segmented:
            return None
        return self._over_channels(k, 2 * self.dims.states) != segments.RESET

    def live(self) -> jax.Array | None:
        """Which of the tokens are real, `(group, 128)`; None if all are."""
        if not self.dims.coded:
            return None
        codes = self.ref[
            pl.ds(self._row(0, 2 * self.dims.states), self.dims.group, stride=self.height), :
        ]
        return codes != segments.SKIP


class Tokens(NamedTuple):
    """A group's tokens of one lane tile of a block."""

    refs: dict[str, Any]
    dims: KernelShape
    rows: Any
    lanes: slice

    def load(self, name: str) -> jax.Array:
        return self.refs[name][self.rows, self.lanes].astype(jnp.float32)

    def maybe(self, name: str) -> jax.Array | None:
        """A number of each channel, `(1, 128)`, if it was given."""
        return self.refs[name][:, self.lanes] if name in self.refs else None

    def store(self, name: str, x: jax.Array) -> None:
        self.refs[name][self.rows, self.lanes] = x.astype(self.refs[name].dtype)

    def add(self, name: str, x: jax.Array) -> None:
        if name in self.refs:
            self.refs[name][:, self.lanes] += x

    def exists(self, live: jax.Array | None) -> jax.Array | None:
        """`live` and not beyond the last channel."""
        if self.dims.width % self.dims.tiles.width == 0:
            return live
        lane = jax.lax.broadcasted_iota(jnp.int32, (self.dims.group, LANES), 1)
        place = pl.program_id(1) * self.dims.tiles.width + self.lanes.start + lane
        inside = place < self.dims.width
        return inside if live is None else inside & live

    def step_size(self, mask) -> jax.Array:
        """dt after its softplus, 0 where masked."""
        dt = tile.step_size(self.load("dt"), self.maybe("bias"), softplus=self.dims.softplus)
        return tile.select(mask, dt)


def group_tokens(dims: KernelShape, refs: dict[str, Any], g) -> list[Tokens]:
    """The g-th group of a block, lane tile by lane tile."""
    rows = pl.ds(pl.multiple_of(g * dims.group, dims.group), dims.group)
    return [Tokens(refs, dims, rows, slice(j * LANES, (j + 1) * LANES)) for j in range(dims.rows)]
