"""Collectives of the shards of a row, for use inside `jax.shard_map`.

A row's tokens lie on the mesh axis in their order: shard i has tokens ``[i l, (i + 1) l)``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "seq"
"""The mesh axis that splits the length."""


def axis_size(axis: str) -> int:
    """How many shards a row has; ValueError outside of `jax.shard_map` over ``axis``."""
    try:
        return jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"axis={axis!r} is no mesh axis here; call this inside jax.shard_map over {axis!r}"
        ) from None


def wide(dtype: Any) -> Any:
    """The dtype of sums over arrays of floats of ``dtype``, at least float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def shift(x: Any, distance: int, axis: str) -> Any:
    """What the shard ``distance`` places before this one has; zeros where there is none.

    ``x`` is a tree of arrays; a negative distance looks behind. One collective for each array.
    """
    size = axis_size(axis)
    pairs = [(i, i + distance) for i in range(size) if 0 <= i + distance < size]
    return jax.tree.map(lambda part: jax.lax.ppermute(part, axis, pairs), x)


def turn(x: Any, distance: int, axis: str) -> Any:
    """``shift`` where the shards stand in a circle."""
    size = axis_size(axis)
    pairs = [(i, (i + distance) % size) for i in range(size)]
    return jax.tree.map(lambda part: jax.lax.ppermute(part, axis, pairs), x)


def gather(x: jax.Array, axis: str) -> jax.Array:
    """``(P, ..)``, the arrays of all shards.

    Its derivative is a reduce-scatter in float32: gradients of bfloat16 arrays are rounded once,
    not with every shard that is added.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.all_gather(x, axis)
    return _gather(x, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, axis):
    return jax.lax.all_gather(x, axis)


def _gather_forward(x, axis):
    return _gather(x, axis), None


def _gather_backward(axis, _, dy):
    dx = jax.lax.psum_scatter(dy.astype(wide(dy.dtype)), axis, scatter_dimension=0)
    return (dx.astype(dy.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def join(x: jax.Array) -> jax.Array:
    """``(P, B, l, ..)`` as the row ``(B, P l, ..)``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def token_index(length: int, axis: str) -> jax.Array:
    """``(1, l)`` int32, the places in their row of this shard's tokens."""
    first = jax.lax.axis_index(axis) * jnp.int32(length)
    return first + jnp.arange(length, dtype=jnp.int32)[None]
