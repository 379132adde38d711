"""Where parameters live: names of their axes, and one table from those to the axes of the mesh.

An axis has a logical name: "embed" are the channels of the residual stream, "inner" the channels or
heads that a mixer works on, "mlp" a hidden layer, "vocab" the tokens. Layers are named here, what
only one mixer has is named by it (``MixerConfig.param_axes``). No device keeps all of a parameter:
what the table leaves of the mesh goes to the largest axis that it divides. The compiler gathers a
parameter where it is used, and sums its gradient into the same parts (ZeRO; Rajbhandari et al.
2020, arXiv:1910.02054); the optimizer's state has parts like them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from seqmodels.parallel.mesh import MESH_AXES, current_mesh

RULES: dict[str, tuple[str, ...]] = {
    "embed": ("data", "seq"),
    "inner": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
}
"""The axes of the mesh that split an axis of a parameter, by its logical name.

Shards of a row have the same parameters, as the rows of a batch do: both share them out.
"""

INTO = PartitionSpec("embed", "inner")
OUT_OF = PartitionSpec("inner", "embed")
TAPS = PartitionSpec(None, "inner")
TABLE = PartitionSpec("vocab", "embed")
_LAYERS: dict[str, PartitionSpec] = {
    **dict.fromkeys(("in_proj", "q_proj", "k_proj", "v_proj", "g_proj", "f_proj", "i_proj"), INTO),
    **dict.fromkeys(("a_proj", "b_proj", "linear_x", "linear_y", "gate", "value"), INTO),
    **dict.fromkeys(("o_proj", "out_proj", "linear_out"), OUT_OF),
    **dict.fromkeys(("x_proj", "fc_D"), PartitionSpec("inner", None)),
    **dict.fromkeys(("dt_proj", "up"), PartitionSpec(None, "inner")),
    **dict.fromkeys(("conv", "conv1d", "conv_1d", "q_conv", "k_conv", "v_conv"), TAPS),
    "down": PartitionSpec("embed", None),
    "latent_out": PartitionSpec(None, "embed"),
    **dict.fromkeys(
        ("mlp_in", "mlp_gate", "head_in", "shared_in", "shared_gate"), PartitionSpec("embed", "mlp")
    ),
    **dict.fromkeys(("mlp_out", "shared_out"), PartitionSpec("mlp", "embed")),
    **dict.fromkeys(("router", "shared_router", "latent_in"), PartitionSpec("embed", None)),
    "head": PartitionSpec("embed", "vocab"),
    "encoder": PartitionSpec(None, "embed"),
}
_LEAVES = {
    "embedding": TABLE,
    **dict.fromkeys(("w_in", "w_gate"), PartitionSpec(None, "embed", "mlp")),
    "w_out": PartitionSpec(None, "mlp", "embed"),
}


def layer_axes(path: Sequence[str]) -> PartitionSpec:
    """Logical axes of a layer's parameter, such as ``("q_proj", "kernel")``; none of others."""
    layer, leaf = ("", *path)[-2:]
    if leaf == "kernel":
        return _LAYERS.get(layer, PartitionSpec())
    return _LEAVES.get(leaf, PartitionSpec())


def partition(
    axes: PartitionSpec,
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    over: Sequence[str] = MESH_AXES,
) -> PartitionSpec:
    """Which axes of ``mesh`` split each axis of a parameter.

    An axis of the mesh that does not divide the axis it is meant for takes another one, and where
    it divides none, devices along it have copies. Vectors stay whole: they are small.

    Args:
      axes: logical names, None or nothing where an axis has none. "layers" is never split: a scan
        goes over it.
      shape: of the parameter.
      mesh: of ``make_mesh``.
      over: the axes of the mesh that may split it.
    """
    names = (*axes, *(None,) * (len(shape) - len(axes)))
    candidates = [i for i, name in enumerate(names) if name != "layers"]
    taken: list[list[str]] = [[] for _ in shape]
    if len(candidates) > 1:
        left = list(shape)

        def take(place: int, axis: str) -> None:
            taken[place].append(axis)
            left[place] //= mesh.shape[axis]

        waiting = [axis for axis in over if mesh.shape[axis] > 1]
        for place in candidates:
            for axis in RULES.get(names[place] or "", ()):
                if axis in waiting and left[place] % mesh.shape[axis] == 0:
                    take(place, axis)
                    waiting.remove(axis)
        for axis in waiting:
            places = [i for i in candidates if left[i] % mesh.shape[axis] == 0]
            if places:
                take(max(places, key=left.__getitem__), axis)
    return PartitionSpec(*(tuple(part) or None for part in taken))


def gathered(x: jax.Array | np.ndarray, axes: PartitionSpec) -> jax.Array | np.ndarray:
    """A parameter as a layer uses it: of its parts only those over ``model`` are apart.

    The compiler finds out by itself where it multiplies; a look-up in a table has to be told.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = partition(axes, x.shape, mesh, over=("model",))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def parameter_shardings(axes: Any, params: Any, mesh: Mesh, over: Sequence[str] = MESH_AXES) -> Any:
    """A tree like ``params`` of shardings.

    Args:
      axes: tree like ``params`` of logical axes, see ``seqmodels.models.param_axes``.
      params: arrays or their shapes.
      mesh, over: as in ``partition``.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition(names, leaf.shape, mesh, over)),
        params,
        axes,
    )
