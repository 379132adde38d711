"""What the long convolution is measured against: the same maths written with JAX alone.

Each has the signature of the op it stands in for.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.long_conv.shapes import named
from pallas_kernels.tools.programs import program


def published_fft(u, kernel, *, kernel_reverse=None):
    """An FFT of `L + Lk` numbers as in S4's code; JAX differentiates it."""
    length = u.shape[1]
    n = length + kernel.shape[1]
    circle = jnp.pad(kernel, ((0, 0), (0, length)))
    if kernel_reverse is not None:
        circle = circle + jnp.pad(jnp.flip(kernel_reverse, 1), ((0, 0), (length, 0)))
    spectrum = jnp.fft.rfft(u.astype(kernel.dtype), n, axis=1)
    spectrum = spectrum * jnp.fft.rfft(circle.T, n, axis=0)[None]
    return jnp.fft.irfft(spectrum, n, axis=1)[:, :length].astype(u.dtype)


def cauchy_einsum(dt, eigenvalues, p, b, c, length):
    """`s4_kernel` with all of the Cauchy matrix, `(H, N / 2, L / 2 + 1)`, and its conjugate's."""
    w = jnp.exp(-2j * jnp.pi * jnp.arange(length // 2 + 1) / length)
    inputs = jnp.stack([b, p]) * dt[None, :, None]
    readouts = jnp.concatenate([c, jnp.conj(p)[None]])

    def sums(values, weights):
        poles = (dt[:, None] * values)[..., None]
        cauchy = 1 / (2 * (1 - w)[None, None] - (1 + w)[None, None] * poles)
        return jnp.einsum("ahn,rhn,hnl->arhl", *weights, cauchy)

    conjugates = (jnp.conj(inputs), jnp.conj(readouts))
    r = sums(eigenvalues, (inputs, readouts)) + sums(jnp.conj(eigenvalues), conjugates)
    w1 = (1 + w)[None, None]
    spectrum = 2 * (r[0, :-1] - w1 * r[1, :-1] * r[0, -1:] / (1 + w1 * r[1, -1:]))
    return jnp.fft.irfft(spectrum, length)


CONVS: dict[str, Any] = {"published fft": published_fft}


def case(shape: str, baseline: str, mode: str, scale: str = "1") -> tuple[Any, ...]:
    """As `pallas_kernels.long_conv.shapes.case`, of a key of `CONVS`."""
    fn, operands = program(CONVS[baseline], named(shape).scaled(float(scale)), mode)
    return fn, *operands
