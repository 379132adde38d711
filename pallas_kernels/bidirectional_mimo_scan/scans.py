"""Two scans of all of the time between two products, on the scan of any backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend
from pallas_kernels.linear_scan.tile import Config


def _dot(x: jax.Array, projection: jax.Array) -> jax.Array:
    """`x projection` over rows and tokens as one axis: a CPU then differentiates without a copy of
    `x`, transposed, for each product."""
    y = jnp.dot(x.reshape(-1, x.shape[-1]), projection, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:-1], -1)


def between_products(scan: Backend) -> Backend:
    """The backend whose recurrences are the linear scan `scan`; JAX differentiates the products."""

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
        drive = jax.lax.complex(*jnp.split(_dot(u, input_projection), 2, axis=-1))
        zero = jnp.zeros((drive.shape[0], drive.shape[2]), drive.dtype)
        zero = compat.match_vma(zero, drive)[0]
        ways = (scan(Config(r), decay, drive, zero, segment_index)[0] for r in (False, True))
        planes = [z for h in ways for z in (h.real, h.imag)]
        return (_dot(jnp.concatenate(planes, axis=-1), output_projection),), None

    def unsupported(config: None, u, decay, input_projection, output_projection, segment_index):
        drive = jax.ShapeDtypeStruct((*u.shape[:2], decay.size), decay.dtype)
        return scan.unsupported(Config(False), decay, drive, None, segment_index)

    return Backend(forward, unsupported=unsupported)
