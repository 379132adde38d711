"""The recurrence one token at a time: slow, obvious, and what every other path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend
from pallas_kernels.selective_scan.tile import Config


def selective_scan(config: Config, x, dt, A, B, C, D, gate, dt_bias, initial_state, segment_index):
    """`api.selective_scan` by `jax.lax.scan` over tokens.

    Differentiable by JAX itself, any number of times and in forward mode. Its backward pass keeps
    the state of every token: `(B, L, D, N)`.

    Args:
      config: static flags.
      x, dt: `(B, L, D)`.
      A: `(D, N)`.
      B, C: `(B, L, N)`.
      D, dt_bias: `(D,)` or None.
      gate: `(B, L, D)` or None.
      initial_state: `(B, D, N)`; all maths is in its dtype.
      segment_index: `(B, L)` int32 or None.
    """
    dtype = initial_state.dtype
    if segment_index is None:
        codes = compat.match_vma(jnp.zeros(x.shape[:2], jnp.int32), x)[0]
    else:
        codes = segments.step_codes(segment_index, reverse=config.reverse)

    def step(h, token):
        x_t, dt_t, B_t, C_t, gate_t, code = token
        if dt_bias is not None:
            dt_t = dt_t + dt_bias[None]
        if config.dt_softplus:
            dt_t = jax.nn.softplus(dt_t)
        code = code[:, None, None]
        entering = jnp.where(code == segments.RESET, jnp.zeros_like(h), h)
        decay = jnp.exp(dt_t[:, :, None] * A[None])
        after = decay * entering + (dt_t * x_t)[:, :, None] * B_t[:, None, :]
        after = jnp.where(code == segments.SKIP, h, after)
        y_t = jnp.sum(after * C_t[:, None, :], axis=2)
        if D is not None:
            y_t = y_t + D[None] * x_t
        if gate is not None:
            y_t = y_t * gate_t * jax.nn.sigmoid(gate_t)
        return after, jnp.where(code[:, :, 0] == segments.SKIP, jnp.zeros_like(y_t), y_t)

    A, D, dt_bias = jax.tree.map(lambda w: w.astype(dtype), (A, D, dt_bias))
    # What padding holds may overflow; the gradient of a select would still meet the infinity.
    real = (codes != segments.SKIP)[:, :, None]
    tokens = jax.tree.map(
        lambda z: jnp.where(real, z, jnp.zeros_like(z)).astype(dtype), (x, dt, B, C, gate)
    )
    tokens = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (*tokens, codes))
    final_state, y = jax.lax.scan(step, initial_state, tokens, reverse=config.reverse)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final_state


def forward(config: Config, *arrays, return_residuals: bool):
    """`((y, final_state), None)`."""
    return selective_scan(config, *arrays), None


BACKEND = Backend(forward)
