"""Tasks of models that see what is behind a token: masked tokens, and a prefix that is read whole.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019, section 3.1;
Arora et al., "Just read twice", 2024 (arXiv:2407.05483), section 4.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels.mixers import JRTConfig, Segments
from seqmodels.models import LanguageModel, param_axes
from seqmodels.models.language import output_table, project
from seqmodels.training.cross_entropy import tiled_sums
from seqmodels.training.language import check_packs
from seqmodels.training.task import Batch, Sums, Task, Variables, initializer

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens: those that the mask stands for, and those replaced at random."""

PREFIX_WEIGHT = 0.25
"""Weight in the loss of the prefix's masked tokens, beside the next tokens behind it."""


def masked_language(
    model: LanguageModel,
    param_labels: Callable[[Any], Any],
    *,
    mask_token: int,
    share: float = 0.15,
    packed: bool = True,
    tile: int | None = 1024,
) -> Task:
    """Prediction of tokens that are hidden: 8 of 10 behind a mask, 1 behind another token.

    Evaluation hides the same places each time. Batches are those of ``seqmodels.data.text``.

    Args:
      model: the model; its mixers may see both sides.
      param_labels: see ``Task.param_labels``.
      mask_token: the id of the mask, which the text does not have; ids below it are tokens.
      share: of the tokens that are to be predicted.
      packed: whether rows may hold several documents; without, segment ids are ignored.
      tile: tokens on a device whose logits exist at a time; None for all.

    Raises:
      ValueError: a mask outside the vocabulary; with ``packed`` a mixer that takes a document a
        row.
    """
    check_mask(model, mask_token)
    if packed:
        check_packs(model)

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: None
    ) -> tuple[Sums, Any, None]:
        inputs = jnp.asarray(batch["inputs"])
        dropout, hiding = jax.random.split(jax.random.key(0) if key is None else key)
        real = jnp.asarray(batch["weights"]) > 0
        seen, hidden = hide(inputs, real, hiding, share, mask_token)
        dropped = None if key is None else dropout
        x, statistics = _run(model, variables, batch, seen, packed, dropped)
        weights = jnp.where(hidden, batch["weights"], 0.0)
        return _sums(model, variables, x, inputs, weights, tile), statistics, carry

    return _task(model, param_labels, loss)


def prefix_language(
    model: LanguageModel,
    param_labels: Callable[[Any], Any],
    *,
    mask_token: int,
    share: float = 0.15,
    packed: bool = True,
    tile: int | None = 1024,
) -> Task:
    """Next tokens behind each document's prefix, and tokens of the prefix that are masked.

    The loss is the mean over the first, and a quarter of the mean over the second; the prefix is
    that of the model's JRT layers. Its next tokens do not count: an encoder has read them.
    Evaluation hides nothing and has the next tokens alone.

    Args:
      model: the model; its mixers are causal, and one at least is JRT.
      param_labels, mask_token, packed, tile: as ``masked_language`` has them.
      share: of the prefix, each token by itself.

    Raises:
      ValueError: a mask outside the vocabulary; no JRT layer, or several prefixes; another mixer
        that is not causal; with ``packed`` one that takes a document a row.
    """
    check_mask(model, mask_token)
    prefix = prefix_of(model)
    if packed:
        check_packs(model)

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: None
    ) -> tuple[Sums, Any, None]:
        inputs, counted = jnp.asarray(batch["inputs"]), jnp.asarray(batch["weights"])
        early = positions_of(batch, packed) < prefix
        sums = functools.partial(_sums, model, variables, tile=tile)
        behind = jnp.where(early, 0.0, counted)
        if key is None:
            x, statistics = _run(model, variables, batch, inputs, packed, None)
            return sums(x, batch["targets"], behind), statistics, carry
        dropout, hiding = jax.random.split(key)
        hidden = early & (counted > 0) & jax.random.bernoulli(hiding, share, inputs.shape)
        seen = jnp.where(hidden, mask_token, inputs)
        x, statistics = _run(model, variables, batch, seen, packed, dropout)
        following = sums(x, batch["targets"], behind)
        masked = sums(x, inputs, jnp.where(hidden, counted, 0.0))
        more = PREFIX_WEIGHT * masked.loss / jnp.maximum(masked.weight, 1.0)
        total = following.loss + more * following.weight
        return following.replace(loss=total), statistics, carry  # type: ignore[attr-defined]

    return _task(model, param_labels, loss)


