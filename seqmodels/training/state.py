"""Everything that training changes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from seqmodels.parallel.mesh import MESH_AXES, batch_sharding, replicated
from seqmodels.parallel.parameters import parameter_shardings
from seqmodels.training.config import TrainConfig
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.task import Task, Variables


@flax.struct.dataclass
class Average:
    """A running average of the parameters.

    Attributes:
      params: the average; before the first update the parameters themselves.
      updates: how many were averaged, int32 scalar.
    """

    params: Any
    updates: Any

    def update(self, params: Any, decay: float) -> "Average":
        """Weighs the last of n updates ``(1 - decay) / (1 - decay^n)``, as Adam's moments do."""
        updates = self.updates + 1
        weight = (1.0 - decay) / -jnp.expm1(updates * math.log(decay))
        average = jax.tree.map(
            lambda a, p: a + weight.astype(a.dtype) * (p - a), self.params, params
        )
        return Average(average, updates)


@flax.struct.dataclass
class TrainState:
    """Model, optimizer and randomness after ``step`` batches.

    Attributes:
      step: batches consumed, int32 scalar.
      params: the model's parameters.
      batch_stats: BatchNorm's running statistics; empty without BatchNorm.
      opt_state: the optimizer's state.
      rng: key that dropout's keys are derived from, together with ``step``.
      average: an ``Average`` of the parameters; None without ``ema_decay``.
      carry: what the last batch left for the next one's rows; None where batches are independent.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    rng: Any
    average: Any = None
    carry: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables; ``batch_stats`` only where the model has some."""
        statistics = {"batch_stats": self.batch_stats} if self.batch_stats else {}
        return {"params": self.params, **statistics}

    @property
    def averaged(self) -> dict[str, Any]:
        """The variables to evaluate: with the average of the parameters, if there is one."""
        average = {} if self.average is None else {"params": self.average.params}
        return self.variables | average


def variable_shardings(task: Task, mesh: Mesh, over: Sequence[str] = MESH_AXES) -> Variables:
    """Where the model's variables live; statistics are whole on each device.

    Args:
      task: the model's.
      mesh: of ``make_mesh``.
      over: the axes of the mesh that parameters are split over.
    """
    variables = jax.eval_shape(task.init, jax.random.key(0))
    params = variables["params"]
    return {
        **dict.fromkeys(variables, replicated(mesh)),
        "params": parameter_shardings(task.param_axes(params), params, mesh, over),
    }


def shardings(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, *, average: bool = False
) -> TrainState:
    """Where each part of the state lives.

    What the optimizer and the average keep of a parameter is split as the parameter is, rows of the
    carry are split over data, and the rest is whole on each device.

    Args:
      task, optimizer: the model's and its own.
      mesh: of ``make_mesh``.
      average: whether the state has one.
    """
    whole, params = replicated(mesh), variable_shardings(task, mesh)["params"]
    opt_state = jax.eval_shape(
        lambda key: optimizer.init(task.init(key)["params"]), jax.random.key(0)
    )
    return TrainState(
        step=whole,
        params=params,
        batch_stats=whole,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            lambda leaf, sharding: leaf if _is_nothing(leaf) else sharding,
            opt_state,
            params,
            transform_non_params=lambda _: whole,
            is_leaf=_is_nothing,
        ),
        rng=whole,
        average=Average(params, whole) if average else None,
        carry=batch_sharding(mesh),
    )


def _is_nothing(leaf: Any) -> bool:
    """What the optimizer keeps of a parameter that is not trained."""
    return isinstance(leaf, optax.MaskedNode)


def _initializer(
    task: Task, config: TrainConfig
) -> tuple[Callable[..., TrainState], optax.GradientTransformation]:
    init_key, rng = jax.random.split(jax.random.key(config.seed))
    abstract = jax.eval_shape(task.init, init_key)
    optimizer = make_optimizer(config, task.param_labels(abstract["params"]))

    def init(given: Variables | None = None) -> TrainState:
        variables = task.init(init_key) if given is None else given
        params, average = variables["params"], None
        if config.ema_decay is not None:
            # A copy: one array could not be donated twice.
            average = Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            rng=rng,
            average=average,
            carry=task.start(config.batch_size),
        )

    return init, optimizer


def optimizer_of(task: Task, config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer for the task's parameters.

    Raises:
      ValueError: the config names a parameter group that the model does not have.
    """
    return _initializer(task, config)[1]


def create_state(task: Task, config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state before the first step, on the mesh; raises as the optimizer does."""
    init, optimizer = _initializer(task, config)
    given = () if task.begin is None else (task.begin(),)
    return jax.jit(init, out_shardings=_shardings(task, optimizer, config, mesh))(*given)


def abstract_state(task: Task, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of ``create_state``'s result, without computing it."""
    init, optimizer = _initializer(task, config)
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
        ),
        _shardings(task, optimizer, config, mesh),
        jax.eval_shape(init),
    )


def _shardings(
    task: Task, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> TrainState:
    return shardings(task, optimizer, mesh, average=config.ema_decay is not None)
