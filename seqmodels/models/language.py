"""Language models: embedding, backbone, projection onto the vocabulary."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from seqmodels.layers.embedding import Embedding
from seqmodels.layers.projections import scaled
from seqmodels.mixers import Segments, State
from seqmodels.models.backbone import Backbone, BackboneConfig
from seqmodels.models.ids import check_ids
from seqmodels.ranges import Checked, Positive, Size

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(Checked):
    """Configuration of a language model.

    Attributes:
      backbone: the stack of blocks.
      vocabulary_size: token ids are below it.
      tie_embeddings: the projection onto the vocabulary is the embedding's table.
      embedding_std: of the initial embeddings, and of an untied projection.
      embedding_scale: what embeddings are multiplied by; ``sqrt(width)`` in Gemma's models.
      logit_scale: what logits are multiplied by, before ``logit_cap`` (Granite).
      logit_cap: None, or the bound c of ``c tanh(logits / c)``.
      dtype: of activations; parameters are float32.
    """

    backbone: BackboneConfig
    vocabulary_size: Size
    tie_embeddings: bool = True
    embedding_std: Positive = 0.02
    embedding_scale: Positive = 1.0
    logit_scale: Positive = 1.0
    logit_cap: Positive | None = None
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary_size < 2:
            raise ValueError(
                f"LanguageModelConfig: vocabulary_size={self.vocabulary_size} must be at least 2"
            )


class LanguageModel(nn.Module):
    """Tokens to logits of the next token; states in and out, as in the mixers' contract.

    Parameters: ``embedding/embedding (vocabulary, width)``, ``backbone``, and without tied
    embeddings ``head/kernel (width, vocabulary)``.
    """

    config: LanguageModelConfig

    def setup(self) -> None:
        config = self.config
        width, std = config.backbone.width, config.embedding_std
        self.embedding = Embedding(config.vocabulary_size, width, std)
        self.backbone = Backbone(config.backbone)
        if not config.tie_embeddings:
            init = nn.initializers.normal(std)
            self.head = nn.Dense(config.vocabulary_size, use_bias=False, kernel_init=init)

    def __call__(
        self,
        tokens: Shaped[Array | np.ndarray, "..."],
        *,
        segments: Segments | None = None,
        state: tuple[State, ...] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l v"], tuple[State, ...]]:
        """Ids ``(B, L)`` -> float32 logits ``(B, L, V)`` and one state for each block.

        Raises:
          ValueError: tokens that are not integers ``(B, L)``, that are known now and outside the
            vocabulary (see ``check_ids``), or bad arguments of a mixer.
        """
        x, state = self.hidden(tokens, segments=segments, state=state, deterministic=deterministic)
        return self.logits(x), state

    def hidden(
        self,
        tokens: Shaped[Array | np.ndarray, "..."],
        *,
        segments: Segments | None = None,
        state: tuple[State, ...] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], tuple[State, ...]]:
        """The backbone's outputs: what ``logits`` takes, position by position."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; a language model "
                "takes integer ids (B, L)"
            )
        check_ids("tokens", tokens, self.config.vocabulary_size)
        x = self.embedding(tokens) * self.config.embedding_scale
        x = x.astype(self.config.dtype)
        return self.backbone(x, segments=segments, state=state, deterministic=deterministic)

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of hidden vectors."""
        wide = x.astype(jnp.float32)
        logits = self.embedding.attend(wide) if self.config.tie_embeddings else self.head(wide)
        return _scaled(self.config, logits)

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> tuple[State, ...]:
        """One state for each block, before the first token; see ``Backbone.initial_state``."""
        backbone = Backbone(self.config.backbone, parent=None)
        return backbone.initial_state(batch_size, max_length=max_length, dtype=dtype)


def output_table(config: LanguageModelConfig, params: Mapping[str, Any]) -> Float[Array, "v d"]:
    """What hidden vectors are multiplied by, a row for each token of the vocabulary."""
    return params["embedding"]["embedding"] if config.tie_embeddings else params["head"]["kernel"].T


def project(
    config: LanguageModelConfig, table: Float[Array, "v d"], x: Float[Array, "*b d"]
) -> Float[Array, "*b v"]:
    """``LanguageModel.logits`` from rows of the ``output_table``, some or all."""
    wide = x.astype(jnp.float32)
    return _scaled(config, jnp.dot(wide, table.T, preferred_element_type=jnp.float32))


def _scaled(config: LanguageModelConfig, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    logits = scaled(logits, config.logit_scale)
    cap = config.logit_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)
