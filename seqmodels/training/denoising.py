"""Training tasks of self-pretraining: a denoiser, and a model that begins with what it learned."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Shaped

from seqmodels.models.denoiser import Denoising, corrupt
from seqmodels.training.task import Batch, Sums, Task, Variables, initializer


def denoising(
    model: nn.Module,
    param_labels: Callable[[Any], Any],
    *,
    kind: Denoising,
    share: float,
    length: int,
    channels: int | None = None,
) -> Task:
    """The task of a ``Denoiser``: cross entropy of tokens, or squared errors of values.

    Of a batch it reads "inputs", "segment_ids" and "weights", and no labels. Pairs count as two
    rows. Evaluation masks the same places each time.

    Args:
      model: a ``Denoiser``.
      param_labels: see ``Task.param_labels``.
      kind, share: see ``corrupt``.
      length, channels: see ``classification``.
    """

    @initializer
    def init(key: Array) -> Variables:
        segment_ids = jnp.ones((1, length), jnp.int32)
        inputs = segment_ids if channels is None else jnp.ones((1, length, channels))
        return dict(model.init(key, inputs, segment_ids, deterministic=True))

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: None
    ) -> tuple[Sums, Any, None]:
        segment_ids, inputs = batch["segment_ids"], batch["inputs"]
        rows = segment_ids.reshape(-1, segment_ids.shape[-1])
        weights = jnp.repeat(batch["weights"], len(rows) // len(segment_ids))
        inputs = inputs.reshape(*rows.shape, *inputs.shape[segment_ids.ndim :])
        dropout, mask = jax.random.split(jax.random.key(0) if key is None else key)
        seen, wanted, where = corrupt(inputs, rows != 0, kind, share, mask)
        statistics = variables.get("batch_stats", {})
        if key is None:
            said: Any = model.apply(variables, seen, rows, deterministic=True)
        else:
            said, updated = model.apply(
                variables,
                seen,
                rows,
                deterministic=False,
                rngs={"dropout": dropout},
                mutable=["batch_stats"],
            )
            statistics = updated.get("batch_stats", statistics)
        return denoising_sums(said, wanted, where, weights), statistics, carry

    return Task(init=init, loss=loss, param_labels=param_labels)


def denoising_sums(
    said: Shaped[Array, "b l out"],
    wanted: Shaped[Array, "b l *c"],
    where: Bool[Array, "b l"],
    weights: Shaped[Array, " b"],
) -> Sums:
    """Sums over the places asked for, each times its row's weight; of values none is correct."""
    counted = jnp.where(where, weights[:, None], 0.0)
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        losses = optax.softmax_cross_entropy_with_integer_labels(said, wanted)
        correct = jnp.argmax(said, axis=-1) == wanted
    else:
        losses = jnp.mean((said - wanted) ** 2, axis=-1)
        correct = jnp.zeros_like(where)
    return Sums(
        loss=jnp.sum(jnp.where(where, losses * counted, 0.0)),
        correct=jnp.sum(jnp.where(correct, counted, 0.0)),
        weight=jnp.sum(counted),
    )


def beginning_with(task: Task, learned: Variables) -> Task:
    """The task, whose parameters and statistics begin as ``learned`` where it has them by name.

    Entries of ``learned`` that the task's model does not have, such as another head, are left out.
    """

    @initializer
    def init(key: Array) -> Variables:
        fresh = task.init(key)
        return {
            collection: {
                name: learned.get(collection, {}).get(name, part) for name, part in parts.items()
            }
            for collection, parts in fresh.items()
        }

    return dataclasses.replace(task, init=init)
