"""The task of a language model: the next token, with states carried between batches or not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqmodels.mixers import Segments, build
from seqmodels.models import LanguageModel
from seqmodels.training.cross_entropy import tiled_sums
from seqmodels.training.task import Batch, Sums, Task, Variables


def language(
    model: LanguageModel,
    param_labels: Callable[[Any], Any],
    *,
    packed: bool = True,
    carry_state: bool = False,
    tile: int = 1024,
) -> Task:
    """Next-token prediction over batches of ``seqmodels.data.text``.

    Args:
      model: the model.
      param_labels: see ``Task.param_labels``.
      packed: whether rows may hold several documents; without, segment ids are ignored.
      carry_state: each batch begins in the states that the one before ended in (truncated
        backpropagation through time; Williams and Peng 1990). Needs batches of streams.
      tile: tokens whose logits exist at a time.

    Raises:
      ValueError: a mixer that is not causal; with ``packed`` one that takes a document a row; with
        ``carry_state`` one without a state of a fixed size.
    """
    check_causal(model)
    if packed:
        check_packs(model)
    if carry_state:
        check_carries(model)

    def init(key: Array) -> Variables:
        return dict(model.init(key, jnp.zeros((1, 8), jnp.int32)))

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: Any
    ) -> tuple[Sums, Any, Any]:
        segments = Segments.from_ids(batch["segment_ids"]) if packed else None
        (x, state), updated = model.apply(
            variables,
            batch["inputs"],
            segments=segments,
            state=carry,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
            mutable=[] if key is None else ["batch_stats"],
            method="hidden",
        )

        def logits(hidden: Array) -> Any:
            return model.apply(variables, hidden, method="logits")

        sums = tiled_sums(
            logits,
            x,
            batch["targets"],
            batch["weights"],
            tile=tile,
        )
        statistics = updated.get("batch_stats", variables.get("batch_stats", {}))
        return sums, statistics, None if carry is None else state

    def start(rows: int) -> Any:
        return model.initial_state(rows, dtype=model.config.dtype)

    return Task(
        init=init, loss=loss, param_labels=param_labels, carry=start if carry_state else None
    )


def check_causal(model: LanguageModel) -> None:
    """Raises ValueError unless no mixer sees the token that is to be predicted."""
    for config in model.config.backbone.mixers:
        if not config.causal:
            raise ValueError(
                f"mixer={config.mixer!r} is bidirectional and sees the tokens that a language "
                "model predicts; choose a causal mixer, or bidirectional=False where it has it"
            )


def check_packs(model: LanguageModel) -> None:
    """Raises ValueError unless every mixer keeps the documents of a row apart."""
    for config in model.config.backbone.mixers:
        if not config.supports_packing:
            raise ValueError(
                f"packed=True needs mixers that keep documents apart, mixer={config.mixer!r} takes "
                "one document a row; choose another mixer, or a text of one document without "
                "carry_state"
            )


def check_carries(model: LanguageModel) -> None:
    """Raises ValueError unless every mixer carries a state whose size does not grow."""
    for config in model.config.backbone.mixers:
        if not config.stateful:
            raise ValueError(
                f"carry_state=True needs mixers that stream, mixer={config.mixer!r} carries no "
                "state; choose another mixer, or carry_state=False"
            )
    growing = growing_mixers(model)
    if growing:
        raise ValueError(
            f"carry_state=True needs states of a fixed size, but the cache of "
            f"mixer={growing[0]!r} grows with the text; choose another mixer, or carry_state=False"
        )


def growing_mixers(model: LanguageModel) -> list[str]:
    """Names of the mixers whose states need a ``max_length``."""
    names = []
    for config in model.config.backbone.mixers:
        if config.stateful:
            mixer = build(config, model.config.backbone.width, parent=None)
            try:
                jax.eval_shape(functools.partial(mixer.initial_state, 1))
            except ValueError:
                names.append(config.mixer)
    return names
