"""GPU kernels (Triton lowering): chunks of time in parallel, the window in registers.

A program owns a strip of channels, one a thread, and walks one chunk of time with the last W - 1
tokens in registers, so that each token is read once. Backward walks with time too: the cotangent of
token t goes to the W tokens that it read, and the sum of the oldest of them is then complete; it
walks W - 1 tokens beyond its chunk to complete its last ones.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import tile
from pallas_kernels.causal_conv1d.tile import Activation, Config
from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, beyond_addresses, no_wide_numbers
from pallas_kernels.common.compat import pl

_ENOUGH_PROGRAMS = 1024  # several for each multiprocessor of the GPUs since Ampere


class Tiles(NamedTuple):
    """`steps` of time a chunk, `width` channels a program, `unroll` steps loaded together."""

    steps: int
    width: int
    unroll: int


def choose_tiles(batch: int, length: int, width: int, taps: int) -> Tiles:
    """Chunks of 256 steps, or down to 32 of them where the GPU would else not be full; fewer steps
    together where more taps take the registers."""
    strip = min(128, max(32, pl.next_power_of_2(width)))
    strips = batch * -(-width // strip)
    steps = 256
    while steps > 32 and strips * -(-length // steps) < _ENOUGH_PROGRAMS:
        steps //= 2
    return Tiles(steps, strip, max(1, 32 // max(taps, 4)))


class _Job(NamedTuple):
    """What is static about one kernel."""

    batch: int
    length: int
    width: int
    taps: int
    activation: Activation
    tiles: Tiles
    segmented: bool

    @property
    def chunks(self) -> int:
        return -(-self.length // self.tiles.steps)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.chunks, self.batch, -(-self.width // self.tiles.width)


# Loads and stores. References are whole arrays; a strip is the channels of one program.


class _Strip(NamedTuple):
    row: jax.Array  # which sequence
    lanes: slice | pl.Slice  # which channels
    valid: jax.Array  # channels that exist, (width,)
    first: jax.Array  # the chunk's first token

    def load(self, ref, index, live=True) -> jax.Array:
        """`(width,)` values at `index` of the axes before the channels."""
        mask = self.valid & live
        value = compat.triton.load(ref.at[(*index, self.lanes)], mask=mask, other=0.0)
        return value.astype(jnp.float32)

    def store(self, ref, index, value, live=True) -> None:
        mask = self.valid & live
        compat.triton.store(ref.at[(*index, self.lanes)], value.astype(ref.dtype), mask=mask)


def _row(i: int) -> jax.Array:
    """A static index; the interpreter's masked loads and stores take only traced ones."""
    return pl.program_id(0) * 0 + i


def _strip(job: _Job) -> _Strip:
    start = pl.program_id(2) * job.tiles.width
    valid = start + jnp.arange(job.tiles.width) < job.width
    lanes = pl.ds(start, job.tiles.width)
    return _Strip(pl.program_id(1), lanes, valid, pl.program_id(0) * job.tiles.steps)


def _weight_rows(job: _Job, strip: _Strip, ref) -> tuple[list[jax.Array], jax.Array]:
    """Weights by distance, and the bias."""
    *weights, bias = (strip.load(ref, (_row(i),)) for i in range(job.taps + 1))
    return weights[::-1], bias


def _window_before(job: _Job, strip: _Strip, x_ref, initial_ref) -> list[jax.Array]:
    """The tokens before the chunk, the nearest first."""
    window = []
    for d in range(1, job.taps):
        t = strip.first - d
        token = strip.load(x_ref, (strip.row, t), t >= 0)
        carried = strip.load(initial_ref, (strip.row, t + job.taps - 1), t < 0)
        window.append(jnp.where(t >= 0, token, carried))
    return window


