"""Denoising of a classifier's own inputs, before it sees a label (self-pretraining).

Amos, Berant & Gupta, "Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires
Data-Driven Priors", ICLR 2024.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from seqmodels.models.classifier import ClassifierConfig, hidden

Denoising = Literal["masked", "causal"]


class Denoiser(nn.Module):
    """A classifier's encoder and backbone with a head for each place.

    Parameters: those of `Classifier` but for its head, under the same names, and ``denoise``, a
    linear map to logits of tokens or to values.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self,
        inputs: Shaped[Array, "b l *c"],
        segment_ids: Shaped[Array, "b l"],
        deterministic: bool = True,
    ) -> Float[Array, "b l out"]:
        """Returns float32 logits ``(B, L, vocabulary)``, or values ``(B, L, C)``.

        Args:
          inputs, segment_ids, deterministic: as `Classifier`'s.

        Raises:
          ValueError: ``inputs`` do not fit the configured vocabulary.
        """
        x, _ = hidden(self, self.config, inputs, segment_ids, deterministic)
        x = x[:, -inputs.shape[1] :].astype(jnp.float32)  # without the class token
        return nn.Dense(self.config.vocabulary_size or inputs.shape[-1], name="denoise")(x)


def corrupt(
    inputs: Shaped[Array, "b l *c"],
    real: Bool[Array, "b l"],
    kind: Denoising,
    share: float,
    key: Array,
) -> tuple[Shaped[Array, "b l *c"], Shaped[Array, "b l *c"], Bool[Array, "b l"]]:
    """What the denoiser sees, what it is to say, and where.

    Args:
      inputs: ids, of which 0 stands for padding and is no token, or real values.
      real: tokens that are no padding.
      kind: "masked" sets ``share`` of the tokens to 0, each by itself; "causal" asks each place
        for the next token.
      share: of the tokens.
      key: of what is masked.
    """
    if kind == "causal":
        following = real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
        return inputs, jnp.roll(inputs, -1, axis=1), following
    hide = real & jax.random.bernoulli(key, share, real.shape)
    seen = jnp.where(hide.reshape(*hide.shape, *(1,) * (inputs.ndim - 2)), 0, inputs)
    return seen.astype(inputs.dtype), inputs, hide
