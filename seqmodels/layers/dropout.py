"""Dropout whose mask is shared by all time steps of a row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Dropout(nn.Module):
    """`flax.linen.Dropout` of whole channels of a sequence, as the LRA recipes have it.

    Its draws do not depend on `jax_enable_x64`; flax's do.

    Attributes:
      rate: the probability of a channel to be dropped, in [0, 1).
      deterministic: drop nothing.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
        if self.rate == 0.0 or self.deterministic:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0], 1, *x.shape[2:])
        mask = jax.random.bernoulli(self.make_rng("dropout"), jnp.float32(keep), shape)
        return jnp.where(mask, x / keep, jnp.zeros_like(x))
