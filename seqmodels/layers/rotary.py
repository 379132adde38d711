"""Rotary position embedding."""

import jax
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

    Angles are exact to 1e-5 at all positions below 2^31. Beyond, where ``positions`` are those of
    ``seqmodels.layers.positions``, what counts in attention is: the angles between tokens that are
    D apart are exact to 1e-5 + 2e-9 D, without end.

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
    angle = _angles(positions, base ** (-2.0 * np.arange(size // 2) / size))[:, :, None]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    halves = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)


def _angles(positions: Int[Array, "b l"], frequency: np.ndarray) -> Float[Array, "b l f"]:
    """``positions * frequency`` radians, whole turns taken off; ``frequency (F,)`` float64.

    A frequency is a number of units of 2^-32 turns, and the fraction of a unit that is left.
    Products with whole units are exact in integers, where whole turns fall off by themselves. From
    2^31 on even numbers of units serve for frequencies, for positions repeat after 2^31.
    """
    units = frequency / (2.0 * np.pi) % 1.0 * 2.0**32
    fraction = ((units - np.floor(units)) * 2.0**-32).astype(np.float32)[None, None]
    whole, even = (
        x.astype(np.uint64).astype(np.uint32)[None, None]
        for x in (np.floor(units), 2.0 * np.round(units / 2.0))
    )
    position = jax.lax.bitcast_convert_type(positions, jnp.uint32)[:, :, None]
    near = jnp.minimum(position, jnp.uint32(2**31))
    turns = near * whole + (position - near) * even
    turns = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32) * 2.0**-32
    turns = turns + near.astype(jnp.float32) * fraction
    return 2.0 * np.pi * (turns - jnp.round(turns))
