"""The portable path: shifted adds, which XLA fuses into one pass; no gather, no long loop.

A shift is a pad by d in front and by -d behind, which a fusion reads in place. The first W - 1
tokens, which see the carried window, are computed apart and written over.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import tile
from pallas_kernels.causal_conv1d.tile import Config
from pallas_kernels.common import compat, dispatch, symbolic
from pallas_kernels.common.backend import Backend

# Numbers in an accumulator of the weight gradient: all of them together stay in a CPU's L1 or L2.
_ACCUMULATOR = 8192


def _shift(x: jax.Array, by: int) -> jax.Array:
    """`x` moved `by` tokens later (earlier if negative), 0 where nothing moves in."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (by, -by, 0), (0, 0, 0)))


def _rows(weight: jax.Array, bias: jax.Array, dtype) -> tuple[list[jax.Array], jax.Array]:
    """Weights by distance and the bias, each `(1, 1, D)`."""
    weights = [row[None, None] for row in weight.astype(dtype)[::-1]]
    return weights, bias.astype(dtype)[None, None]


def _long_from(conv_size: int) -> int:
    """Below so few tokens, copying the window and them together costs nothing."""
    return max(16, 2 * conv_size)


def _first(x: jax.Array | None, count: int) -> jax.Array | None:
    return None if x is None else x[:, :count]


def _over(x: jax.Array, head: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, head, (0, 0, 0)) if head.shape[1] else x


def forward(
    config: Config, x, weight, bias, initial_state, segment_index, *, return_residuals: bool
):
    """`(y,)`; arguments as in `reference.with_state`, which are all that `backward` needs."""
    y = _output(config, x, weight, bias, initial_state, segment_index)
    return (y,), (x, weight, bias, initial_state, segment_index) if return_residuals else None


def _output(config: Config, x, weight, bias, initial_state, segment_index):
    conv_size = weight.shape[0]
    dtype = jnp.dtype("float32") if x.dtype == jnp.bfloat16 else x.dtype
    weights, bias = _rows(weight, bias, dtype)
    limit = tile.limits(segment_index, conv_size)

    def head(x, limit):
        seen = tile.head_inputs(x, initial_state, limit, dtype)
        return tile.output(seen, weights, bias, limit, config.activation).astype(x.dtype)

    def shifted(x, limit):
        seen = [_shift(x, d).astype(dtype) for d in range(conv_size)]
        y = tile.output(seen, weights, bias, limit, config.activation).astype(x.dtype)
        return _over(y, head(x[:, : conv_size - 1], _first(limit, conv_size - 1)))

    length, long_from = x.shape[1], _long_from(conv_size)
    return dispatch.choose(
        "causal_conv1d method",
        {"behind its window": head, "shifted": shifted},
        *(x, limit),
        default="behind its window",
        everywhere="shifted",
        unsupported={"shifted": f"{length} tokens are fewer than {long_from}"}
        if length < long_from
        else {},
    )


def backward(config: Config, residuals, cotangents):
    """`(dx, dweight, dbias, dinitial_state, None)` from the cotangent of `forward`'s output."""
    (x, weight, bias, initial_state, segment_index), (dy,) = residuals, cotangents
    activation = config.activation
    conv_size, length = weight.shape[0], x.shape[1]
    dtype = jnp.dtype("float32") if x.dtype == jnp.bfloat16 else x.dtype
    weights, bias_row = _rows(weight, bias, dtype)
    limit = tile.limits(segment_index, conv_size)
    following = None if segment_index is None else tile.ahead(segment_index, conv_size)[..., None]

    def head(x, dy, limit):
        seen = tile.head_inputs(x, initial_state, limit, dtype)
        return seen, tile.cotangent(seen, weights, bias_row, dy.astype(dtype), limit, activation)

    if length < _long_from(conv_size):
        seen, g = head(x, dy, limit)
        sums = [jnp.sum(g * tap, (0, 1)) for tap in seen]
        dbias = jnp.sum(g, (0, 1))
    else:
        seen = [tile.zero_beyond(_shift(x, d).astype(dtype), limit, d) for d in range(conv_size)]
        g = tile.cotangent(seen, weights, bias_row, dy.astype(dtype), limit, activation)
        first, g_first = head(
            x[:, : conv_size - 1], dy[:, : conv_size - 1], _first(limit, conv_size - 1)
        )
        g = _over(g, g_first)
        sums, dbias = _weight_gradient(x, g, limit, first)
    parts = [
        weights[d] * tile.zero_beyond(_shift(g, -d), following, d)
        for d in range(min(conv_size, length))
    ]
    dx = functools.reduce(jnp.add, parts)
    dinitial = tile.initial_gradient(
        x, [w[0, 0] for w in weights], bias_row[0, 0], initial_state, limit, dy, activation
    )
    dweight = jnp.stack(sums[::-1]).astype(weight.dtype)
    return dx.astype(x.dtype), dweight, dbias.astype(bias.dtype), dinitial, None


def _weight_gradient(x, g, limit, first):
    """`sum_t g_t x_{t-d}` for each distance, and `sum_t g_t`; `first` are the inputs of the head.

    A reduction over all rows at once would walk down each channel; a loop over a few rows keeps
    the sums in the cache and reads `x` and `g` in order.
    """
    batch, length, width = x.shape
    start = len(first) - 1
    size = max(1, min(length - start, _ACCUMULATOR // (symbolic.known(batch, 1) * width)))
    count = (length - start) // size

    def products(t, size):
        def rows(array, t):
            return jax.lax.dynamic_slice_in_dim(array, t, size, axis=1)

        here = rows(g, t)
        part = None if limit is None else rows(limit, t)
        seen = [rows(x, t - d).astype(g.dtype) for d in range(start + 1)]
        return [here * tile.zero_beyond(u, part, d) for d, u in enumerate(seen)] + [here]

    def add(i, totals):
        return [a + b for a, b in zip(totals, products(start + i * size, size), strict=True)]

    zero = compat.match_vma(jnp.zeros((batch, size, width), g.dtype), g)[0]
    totals = jax.lax.fori_loop(0, count, add, [zero] * (start + 2))
    sums = [jnp.sum(total, (0, 1)) for total in totals]
    done = start + count * size
    if done < length:
        sums = [a + b.sum((0, 1)) for a, b in zip(sums, products(done, length - done), strict=True)]
    g_first = g[:, :start]
    at_start = [jnp.sum(g_first * tap, (0, 1)) for tap in first] + [jnp.sum(g_first, (0, 1))]
    *sums, dbias = [a + b for a, b in zip(sums, at_start, strict=True)]
    return sums, dbias


BACKEND = Backend(forward, backward)
