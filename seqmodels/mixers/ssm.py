"""What diagonal state-space models share: discretisation and the range of step sizes."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

Discretization = Literal["zoh", "bilinear"]


def discretize(
    eigenvalues: Complex[Array, "*p"], step: Float[Array, "*p"], rule: Discretization
) -> tuple[Complex[Array, "*p"], Complex[Array, "*p"]]:
    """Continuous eigenvalues and steps -> logarithm of the decay per token, factor on the input.

    Zero-order hold: decay ``exp(λΔ)``, factor ``(exp(λΔ) - 1) / λ``; bilinear:
    ``(1 + λΔ/2) / (1 - λΔ/2)`` and ``Δ / (1 - λΔ/2)``.
    """
    delta = step.astype(eigenvalues.dtype)
    scaled = eigenvalues * delta
    if rule == "zoh":
        return scaled, jnp.expm1(scaled) / eigenvalues
    return jnp.log((1.0 + 0.5 * scaled) / (1.0 - 0.5 * scaled)), delta / (1.0 - 0.5 * scaled)


def log_uniform(low: float, high: float) -> Any:
    """Initialiser: logarithms of values spread log-uniformly over ``[low, high]``."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, np.log(low), np.log(high))

    return init


def constant(values: np.ndarray) -> Any:
    """Initialiser: ``values`` as float32."""
    return lambda key: jnp.asarray(values, jnp.float32)


def check_step_range(owner: str, dt_min: float, dt_max: float) -> None:
    """Raises ValueError unless ``dt_min <= dt_max``."""
    if dt_min > dt_max:
        raise ValueError(f"{owner}: need 0 < dt_min <= dt_max, got {dt_min=} and {dt_max=}")
