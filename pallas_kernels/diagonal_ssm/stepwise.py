"""The scan: each step expands the input to the states, advances them and contracts them.

States of all tokens are never written. Backward keeps the state of every T-th token and walks the
tokens between them once more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.planes import join, split
from pallas_kernels.diagonal_ssm import powers, tile

_STEPS = 64  # tokens between two states that are kept


def diagonal_ssm(u, log_a, c, initial_state, segment_index):
    """`(y, final_state)` from the first token to the last; arguments as in `reference`."""
    if u.shape[1] == 1:
        return _one_token(u, log_a, c, initial_state, segment_index)
    batch, length, width = u.shape
    steps = min(_STEPS, length)
    count = -(-length // steps)
    padding = count * steps - length
    codes = None
    if segment_index is not None or padding:
        segment_index = (
            jnp.ones((batch, length), jnp.int32) if segment_index is None else segment_index
        )
        codes = segments.step_codes(jnp.pad(segment_index, ((0, 0), (0, padding))))
        codes = codes.T.reshape(count, steps, batch)
    real = log_a.real.dtype
    tokens = jnp.pad(u.astype(real), ((0, 0), (0, padding), (0, 0)))
    tokens = jnp.moveaxis(tokens, 1, 0).reshape(count, steps, batch, width)
    decay, lacking, output_projection = (split(x.T[None]) for x in (*powers.decay(log_a), 2 * c))

    def step(h, token):
        u_t, code = token
        code = None if code is None else code[:, None, None]
        h = tile.advance(h, u_t[:, None], code, decay, lacking)
        y = tile.contract(output_projection, h).sum(1)
        if code is None:
            return h, y
        return h, jnp.where(code[..., 0] == segments.SKIP, jnp.zeros_like(y), y)

    @jax.checkpoint
    def walk(h, piece):
        return jax.lax.scan(step, h, piece)

    h = compat.match_vma(*split(initial_state.swapaxes(1, 2)), u)[:2]
    h, y = jax.lax.scan(walk, h, (tokens, codes))
    y = jnp.moveaxis(y.reshape(count * steps, batch, width)[:length], 0, 1)
    return y.astype(u.dtype), join(h).swapaxes(1, 2)


def _one_token(u, log_a, c, initial_state, segment_index):
    """A decoding step, `L = 1`: no loops."""
    decay = powers.powers(log_a, jnp.ones((1, 1), jnp.int32))
    h = decay[None] * initial_state + u[:, 0, :, None].astype(initial_state.dtype)
    y = 2 * (c[None] * h).real.sum(-1).astype(u.dtype)
    if segment_index is None:
        return y[:, None], h
    padding = segment_index == 0
    y = jnp.where(padding, jnp.zeros_like(y), y)
    return y[:, None], jnp.where(padding[..., None], initial_state, h)
