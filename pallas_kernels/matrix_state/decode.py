"""A decoding step with a matrix state: products with the state, no chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matrix_state.config import Config


def read(x: jax.Array, state: jax.Array) -> jax.Array:
    """`state^T x`, `(B, H, V)`, of `x (B, H, K)` and `state (B, H, K, V)`.

    Not a sum of products: jax 0.10.2 compiles those for CPUs, where the state is a constant, into
    programs that read memory which nothing has written.
    """
    return jnp.einsum("bhk,bhkv->bhv", x, state, precision=jax.lax.Precision.HIGHEST)


def one_token(
    config: Config,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    initial_state: Any,
    segment_index: Any,
    new_value: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lambda k, v, state: v,
) -> tuple[jax.Array, jax.Array]:
    """`(o (B, 1, H, V), state (B, H, K, V))` of rows of one token; JAX differentiates it.

    Args:
      config, q, k, v, log_decay, initial_state, segment_index: as the ops' backends take them.
      new_value: what a token writes under its key, `(k (B, H, K), v (B, H, V), state)` after the
        state decayed; linear attention writes v.
    """
    dtype, repeats = initial_state.dtype, v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x[:, 0].astype(dtype), repeats, axis=1) for x in (q, k))
    state = initial_state
    if log_decay is not None:
        decay = jnp.exp(log_decay[:, 0].astype(dtype))
        state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    v_new = new_value(k, v[:, 0].astype(dtype), state)
    state = state + k[..., None] * v_new[:, :, None]
    o = config.scale * read(q, state)
    if segment_index is not None:
        padding = (segment_index == 0)[..., None]
        o = jnp.where(padding, 0.0, o)
        state = jnp.where(padding[..., None], initial_state, state)
    return o[:, None].astype(v.dtype), state
