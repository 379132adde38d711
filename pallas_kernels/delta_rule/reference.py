"""The sequential oracle: one token at a time, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import segments
from pallas_kernels.common.backend import Backend
from pallas_kernels.matrix_state.config import Config

_HIGHEST = jax.lax.Precision.HIGHEST


def delta_rule(config: Config, q, k, v, beta, log_decay, initial_state, segment_index):
    """`api.delta_rule` by `jax.lax.scan` over tokens; keeps the state of every token to go back.

    Args:
      config: static options.
      q, k: `(B, L, G, K)`; v: `(B, L, H, V)`; beta: `(B, L, H)`.
      log_decay: None, `(B, L, H)` or `(B, L, H, K)`.
      initial_state: `(B, H, K, V)`, in the dtype that is computed in.
      segment_index: `(B, L)` int32 or None.
    """
    dtype = initial_state.dtype
    if segment_index is not None:
        # What padding holds would come back as 0 * inf in the gradients.
        q, k, v, beta, log_decay = jax.tree.map(
            lambda x: jnp.where(
                (segment_index > 0).reshape(*segment_index.shape, *[1] * (x.ndim - 2)), x, 0
            ),
            (q, k, v, beta, log_decay),
        )
    repeats = v.shape[2] // q.shape[2]
    queries, keys = (jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (q, k))
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    codes = None if segment_index is None else segments.step_codes(segment_index)

    def step(state, token):
        q, k, v, beta, g, code = token
        before = state
        if code is not None:
            code = code[:, None, None, None]
            before = jnp.where(code == segments.RESET, jnp.zeros_like(state), state)
        if g is not None:
            before = jnp.exp(g.astype(dtype))[..., None] * before
        retrieved = jnp.einsum("bhk,bhkv->bhv", k, before, precision=_HIGHEST)
        v_new = beta.astype(dtype)[..., None] * (v.astype(dtype) - retrieved)
        after = before + k[..., None] * v_new[:, :, None]
        out = config.scale * jnp.einsum("bhk,bhkv->bhv", q, after, precision=_HIGHEST)
        if code is not None:
            after = jnp.where(code == segments.SKIP, state, after)
            out = jnp.where(code[..., 0] == segments.SKIP, jnp.zeros_like(out), out)
        return after, out

    tokens = (queries, keys, v, beta, log_decay, codes)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final_state, o = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final_state


def forward(config: Config, *arrays, return_residuals: bool):
    """`((o, final_state), None)`."""
    return delta_rule(config, *arrays), None


BACKEND = Backend(forward)
