"""One training step and one evaluation step, as pure functions under jit."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from seqmodels.parallel.mesh import batch_sharding, on_mesh, replicated
from seqmodels.training.state import TrainState, shardings, variable_shardings
from seqmodels.training.task import Batch, Sums, Task, Variables


@flax.struct.dataclass
class StepMetrics:
    """What one training step measured.

    Attributes:
      sums: loss and accuracy.
      grad_norm: global norm of the gradient before clipping, float32 scalar.
      finite: bool scalar; False when the update was not applied.
      index: the batch's "index" ``(B,)``, of the rows of all processes; None without one.
      tokens: its real tokens, int32 scalar; 0 without segment ids.
    """

    sums: Any
    grad_norm: Any
    finite: Any
    index: Any = None
    tokens: Any = 0


def micro_batches(rows: Any, count: int) -> Any:
    """Splits the arrays ``(B, ...)`` of a tree into ``(count, B / count, ...)``.

    Micro-batch i holds the rows i, i + count, ...: each device splits its own rows, and nothing
    moves between devices.
    """
    return jax.tree.map(
        lambda value: jnp.swapaxes(value.reshape(-1, count, *value.shape[1:]), 0, 1), rows
    )


def whole_batch(parts: Any) -> Any:
    """Inverts ``micro_batches``."""
    return jax.tree.map(
        lambda value: jnp.swapaxes(value, 0, 1).reshape(-1, *value.shape[2:]), parts
    )


def gradients(
    task: Task, variables: Variables, batch: Batch, key: Array, accumulate: int, carry: Any = None
) -> tuple[Any, Sums, Any, Any]:
    """Gradient of the weighted mean loss over the batch, its sums, new statistics, new carry.

    With ``accumulate`` micro-batches the gradients of the summed losses are added up, and divided
    by the weight of the whole batch once: the same gradient as of one big batch.
    """

    def summed_loss(
        params: Any, statistics: Any, rows: Batch, k: Array, carry: Any
    ) -> tuple[Array, Any]:
        model = {"params": params} | ({"batch_stats": statistics} if statistics else {})
        sums, statistics, carry = task.loss(model, rows, k, carry)
        return sums.loss, (sums, statistics, carry)

    grad = jax.grad(summed_loss, has_aux=True)
    params, statistics = variables["params"], variables.get("batch_stats", {})
    if accumulate == 1:
        total, (sums, statistics, carry) = grad(params, statistics, batch, key, carry)
    else:

        def body(so_far: Any, xs: tuple[Batch, Array, Any]) -> tuple[Any, Any]:
            total, sums, statistics = so_far
            new, (new_sums, statistics, carry) = grad(params, statistics, *xs)
            return (jax.tree.map(jnp.add, total, new), sums + new_sums, statistics), carry

        zeros = jax.tree.map(jnp.zeros_like, params)
        zero_sums = Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
        rows, carries = (micro_batches(part, accumulate) for part in (dict(batch), carry))
        xs = (rows, jax.random.split(key, accumulate), carries)
        (total, sums, statistics), carries = jax.lax.scan(body, (zeros, zero_sums, statistics), xs)
        carry = whole_batch(carries)
    weight = jnp.maximum(sums.weight, 1e-9)
    return jax.tree.map(lambda g: g / weight.astype(g.dtype), total), sums, statistics, carry


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    skip_non_finite: bool = False,
    ema_decay: float | None = None,
    exchange: Mapping[str, str] | None = None,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, StepMetrics]]:
    """``train_step(state, batch, proceed) -> (state, metrics)``, jitted; ``state`` is donated.

    A loss, gradient, statistic or carry that is not finite leaves all of the state as it was; the
    step is counted only with ``skip_non_finite``. ``ema_decay`` is of the parameters' average, if
    the state has one. With ``proceed`` False (bool
    scalar) nothing changes: a caller who passes the last step's ``finite`` can read it while the
    next step is already under way, and still has the state from before the bad batch.
    """

    def train_step(
        state: TrainState, batch: Batch, proceed: Array
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.rng, state.step)
        grads, sums, statistics, carry = gradients(
            task, state.variables, batch, key, accumulate, state.carry
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        for leaf in jax.tree.leaves((statistics, carry)):
            finite &= jnp.all(jnp.isfinite(leaf))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if ema_decay is not None:
            average = average.update(params, ema_decay)
        apply = finite & proceed
        counted = proceed if skip_non_finite else apply
        kept = jax.tree.map(
            lambda new, old: jnp.where(apply, new, old),
            (params, statistics, opt_state, average, carry),
            (state.params, state.batch_stats, state.opt_state, state.average, state.carry),
        )
        new_state = TrainState(
            step=state.step + counted.astype(state.step.dtype),
            params=kept[0],
            batch_stats=kept[1],
            opt_state=kept[2],
            rng=state.rng,
            average=kept[3],
            carry=kept[4],
        )
        real = jnp.asarray(batch.get("segment_ids", 0)) != 0
        return new_state, StepMetrics(
            sums=sums,
            grad_norm=grad_norm,
            finite=finite,
            index=batch.get("index"),
            tokens=jnp.sum(real, dtype=jnp.int32),
        )

    whole = replicated(mesh)
    places = shardings(task, optimizer, mesh, average=ema_decay is not None)
    return jax.jit(
        on_mesh(train_step, mesh, exchange),
        donate_argnums=0,
        in_shardings=(places, None, whole),  # a batch is where `put_batch` has put it
        out_shardings=(places, whole),
    )


def make_eval_step(
    task: Task, mesh: Mesh, exchange: Mapping[str, str] | None = None
) -> Callable[[Variables, Batch, Any], tuple[Sums, Any]]:
    """``eval_step(variables, batch, carry) -> (sums, carry)``, jitted, without dropout."""

    def eval_step(variables: Variables, batch: Batch, carry: Any) -> tuple[Sums, Any]:
        sums, _, carry = task.loss(variables, batch, None, carry)
        return sums, carry

    rows = batch_sharding(mesh)
    return jax.jit(
        on_mesh(eval_step, mesh, exchange),
        in_shardings=(variable_shardings(task, mesh), None, rows),
        out_shardings=(replicated(mesh), rows),
    )
