"""Token embedding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Up to here a matmul with one-hot rows beats gather forward and scatter-add backward on CPU.
ONE_HOT_UP_TO = 256


class Embedding(nn.Module):
    """Rows of a table ``(vocabulary_size, width)``, initially normal with deviation ``std``.

    A small vocabulary is looked up by a one-hot matmul (the result is the same, bit for bit), whose
    gradient is a matmul too instead of a scatter.
    """

    vocabulary_size: int
    width: int
    std: float

    @nn.compact
    def __call__(self, tokens: Int[Array | np.ndarray, "b l"]) -> Float[Array, "b l d"]:
        shape = (self.vocabulary_size, self.width)
        table = self.param("embedding", nn.initializers.normal(self.std), shape)
        if self.vocabulary_size > ONE_HOT_UP_TO:
            return jnp.take(table, tokens, axis=0, mode="clip")
        rows = jax.nn.one_hot(tokens, self.vocabulary_size, dtype=table.dtype)
        return jnp.dot(rows, table, precision=jax.lax.Precision.HIGHEST)
