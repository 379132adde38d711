"""Spectra by the fast Fourier transform of the platform: what CPUs and GPUs do best."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.long_conv.spectrum import Transform, convolution


def size(least: int) -> int:
    """The shortest fast transform of at least so many numbers: `m * 2**k` with m = 1, 3, 5."""
    return min(m << max(0, -(-least // m) - 1).bit_length() for m in (1, 3, 5))


def plan(least: int, _: Any) -> Transform:
    """Spectra are complex, `(B, H, n / 2 + 1)`: a transform runs along the last axis."""
    n = size(least)
    return Transform(
        size=n,
        forward=lambda x: jnp.fft.rfft(jnp.swapaxes(x, 1, 2), n),
        inverse=lambda s, count: jnp.swapaxes(jnp.fft.irfft(s, n)[..., :count], 1, 2),
        multiply=lambda a, b: a * b,
        correlate=lambda a, b: a * jnp.conj(b),
        total=lambda s: s.sum(0, keepdims=True),
    )


long_conv = convolution(plan)
