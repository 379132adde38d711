"""What linear attention is measured against: the recurrence, one token at a time, in plain JAX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def sequential_scan(
    q, k, v, log_decay=None, *, initial_state=None, segment_ids=None, unroll: int = 1
):
    """`jax.lax.scan` over the length, differentiated by JAX; the op's signature.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    if segment_ids is not None:
        raise NotImplementedError("the baseline knows no segments")
    batch, _, heads, value_size = v.shape
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[3], value_size), jnp.float32)
    if log_decay is not None and log_decay.ndim < 4:
        log_decay = jnp.broadcast_to(log_decay, v.shape[:3])[..., None]

    def step(state, token):
        q, k, v, g = token
        state = state if g is None else jnp.exp(g)[..., None] * state
        state = state + k[..., None] * v[:, :, None]
        return state, q.shape[-1] ** -0.5 * jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay))
    final, o = jax.lax.scan(step, initial_state, tokens, unroll=unroll)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final


SCANS: dict[str, Any] = {
    "scan, unroll 1": sequential_scan,
    "scan, unroll 8": functools.partial(sequential_scan, unroll=8),
}
