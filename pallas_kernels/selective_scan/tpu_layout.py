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
    """`(steps, width)` of a block."""

    steps: int
    width: int


class Job(NamedTuple):
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

    job: Job
    backward: bool

    def time(self, i):
        last = self.backward != self.job.reverse
        return self.job.blocks - 1 - i if last else i

    def tokens(self) -> pl.BlockSpec:
        """Block of an array `(B, L, D)`."""
        steps, width = self.job.tiles
        return pl.BlockSpec(
            block_shape=(None, steps, width), index_map=lambda b, d, i: (b, self.time(i), d)
        )

    def shared(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, None, self.job.shared, self.job.tiles.steps),
            index_map=lambda b, d, i: (b, self.time(i), 0, 0),
        )

    def shared_gradient(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, None, None, 2 * self.job.states, self.job.tiles.steps),
            index_map=lambda b, d, i: (d, b, self.time(i), 0, 0),
        )

    def decays(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, self.job.states, self.job.rows, LANES),
            index_map=lambda b, d, i: (d, 0, 0, 0),
        )

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, None, self.job.states, self.job.rows, LANES),
            index_map=lambda b, d, i: (b, d, 0, 0, 0),
        )

    def boundaries(self) -> pl.BlockSpec:
        """Block of the states that enter each block of time."""
        return pl.BlockSpec(
            block_shape=(None, None, None, self.job.states, self.job.rows, LANES),
            index_map=lambda b, d, i: (b, self.time(i), d, 0, 0, 0),
        )

    def channels(self) -> pl.BlockSpec:
        """Block of an array `(1, D)`."""
        return pl.BlockSpec(block_shape=(1, self.job.tiles.width), index_map=lambda b, d, i: (0, d))

    def channel_sums(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            block_shape=(None, self.job.group, self.job.tiles.width),
            index_map=lambda b, d, i: (b, 0, d),
        )


def tiled(job: Job, x: jax.Array) -> jax.Array:
    """`(..., D, N)` to `(..., strips, N, rows, 128)`, padded with zeros."""
    fill = job.strips * job.tiles.width - job.width
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, fill), (0, 0)])
    x = jnp.swapaxes(x, -1, -2)
    x = x.reshape(*x.shape[:-1], job.strips, job.rows, LANES)
    return jnp.moveaxis(x, -3, -4)


def untiled(job: Job, x: jax.Array) -> jax.Array:
    """The inverse of `tiled`."""
    x = jnp.moveaxis(x, -4, -3)
    x = x.reshape(*x.shape[:-3], job.strips * job.tiles.width)
    return jnp.swapaxes(x[..., : job.width], -1, -2)


def pack_shared(job: Job, B, C, runs) -> jax.Array:
    """B, C and the step codes of each block, tokens last: `(B, blocks, shared, steps)`."""
    fill = job.blocks * job.tiles.steps - job.length

    def pad(x, value):
        return jnp.pad(x.astype(jnp.float32), ((0, 0), (0, fill), (0, 0)), constant_values=value)

    parts = [pad(B, 0), pad(C, 0)]
    if job.coded:
        codes = jnp.full(B.shape[:2], segments.KEEP, jnp.int32)
        if runs is not None:
            codes = segments.step_codes(runs, reverse=job.reverse)
        parts.append(pad(codes[:, :, None], segments.SKIP))
    x = jnp.concatenate(compat.match_vma(*parts), axis=2)
    x = x.reshape(job.batch, job.blocks, job.tiles.steps, job.shared)
    return jnp.swapaxes(x, 2, 3)


