"""Circular convolutions and correlations of rows with padding: each row closes at its own end."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def short(
    x: Float[Array, "b l h"], taps: Float[Array, "h w"], lengths: Int[Array, " b"] | None
) -> Float[Array, "b l h"]:
    """``y_t = sum_j taps_j x_{t - j + W // 2}`` around the token, indices modulo the row's length.

    ``lengths`` are those of the real tokens; None, all are.
    """
    ahead = taps.shape[1] // 2
    parts = [turned(x, j - ahead, lengths) * taps[None, None, :, j] for j in range(taps.shape[1])]
    return functools.reduce(jnp.add, parts)


def turned(
    x: Float[Array, "b l h"], steps: int, lengths: Int[Array, " b"] | None
) -> Float[Array, "b l h"]:
    """``x_{t - steps}``, indices modulo the row's length; padding is unspecified."""
    if lengths is None:
        return jnp.roll(x, steps, axis=1)
    size = jnp.maximum(lengths, 1)[:, None]
    place = (jnp.arange(x.shape[1], dtype=jnp.int32)[None] - steps) % size
    return jnp.take_along_axis(x, place[..., None], axis=1)


def correlate(
    k: Float[Array, "b l h"], q: Float[Array, "b l h"], lengths: Int[Array, " b"] | None
) -> Float[Array, "b l h"]:
    """``h_j = sum_t k_t q_{t + j}``, indices modulo the row's length; both 0 on padding."""
    size = _points(k.shape[1], lengths)
    spectrum = jnp.conj(jnp.fft.rfft(k, size, axis=1)) * jnp.fft.rfft(q, size, axis=1)
    line = jnp.fft.irfft(spectrum, size, axis=1)
    # Lag j, and what is j behind the end: lag j - n.
    return _folded(line, lengths, -1)


def convolve(
    h: Float[Array, "b l h"], u: Float[Array, "b l h"], lengths: Int[Array, " b"] | None
) -> Float[Array, "b l h"]:
    """``y_t = sum_j h_j u_{t - j}``, indices modulo the row's length; both 0 on padding."""
    size = _points(u.shape[1], lengths)
    spectrum = jnp.fft.rfft(h, size, axis=1) * jnp.fft.rfft(u, size, axis=1)
    return _folded(jnp.fft.irfft(spectrum, size, axis=1), lengths, 1)


def _points(length: int, lengths: Array | None) -> int:
    """Size of the transform: rows that close where the array ends need no zeros behind them."""
    return length if lengths is None else 2 * length


def _folded(
    line: Float[Array, "b n h"], lengths: Int[Array, " b"] | None, side: int
) -> Float[Array, "b l h"]:
    """``line_t + line_{t + side * length}``, 0 on padding; indices modulo the array's size."""
    if lengths is None:
        return line
    size = line.shape[1]
    here = jnp.arange(size // 2, dtype=jnp.int32)[None]
    place = (here + side * lengths[:, None]) % size
    y = line[:, : size // 2] + jnp.take_along_axis(line, place[..., None], axis=1)
    return jnp.where((here < lengths[:, None])[..., None], y, jnp.zeros_like(y))
