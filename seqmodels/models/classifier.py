"""Sequence classification: embedding, backbone, pooling over real tokens, head.

One sequence a row (`Classifier`), or two whose relation is asked for (`Matcher`).
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from seqmodels.layers.embedding import Embedding, LearnedPositions, sinusoids
from seqmodels.mixers import Segments
from seqmodels.models.backbone import Backbone, BackboneConfig
from seqmodels.models.ids import check_ids
from seqmodels.parallel.mesh import shards_of
from seqmodels.ranges import Checked, Positive, Size

Pooling = Literal["mean", "last", "class"]
Interaction = Literal["concat", "nli"]
Positions = Literal["sinusoid", "learned"]


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(Checked):
    """Configuration of a classifier.

    Attributes:
      backbone: the stack of blocks.
      num_classes: size of the output.
      vocabulary_size: token ids are below it; None for real-valued inputs ``(B, L, C)``.
      embedding_std: of the initial embeddings; None is ``vocabulary_size ** -0.5``, what a linear
        layer on one-hot tokens has (S5's encoder); torch's and S4's is 1.
      pooling: "mean" over the real tokens, the "last" of them, or what becomes of a learned "class"
        token put in front, as in the Transformers of Long Range Arena.
      positions: what is added to the inputs by their place in the row: fixed "sinusoid" functions
        or "learned" vectors, as in the Transformers of Long Range Arena; None for nothing.
      max_length: the longest row, class token included, that has "learned" positions.
      window: None, or a number of tokens: mixers see pieces of so many, cut from the row's start,
        each as a row of its own, and pooling alone joins them. It changes no parameter.
    """

    backbone: BackboneConfig
    num_classes: Size
    vocabulary_size: Size | None = None
    embedding_std: Positive | None = None
    pooling: Pooling = "mean"
    positions: Positions | None = None
    max_length: Size | None = None
    window: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 2:
            raise ValueError(f"ClassifierConfig: num_classes={self.num_classes} must be at least 2")
        if (self.max_length is not None) != (self.positions == "learned"):
            raise ValueError(
                f"ClassifierConfig: max_length={self.max_length} with positions="
                f"{self.positions!r}: learned positions need it, nothing else has it"
            )
        if self.window is not None and self.pooling != "mean":
            raise ValueError(
                f"ClassifierConfig: window={self.window} needs pooling='mean': the "
                f"{'first' if self.pooling == 'class' else 'last'} token sees one window alone"
            )
        if self.pooling == "class" and all(mixer.causal for mixer in self.backbone.mixers):
            raise ValueError(
                f"ClassifierConfig: pooling='class' reads the first token, which sees nothing "
                f"through the causal layout={self.backbone.layout}; take 'last' or 'mean'"
            )


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
        pooled = encode(self, self.config, inputs, segment_ids, deterministic)
        return nn.Dense(self.config.num_classes, name="head")(pooled)


@dataclasses.dataclass(frozen=True)
class MatcherConfig(Checked):
    """Configuration of a matcher.

    Attributes:
      tower: how both inputs are encoded, and the number of classes.
      interaction: what the head sees of the encodings a and b: "concat" ``[a, b]``, as in Long
        Range Arena, or "nli" ``[a, b, a b, a - b]``, as in S4 and S5.
      hidden: width of the head's hidden layer; None is the backbone's.
    """

    tower: ClassifierConfig
    interaction: Interaction = "nli"
    hidden: Size | None = None

    @property
    def backbone(self) -> BackboneConfig:
        return self.tower.backbone


class Matcher(nn.Module):
    """Two documents a row, encoded by one tower -> logits (Tay et al. 2021, Retrieval)."""

    config: MatcherConfig

    @nn.compact
    def __call__(
        self,
        inputs: Shaped[Array | np.ndarray, "..."],
        segment_ids: Int[Array | np.ndarray, "b 2 l"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b classes"]:
        """Returns float32 logits ``(B, num_classes)``.

        Args:
          inputs, segment_ids: as `Classifier`'s, of two sequences side by side, ``(B, 2, L)``. They
            run through the tower as one batch of 2 B rows.

        Raises:
          ValueError: not two sequences a row, or ``inputs`` do not fit the tower's vocabulary.
        """
        config = self.config
        if inputs.ndim < 3 or inputs.shape[1] != 2:
            raise ValueError(
                f"inputs have shape {inputs.shape}; a matcher takes two sequences a row, (B, 2, L) "
                "or (B, 2, L, C)"
            )
        rows = None if segment_ids is None else segment_ids.reshape(-1, segment_ids.shape[2])
        pooled = encode(
            self, config.tower, inputs.reshape(-1, *inputs.shape[2:]), rows, deterministic
        ).reshape(inputs.shape[0], 2, -1)
        a, b = pooled[:, 0], pooled[:, 1]
        parts = [a, b] if config.interaction == "concat" else [a, b, a * b, a - b]
        hidden = config.hidden or config.backbone.width
        x = jax.nn.gelu(nn.Dense(hidden, name="head_in")(jnp.concatenate(parts, axis=-1)))
        return nn.Dense(config.tower.num_classes, name="head")(x)


def encode(
    module: nn.Module,
    config: ClassifierConfig,
    inputs: Int[Array | np.ndarray, "b l"] | Float[Array | np.ndarray, "b l c"],
    segment_ids: Int[Array | np.ndarray, "b l"] | None,
    deterministic: bool,
) -> Float[Array, "b d"]:
    """The pooled float32 encoding of each row; arguments and errors as ``hidden``'s."""
    x, segments = hidden(module, config, inputs, segment_ids, deterministic)
    return pool(x.astype(jnp.float32), segments, config.pooling)


def hidden(
    module: nn.Module,
    config: ClassifierConfig,
    inputs: Int[Array | np.ndarray, "b l"] | Float[Array | np.ndarray, "b l c"],
    segment_ids: Int[Array | np.ndarray, "b l"] | None,
    deterministic: bool,
) -> tuple[Float[Array, "b t d"], Segments | None]:
    """What the backbone makes of each row, and its segments; both begin with the class token, if
    there is one. Parameters are those of ``module``.

    Raises:
      ValueError: ``inputs`` do not fit the configured vocabulary (of ids, see ``check_ids``), or
        rows are to be cut into windows and are split over devices.
    """
    width = config.backbone.width
    expected = 3 if config.vocabulary_size is None else 2
    if inputs.ndim != expected or (expected == 2) != jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(
            f"inputs have shape {inputs.shape} and dtype {inputs.dtype}; with "
            f"vocabulary_size={config.vocabulary_size} the classifier takes "
            + ("integer ids (B, L)" if expected == 2 else "real values (B, L, C)")
        )
    if config.vocabulary_size is None:
        x = nn.Dense(width, name="encoder")(inputs)
    else:
        check_ids("inputs", inputs, config.vocabulary_size)
        std = config.embedding_std or config.vocabulary_size**-0.5
        x = Embedding(config.vocabulary_size, width, std, name="encoder")(inputs)
    if config.pooling == "class":
        token = module.param("class_token", nn.initializers.zeros, (width,), jnp.float32)
        front = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
        x = jnp.concatenate([front, x], axis=1)
        if segment_ids is not None:
            segment_ids = jnp.concatenate([segment_ids[:, :1], segment_ids], axis=1)
    if config.positions == "sinusoid":
        x = x + sinusoids(*x.shape[1:]).astype(x.dtype)[None]
    elif config.positions == "learned":
        x = x + LearnedPositions(config.max_length or 0, width, name="positions")(x)[None]
    segments = None if segment_ids is None else Segments.from_ids(segment_ids, single=True)
    backbone, length = Backbone(config.backbone, name="backbone"), x.shape[1]
    if config.window is None:
        x, _ = backbone(x, segments=segments, deterministic=deterministic)
    else:
        pieces, ids = windows(x, segment_ids, config.window)
        within = Segments.from_ids(ids, single=True)
        x, _ = backbone(pieces, segments=within, deterministic=deterministic)
        x = x.reshape(-1, length + -length % config.window, width)[:, :length]
    return x, segments


def windows(
    x: Float[Array, "b l d"],
    segment_ids: Int[Array | np.ndarray, "b l"] | None,
    size: int,
) -> tuple[Float[Array, "n w d"], Int[Array, "n w"]]:
    """Rows cut into pieces of ``size`` tokens, padded at the end: tokens and segment ids.

    Raises:
      ValueError: the mesh splits rows over devices, which would cut them elsewhere.
    """
    if shards_of(x.shape[1]) > 1:
        raise ValueError(f"window={size} cuts rows that one device has whole; take seq=1")
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    more = -x.shape[1] % size
    x, ids = jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.pad(ids, ((0, 0), (0, more)))
    return x.reshape(-1, size, x.shape[2]), ids.reshape(-1, size)


def pool(x: Float[Array, "b l d"], segments: Segments | None, kind: Pooling) -> Float[Array, "b d"]:
    """Pools over the real tokens; zeros for a row that has none."""
    mask = jnp.ones(x.shape[:2], bool) if segments is None else segments.mask
    if kind == "class":
        return jnp.where(mask[:, :1], x[:, 0], 0.0)
    if kind == "last":
        mask = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    total = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=x.dtype), 1.0)
    return jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1) / total
