"""The device mesh and where batches and parameters live on it.

A mesh always has the axes ``("data", "model", "seq")``, so that a program written for one device is
the program for many. Only ``data`` is in use: nothing splits parameters or the length yet, and the
other two have size 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.common import segments

MESH_AXES = ("data", "model", "seq")


def make_mesh(
    data: int = -1,
    model: int = 1,
    seq: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices as a mesh with axes ``("data", "model", "seq")``.

    Args:
      data: size of the axis that splits the rows of a batch; -1 takes all devices.
      model: 1; parameters are not split, every device has them in full.
      seq: 1; the length is not split.
      devices: the devices to use; default all of them, of all processes.

    Raises:
      ValueError: ``model`` or ``seq`` is not 1, or ``data`` is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    for name, size in (("model", model), ("seq", seq)):
        if size != 1:
            raise ValueError(
                f"mesh axis {name}={size} must be 1, nothing is split over it yet; use data=-1, "
                "which splits the rows of a batch over all devices"
            )
    if data < 1 and data != -1:
        raise ValueError(f"mesh axis data={data} must be at least 1, or -1 for all devices")
    if data not in (-1, len(devices)):
        raise ValueError(
            f"mesh axis data={data} needs {data} devices, there are {len(devices)}; use data=-1 to "
            "take all, or pass a subset of devices"
        )
    grid = np.asarray(devices).reshape(-1, 1, 1)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def on_mesh(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``fn`` traced with ``mesh`` as the mesh that the ops of ``seqmodels.ops`` find."""

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on each device: parameters, optimizer state, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows (axis 0) of a batch are split over ``data``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Puts a host batch on the mesh, rows split over ``data``.

    With several processes each one passes its own rows, and the result is the global batch.

    Args:
      batch: arrays ``(B, ...)`` that agree on ``B``; "segment_ids", if any, ``(B, ..., L)``.
      mesh: a mesh of ``make_mesh``.

    Raises:
      ValueError: ``B`` does not divide by the data axis, or segment ids are out of order (see
        ``pallas_kernels.common.segments.check``).
    """
    if "segment_ids" in batch:
        # The last place where they can be read: a step sees traced ones.
        ids = np.asarray(batch["segment_ids"])
        segments.check(ids.reshape(-1, ids.shape[-1]))
    processes = jax.process_count()
    for name, value in batch.items():
        rows = value.shape[0] * processes
        if rows % mesh.shape["data"]:
            raise ValueError(
                f"batch['{name}'] has {rows} rows, which do not divide over the mesh's data axis "
                f"of {mesh.shape['data']}; choose a batch_size that is a multiple of "
                f"{mesh.shape['data']}, or a smaller data axis"
            )
    sharding = batch_sharding(mesh)
    if processes == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }
