"""The convolution one token at a time: slow, obvious, and what every other path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend
from pallas_kernels.long_conv.spectrum import wide


def long_conv(u, kernel, kernel_reverse):
    """`y (B, L, H)` by `jax.lax.scan` over tokens, each a weighted sum of the whole row.

    Differentiable by JAX itself, any number of times and in forward mode.

    Args:
      u: `(B, L, H)`.
      kernel: `(H, Lk)`.
      kernel_reverse: `(H, Lr)` or None.
    """
    length = u.shape[1]
    dtype = wide(u.dtype)
    by_distance = _column(kernel, length, dtype)
    if kernel_reverse is None:
        ahead = compat.match_vma(jnp.zeros_like(by_distance), by_distance)[0]
    else:
        ahead = _column(kernel_reverse, length, dtype)
    # Row L - 1 + d is the weight of the token d before; rows before L - 1 are of tokens behind.
    weights = jnp.concatenate([ahead[: length - 1][::-1], by_distance])
    rows = u.astype(dtype)

    def step(_, t):
        seen = jax.lax.dynamic_slice_in_dim(weights, t, length)[::-1]
        return None, (rows * seen[None]).sum(1)

    y = jax.lax.scan(step, None, jnp.arange(length, dtype=jnp.int32))[1]
    return jnp.moveaxis(y, 0, 1).astype(u.dtype)


def _column(kernel, length, dtype):
    """`(H, any) -> (L, H)`, cut or followed by zeros."""
    kernel = kernel[:, :length].astype(dtype)
    return jnp.pad(kernel, ((0, 0), (0, length - kernel.shape[1]))).T


def forward(config, *arrays, return_residuals: bool):
    """`((y,), None)`; there is one method, whatever the config says."""
    return (long_conv(*arrays),), None


BACKEND = Backend(forward)
