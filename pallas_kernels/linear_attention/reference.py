"""The sequential oracle: one token at a time, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import segments
from pallas_kernels.common.backend import Backend
from pallas_kernels.matrix_state.config import Config

_HIGHEST = jax.lax.Precision.HIGHEST


def linear_attention(config: Config, q, k, v, log_decay, initial_state, segment_index):
    """`S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`.

    Args:
      config: static options.
      q, k: `(B, L, G, K)`; v: `(B, L, H, V)`.
      log_decay: None, `(B, L, H)` or `(B, L, H, K)`.
      initial_state: `(B, H, K, V)`, in the dtype that is computed in.
      segment_index: `(B, L)` int32 or None.
    """
    dtype, heads = initial_state.dtype, v.shape[2]
    group = heads // q.shape[2]
    q, k = (jnp.repeat(x.astype(dtype), group, axis=2) for x in (q, k))
    if log_decay is not None:
        log_decay = log_decay.astype(dtype)
        log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    codes = None if segment_index is None else segments.step_codes(segment_index)

    def step(state, token):
        q, k, v, g, code = token
        before = state
        if code is not None:
            code = code[:, None, None, None]
            before = jnp.where(code == segments.RESET, 0.0, before)
        if g is not None:
            before = jnp.exp(g)[..., None] * before
        after = before + k[..., None] * v.astype(dtype)[:, :, None]
        out = config.scale * jnp.einsum("bhk,bhkv->bhv", q, after, precision=_HIGHEST)
        if code is not None:
            after = jnp.where(code == segments.SKIP, state, after)
            out = jnp.where(code[..., 0] == segments.SKIP, 0.0, out)
        return after, out.astype(v.dtype)

    tokens = (q, k, v, log_decay, codes)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final_state, o = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(o, 0, 1), final_state


def forward(config: Config, *arrays, return_residuals: bool):
    """`((o, final_state), None)`."""
    return linear_attention(config, *arrays), None


BACKEND = Backend(forward)
