"""Everything that training changes."""

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


def create_state(
    task: Task, config: TrainConfig, mesh: Mesh
) -> tuple[TrainState, optax.GradientTransformation]:
    """Initialises the model and its optimizer, replicated over the mesh.

    Raises:
      ValueError: the config names a parameter group that the model does not have.
    """
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

    return jax.jit(init, out_shardings=replicated(mesh))(), optimizer
