"""The convolution one token at a time: slow, obvious, and what every other path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.tile import Config
from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend


def with_state(config: Config, x, weight, bias, initial_state, segment_index):
    """`(y, final_state)` by `jax.lax.scan` over tokens with the window carried; see the op.

    Differentiable by JAX itself, any number of times and in forward mode.

    Args:
      config: the activation.
      x: `(B, L, D)`.
      weight: `(W, D)`.
      bias: `(D,)`.
      initial_state: `(B, W-1, D)` in `x`'s dtype.
      segment_index: `(B, L)` int32 or None.
    """
    dtype = jnp.dtype("float32") if x.dtype == jnp.bfloat16 else x.dtype
    weight, bias = weight.astype(dtype)[None], bias.astype(dtype)[None]
    codes = compat.match_vma(jnp.zeros(x.shape[:2], jnp.int32), x)[0]
    if segment_index is not None:
        codes = segments.step_codes(segment_index)

    def step(window, token):
        x_t, code = token
        code = code[:, None, None]
        entering = jnp.where(code == segments.RESET, jnp.zeros_like(window), window)
        seen = jnp.concatenate([entering, x_t[:, None]], axis=1)
        y = bias + jnp.sum(weight * seen, axis=1)
        if config.activation == "silu":
            y = jax.nn.silu(y)
        padding = code == segments.SKIP
        return (
            jnp.where(padding, window, seen[:, 1:]),
            jnp.where(padding[:, 0], jnp.zeros_like(y), y),
        )

    tokens = (jnp.moveaxis(x, 1, 0).astype(dtype), codes.T)
    final_state, y = jax.lax.scan(step, initial_state.astype(dtype), tokens)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final_state.astype(x.dtype)


def forward(config: Config, *arrays, return_residuals: bool):
    """`y` alone, as the other backends; the op takes the final window from `x` itself."""
    return with_state(config, *arrays)[:1], None


BACKEND = Backend(forward)
