"""Products of rows that stand group by group, each group with a matrix of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch, symbolic
from seqmodels.parallel.mesh import current_mesh

LARGEST_TILE = 128
"""Rows of a product on a CPU: with more, too many of a group's last tile are none of its own."""


def grouped_dot(
    x: Float[Array, "t d"], kernels: Float[Array, "e d f"], sizes: Int[Array, " e"]
) -> Float[Array, "t f"]:
    """``y_t = x_t W_e`` for the t of group e: the first ``sizes_0`` rows, the next ``sizes_1``, ...

    `jax.lax.ragged_dot`; XLA's for CPUs multiplies every row with every matrix, so there tiles of
    rows of one group are multiplied one after the other.
    """
    reasons = {}
    if symbolic.is_symbol(x.shape[0]):
        reasons["tiles"] = "the number of rows is a symbol"
    elif current_mesh() is not None:
        reasons["tiles"] = "rows are on several devices"
    return dispatch.choose(
        "grouped_dot",
        {"ragged_dot": jax.lax.ragged_dot, "tiles": in_tiles},
        *(x, kernels, sizes),
        default="ragged_dot",
        cpu="tiles",
        unsupported=reasons,
    )


@jax.custom_vjp
def in_tiles(
    x: Float[Array, "t d"], kernels: Float[Array, "e d f"], sizes: Int[Array, " e"]
) -> Float[Array, "t f"]:
    """``grouped_dot`` by a loop over tiles; its work grows with the rows and not with the groups.

    ``sizes`` sum to T.
    """
    return _products(x, kernels, sizes, 0)


def _forward(x, kernels, sizes):
    return in_tiles(x, kernels, sizes), (x, kernels, sizes)


def _backward(residuals, dy):
    x, kernels, sizes = residuals
    return _products(dy, kernels, sizes, 1), _outer_products(x, dy, kernels, sizes), None


in_tiles.defvjp(_forward, _backward)


def _products(x, kernels, sizes, axis: int):
    """Each row with its group's matrix, summed over the matrix's ``axis``."""
    tile = _tile(x, sizes)
    rows = _padded(x, tile)

    def product(out, group, start, _):
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        part, kernel = _wide(jax.lax.dynamic_slice_in_dim(rows, start, tile), kernel)
        y = jax.lax.dot_general(part, kernel, (((1,), (axis,)), ((), ())))
        # Rows behind the group are another's: its own tile comes later and writes them again.
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, 0)

    out = jnp.zeros((rows.shape[0], kernels.shape[2 - axis]), x.dtype)
    return _each_tile(product, out, tile, sizes)[: x.shape[0]]


def _outer_products(x, dy, kernels, sizes):
    """The gradient of the matrices."""
    tile = _tile(x, sizes)
    rows = [_padded(array, tile) for array in (x, dy)]

    def add(total, group, start, count):
        own = jnp.arange(tile) < count
        parts = (jax.lax.dynamic_slice_in_dim(array, start, tile) for array in rows)
        left, right = (jnp.where(own[:, None], part, 0) for part in _wide(*parts))
        return total.at[group].add(jax.lax.dot_general(left, right, (((0,), (0,)), ((), ()))))

    (zero,) = _wide(jnp.zeros(kernels.shape, kernels.dtype))
    return _each_tile(add, zero, tile, sizes).astype(kernels.dtype)


def _each_tile(body: Callable[..., Array], first: Array, tile: int, sizes: Array) -> Array:
    """``carry = body(carry, group, start, count)`` of each tile, in the order of rows.

    The first ``count`` rows from ``start`` on are the group's.
    """
    sizes = sizes.astype(jnp.int32)
    tiles = -(-sizes // tile)
    ends, starts = jnp.cumsum(tiles), jnp.cumsum(sizes) - sizes

    def step(i: Array, carry: Array) -> Array:
        group = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        inside = (i - ends[group] + tiles[group]) * tile
        return body(carry, group, starts[group] + inside, sizes[group] - inside)

    return jax.lax.fori_loop(jnp.int32(0), ends[-1].astype(jnp.int32), step, first)


def _tile(x: Array, sizes: Array) -> int:
    """Rows of a tile: a power of two of about the rows that a group has."""
    share = max(x.shape[0] // sizes.shape[0], 1)
    return min(LARGEST_TILE, 1 << (share.bit_length() - 1))


def _padded(x: Array, rows: int) -> Array:
    return jnp.pad(x, ((0, rows), (0, 0)))


def _wide(*arrays: Array) -> list[Array]:
    """In float32 (float64 of float64): CPUs lack some products of bfloat16 matrices."""
    dtype = jnp.float64 if arrays[0].dtype == jnp.float64 else jnp.float32
    return [x.astype(dtype) for x in arrays]
