"""The task of a language model: the next token, with states carried between batches or not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqmodels.mixers import Segments, build
from seqmodels.models import LanguageModel, param_axes
from seqmodels.models.language import output_table, project
from seqmodels.training.chunks import chunked
from seqmodels.training.cross_entropy import tiled_sums
from seqmodels.training.task import Batch, Sums, Task, Variables, initializer


def language(
    model: LanguageModel,
    param_labels: Callable[[Any], Any],
    *,
    packed: bool = True,
    causal: bool = True,
    carry_state: bool = False,
    tile: int | None = 1024,
    chunk: int | None = None,
    share: float | None = None,
    balance: float = 0.0,
) -> Task:
    """Next-token prediction over batches of ``seqmodels.data.text``.

    Args:
      model: the model.
      param_labels: see ``Task.param_labels``.
      packed: whether rows may hold several documents; without, segment ids are ignored.
      causal: whether mixers have to be; False where the inputs do not hold the targets.
      carry_state: each batch begins in the states that the one before ended in (truncated
        backpropagation through time; Williams and Peng 1990). Needs batches of streams.
      tile: tokens on a device whose logits exist at a time; None for all.
      chunk: None, or tokens of a row whose intermediate values exist at a time, see
        ``seqmodels.training.chunks``; the gradient is the same.
      share: None, or the share of the chunks that each step backpropagates through, drawn at
        random: an unbiased gradient.
      balance: weight of what mixtures of experts sow to be used alike, the mean over layers, in the
        loss of a step; evaluations leave it out.

    Raises:
      ValueError: a mixer that is not causal where it has to be; with ``packed`` one that takes a
        document a row; with ``carry_state`` or ``chunk`` one without a state of a fixed size; with
        ``chunk`` BatchNorm, whose statistics are of whole rows; a share without chunks.
    """
    if causal:
        check_causal(model)
    if packed:
        check_packs(model)
    if carry_state:
        check_carries(model, "carry_state=True")
    if chunk is not None:
        check_carries(model, f"chunk={chunk}")
        if model.config.backbone.norm == "batch":
            raise ValueError(
                f"chunk={chunk} cannot have norm='batch', whose statistics are of whole rows; "
                "choose another norm, or no chunk"
            )
    elif share is not None:
        raise ValueError(f"share={share} is of chunks; set chunk, or share=None")

    @initializer
    def init(key: Array) -> Variables:
        return dict(model.init(key, jnp.zeros((1, 8), jnp.int32)))

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: Any
    ) -> tuple[Sums, Any, Any]:
        if chunk is None:
            return whole(variables, batch, key, carry)
        names = ("inputs", "targets", "weights", *(("segment_ids",) if packed else ()))
        rows = {name: jnp.asarray(batch[name]) for name in names}
        length = rows["inputs"].shape[1]
        if length % chunk and carry is not None and not packed:
            raise ValueError(
                f"chunk={chunk} does not divide rows of {length} tokens, whose state goes on; "
                "choose one that does, or packed=True"
            )
        drawn = None
        if share is not None and key is not None:
            # Apart from dropout's keys, which are the same for each chunk, as for a whole row.
            drawn = jax.random.bernoulli(jax.random.fold_in(key, 1), share, (-(-length // chunk),))

        def run(state: Any, rows: Batch) -> tuple[Sums, Any]:
            sums, _, state = whole(variables, rows, key, state)
            return sums, state

        sums, state = chunked(
            run,
            start(rows["inputs"].shape[0]) if carry is None else carry,
            rows,
            chunk=min(chunk, length),
            drawn=drawn,
            share=share or 1.0,
        )
        return sums, variables.get("batch_stats", {}), None if carry is None else state

    def whole(
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
            mutable=[] if key is None else ["batch_stats", *(["losses"] if balance else [])],
            method="hidden",
        )

        sums = tiled_sums(
            functools.partial(project, model.config),
            output_table(model.config, variables["params"]),
            x,
            batch["targets"],
            batch["weights"],
            tile=tile,
        )
        sown = jax.tree.leaves(updated.get("losses", {}))
        if sown:
            mean = jnp.mean(jnp.concatenate([jnp.ravel(part) for part in sown]))
            sums = sums.replace(loss=sums.loss + balance * mean * sums.weight)  # type: ignore[attr-defined]
        statistics = updated.get("batch_stats", variables.get("batch_stats", {}))
        return sums, statistics, None if carry is None else state

    def start(rows: int) -> Any:
        return model.initial_state(rows, dtype=model.config.dtype)

    return Task(
        init=init,
        loss=loss,
        param_labels=param_labels,
        param_axes=functools.partial(param_axes, model.config),
        carry=start if carry_state else None,
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


def check_carries(model: LanguageModel, what: str) -> None:
    """Raises ValueError unless every mixer carries a state whose size does not grow.

    Args:
      model: the model.
      what: the option that needs it, as it is set.
    """
    option = what.partition("=")[0]
    for config in model.config.backbone.mixers:
        if not config.stateful:
            raise ValueError(
                f"{what} needs mixers that stream, mixer={config.mixer!r} carries no state; choose "
                f"another mixer, or leave {option} out"
            )
    growing = growing_mixers(model)
    if growing:
        raise ValueError(
            f"{what} needs states of a fixed size, but the cache of mixer={growing[0]!r} grows "
            f"with the text; choose another mixer, or leave {option} out"
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
