"""Sequence classification: embedding, backbone, pooling over real tokens, linear head."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqmodels.layers.embedding import Embedding
from seqmodels.mixers import Segments
from seqmodels.mixers.base import check_choices
from seqmodels.models.backbone import Backbone, BackboneConfig

Pooling = Literal["mean", "last"]


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Configuration of a classifier.

    Attributes:
      backbone: the stack of blocks.
      num_classes: size of the output.
      vocabulary_size: token ids are below it; None for real-valued inputs ``(B, L, C)``.
      embedding_std: of the initial embeddings; None is ``vocabulary_size ** -0.5``, what a linear
        layer on one-hot tokens has (S5's encoder); torch's and S4's is 1.
      pooling: mean over the real tokens, or the last of them.
    """

    backbone: BackboneConfig
    num_classes: int
    vocabulary_size: int | None = None
    embedding_std: float | None = None
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"ClassifierConfig: num_classes={self.num_classes} must be at least 2")
        if self.vocabulary_size is not None and self.vocabulary_size < 1:
            raise ValueError(
                f"ClassifierConfig: vocabulary_size={self.vocabulary_size} must be positive or None"
            )
        check_choices(self)


class Classifier(nn.Module):
    """One document a row, padded at the end -> logits."""

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array | np.ndarray, "b l"] | Float[Array | np.ndarray, "b l c"],
        segment_ids: Int[Array | np.ndarray, "b l"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b classes"]:
        """Returns float32 logits ``(B, num_classes)``.

        Args:
          inputs: token ids ``(B, L)``, or reals ``(B, L, C)`` without a vocabulary.
          segment_ids: 1 on real tokens, 0 on padding at the end; None for no padding.
          deterministic: no dropout, running statistics in BatchNorm.

        Raises:
          ValueError: ``inputs`` do not fit the configured vocabulary.
        """
        config = self.config
        width = config.backbone.width
        expected = 3 if config.vocabulary_size is None else 2
        if inputs.ndim != expected or (expected == 2) != jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(
                f"inputs have shape {inputs.shape} and dtype {inputs.dtype}; with "
                f"vocabulary_size={config.vocabulary_size} the classifier takes "
                + ("integer ids (B, L)" if expected == 2 else "real values (B, L, C)")
            )
        segments = None if segment_ids is None else Segments.from_ids(segment_ids, single=True)
        if config.vocabulary_size is None:
            x = nn.Dense(width, name="encoder")(inputs)
        else:
            std = config.embedding_std or config.vocabulary_size**-0.5
            x = Embedding(config.vocabulary_size, width, std, name="encoder")(inputs)
        x, _ = Backbone(config.backbone, name="backbone")(
            x, segments=segments, deterministic=deterministic
        )
        pooled = pool(x.astype(jnp.float32), segments, config.pooling)
        return nn.Dense(config.num_classes, name="head")(pooled)


def pool(x: Float[Array, "b l d"], segments: Segments | None, kind: Pooling) -> Float[Array, "b d"]:
    """Pools over the real tokens; zeros for a row that has none."""
    mask = jnp.ones(x.shape[:2], bool) if segments is None else segments.mask
    if kind == "last":
        mask = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    total = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=x.dtype), 1.0)
    return jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1) / total
