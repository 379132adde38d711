"""Embeddings of tokens and of their places."""

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


class LearnedPositions(nn.Module):
    """A vector for each place in a row, initially normal with deviation 0.02."""

    max_length: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "l d"]:
        """The vectors of the first L places, in the dtype of ``x``.

        Raises:
          ValueError: a row is longer than ``max_length``.
        """
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"rows of {x.shape[1]} tokens need positions for all of them: raise "
                f"max_length={self.max_length}"
            )
        shape = (self.max_length, self.width)
        table = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        return table[: x.shape[1]].astype(x.dtype)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "l d"]:
    """Sines, then cosines, of ``t / 10000^(i / (d / 2 - 1))`` at places t, float32 ``(L, d)``.

    Vaswani et al., "Attention Is All You Need", 2017, in the order of Long Range Arena's code.
    An odd last channel is 0.
    """
    half = width // 2
    rates = 1e4 ** (-np.arange(half) / max(half - 1, 1))
    angles = np.arange(length)[:, None] * rates
    waves = [np.sin(angles), np.cos(angles), np.zeros((length, width - 2 * half))]
    return np.concatenate(waves, axis=1).astype(np.float32)
