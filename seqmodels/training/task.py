"""What training knows of a model: a few functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import dispatch

Batch = Mapping[str, Any]
Variables = dict[str, Any]
"""A model's collections: "params" and, with BatchNorm, "batch_stats"."""


@flax.struct.dataclass
class Sums:
    """Sums over the examples of a batch, each times its weight: float32 scalars on any device."""

    loss: Any
    correct: Any
    weight: Any

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def initializer(init: Callable[[Array], Variables]) -> Callable[[Array], Variables]:
    """``init``, jitted: traced once, while its shapes are asked for several times.

    Parameters do not depend on what the ops compute, which is dead code on every platform: the
    portable path is traced, and no kernel.
    """
    jitted = jax.jit(init)

    def run(key: Array) -> Variables:
        with dispatch.only_for("cpu"):
            return jitted(key)

    return run


def unnamed(params: Any) -> Any:
    """No logical axes for any parameter: each is split where its sizes allow."""
    return jax.tree.map(lambda _: PartitionSpec(), params)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its loss.

    Attributes:
      init: ``init(key) -> variables``, see ``initializer``.
      loss: ``loss(variables, batch, key, carry) -> (sums, batch_stats, carry)``. With ``key=None``
        the model is evaluated: no dropout, running statistics, ``batch_stats`` returned as given.
        ``carry`` is what earlier batches left for this one's rows; None where batches are
        independent.
      param_labels: ``param_labels(params) -> tree like params`` of ``ParamLabel``: learning rate
        group and weight decay of each parameter.
      param_axes: ``param_axes(params) -> tree like params`` of the logical axes that say how each
        parameter is split over devices; see ``seqmodels.parallel.parameters``.
      begin: None, or ``begin()``: the variables that training begins with, in place of what
        ``init`` makes, with its shapes.
      carry: None, or ``carry(rows)``: a tree of arrays ``(rows, ...)``, what the first batch finds.
        Row i of each batch then continues row i of the one before; no gradient flows back.
    """

    init: Callable[[Array], Variables]
    loss: Callable[[Variables, Batch, Array | None, Any], tuple[Sums, Any, Any]]
    param_labels: Callable[[Any], Any]
    param_axes: Callable[[Any], Any] = unnamed
    begin: Callable[[], Variables] | None = None
    carry: Callable[[int], Any] | None = None

    def start(self, rows: int) -> Any:
        """The carry before the first batch of so many rows; None without one."""
        return None if self.carry is None else self.carry(rows)


def classification_sums(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], weights: Float[Array, " b"]
) -> Sums:
    """Weighted softmax cross entropy and number of correct predictions."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return weighted_sums(losses, jnp.argmax(logits, axis=-1) == labels, weights)


def weighted_sums(
    losses: Float[Array, " b"], correct: Bool[Array, " b"], weights: Float[Array, " b"]
) -> Sums:
    """Sums of losses and of correct predictions, each times its weight."""
    # A row of weight 0 must not turn the sum into NaN, whatever it holds.
    used = weights != 0
    return Sums(
        loss=jnp.sum(jnp.where(used, losses * weights, 0.0)),
        correct=jnp.sum(jnp.where(used, correct.astype(jnp.float32) * weights, 0.0)),
        weight=jnp.sum(weights),
    )


def classification(
    model: nn.Module,
    param_labels: Callable[[Any], Any],
    *,
    param_axes: Callable[[Any], Any] = unnamed,
    length: int,
    parts: int = 1,
    channels: int | None = None,
) -> Task:
    """The task of a Linen classifier.

    Args:
      model: ``model.apply(variables, inputs, segment_ids, deterministic=...) -> logits (B, C)``.
      param_labels, param_axes: see ``Task``.
      length: length of the dummy batch that initialises the parameters; they do not depend on it.
      parts: sequences of one example, side by side where there are several.
      channels: of real inputs; None for token ids.
    """

    @initializer
    def init(key: Array) -> Variables:
        segment_ids = jnp.ones((1, parts, length) if parts > 1 else (1, length), jnp.int32)
        reals = None if channels is None else jnp.ones((*segment_ids.shape, channels))
        inputs = segment_ids if reals is None else reals
        return dict(model.init(key, inputs, segment_ids, deterministic=True))

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: None
    ) -> tuple[Sums, Any, None]:
        inputs = (batch["inputs"], batch["segment_ids"])
        statistics = variables.get("batch_stats", {})
        if key is None:
            logits: Any = model.apply(variables, *inputs, deterministic=True)
        else:
            logits, updated = model.apply(
                variables,
                *inputs,
                deterministic=False,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            statistics = updated.get("batch_stats", statistics)
        return classification_sums(logits, batch["labels"], batch["weights"]), statistics, carry

    return Task(init=init, loss=loss, param_labels=param_labels, param_axes=param_axes)
