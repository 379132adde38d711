"""GPU kernels (Triton lowering): chunks of time in parallel, the window in registers.

A program owns a strip of channels, one a thread, and walks one chunk of time with the last W - 1
tokens in registers, so that each token is read once. Backward walks with time too: the cotangent of
token t goes to the W tokens that it read, and the sum of the oldest of them is then complete; it
walks W - 1 tokens beyond its chunk to complete its last ones.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import tile
from pallas_kernels.causal_conv1d.tile import Activation, Config
from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.gpu import Strip, StripShape, Tiles, beyond_addresses
from pallas_kernels.common.gpu import strip as this_strip

_ENOUGH_PROGRAMS = 1024  # several for each multiprocessor of the GPUs since Ampere


def choose_tiles(batch: int, length: int, width: int, conv_size: int) -> Tiles:
    """Chunks of 256 steps, or down to 32 of them where the GPU would else not be full; fewer steps
    together where more taps take the registers."""
    strip = min(128, max(32, pl.next_power_of_2(width)))
    strips = batch * -(-width // strip)
    steps = 256
    while steps > 32 and strips * -(-length // steps) < _ENOUGH_PROGRAMS:
        steps //= 2
    return Tiles(steps, strip, max(1, 32 // max(conv_size, 4)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelShape(StripShape):
    conv_size: int
    activation: Activation


def _row(i: int) -> jax.Array:
    """A static index; the interpreter's masked loads and stores take only traced ones."""
    return pl.program_id(0) * 0 + i


def _first(dims: _KernelShape) -> jax.Array:
    """The chunk's first token."""
    return pl.program_id(0) * dims.tiles.steps


def _weight_rows(dims: _KernelShape, strip: Strip, ref) -> tuple[list[jax.Array], jax.Array]:
    """Weights by distance, and the bias."""
    *weights, bias = (strip.load(ref, (_row(i),)) for i in range(dims.conv_size + 1))
    return weights[::-1], bias


def _window_before(dims: _KernelShape, strip: Strip, first, x_ref, initial_ref) -> list[jax.Array]:
    """The tokens before the chunk, the nearest first."""
    window = []
    for d in range(1, dims.conv_size):
        t = first - d
        token = strip.load(x_ref, (strip.row, t), t >= 0)
        carried = strip.load(initial_ref, (strip.row, t + dims.conv_size - 1), t < 0)
        window.append(jnp.where(t >= 0, token, carried))
    return window


