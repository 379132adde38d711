"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "b l h k"],
    positions: Int[Array, "b l"],
    base: float = 1e4,
    channels: int | None = None,
) -> Float[Array, "b l h k"]:
    """Rotates channels ``i`` and ``i + K/2`` by ``positions * base^(-2i/K)``; float32 inside.

    With ``channels``, K is that number, and the channels of a head behind it stay as they are.

    Su et al., "RoFormer", 2021, equation 34, with the halves of a head as the planes' coordinates.

    Raises:
      ValueError: K is odd.
    """
    if channels is not None and channels < x.shape[-1]:
        turned = rotary(x[..., :channels], positions, base)
        return jnp.concatenate([turned, x[..., channels:]], axis=-1)
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary: heads of {size} channels have no pairs; choose an even number")
    frequency = (base ** (-2.0 * np.arange(size // 2) / size)).astype(np.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    halves = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)
