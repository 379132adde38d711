"""The maths of one step and of one tile, on values of any shape that broadcasts.

One step of one state, with `decay = exp(dt A)` and `flow = dt x B`:

    forward    h = decay h_before + flow,                y = sum_n C h
    backward   G = dy C + c,   c_before = decay G,       c the cotangent that flows to the state
               dC = dy h,   d(dt x) = G B,   dB = dt x G,   dA = dt P,   ddt = A P + ...
               with P = c_before h_before

`P` is a product of what is known, never a difference: nothing cancels. The exponents of all
exponentials are at most 0. A token that is padding, or does not exist, has dt = 0 and x = 0: its
decay is exactly 1 and its flow exactly 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import segments


class Config(NamedTuple):
    """What is static about a selective scan.

    Attributes:
      dt_softplus: dt goes through a softplus.
      reverse: from the last token to the first.
      tiles: the backend's own `Tiles`, or of `xla` how many states a step touches; None for what
        suits the shape.
    """

    dt_softplus: bool
    reverse: bool
    tiles: Any = None


LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def step_size(dt: jax.Array, bias: jax.Array | None, *, softplus: bool) -> jax.Array:
    """dt as the recurrence sees it: with its bias, through `log(1 + exp(dt))`."""
    if bias is not None:
        dt = dt + bias
    return jnp.maximum(dt, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(dt))) if softplus else dt


def step_size_gradient(
    dt: jax.Array, bias: jax.Array | None, cotangent: jax.Array, *, softplus: bool
) -> jax.Array:
    """The cotangent of dt, and of its bias, from that of `step_size`."""
    if not softplus:
        return cotangent
    return cotangent * sigmoid(dt if bias is None else dt + bias)


def sigmoid(x: jax.Array) -> jax.Array:
    small = jnp.exp(-jnp.abs(x))
    return jnp.where(x >= 0, 1.0, small) / (1.0 + small)


def silu(x: jax.Array) -> jax.Array:
    return x * sigmoid(x)


def silu_gradient(x: jax.Array) -> jax.Array:
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def decay(dt: jax.Array, A_log2: jax.Array) -> jax.Array:
    """`exp(dt A)`; `A_log2` is A in units of log 2, which saves a multiplication a state."""
    return jnp.exp2(dt * A_log2)


def select(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, and 0 where the mask is false: not even an infinity gets through."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def advance(
    h: jax.Array, decay: jax.Array, flow: jax.Array, inside: jax.Array | None = None
) -> jax.Array:
    """One step forward; where `inside` is false a document begins and drops the state before."""
    return select(inside, h) * decay + flow


def retreat(
    G: jax.Array, decay: jax.Array, h_before: jax.Array, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One step backward: `(c_before, P)`."""
    c_before = select(inside, decay * G)
    return c_before, c_before * select(inside, h_before)


def summary(run, config: Config, x, dt, A, B, C, D, gate, dt_bias, initial_state, segment_index):
    """`(decay, state)`, each `(B, D, N)`; see `backend.summarize`."""
    _, state = run(config, x, dt, A, B, C, None, None, dt_bias, initial_state, segment_index)
    bias = None if dt_bias is None else dt_bias[None, None]
    dt = step_size(dt.astype(initial_state.dtype), bias, softplus=config.dt_softplus)
    if segment_index is not None:
        dt = jnp.where((segment_index != 0)[:, :, None], dt, jnp.zeros_like(dt))
    decay = jnp.exp(jnp.sum(dt, axis=1)[:, :, None] * A[None])
    if segment_index is None:
        return decay, state
    restarts = segments.step_codes(segment_index, reverse=config.reverse) == segments.RESET
    forgotten = jnp.any(restarts, axis=1)[:, None, None]
    return jnp.where(forgotten, jnp.zeros_like(decay), decay), state
