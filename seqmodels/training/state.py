"""Everything that training changes."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from seqmodels.parallel.mesh import replicated
from seqmodels.training.config import TrainConfig
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.task import Task


@flax.struct.dataclass
class TrainState:
    """Model, optimizer and randomness after ``step`` batches.

    Attributes:
      step: batches consumed, int32 scalar.
      params: the model's parameters.
      batch_stats: BatchNorm's running statistics; empty without BatchNorm.
      opt_state: the optimizer's state.
      rng: key that dropout's keys are derived from, together with ``step``.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    rng: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables; ``batch_stats`` only where the model has some."""
        statistics = {"batch_stats": self.batch_stats} if self.batch_stats else {}
        return {"params": self.params, **statistics}


def _initializer(
    task: Task, config: TrainConfig
) -> tuple[Callable[[], TrainState], optax.GradientTransformation]:
    init_key, rng = jax.random.split(jax.random.key(config.seed))
    abstract = jax.eval_shape(task.init, init_key)
    optimizer = make_optimizer(config, task.marks(abstract["params"]))

    def init() -> TrainState:
        variables = task.init(init_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(variables["params"]),
            rng=rng,
        )

    return init, optimizer


def optimizer_of(task: Task, config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer for the task's parameters.

    Raises:
      ValueError: the config names a parameter group that the model does not have.
    """
    return _initializer(task, config)[1]


def create_state(task: Task, config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state before the first step, replicated over the mesh; raises as the optimizer does."""
    return jax.jit(_initializer(task, config)[0], out_shardings=replicated(mesh))()


def abstract_state(task: Task, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of ``create_state``'s result, without computing it."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(_initializer(task, config)[0]),
    )
