"""Low-rank adaptation: a model that stays as it is, and two narrow matrices beside each map.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv:2106.09685),
section 4.1. A function of the parameters alone: the model computes with ``W + alpha / r A B``, so
that any layer with a kernel ``(in, out)`` can have it, and what was learned can be added to W.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from seqmodels.mixers.base import ParamLabel
from seqmodels.ranges import Checked, Positive, Size
from seqmodels.training.task import Batch, Task, Variables, initializer

BASE, ADAPTERS = "base", "adapters"
"""The parts of an adapted model's parameters."""

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Checked):
    """Which layers are adapted, and how.

    Attributes:
      rank: r, columns of A and rows of B.
      alpha: what ``A B`` is multiplied by, times the rank.
      layers: names of dense layers, such as "q_proj"; () for all with a kernel ``(in, out)``.
    """

    rank: Size = 8
    alpha: Positive = 16.0
    layers: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.rank


def adapted_paths(params: Mapping[str, Any], config: LoRAConfig) -> list[Path]:
    """Paths of the kernels that are adapted.

    Raises:
      ValueError: a name is that of no dense layer, or there is none.
    """
    flat = flax.traverse_util.flatten_dict(params)
    dense = [
        path
        for path, leaf in flat.items()
        if path[-1] == "kernel" and len(leaf.shape) == 2 and "conv" not in path[-2]
    ]
    names = sorted({path[-2] for path in dense})
    unknown = sorted(set(config.layers) - set(names))
    if unknown or not dense:
        raise ValueError(
            f"LoRAConfig: layers={config.layers} must be dense layers of the model, which has "
            f"{', '.join(names)}"
        )
    return [path for path in dense if not config.layers or path[-2] in config.layers]


def new_adapters(params: Mapping[str, Any], config: LoRAConfig, key: Array) -> dict[str, Any]:
    """A, normal with the deviation ``in^-1/2``, and B, 0, for each kernel, under its path."""
    paths = adapted_paths(params, config)
    flat, new = flax.traverse_util.flatten_dict(params), {}
    for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
        rows, columns = flat[path].shape
        normal = jax.random.normal(own, (rows, config.rank), jnp.float32)
        new[*path, "a"] = normal * rows**-0.5
        new[*path, "b"] = jnp.zeros((config.rank, columns), jnp.float32)
    return flax.traverse_util.unflatten_dict(new)


def merged(
    params: Mapping[str, Any], adapters: Mapping[str, Any], config: LoRAConfig
) -> dict[str, Any]:
    """The parameters with ``alpha / r A B`` added."""
    flat = dict(flax.traverse_util.flatten_dict(params))
    parts = flax.traverse_util.flatten_dict(adapters)
    for path in {path[:-1] for path in parts}:
        product = jnp.dot(parts[*path, "a"], parts[*path, "b"], precision="highest")
        flat[path] = flat[path] + (config.scale * product).astype(flat[path].dtype)
    return flax.traverse_util.unflatten_dict(flat)


def adapted(task: Task, config: LoRAConfig, seed: int = 0) -> Task:
    """The task with adapters, which alone are trained.

    Parameters are ``{"base": those of the task, "adapters": A and B}``; ``merged`` makes them the
    task's again. The optimizer keeps nothing of the base.

    Args:
      task: its ``begin``, if any, gives the base.
      config: which layers.
      seed: of A.
    """
    key = jax.random.key(seed)

    def beside(variables: Variables) -> Variables:
        base = variables["params"]
        return {**variables, "params": {BASE: base, ADAPTERS: new_adapters(base, config, key)}}

    @initializer
    def init(key: Array) -> Variables:
        return beside(task.init(key))

    def loss(
        variables: Variables, batch: Batch, key: Array | None, carry: Any
    ) -> tuple[Any, Any, Any]:
        params = variables["params"]
        whole = merged(jax.lax.stop_gradient(params[BASE]), params[ADAPTERS], config)
        return task.loss({**variables, "params": whole}, batch, key, carry)

    def labels(params: Any) -> Any:
        kept = jax.tree.map(
            lambda label: dataclasses.replace(label, group="main", trainable=False),
            task.param_labels(params[BASE]),
            is_leaf=lambda leaf: isinstance(leaf, ParamLabel),
        )
        return {BASE: kept, ADAPTERS: jax.tree.map(lambda _: ParamLabel(), params[ADAPTERS])}

    def axes(params: Any) -> Any:
        base = task.param_axes(params[BASE])
        flat = flax.traverse_util.flatten_dict(base)
        parts = {}
        for path in flax.traverse_util.flatten_dict(params[ADAPTERS]):
            rows, columns = (*flat[path[:-1]], None, None)[:2]
            sides = {"a": PartitionSpec(rows, None), "b": PartitionSpec(None, columns)}
            parts[path] = sides[path[-1]]
        return {BASE: base, ADAPTERS: flax.traverse_util.unflatten_dict(parts)}

    begin = task.begin
    return dataclasses.replace(
        task,
        init=init,
        loss=loss,
        param_labels=labels,
        param_axes=axes,
        begin=None if begin is None else lambda: beside(begin()),
    )