def hide(
    tokens: Int[Array, "b l"], real: Bool[Array, "b l"], key: Array, share: float, mask_token: int
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """What the model sees of the tokens, and which it is to predict."""
    chosen_key, how_key, which_key = jax.random.split(key, 3)
    chosen = real & jax.random.bernoulli(chosen_key, share, tokens.shape)
    how = jax.random.uniform(how_key, tokens.shape)
    other = jax.random.randint(which_key, tokens.shape, 0, mask_token, tokens.dtype)
    shown = jnp.where(how < MASKED, jnp.asarray(mask_token, tokens.dtype), other)
    return jnp.where(chosen & (how < MASKED + RANDOM), shown, tokens), chosen


def check_mask(model: LanguageModel, mask_token: int) -> None:
    """Raises ValueError unless the mask is a token of the model."""
    size = model.config.vocabulary_size
    if not 0 < mask_token < size:
        raise ValueError(
            f"mask_token={mask_token} must be above 0 and below vocabulary_size={size}; give the "
            "model one token more than the text has"
        )


def prefix_of(model: LanguageModel) -> int:
    """The prefix of the model's JRT layers; raises as ``prefix_language``."""
    mixers = model.config.backbone.mixers
    prefixes = {config.prefix for config in mixers if isinstance(config, JRTConfig)}
    if len(prefixes) != 1:
        raise ValueError(
            f"a prefix needs JRT layers, all with the same one; mixers have {sorted(prefixes)}"
        )
    for config in mixers:
        if not (config.causal or isinstance(config, JRTConfig)):
            raise ValueError(
                f"mixer={config.mixer!r} is bidirectional and sees the tokens that are predicted "
                "behind the prefix; choose a causal mixer"
            )
    return prefixes.pop()


def positions_of(batch: Batch, packed: bool) -> Int[Array, "b l"]:
    """Positions of tokens, from the start of each document."""
    if packed:
        return Segments.from_ids(batch["segment_ids"]).positions
    rows, length = batch["inputs"].shape
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))


def _run(
    model: LanguageModel,
    variables: Variables,
    batch: Batch,
    seen: Int[Array, "b l"],
    packed: bool,
    dropout: Array | None,
) -> tuple[Float[Array, "b l d"], Any]:
    """Hidden vectors of what is seen, and the running statistics after it; None to evaluate."""
    segments = Segments.from_ids(batch["segment_ids"]) if packed else None
    (x, _), updated = model.apply(
        variables,
        seen,
        segments=segments,
        deterministic=dropout is None,
        rngs=None if dropout is None else {"dropout": dropout},
        mutable=[] if dropout is None else ["batch_stats"],
        method="hidden",
    )
    return x, updated.get("batch_stats", variables.get("batch_stats", {}))


def _sums(
    model: LanguageModel,
    variables: Variables,
    x: Float[Array, "b l d"],
    targets: Int[Array, "b l"],
    weights: Float[Array, "b l"],
    tile: int | None,
) -> Sums:
    table = output_table(model.config, variables["params"])
    return tiled_sums(
        functools.partial(project, model.config), table, x, targets, weights, tile=tile
    )


def _task(model: LanguageModel, param_labels: Callable[[Any], Any], loss: Any) -> Task:
    @initializer
    def init(key: Array) -> Variables:
        return dict(model.init(key, jnp.zeros((1, 8), jnp.int32)))

    return Task(
        init=init,
        loss=loss,
        param_labels=param_labels,
        param_axes=functools.partial(param_axes, model.config),
    )
