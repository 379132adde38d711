"""AdamW with parameter groups, from the models' ``param_labels``.

One Adam for all parameters, then masked decoupled weight decay, then one learning rate for each
group; so a step is a few fused element-wise updates, whatever the number of groups. For S5 the
group "ssm" is plain Adam with its own rate and the rest AdamW (lindermanlab/S5, train_helpers).
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seqmodels.mixers.base import ParamLabel
from seqmodels.training.config import TrainConfig


def schedule(config: TrainConfig, peak: float) -> optax.Schedule:
    """Learning rate at each step: linear warm-up from 0, then to ``min_lr`` at ``steps``.

    Unlike lindermanlab/S5, whose cosine runs below the warm-up and ends before training does, the
    decay starts at the peak when the warm-up ends, and ends with the last step.
    """
    end = min(config.min_lr, peak)
    decay_steps = max(config.steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        alpha = end / peak if peak else 0.0
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=alpha)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, decay_steps)
    elif config.schedule == "rsqrt":
        after = _rsqrt(peak, max(config.warmup_steps, 1))
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    # Shifted by one, so that the first update is not a wasted one at rate 0.
    return optax.join_schedules([lambda n: warmup(n + 1), after], [config.warmup_steps])


def _rsqrt(peak: float, begin: int) -> optax.Schedule:
    """``peak sqrt(begin / (begin + n))`` at step n after the warm-up; before it, where nobody looks
    but the schedules that are joined, the peak."""
    return lambda n: peak * jnp.sqrt(begin / (begin + jnp.maximum(n, 0)))


class GroupRatesState(NamedTuple):
    updates: jax.Array  # int32 scalar: how many were made


def scale_by_group_rates(
    schedules: Mapping[str, optax.Schedule], groups: Any
) -> optax.GradientTransformation:
    """Multiplies each update by minus the learning rate of its parameter's group.

    Args:
      schedules: group name -> learning rate at each step.
      groups: tree like the parameters, of group names.
    """

    def init(params: Any) -> GroupRatesState:
        del params
        return GroupRatesState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: GroupRatesState, params: Any = None
    ) -> tuple[Any, GroupRatesState]:
        del params
        rates = {name: rate(state.updates) for name, rate in schedules.items()}
        scaled = jax.tree.map(
            lambda group, u: u * jnp.asarray(-rates[group], u.dtype), groups, updates
        )
        return scaled, GroupRatesState(optax.safe_increment(state.updates))

    return optax.GradientTransformation(init, update)


def group_rates(config: TrainConfig, groups: Any) -> dict[str, float]:
    """Peak learning rate of each group in use.

    Raises:
      ValueError: the config gives a rate to a group that no parameter belongs to.
    """
    used = sorted(set(jax.tree.leaves(groups)))
    unknown = sorted(set(config.group_learning_rates) - set(used))
    if unknown:
        raise ValueError(
            f"group_learning_rates names {', '.join(map(repr, unknown))}, but the model's "
            f"parameters are in the groups {', '.join(map(repr, used))}"
        )
    return {name: config.group_learning_rates.get(name, config.learning_rate) for name in used}


def make_optimizer(config: TrainConfig, param_labels: Any) -> optax.GradientTransformation:
    """The optimizer of ``config`` for parameters with these labels.

    Args:
      config: rates, decay, schedule, clipping.
      param_labels: tree like the parameters, of ``ParamLabel``.

    Raises:
      ValueError: see ``group_rates``.

    Nothing is kept of parameters that are not ``trainable``, and they do not change.
    """
    groups, decays, trained = (
        jax.tree.map(
            attrgetter(name), param_labels, is_leaf=lambda leaf: isinstance(leaf, ParamLabel)
        )
        for name in ("group", "weight_decay", "trainable")
    )
    frozen = not all(jax.tree.leaves(trained))
    if frozen:
        groups, decays = (
            jax.tree.map(lambda leaf, keep: leaf if keep else optax.MaskedNode(), tree, trained)
            for tree in (groups, decays)
        )
    rates = group_rates(config, groups)
    parts = [
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        scale_by_group_rates({g: schedule(config, peak) for g, peak in rates.items()}, groups),
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if not frozen:
        return optax.chain(*parts)
    return optax.multi_transform({True: optax.chain(*parts), False: optax.set_to_zero()}, trained)
