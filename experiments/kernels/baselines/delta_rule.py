"""What the delta rule is measured against: the recurrence as one would write it with JAX alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def sequential_scan(q, k, v, beta, log_decay=None, *, initial_state=None, unroll: int = 1):
    """`jax.lax.scan` over the tokens of rows without documents, differentiated by JAX.

    Arguments as in `delta_rule`; `unroll` steps an iteration.
    """
    batch, _, heads, values = v.shape
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    scale = q.shape[3] ** -0.5
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[3], values), jnp.float32)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(state, token):
        q, k, v, beta, g = jax.tree.map(lambda x: x.astype(jnp.float32), token)
        if g is not None:
            state = jnp.exp(g)[..., None] * state
        error = v - jnp.einsum("bhk,bhkv->bhv", k, state)
        state = state + (beta[..., None] * k)[..., None] * error[:, :, None]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, log_decay))
    final, o = jax.lax.scan(step, initial_state, tokens, unroll=unroll)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final


SCANS: dict[str, Any] = {
    "scan, unroll 1": sequential_scan,
    "scan, unroll 8": functools.partial(sequential_scan, unroll=8),
}
