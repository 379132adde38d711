"""Both recurrences one token at a time: slow, obvious, what every other path is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend


def forward(
    config: None,
    u,
    decay,
    input_projection,
    output_projection,
    segment_index,
    *,
    return_residuals: bool,
):
    """`((y,), None)`, by `jax.lax.scan` over tokens, each projected by itself.

    Differentiable by JAX itself, any number of times and in forward mode.

    Args:
      u: `(B, L, H)` real.
      decay: `(P,)` complex.
      input_projection: `(H, 2 P)` real.
      output_projection: `(4 P, H)` real.
      segment_index: `(B, L)` int32 or None.
    """
    precision = jax.lax.Precision.HIGHEST
    real, imaginary = jnp.split(input_projection, 2, axis=1)
    matrix = jax.lax.complex(real, imaginary)
    left_re, left_im, right_re, right_im = jnp.split(output_projection, 4)
    index = jnp.ones(u.shape[:2], jnp.int32) if segment_index is None else segment_index

    def one_way(c_re, c_im, reverse: bool):
        def step(h, token):
            u_t, code = token
            code = code[:, None]
            drive = jnp.matmul(u_t.astype(h.dtype), matrix, precision=precision)
            entering = jnp.where(code == segments.RESET, jnp.zeros_like(h), h)
            h = jnp.where(code == segments.SKIP, h, decay[None] * entering + drive)
            y = jnp.matmul(h.real, c_re, precision=precision)
            y = y + jnp.matmul(h.imag, c_im, precision=precision)
            return h, jnp.where(code == segments.SKIP, jnp.zeros_like(y), y)

        codes = segments.step_codes(index, reverse=reverse)
        zero = compat.match_vma(jnp.zeros((u.shape[0], decay.size), decay.dtype), u)[0]
        tokens = compat.match_vma(jnp.moveaxis(u, 1, 0), codes.T)
        return jax.lax.scan(step, zero, tokens, reverse=reverse)[1]

    y = one_way(left_re, left_im, False) + one_way(right_re, right_im, True)
    return (jnp.moveaxis(y, 0, 1),), None


BACKEND = Backend(forward)
