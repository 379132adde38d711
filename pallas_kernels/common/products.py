"""Products of bfloat16 arrays with float32 sums, on backends that lack some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import dispatch


def widened_on_cpu(product: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`product(*arrays)`; where it is compiled for a CPU, of float32 copies of bfloat16 arrays.

    XLA's CPU backend refuses a product of two bfloat16 arrays with float32 sums in some layouts
    ("Unsupported element type for DotThunk"); in which ones depends on what is fused around it.
    Copies give the same sums, for products of two bfloat16 numbers are exact in float32. Other
    backends compile `product` as it is. The result's dtype must not depend on the arrays'.
    """
    if all(x.dtype != jnp.bfloat16 for x in arrays):
        return product(*arrays)

    def widened(*arrays: jax.Array) -> jax.Array:
        return product(*(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays))

    ways = {"bfloat16": product, "float32 copies": widened}
    return dispatch.choose("product", ways, *arrays, default="bfloat16", cpu="float32 copies")


# Compiled, for outside of `jax.jit` JAX would compile a choice of platforms at every call.
@functools.partial(jax.jit, static_argnames=("equation", "precision", "dtype"), inline=True)
def einsum(
    equation: str, x: jax.Array, y: jax.Array, *, precision: Any = None, dtype: Any = jnp.float32
) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, summed in and of `dtype`, at least float32."""

    def product(*arrays: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *arrays, precision=precision, preferred_element_type=dtype)

    # Without it a backward pass would keep what the product of any platform wants kept.
    keeping_arrays = functools.partial(jax.checkpoint, prevent_cse=False)
    return keeping_arrays(functools.partial(widened_on_cpu, product))(x, y)
