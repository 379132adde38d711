"""The maths of the convolution, on values; shared by every backend.

Everything is told by *distance*: the tap at distance d of token t is `x_{t-d}` and `w_d` is
`weight[W-1-d]`.

    forward    pre_t = bias + sum_d [d <= reach_t] w_d x_{t-d},   y_t = act(pre_t)
    backward   g_t = dy_t act'(pre_t),   dw_d = sum_t [d <= reach_t] g_t x_{t-d},
               dx_s = sum_d [d <= ahead_s] w_d g_{s+d},   dbias = sum_t g_t

`reach_t` is how many tokens before t its taps may read, `ahead_s` how many tokens after s read it;
both are -1 on padding. None means W-1 everywhere: one document a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import segments

Activation = str | None  # "silu" or None
Values = Sequence[jax.Array]


class Config(NamedTuple):
    """What is static about a convolution.

    Attributes:
      activation: None or "silu".
      tiles: the backend's own `Tiles`; None for what suits the shape.
    """

    activation: Activation
    tiles: Any = None


def reach(segment_index: jax.Array, conv_size: int) -> jax.Array:
    """`(B, L)` int32; the first document of a row reaches into the carried window."""
    inside = jnp.where(
        segment_index == 1,
        conv_size - 1,
        jnp.minimum(segments.positions(segment_index), conv_size - 1),
    )
    return jnp.where(segment_index == 0, -1, inside).astype(jnp.int32)


def ahead(segment_index: jax.Array, conv_size: int) -> jax.Array:
    """`(B, L)` int32: tokens of the same document that follow, at most `conv_size - 1`."""
    following = segments.positions(segment_index[:, ::-1])[:, ::-1]
    return jnp.where(segment_index == 0, -1, jnp.minimum(following, conv_size - 1)).astype(
        jnp.int32
    )


def limits(segment_index: jax.Array | None, conv_size: int) -> jax.Array | None:
    """`reach (B, L, 1)`, beside `(B, L, D)`; None without a segment index."""
    return None if segment_index is None else reach(segment_index, conv_size)[..., None]


def zero_beyond(x: jax.Array, limit: jax.Array | None, distance: int) -> jax.Array:
    """`x` where `distance <= limit`, else 0: a select, so that no infinity gets through."""
    return x if limit is None else jnp.where(limit >= distance, x, jnp.zeros_like(x))


def pre_activation(inputs: Values, weights: Values, bias: jax.Array) -> jax.Array:
    """`bias + sum_d w_d inputs_d`; both sequences by distance, the inputs masked already."""
    total = bias
    for x, w in zip(inputs, weights, strict=True):
        total = total + w * x
    return total


def activate(pre: jax.Array, activation: Activation) -> jax.Array:
    return pre * jax.lax.logistic(pre) if activation == "silu" else pre


def output(
    inputs: Values,
    weights: Values,
    bias: jax.Array,
    limit: jax.Array | None,
    activation: Activation,
) -> jax.Array:
    """`y`, 0 on padding; `inputs` as they were read, `limit` is `reach`."""
    masked = [zero_beyond(x, limit, d) for d, x in enumerate(inputs)]
    return zero_beyond(activate(pre_activation(masked, weights, bias), activation), limit, 0)


def cotangent(
    masked: Values,
    weights: Values,
    bias: jax.Array,
    dy: jax.Array,
    limit: jax.Array | None,
    activation: Activation,
) -> jax.Array:
    """`g`, the cotangent of the pre-activation, which is computed again from the masked inputs."""
    if activation == "silu":
        pre = pre_activation(masked, weights, bias)
        gate = jax.lax.logistic(pre)
        dy = dy * (gate * (1 + pre * (1 - gate)))
    return zero_beyond(dy, limit, 0)


def final_window(x: jax.Array, initial: jax.Array, segment_index: jax.Array | None) -> jax.Array:
    """The window after the last real token, `(B, W-1, D)`: a copy of inputs, no kernel's work.

    Tokens of earlier documents are 0; a row of padding returns `initial`. JAX differentiates it.

    Args:
      x: `(B, L, D)`.
      initial: `(B, W-1, D)`, the window before token 0.
      segment_index: `(B, L)` int32 or None.
    """
    size = initial.shape[1]
    if segment_index is None or size == 0:
        recent = jnp.concatenate([initial, x[:, -size:] if size else x[:, :0]], axis=1)
        return recent[:, recent.shape[1] - size :]
    count = jnp.sum(segment_index != 0, axis=1, dtype=jnp.int32)
    place = count[:, None] - size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    last = jnp.take_along_axis(
        reach(segment_index, size + 1), jnp.maximum(count - 1, 0)[:, None], axis=1
    )
    # Entry k is the tap at distance size - 1 - k of the last real token.
    distance = size - 1 - jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    seen = (distance <= last) | (count == 0)[:, None]

    def rows(array: jax.Array, index: jax.Array) -> jax.Array:
        index = jnp.clip(index, 0, array.shape[1] - 1)
        return jax.vmap(lambda a, i: a[i])(array, index)

    window = jnp.where((place < 0)[..., None], rows(initial, place + size), rows(x, place))
    return jnp.where(seen[..., None], window, jnp.zeros_like(window))


# Borders and short rows, where an array of the window and the tokens is small enough to build.


def head_inputs(x: jax.Array, initial: jax.Array, limit: jax.Array | None, dtype: Any) -> Values:
    """Masked inputs by distance, each `(B, L, D)`, of tokens that follow `initial` directly."""
    size, length = initial.shape[1], x.shape[1]
    whole = jnp.concatenate([initial, x], axis=1).astype(dtype)
    inputs = (whole[:, size - d : size - d + length] for d in range(size + 1))
    return [zero_beyond(tap, limit, d) for d, tap in enumerate(inputs)]


def initial_gradient(
    x: jax.Array,
    weights: Values,
    bias: jax.Array,
    initial: jax.Array,
    limit: jax.Array | None,
    dy: jax.Array,
    activation: Activation,
) -> jax.Array:
    """`dinitial (B, W-1, D)` in `initial`'s dtype, from the first `W - 1` tokens alone.

    Args:
      x, dy: `(B, L, D)`.
      weights, bias: `(D,)` each, by distance, in the dtype to compute in.
      limit: `reach`, `(B, L, 1)` or None.
    """
    size = initial.shape[1]
    x, dy = x[:, :size], dy[:, :size]
    limit = None if limit is None else limit[:, :size]
    masked = head_inputs(x, initial, limit, bias.dtype)
    weights, bias = [w[None, None] for w in weights], bias[None, None]
    g = cotangent(masked, weights, bias, dy.astype(bias.dtype), limit, activation)
    total = jnp.zeros(initial.shape, bias.dtype)
    for d in range(1, size + 1):
        # Token t reads entry size + t - d of the window.
        count = min(d, g.shape[1])
        part = weights[d] * zero_beyond(g, limit, d)[:, :count]
        total += jnp.pad(part, ((0, 0), (size - d, d - count), (0, 0)))
    return total.astype(initial.dtype)