def _walk(job: _Job, steps: int, body, carry):
    """`body(place, carry)` for the places of the chunk, some unrolled; the last may not exist."""
    unroll = job.tiles.unroll

    def group(i, carry):
        for j in range(unroll):
            carry = body(i * unroll + j, carry)
        return carry

    return jax.lax.fori_loop(0, -(-steps // unroll), group, carry)


def _limit(job: _Job, strip: _Strip, codes_ref, t, live):
    """`reach` of a token, -1 where it does not exist; None without segments."""
    if not job.segmented:
        return None
    return compat.triton.load(codes_ref.at[strip.row, t], mask=live, other=-1)


# The kernels: maths on values between a load and a store.


def _forward_kernel(*refs, job: _Job):
    x_ref, initial_ref, weight_ref, *codes, y_ref = refs
    codes_ref = codes[0] if job.segmented else None
    strip = _strip(job)
    weights, bias = _weight_rows(job, strip, weight_ref)

    def body(place, window):
        t = strip.first + place
        live = (place < job.tiles.steps) & (t < job.length)
        seen = [strip.load(x_ref, (strip.row, t), live), *window]
        limit = _limit(job, strip, codes_ref, t, live)
        y = tile.output(seen, weights, bias, limit, job.activation)
        strip.store(y_ref, (strip.row, t), y, live)
        return seen[:-1]

    _walk(job, job.tiles.steps, body, _window_before(job, strip, x_ref, initial_ref))


def _backward_kernel(*refs, job: _Job):
    x_ref, initial_ref, dy_ref, weight_ref, *codes, dx_ref, sums_ref = refs
    codes_ref = codes[0] if job.segmented else None
    strip = _strip(job)
    weights, bias = _weight_rows(job, strip, weight_ref)
    oldest = job.taps - 1

    def body(place, carry):
        window, pending, sums = carry
        t = strip.first + place
        exists = t < job.length
        limit = _limit(job, strip, codes_ref, t, exists)
        seen = [strip.load(x_ref, (strip.row, t), exists), *window]
        dy = strip.load(dy_ref, (strip.row, t), exists)
        taps = [tile.keep(x, limit, d) for d, x in enumerate(seen)]
        g = tile.cotangent(taps, weights, bias, dy, limit, job.activation)
        g = jnp.where(exists, g, jnp.zeros_like(g))
        own = place < job.tiles.steps
        new = [jnp.where(own, g * tap, 0.0) for tap in taps] + [jnp.where(own, g, 0.0)]
        sums = [s + n for s, n in zip(sums, new, strict=True)]
        parts = [tile.keep(w * g, limit, d) for d, w in enumerate(weights)]
        parts = [parts[0], *(p + q for p, q in zip(pending, parts[1:], strict=True))]
        s = t - oldest
        complete = (place >= oldest) & (place - oldest < job.tiles.steps) & (s < job.length)
        strip.store(dx_ref, (strip.row, s), parts[oldest], complete)
        return seen[:-1], parts[:-1], sums

    zero = jnp.zeros((job.tiles.width,), jnp.float32)
    window = _window_before(job, strip, x_ref, initial_ref)
    carry = window, [zero] * oldest, [zero] * (job.taps + 1)
    _, _, sums = _walk(job, job.tiles.steps + oldest, body, carry)
    *by_distance, dbias = sums
    for i, value in enumerate([*by_distance[::-1], dbias]):
        strip.store(sums_ref, (strip.row, pl.program_id(0), _row(i)), value)


# The calls.


def _job(x, taps: int, runs, activation: Activation, tiles: Tiles | None) -> _Job:
    batch, length, width = x.shape
    tiles = tiles or choose_tiles(batch, length, width, taps)
    return _Job(batch, length, width, taps, activation, tiles, runs is not None)


def _codes(runs, taps: int) -> list[jax.Array]:
    return [] if runs is None else [tile.reach(runs, taps)]


def _small_operands(weight, bias, initial_state) -> tuple[jax.Array, jax.Array]:
    """The window, of at least one row; weights and bias `(W+1, D)` float32."""
    rows = jnp.concatenate([weight.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    none = initial_state.shape[1] == 0
    return jnp.pad(initial_state, ((0, 0), (0, int(none)), (0, 0))), rows


def _call(kernel, job: _Job, name: str, operands, out, flops: int):
    return compat.pallas_call(
        functools.partial(kernel, job=job),
        backend="gpu",
        name=name,
        grid=job.grid,
        out_shape=out,
        compiler_params=compat.triton.CompilerParams(
            num_warps=max(1, job.tiles.width // 32), num_stages=1
        ),
        flops=flops * job.batch * job.length * job.width,
    )(*operands)


def forward(config: Config, x, weight, bias, initial_state, runs, *, return_residuals: bool):
    """`(y,)`; arguments as in `reference.with_state`, which are all that `backward` needs."""
    job = _job(x, weight.shape[0], runs, *config)
    operands = [x, *_small_operands(weight, bias, initial_state), *_codes(runs, job.taps)]
    out = compat.out_struct(x.shape, x.dtype, *operands)
    flops = 2 * job.taps + 4
    y = _call(_forward_kernel, job, "causal_conv1d_forward", operands, out, flops=flops)
    return (y,), (x, weight, bias, initial_state, runs) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(dx, dweight, dbias, dinitial_state, None)` from the cotangent of `forward`'s output."""
    (x, weight, bias, initial_state, runs), (dy,) = residuals, cotangents
    job = _job(x, weight.shape[0], runs, *config)
    window, rows = _small_operands(weight, bias, initial_state)
    operands = [x, window, dy, rows, *_codes(runs, job.taps)]
    sums = (job.batch, job.chunks, job.taps + 1, job.width)
    out = [
        compat.out_struct(x.shape, x.dtype, *operands),
        compat.out_struct(sums, jnp.float32, *operands),
    ]
    dx, sums = _call(
        _backward_kernel, job, "causal_conv1d_backward", operands, out, flops=6 * job.taps + 8
    )
    limit = tile.limits(runs, job.taps)
    dinitial = tile.initial_gradient(
        x, list(rows[-2::-1]), rows[-1], initial_state, limit, dy, config.activation
    )
    total = sums.sum((0, 1))
    return dx, total[:-1].astype(weight.dtype), total[-1].astype(bias.dtype), dinitial, None


def unsupported(config: Config, x, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(x) or beyond_addresses(x.shape[0], lambda: x.size)


BACKEND = Backend(forward, backward, unsupported=unsupported)
