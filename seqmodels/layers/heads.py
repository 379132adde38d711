"""Parts of layers whose heads each keep a matrix: projections, norms, gates, initialisers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Projection(nn.Module):
    """``x W (+ b)`` with ``W`` normal of deviation ``std``, ``b`` zero; computed in ``dtype``."""

    features: int
    std: float
    use_bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l features"]:
        shape = (x.shape[-1], self.features)
        dtype = x.dtype if self.dtype is None else self.dtype
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
        y = jnp.dot(x.astype(dtype), kernel.astype(dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + jnp.broadcast_to(bias.astype(dtype), y.shape)


class LowRank(nn.Module):
    """Two projections, through ``rank`` channels and with no activation between them."""

    features: int
    rank: int
    std: float
    use_bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l features"]:
        x = Projection(self.rank, self.std, name="down")(x)
        return Projection(self.features, self.std, self.use_bias, self.dtype, name="up")(x)


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
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(mean_square + self.epsilon) * jnp.broadcast_to(scale, x.shape)
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

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high))

    return init


def step_bias(low: float = 1e-3, high: float = 1e-1) -> Any:
    """Initialiser: ``b`` such that ``softplus(b)`` is log-uniform in ``[low, high]``."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, np.log(low), np.log(high)))
        return step + jnp.log(-jnp.expm1(-step))

    return init