def unpack_shared(job: Job, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dB and dC `(B, L, N)` from their sums over each strip `(strips, B, blocks, 2 N, steps)`."""
    x = jnp.swapaxes(x.sum(0), 2, 3).reshape(job.batch, -1, 2 * job.states)[:, : job.length]
    return x[:, :, : job.states], x[:, :, job.states :]


# Loads and stores.


class Staged(NamedTuple):
    """A staging area for the tokens of a group, `(group * rows, 128)`.

    Eight tokens of each lane tile follow each other: a load with a longer stride is slower.
    """

    ref: Any
    job: Job
    first: Any = 0  # the group's first token, if the area holds a block

    def _row(self, k: int, j: int):
        row = (k // SUBLANES * self.job.rows + j) * SUBLANES + k % SUBLANES
        return self.first * self.job.rows + row

    def put(self, j: int, x: jax.Array) -> None:
        """The tokens of lane tile j."""
        for k in range(0, self.job.group, SUBLANES):
            self.ref[pl.ds(self._row(k, j), SUBLANES), :] = x[k : k + SUBLANES]

    def get(self, j: int) -> jax.Array:
        starts = range(0, self.job.group, SUBLANES)
        parts = [self.ref[pl.ds(self._row(k, j), SUBLANES), :] for k in starts]
        return jnp.concatenate(parts, axis=0)

    def put_token(self, k: int, x: jax.Array) -> None:
        """Token k of all lane tiles, `(rows, 128)`."""
        self.ref[pl.ds(self._row(k, 0), self.job.rows, stride=SUBLANES), :] = x

    def token(self, k: int) -> jax.Array:
        return self.ref[pl.ds(self._row(k, 0), self.job.rows, stride=SUBLANES), :]

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
    job: Job
    first: Any = 0  # the token's first row

    @staticmethod
    def fold(job: Job) -> int:
        return 2 if job.rows > _HALF and job.rows % 2 == 0 else 1

    @property
    def stride(self) -> int:
        return self.job.rows // self.fold(self.job)

    def _row(self, n: int):
        return self.first + n * self.job.rows

    def put(self, n: int, x: jax.Array) -> None:
        self.ref[pl.ds(self._row(n), self.job.rows), :] = x

    def get(self, n: int) -> jax.Array:
        return self.ref[pl.ds(self._row(n), self.job.rows), :]

    def lane_tiles(self, j: int) -> jax.Array:
        """`(N * fold, 128)`."""
        count = self.job.states * self.fold(self.job)
        return self.ref[pl.ds(self._row(0) + j, count, stride=self.stride), :]

    def alike(self, area: Staged, k: int, j: int) -> jax.Array:
        """Token k of `area` in the shape of `lane_tiles(j)`."""
        rows = [area.row(k, j + p * self.stride, SUBLANES) for p in range(self.fold(self.job))]
        tile = rows[0]
        if len(rows) == 2:
            odd = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) % 2 == 1
            tile = jnp.where(odd, rows[1], tile)
        count = self.job.states * self.fold(self.job)
        return jnp.concatenate([tile] * -(-count // SUBLANES), axis=0)[:count]


class Spread(NamedTuple):
    """The shared numbers of a group, each over 128 lanes: `(group * height, 128)`."""

    ref: Any
    job: Job
    first: Any = 0  # the group's first token, if the area holds a block

    @property
    def height(self) -> int:
        return round_up(self.job.shared, SUBLANES)

    def _row(self, k: int, i: int):
        return (self.first + k) * self.height + i

    def fill(self, shared_ref: Any, start) -> None:
        """Spread the tokens from `start` of a block."""
        x = shared_ref[...]
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) - start
        for k in range(self.job.group):
            one = jnp.sum(jnp.where(lane == k, x, 0.0), axis=1, keepdims=True)
            spread = jnp.broadcast_to(one, (self.job.shared, LANES))
            self.ref[pl.ds(self._row(k, 0), self.job.shared), :] = spread

    def _over_channels(self, k: int, i: int) -> jax.Array:
        row = self.ref[pl.ds(self._row(k, i), 1), :]
        return jnp.broadcast_to(row, (self.job.rows, LANES))

    def B(self, k: int, n: int) -> jax.Array:
        return self._over_channels(k, n)

    def C(self, k: int, n: int) -> jax.Array:
        return self._over_channels(k, self.job.states + n)

    def inside(self, k: int) -> jax.Array | None:
        """False where token k begins a document; None if none does."""
        if not self.job.segmented:
            return None
        return self._over_channels(k, 2 * self.job.states) != segments.RESET

    def live(self) -> jax.Array | None:
        """Which of the tokens are real, `(group, 128)`; None if all are."""
        if not self.job.coded:
            return None
        codes = self.ref[
            pl.ds(self._row(0, 2 * self.job.states), self.job.group, stride=self.height), :
        ]
        return codes != segments.SKIP


class Tokens(NamedTuple):
    """A group's tokens of one lane tile of a block."""

    refs: dict[str, Any]
    job: Job
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
        if self.job.width % self.job.tiles.width == 0:
            return live
        lane = jax.lax.broadcasted_iota(jnp.int32, (self.job.group, LANES), 1)
        place = pl.program_id(1) * self.job.tiles.width + self.lanes.start + lane
        inside = place < self.job.width
        return inside if live is None else inside & live

    def step_size(self, mask) -> jax.Array:
        """dt after its softplus, 0 where masked."""
        dt = tile.step_size(self.load("dt"), self.maybe("bias"), softplus=self.job.softplus)
        return tile.select(mask, dt)


def group_tokens(job: Job, refs: dict[str, Any], g) -> list[Tokens]:
    """The g-th group of a block, lane tile by lane tile."""
    rows = pl.ds(pl.multiple_of(g * job.group, job.group), job.group)
    return [Tokens(refs, job, rows, slice(j * LANES, (j + 1) * LANES)) for j in range(job.rows)]
