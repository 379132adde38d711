"""The portable path: three methods of the same op, and which one runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import dispatch
from pallas_kernels.common.backend import Backend
from pallas_kernels.diagonal_ssm import chunked, fft, stepwise
from pallas_kernels.diagonal_ssm.tile import Config

# Chunks are faster than the FFT at every length from 1k to 64k on a CPU (`experiments/results/
# kernels/diagonal_ssm-cpu.json`) and take segments and states, so the FFT is never chosen.
_METHODS = {
    "fft": fft.diagonal_ssm,
    "chunked": chunked.diagonal_ssm,
    "scan": stepwise.diagonal_ssm,
}


def forward(config: Config, u, log_a, c, initial_state, segment_index, *, return_residuals: bool):
    """`((y, final_state), None)`; JAX differentiates it, the methods have rules of their own."""
    runs_there = segment_index
    if config.reverse:
        u = flip(u, segment_index)
        runs_there = None if segment_index is None else _flipped_index(segment_index)
    arrays = (u, log_a, c, initial_state, runs_there)
    if config.method is not None:
        y, final_state = _METHODS[config.method](*arrays)
    else:
        long = {"scan": f"there are {u.shape[1]} tokens, chunks pay from 2 on"}
        y, final_state = dispatch.choose(
            "diagonal_ssm method",
            _METHODS,
            *arrays,
            default="chunked",
            everywhere="scan",
            unsupported=long if u.shape[1] > 1 else {},
        )
    return (flip(y, segment_index) if config.reverse else y, final_state), None


BACKEND = Backend(forward)


def flip(x: jax.Array, segment_index: jax.Array | None) -> jax.Array:
    """`x (B, L, H)` with each row's real tokens in the opposite order; its own inverse."""
    return jnp.flip(x, 1) if segment_index is None else _flip_real(x, segment_index)


def _flip_index(segment_index):
    length = segment_index.shape[1]
    real = (segment_index != 0).sum(1, keepdims=True, dtype=jnp.int32)
    t = jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.where(t < real, real - 1 - t, t)


@jax.custom_vjp
def _flip_real(x, segment_index):
    return jnp.take_along_axis(x, _flip_index(segment_index)[..., None], axis=1)


# By hand, because a gather's derivative is a scatter where this one is the same gather.
_flip_real.defvjp(
    lambda x, segment_index: (_flip_real(x, segment_index), segment_index),
    lambda segment_index, dx: (_flip_real(dx, segment_index), None),
)


def _flipped_index(segment_index):
    """Run numbers of the flipped rows, again 1, 2, ..."""
    flipped = jnp.take_along_axis(segment_index, _flip_index(segment_index), axis=1)
    return jnp.where(flipped == 0, 0, segment_index.max(1, keepdims=True) + 1 - flipped)
