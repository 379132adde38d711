"""Numbers as tuples of planes: `(x,)` when real, `(re, im)` when complex.

Pallas kernels have no complex type. All planes of a number have one shape and one floating dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, ...]


def split(x: jax.Array, dtype=None) -> Planes:
    """The planes of an array, upcast to `dtype`."""
    planes = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)
    return planes if dtype is None else tuple(p.astype(dtype) for p in planes)


def join(x: Planes) -> jax.Array:
    """The array of the planes; the inverse of `split`."""
    return x[0] if len(x) == 1 else jax.lax.complex(*x)


def add(x: Planes, y: Planes) -> Planes:
    return tuple(p + q for p, q in zip(x, y, strict=True))


def mul(x: Planes, y: Planes) -> Planes:
    if len(x) == 1:
        return (x[0] * y[0],)
    (xr, xi), (yr, yi) = x, y
    return (xr * yr - xi * yi, xr * yi + xi * yr)


def where(mask: jax.Array, x: Planes, y: Planes) -> Planes:
    return tuple(jnp.where(mask, p, q) for p, q in zip(x, y, strict=True))


def zeros_like(x: Planes) -> Planes:
    return tuple(jnp.zeros_like(p) for p in x)


def ones_like(x: Planes) -> Planes:
    """The number one, in planes."""
    return (jnp.ones_like(x[0]), *zeros_like(x[1:]))


def is_zero(x: Planes) -> jax.Array:
    zero = x[0] == 0
    return zero if len(x) == 1 else zero & (x[1] == 0)
