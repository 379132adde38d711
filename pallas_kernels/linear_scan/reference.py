"""The recurrence one token at a time: slow, obvious, and what every other path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend
from pallas_kernels.linear_scan.tile import Config


def forward(config: Config, a, b, initial_state, segment_index, *, return_residuals: bool = False):
    """`h_t = a_t * h_{t-1} + b_t`, by `jax.lax.scan` over tokens; see `api.linear_scan`.

    Differentiable by JAX itself, any number of times and in forward mode.

    Args:
      config: the direction.
      a: `(B, L, D)` or `(D,)`.
      b: `(B, L, D)`.
      initial_state: `(B, D)` in the state's dtype.
      segment_index: `(B, L)` int32 or None.

    Returns:
      `(h (B, L, D), final_state (B, D))` and no residuals.
    """
    reverse = config.reverse
    batch, length, width = b.shape
    a = jnp.broadcast_to(a.astype(initial_state.dtype), (batch, length, width))
    codes = compat.match_vma(jnp.zeros((batch, length), jnp.int32), b)[0]
    if segment_index is not None:
        codes = segments.step_codes(segment_index, reverse=reverse)

    def step(h, token):
        a_t, b_t, code = token
        code = code[:, None]
        entering = jnp.where(code == segments.RESET, jnp.zeros_like(h), h)
        after = jnp.where(code == segments.SKIP, h, a_t * entering + b_t)
        return after, jnp.where(code == segments.SKIP, jnp.zeros_like(h), after)

    tokens = (a, b.astype(initial_state.dtype), codes)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final_state, h = jax.lax.scan(step, initial_state, tokens, reverse=reverse)
    return (jnp.moveaxis(h, 0, 1).astype(b.dtype), final_state), None


BACKEND = Backend(forward)
