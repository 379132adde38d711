"""Projections and the norm without a scale, as the published state-space layers use them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def uniform_fan_in(layers: int = 1) -> Any:
    """Initialiser: uniform within ``(fan_in layers)^(-1/2)`` of 0.

    With one layer it is that of `torch.nn.Linear`; the projections that end a residual branch may
    start smaller by the root of the number of branches.
    """
    return nn.initializers.variance_scaling(1 / (3 * layers), "fan_in", "uniform")


def dense(
    x: Float[Array, "b l d"],
    features: int,
    name: str,
    *,
    use_bias: bool = False,
    kernel_init: Any = None,
) -> Float[Array, "b l features"]:
    """``x W (+ b)`` in ``x``'s dtype: a child of the calling module.

    ``b`` starts at 0, ``W`` as `torch.nn.Linear` has it unless ``kernel_init`` says otherwise.
    """
    init = kernel_init or uniform_fan_in()
    return nn.Dense(features, use_bias, name=name, dtype=x.dtype, kernel_init=init)(x)


def scaled(x: Float[Array, "*b d"], scale: float) -> Float[Array, "*b d"]:
    """``scale x``; nothing is multiplied by 1."""
    return x if scale == 1.0 else x * scale


def rms_normalise(x: Float[Array, "*b d"], epsilon: float, groups: int = 1) -> Float[Array, "*b d"]:
    """Each of ``groups`` parts of the last axis over its root mean square; float32 inside."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon)).reshape(x.shape).astype(x.dtype)
