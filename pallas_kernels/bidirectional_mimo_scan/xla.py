"""The portable path: scans of all of the time, or blocks of time, and which of them runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.bidirectional_mimo_scan import blocks, scans
from pallas_kernels.common import dispatch, symbolic
from pallas_kernels.common.backend import Backend
from pallas_kernels.linear_scan import xla as linear_scan

# State values, B * L * P. Measured on x86 with 2 cores, forward and backward: with fewer, scans are
# up to 1.6 times faster than blocks; with more, blocks are 1.1 to 1.3 times faster than scans.
_LARGE = 2**20

_METHODS = {"scans": scans.between_products(linear_scan.BACKEND), "blocks": blocks.BACKEND}


def forward(config: None, u, decay, *arrays, return_residuals: bool):
    """`((y,), None)`; JAX differentiates it, the methods have rules of their own."""
    unsupported = {}
    values = symbolic.known(u.shape[0] * u.shape[1] * decay.size, 0)
    if arrays[-1] is not None:
        unsupported["blocks"] = "they take one document a row"
    elif values < _LARGE:
        unsupported["blocks"] = f"there are {values} state values, they pay from {_LARGE} on"
    outputs = dispatch.choose(
        "bidirectional_mimo_scan method",
        {name: functools.partial(method, config) for name, method in _METHODS.items()},
        *(u, decay, *arrays),
        default="scans",
        cpu="blocks",
        unsupported=unsupported,
    )
    return outputs, None


def one_token(config: None, u, decay, input_projection, output_projection, segment_index):
    """Two products: from a state of zero, the decay meets nothing."""
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    drive = dot(u, input_projection)
    y = dot(jnp.concatenate([drive, drive], axis=-1), output_projection)
    if segment_index is not None:
        y = jnp.where((segment_index != 0)[..., None], y, jnp.zeros_like(y))
    return (y,)


BACKEND = Backend(forward)
