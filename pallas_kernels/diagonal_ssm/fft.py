"""The model as one convolution: kernel and input multiplied as spectra.

The kernel `K_t = 2 Re sum_n c_n a_n^t` for t below L is one small matrix product a channel: with
`t = q T + i`, the powers of q T and those of i are multiplied.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.diagonal_ssm import chunked, tile
from pallas_kernels.diagonal_ssm.powers import powers
from pallas_kernels.long_conv.fft import long_conv as convolve


def kernel(log_a, c, length: int):
    """`(H, L)` real."""
    steps = chunked.chunk_size(length)
    count = -(-length // steps)
    far = powers(log_a[:, None], steps * jnp.arange(count, dtype=jnp.int32)[None, :, None])
    near = powers(log_a[..., None], jnp.arange(steps, dtype=jnp.int32)[None, None])
    near = 2 * jnp.concatenate([near.real, -near.imag], axis=1)
    blocks = chunked.dot("hqn,hnt->hqt", tile.to_planes(c[:, None] * far), near)
    return blocks.reshape(c.shape[0], -1)[:, :length]


def diagonal_ssm(u, log_a, c, initial_state, segment_index):
    """`(y, final_state)` from the first token to the last; arguments as in `reference`, but
    `segment_index` holds one document a row."""
    length = u.shape[1]
    real = log_a.real.dtype
    if segment_index is not None:
        u = jnp.where((segment_index != 0)[..., None], u, jnp.zeros_like(u))
    y = convolve(u.astype(real), kernel(log_a, c, length), None)

    matrices = tile.chunk(log_a, c, chunked.chunk_size(length))
    pieces = chunked.cut(u, real, chunked.chunk_size(length))
    inside = None if segment_index is None else chunked.documents(segment_index, pieces.steps)
    states = chunked.entering_states(pieces, matrices, initial_state, inside)
    final = chunked.final_state(pieces, log_a, matrices, states, initial_state, inside)
    count = pieces.tokens.shape[1]
    t = pieces.steps * jnp.arange(count, dtype=jnp.int32)[None, None, :, None]
    decayed = powers(log_a[:, None, None], t) * jnp.moveaxis(initial_state, 1, 0)[:, :, None]
    y = y + pieces.uncut(chunked.dot("hbcn,hnt->hbct", tile.to_planes(decayed), matrices.read))
    if segment_index is not None:
        y = jnp.where((segment_index != 0)[..., None], y, jnp.zeros_like(y))
    return y.astype(u.dtype), final
