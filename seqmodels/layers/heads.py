"""Parts of layers whose heads each keep a matrix: gates, norms, initialisers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqmodels.layers.projections import dense, rms_normalise


class LowRank(nn.Module):
    """Two projections, through ``rank`` channels and with no activation between them.

    Attributes:
      features, rank: channels of the outputs and in between.
      std: deviation of the projections' normal initialisation.
      use_bias: whether the second one has a bias.
      dtype: of the second one; None for that of the inputs.
    """

    features: int
    rank: int
    std: float
    use_bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l features"]:
        init = nn.initializers.normal(self.std)
        x = dense(x, self.rank, "down", kernel_init=init)
        x = x if self.dtype is None else x.astype(self.dtype)
        return dense(x, self.features, "up", use_bias=self.use_bias, kernel_init=init)


class GatedNorm(nn.Module):
    """RMS norm over the last axis, scaled, times ``activation(gate)``; float32 inside.

    Attributes:
      epsilon: added to the mean square.
      activation: of the gate.
    """

    epsilon: float
    activation: Callable[[Array], Array] = jax.nn.silu

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b v"], gate: Float[Array, "*b v"] | None = None
    ) -> Float[Array, "*b v"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        y = rms_normalise(x.astype(jnp.float32), self.epsilon) * jnp.broadcast_to(scale, x.shape)
        if gate is not None:
            y = y * self.activation(gate.astype(jnp.float32))
        return y.astype(x.dtype)


def split_heads(x: Float[Array, "b l n"], size: int) -> Float[Array, "b l h size"]:
    """Channels -> heads of ``size`` channels."""
    return x.reshape(*x.shape[:-1], -1, size)


def merge_heads(x: Float[Array, "b l h size"]) -> Float[Array, "b l n"]:
    """The inverse of ``split_heads``."""
    return x.reshape(*x.shape[:-2], -1)


def l2_normalise(x: Float[Array, "*b k"], epsilon: float = 1e-6) -> Float[Array, "*b k"]:
    """``x / sqrt(sum x^2 + epsilon)`` over the last axis; float32 inside."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + epsilon)).astype(x.dtype)


def log_of_uniform(low: float, high: float) -> Any:
    """Initialiser: logarithms of values uniform in ``[low, high)``."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def step_bias(low: float = 1e-3, high: float = 1e-1) -> Any:
    """Initialiser: ``b`` such that ``softplus(b)`` is log-uniform in ``[low, high]``."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, np.log(low), np.log(high)))
        return step + jnp.log(-jnp.expm1(-step))

    return init
