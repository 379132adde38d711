"""Dropout whose mask is shared by all time steps of a row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Dropout(nn.Module):
    """`flax.linen.Dropout` that drops whole channels of a sequence, and whose draws do not depend
    on `jax_enable_x64`.

    Attributes:
      rate: the probability of a channel to be dropped.
      deterministic: drop nothing.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
        if self.rate == 0.0 or self.deterministic:
            return x
        if self.rate == 1.0:
            return jnp.zeros_like(x)
        keep = 1.0 - self.rate
        shape = (x.shape[0], 1, *x.shape[2:])
        mask = jax.random.bernoulli(self.make_rng("dropout"), jnp.float32(keep), shape)
        return jnp.where(mask, x / keep, jnp.zeros_like(x))


def tied_dropout(rate: float, deterministic: bool) -> Dropout:
    """Dropout for ``(B, L, H)`` that drops whole channels of a sequence (the LRA recipes')."""
    return Dropout(rate, deterministic)
