"""The portable path: four Cauchy sums at the roots of unity and Woodbury's identity, by blocks.

On the unit circle, at the angle θ, `2 (1 - ω) / (1 + ω)` is `i s` with a real `s = 2 tan(θ / 2)`,
so that

    K^(θ) = exp(iθ/2) / cos(θ/2) (r(B, C~) - r(P, C~) r(B, P*) / (1 + r(P, P*)))
    r(v, c) = Δ sum_n v_n c_n / (i s - Δ λ_n)  +  the same of the conjugates

A mode resonates where s meets `Δ Im λ`, and their difference is all that matters there: both are
held in two float32 numbers. Sums run over blocks of angles, forward and backward, and tables of
`(H, N/2, block)` are all that ever exists.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.backend import Backend

_BLOCK = 64

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Config(NamedTuple):
    """What is static: the length L of the kernel."""

    length: int


def prepare(config: Config, dt, eigenvalues, p, b, c):
    """The arrays of `forward`, and `restore`: from the spectrum to `((R, H, L),)`."""
    length, step = config.length, dt[:, None]
    imaginary, low = _product(step, eigenvalues.imag)
    inputs = jnp.stack([b, p], 1)  # (H, 2, N/2)
    outputs = jnp.moveaxis(jnp.concatenate([c, jnp.conj(p)[None]]), 0, 1)  # (H, R + 1, N/2)
    g = step[:, None, None].astype(b.dtype) * inputs[:, :, None] * outputs[:, None]
    weights = jnp.concatenate([g.real, g.imag], -1).reshape(dt.shape[0], -1, 2 * b.shape[1])

    def restore(spectrum):
        angle = np.pi * np.arange(length // 2 + 1) / length
        scale = jnp.asarray(np.exp(1j * angle) / np.cos(angle), b.dtype)
        return (jnp.fft.irfft(jax.lax.complex(*spectrum) * scale[None, None], length),)

    return (step * eigenvalues.real, imaginary, low, weights), restore


def _product(x, y):
    """`x y` as the nearest number and what it lacks; the derivative is that of the first."""
    high = x * y
    low = jax.lax.stop_gradient(_lacking(x, y, high))
    return high, low


def _lacking(x, y, product):
    """Dekker 1971: halves of both numbers have exact products."""
    if product.dtype == jnp.float64:
        return jnp.zeros_like(product)

    def halves(z):
        bits = jax.lax.bitcast_convert_type(z, jnp.uint32) & np.uint32(0xFFFFF000)
        upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return upper, z - upper

    (xh, xl), (yh, yl) = halves(x), halves(y)
    return ((xh * yh - product) + xh * yl + xl * yh) + xl * yl


def _nodes(length: int, dtype) -> tuple[jax.Array, jax.Array]:
    """`s = 2 tan(θ / 2)` in two parts, `(blocks, _BLOCK)`; filled up with its last value.

    At θ = π it is 3e16 in double precision, and its square still a float32.
    """
    s = 2 * np.tan(np.pi * np.arange(length // 2 + 1) / length)
    s = np.concatenate([s, np.full(-len(s) % _BLOCK, s[-1])]).reshape(-1, _BLOCK)
    high = s.astype(dtype)
    return jnp.asarray(high), jnp.asarray((s - high.astype(np.float64)).astype(dtype))


class _Table(NamedTuple):
    """`1 / (a + i (s - w)) = near - i below` and `1 / (a + i (s + w)) = far - i above`: what
    modes and their conjugates are at one block of angles, `(H, N/2, T)`."""

    near: jax.Array
    below: jax.Array
    far: jax.Array
    above: jax.Array


def _table(decay, imaginary, low, s, s_low) -> _Table:
    a, w, w_low = -decay[..., None], imaginary[..., None], low[..., None]
    s, s_low = s[None, None], s_low[None, None]
    below, above = (s - w) + (s_low - w_low), (s + w) + (s_low + w_low)
    near, far = 1 / (a * a + below * below), 1 / (a * a + above * above)
    return _Table(a * near, below * near, a * far, above * far)


def _planes(table: _Table):
    """What the weights `[real, imaginary]` multiply for both parts of the sums, `(H, N, T)`."""
    near, below, far, above = table
    real = jnp.concatenate([near + far, below - above], 1)
    return real, jnp.concatenate([-(below + above), near - far], 1)


def _spectrum(real, imag):
    """Both parts of the spectrum over its factor, `(R, H, T)`, of sums `(H, 2 (R + 1), T)`."""
    sums = jax.lax.complex(real, imag).swapaxes(0, 1)
    sums = sums.reshape(2, -1, *sums.shape[1:])
    spectrum = sums[0, :-1] - sums[1, :-1] * (sums[0, -1:] / (1 + sums[1, -1:]))
    return spectrum.real, spectrum.imag


def _sums(weights, table: _Table):
    return tuple(_einsum("hqn,hnt->hqt", weights, plane) for plane in _planes(table))


def _block(decay, imaginary, low, weights, s, s_low):
    """Both parts of the spectrum over `exp(iθ/2) / cos(θ/2)` at one block of angles.

    `decay, imaginary, low (H, N/2)`, `weights (H, 2 (R + 1), N)`, `s (T,)` -> `(R, H, T)`.
    """
    return _spectrum(*_sums(weights, _table(decay, imaginary, low, s, s_low)))


def _block_gradients(decay, imaginary, low, weights, s, s_low, cotangent):
    """Gradients of `decay`, `imaginary` and `weights`; autodiff takes longer."""
    table = _table(decay, imaginary, low, s, s_low)
    dsums = jax.vjp(_spectrum, *_sums(weights, table))[1](cotangent)
    dweights = sum(
        _einsum("hqt,hnt->hqn", d, plane) for d, plane in zip(dsums, _planes(table), strict=True)
    )
    (u, v), (x, y) = (jnp.split(_einsum("hqn,hqt->hnt", weights, d), 2, axis=1) for d in dsums)
    # Both are of 1 / z, whose derivative is -1 / z^2.
    a_near, w_near = _reciprocal_gradients(u + y, v - x, table.near, table.below)
    a_far, w_far = _reciprocal_gradients(u - y, -(v + x), table.far, table.above)
    return -jnp.sum(a_near + a_far, -1), jnp.sum(w_far - w_near, -1), dweights


def _reciprocal_gradients(dreal, dimag, real, imag):
    """Gradients of a and x in `real - i imag = 1 / (a + i x)`."""
    square, product = real * real - imag * imag, 2 * real * imag
    return -(dreal * square + dimag * product), dimag * square - dreal * product


def forward(config: Config, decay, imaginary, low, weights, *, return_residuals: bool):
    """The spectrum but for its factor, real and imaginary part, each `(R, H, L // 2 + 1)`."""
    length = config.length
    nodes = _nodes(length, decay.dtype)
    parts = jax.lax.map(lambda s: _block(decay, imaginary, low, weights, *s), nodes)

    def joined(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1)[..., : length // 2 + 1]

    spectrum = tuple(map(joined, parts))
    return spectrum, (decay, imaginary, low, weights) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """Gradients of `forward`'s arrays; none of `low`, a correction of `imaginary`."""
    decay, imaginary, low, weights = residuals
    nodes = _nodes(config.length, decay.dtype)
    count, block = nodes[0].shape

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, count * block - x.shape[2])))
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, block), 2, 0)

    def add(total, part):
        (s, s_low), cotangent = part
        gradients = _block_gradients(decay, imaginary, low, weights, s, s_low, cotangent)
        return jax.tree.map(jnp.add, total, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, (decay, imaginary, weights))
    parts = (nodes, tuple(map(cut, cotangents)))
    ddecay, dimaginary, dweights = jax.lax.scan(add, zeros, parts)[0]
    return ddecay, dimaginary, None, dweights


def one_token(config: Config, *arrays):
    """`2 Re C B̄`: the sums at the one root of unity, whose angle is 0; JAX differentiates it."""
    (decay, imaginary, low, weights), _ = prepare(config, *arrays)
    zero = jnp.zeros(1, decay.dtype)
    real, _ = _block(decay, imaginary, low, weights, zero, zero)
    return (real,)


BACKEND = Backend(forward, backward, prepare)
NO_KERNEL = Backend(
    forward,
    backward,
    prepare,
    unsupported=lambda *_: "it has no Pallas kernel: parameters are few, and a row is long",
)
