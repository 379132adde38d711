"""The model one token at a time: slow, obvious, and what every other path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import segments
from pallas_kernels.common.backend import Backend
from pallas_kernels.diagonal_ssm.tile import Config


def diagonal_ssm(u, log_a, c, initial_state, segment_index, *, reverse: bool):
    """`y_t = 2 Re sum_n c_n h_tn`, by `jax.lax.scan` over tokens; see `api.diagonal_ssm`.

    Differentiable by JAX itself, any number of times and in forward mode.

    Args:
      u: `(B, L, H)` real.
      log_a, c: `(H, N)` complex.
      initial_state: `(B, H, N)` complex.
      segment_index: `(B, L)` int32 or None.
      reverse: from the last token to the first.
    """
    a = jnp.exp(log_a)[None]
    if segment_index is None:
        segment_index = jnp.ones(u.shape[:2], jnp.int32)
    codes = segments.step_codes(segment_index, reverse=reverse)

    def step(h, token):
        u_t, code = token
        code = code[:, None, None]
        entering = jnp.where(code == segments.RESET, jnp.zeros_like(h), h)
        after = a * entering + u_t.astype(h.dtype)[..., None]
        h = jnp.where(code == segments.SKIP, h, after)
        y = 2.0 * jnp.real(c[None] * h).sum(-1)
        return h, jnp.where(code[..., 0] == segments.SKIP, jnp.zeros_like(y), y)

    tokens = (jnp.moveaxis(u, 1, 0), jnp.moveaxis(codes, 1, 0))
    final_state, y = jax.lax.scan(step, initial_state, tokens, reverse=reverse)
    return jnp.moveaxis(y, 0, 1).astype(u.dtype), final_state


def forward(config: Config, *arrays, return_residuals: bool):
    """`((y, final_state), None)`."""
    return diagonal_ssm(*arrays, reverse=config.reverse), None


BACKEND = Backend(forward)
