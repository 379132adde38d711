"""Kernels on a mesh: every device of the data axis works on its own rows.

The compiler partitions XLA programs by itself, but not Pallas kernels; a kernel has to stand inside
`jax.shard_map`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


def on_mesh(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``fn`` traced with ``mesh`` as the mesh that ``over_rows`` finds."""

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def over_rows(
    op: Callable[..., Any], shared: Sequence[Any], rows: Sequence[Any], *, check_vma: bool = True
) -> Any:
    """``op(*shared, *rows)``, rows split over the data axis of the current mesh if there is one.

    Args:
      op: takes arrays and returns arrays whose axis 0 is the batch.
      shared: arguments that every device has in full; their gradients are summed over devices.
      rows: arguments ``(B, ...)``, or None.
      check_vma: as in `jax.shard_map`; False for kernels that do not know of it, where nothing may
        be shared.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("data", 1) == 1:
        return op(*shared, *rows)

    split = PartitionSpec("data")
    return jax.shard_map(
        lambda shared, rows: op(*shared, *rows),
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=check_vma,
    )(list(shared), list(rows))
