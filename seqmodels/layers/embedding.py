"""Token embedding."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqmodels.parallel.parameters import TABLE, gathered


class Embedding(nn.Module):
    """Rows of a table ``(vocabulary_size, width)``, initially normal with deviation ``std``.

    A gather: on a CPU it beats a matmul with one-hot rows, forward and backward, from a vocabulary
    of 20 on. Ids outside the table give NaN rather than a neighbour's row.
    """

    vocabulary_size: int
    width: int
    std: float

    def setup(self) -> None:
        shape = (self.vocabulary_size, self.width)
        init = nn.initializers.normal(self.std)
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, tokens: Int[Array | np.ndarray, "b l"]) -> Float[Array, "b l d"]:
        """The rows of ``tokens``."""
        table = gathered(self.embedding, TABLE)
        return jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan)

    def attend(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """The product of ``x`` with every row: logits of a model with tied embeddings."""
        return jnp.dot(x, self.embedding.T, preferred_element_type=x.dtype)
