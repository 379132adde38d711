"""Positions in documents of any length, as int32.

A position counts from 0 up to 2^31 - 1. Those behind it are the negative numbers, from -2^31 up to
-1 and from -2^31 again: a position once negative stays so. As unsigned numbers they are 2^31 and
more, so that the first 2^32 tokens are told apart, and later ones by their distance from others.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

_SIGN = np.int32(np.iinfo(np.int32).min)


def further(position: Int[Array, "..."], count: Int[Array, "..."]) -> Int[Array, "..."]:
    """The position ``count`` tokens behind ``position``; ``count`` from 0 to 2^31 - 1."""
    return (position + count) | (position & _SIGN)


def clipped(position: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """Positions with 2^31 - 1 for all behind it, to be compared with numbers below."""
    return jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position)