def _walk(dims: _KernelShape, steps: int, body, carry):
    """`body(place, carry)` for the places of the chunk, some unrolled; the last may not exist."""
    unroll = dims.tiles.unroll

    def group(i, carry):
        for j in range(unroll):
            carry = body(i * unroll + j, carry)
        return carry

    return jax.lax.fori_loop(0, -(-steps // unroll), group, carry)


def _limit(dims: _KernelShape, strip: Strip, codes_ref, t, live):
    """`reach` of a token, -1 where it does not exist; None without segments."""
    if not dims.segmented:
        return None
    return compat.triton.load(codes_ref.at[strip.row, t], mask=live, other=-1)


# The kernels: maths on values between a load and a store.


def _forward_kernel(*refs, dims: _KernelShape):
    x_ref, initial_ref, weight_ref, *codes, y_ref = refs
    codes_ref = codes[0] if dims.segmented else None
    strip, first = this_strip(dims), _first(dims)
    weights, bias = _weight_rows(dims, strip, weight_ref)

    def body(place, window):
        t = first + place
        live = (place < dims.tiles.steps) & (t < dims.length)
        seen = [strip.load(x_ref, (strip.row, t), live), *window]
        limit = _limit(dims, strip, codes_ref, t, live)
        y = tile.output(seen, weights, bias, limit, dims.activation)
        strip.store(y_ref, (strip.row, t), y, live)
        return seen[:-1]

    _walk(dims, dims.tiles.steps, body, _window_before(dims, strip, first, x_ref, initial_ref))


def _backward_kernel(*refs, dims: _KernelShape):
    x_ref, initial_ref, dy_ref, weight_ref, *codes, dx_ref, sums_ref = refs
    codes_ref = codes[0] if dims.segmented else None
    strip, first = this_strip(dims), _first(dims)
    weights, bias = _weight_rows(dims, strip, weight_ref)
    oldest = dims.conv_size - 1

    def body(place, carry):
        window, pending, sums = carry
        t = first + place
        exists = t < dims.length
        limit = _limit(dims, strip, codes_ref, t, exists)
        seen = [strip.load(x_ref, (strip.row, t), exists), *window]
        dy = strip.load(dy_ref, (strip.row, t), exists)
        inputs = [tile.zero_beyond(x, limit, d) for d, x in enumerate(seen)]
        g = tile.cotangent(inputs, weights, bias, dy, limit, dims.activation)
        g = jnp.where(exists, g, jnp.zeros_like(g))
        own = place < dims.tiles.steps
        new = [jnp.where(own, g * x, 0.0) for x in inputs] + [jnp.where(own, g, 0.0)]
        sums = [s + n for s, n in zip(sums, new, strict=True)]
        parts = [tile.zero_beyond(w * g, limit, d) for d, w in enumerate(weights)]
        parts = [parts[0], *(p + q for p, q in zip(pending, parts[1:], strict=True))]
        s = t - oldest
        complete = (place >= oldest) & (place - oldest < dims.tiles.steps) & (s < dims.length)
        strip.store(dx_ref, (strip.row, s), parts[oldest], complete)
        return seen[:-1], parts[:-1], sums

    zero = jnp.zeros((dims.tiles.width,), jnp.float32)
    window = _window_before(dims, strip, first, x_ref, initial_ref)
    carry = window, [zero] * oldest, [zero] * (dims.conv_size + 1)
    _, _, sums = _walk(dims, dims.tiles.steps + oldest, body, carry)
    *by_distance, dbias = sums
    for i, value in enumerate([*by_distance[::-1], dbias]):
        strip.store(sums_ref, (strip.row, pl.program_id(0), _row(i)), value)


# The calls.


def _kernel_shape(
    x, conv_size: int, segment_index, activation: Activation, tiles: Tiles | None
) -> _KernelShape:
    batch, length, width = x.shape
    tiles = tiles or choose_tiles(batch, length, width, conv_size)
    return _KernelShape(
        batch=batch,
        length=length,
        width=width,
        tiles=tiles,
        segmented=segment_index is not None,
        conv_size=conv_size,
        activation=activation,
    )


def _codes(segment_index, conv_size: int) -> list[jax.Array]:
    return [] if segment_index is None else [tile.reach(segment_index, conv_size)]


def _small_operands(weight, bias, initial_state) -> tuple[jax.Array, jax.Array]:
    """The window, of at least one row; weights and bias `(W+1, D)` float32."""
    rows = jnp.concatenate([weight.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    none = initial_state.shape[1] == 0
    return jnp.pad(initial_state, ((0, 0), (0, int(none)), (0, 0))), rows


def _call(kernel, dims: _KernelShape, name: str, operands, out, flops: int):
    return compat.pallas_call(
        functools.partial(kernel, dims=dims),
        backend="gpu",
        name=name,
        grid=dims.grid,
        out_shape=out,
        compiler_params=compat.triton.CompilerParams(
            num_warps=max(1, dims.tiles.width // 32), num_stages=1
        ),
        flops=flops * dims.batch * dims.length * dims.width,
    )(*operands)


def forward(
    config: Config, x, weight, bias, initial_state, segment_index, *, return_residuals: bool
):
    """`(y,)`; arguments as in `reference.with_state`, which are all that `backward` needs."""
    dims = _kernel_shape(x, weight.shape[0], segment_index, *config)
    operands = [
        x,
        *_small_operands(weight, bias, initial_state),
        *_codes(segment_index, dims.conv_size),
    ]
    out = compat.out_struct(x.shape, x.dtype, *operands)
    flops = 2 * dims.conv_size + 4
    y = _call(_forward_kernel, dims, "causal_conv1d_forward", operands, out, flops=flops)
    return (y,), (x, weight, bias, initial_state, segment_index) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(dx, dweight, dbias, dinitial_state, None)` from the cotangent of `forward`'s output."""
    (x, weight, bias, initial_state, segment_index), (dy,) = residuals, cotangents
    dims = _kernel_shape(x, weight.shape[0], segment_index, *config)
    window, rows = _small_operands(weight, bias, initial_state)
    operands = [x, window, dy, rows, *_codes(segment_index, dims.conv_size)]
    sums = (dims.batch, dims.chunks, dims.conv_size + 1, dims.width)
    out = [
        compat.out_struct(x.shape, x.dtype, *operands),
        compat.out_struct(sums, jnp.float32, *operands),
    ]
    dx, sums = _call(
        _backward_kernel,
        dims,
        "causal_conv1d_backward",
        operands,
        out,
        flops=6 * dims.conv_size + 8,
    )
    limit = tile.limits(segment_index, dims.conv_size)
    dinitial = tile.initial_gradient(
        x, list(rows[-2::-1]), rows[-1], initial_state, limit, dy, config.activation
    )
    total = sums.sum((0, 1))
    return dx, total[:-1].astype(weight.dtype), total[-1].astype(bias.dtype), dinitial, None


def unsupported(config: Config, x, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(x) or beyond_addresses(x.shape[0], lambda: x.size)


BACKEND = Backend(forward, backward, unsupported=unsupported)
