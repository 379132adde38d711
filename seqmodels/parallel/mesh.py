"""The device mesh and where batches and parameters live on it.

A mesh always has the axes ``("data", "model", "seq")``, so that a program written for one device is
the program for many: rows are split over ``data``, their length over ``seq``, heads and channels
over ``model``. Where parameters live is in ``seqmodels.parallel.parameters``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.common import dispatch, segments
from seqmodels.parallel import strategies

MESH_AXES = ("data", "model", "seq")


def make_mesh(
    data: int = -1,
    model: int = 1,
    seq: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices as a mesh with axes ``("data", "model", "seq")``.

    Args:
      data: size of the axis that splits the rows of a batch; -1 takes all devices that are left.
      model: size of the axis that splits heads, channels and the hidden layers of MLPs.
      seq: size of the axis that splits the length of the rows.
      devices: the devices to use; default all of them, of all processes.

    Raises:
      ValueError: a size is not positive, or ``data * model * seq`` is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 and data != -1:
        raise ValueError(f"mesh axis data={data} must be at least 1, or -1 for all devices")
    left = len(devices)
    for axis, size in (("model", model), ("seq", seq)):
        if size < 1:
            raise ValueError(f"mesh axis {axis}={size} must be at least 1")
        if left % size:
            nearest = max(n for n in range(1, size + 1) if left % n == 0)
            there = f"{left} devices"
            if left < len(devices):
                there += f" that model={model} leaves"
            raise ValueError(
                f"mesh axis {axis}={size} does not divide the {there}; use {axis}={nearest}, "
                "or pass a subset of devices"
            )
        left //= size
    if data not in (-1, left):
        raise ValueError(
            f"mesh axes data={data}, model={model} and seq={seq} need {data * model * seq} "
            f"devices, there are {len(devices)}; use data=-1 to take all, or pass a subset of them"
        )
    grid = np.asarray(devices).reshape(-1, model, seq)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def on_mesh(
    fn: Callable[..., Any], mesh: Mesh, exchange: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """``fn`` traced with ``mesh`` as the mesh that the ops of ``seqmodels.ops`` find, and for its
    platform alone.

    Args:
      fn: a function of arrays, such as a model's ``apply``; jit what is returned, not ``fn``.
      mesh: a mesh of ``make_mesh``.
      exchange: by the name of an op, what it takes in place of the default of
        ``strategies.STRATEGIES`` where ``mesh`` splits the length.

    Raises:
      ValueError: ``exchange`` names an op that there is not, or what it cannot take.
    """
    chosen = dict(exchange or {})
    strategies.check(chosen)

    def traced(*args: Any) -> Any:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            dispatch.only_for(mesh.devices.flat[0].platform),
            strategies.choosing(chosen),
        ):
            return fn(*args)

    return traced


def current_mesh() -> Any:
    """The mesh of ``on_mesh`` around this trace; None if there is none, or of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shards_of(length: int) -> int:
    """How many shards the current mesh splits rows of ``length`` tokens into.

    A single token is not split: every shard of its row decodes it.

    Raises:
      ValueError: ``length`` does not divide.
    """
    mesh = current_mesh()
    shards = 1 if mesh is None else mesh.shape["seq"]
    if shards == 1 or length == 1:
        return 1
    if length % shards:
        raise ValueError(
            f"a length of {length} tokens does not divide over the mesh's seq axis of {shards}; "
            f"pad rows to {-(-length // shards) * shards}, or choose a seq axis that divides it"
        )
    return shards


def model_parts(what: str, heads: int) -> int:
    """How many parts the current mesh splits so many heads into.

    Raises:
      ValueError: ``heads`` do not divide.
    """
    mesh = current_mesh()
    parts = 1 if mesh is None else mesh.shape["model"]
    if heads % parts:
        nearest = max(n for n in range(1, parts) if heads % n == 0)
        raise ValueError(
            f"{what}: {heads} heads do not divide over the mesh's model axis of {parts}; use "
            f"model={nearest}, or {-(-heads // parts) * parts} heads"
        )
    return parts


def split_tokens(x: jax.Array, first: int = 0) -> jax.Array:
    """``x (B, L, ..)`` where ``put_batch`` has its tokens, all of its channels on each device.

    Rows are axis ``first``.

    Said of the residual stream, it keeps the compiler from splitting channels there, where it
    would have to sum over the devices.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    rows, length = mesh_grid(*x.shape[first : first + 2])
    spec = PartitionSpec(
        *(None,) * first, "data" if rows > 1 else None, "seq" if length > 1 else None
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def in_tiles(x: jax.Array, tile: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """``x (B, L, D)`` in tiles ``(n, B, P, tile, D)``, and what puts such tiles together again.

    Tile i has ``tile`` tokens of each row of each of the P shards, so that no token moves; the last
    one ends in zeros where the length of a shard does not divide.
    """
    batch, length, _ = x.shape
    shards = mesh_grid(batch, length)[1]
    own = length // shards
    tile = min(tile, own)
    parts = jnp.pad(x.reshape(batch, shards, own, -1), ((0, 0), (0, 0), (0, -own % tile), (0, 0)))
    parts = jnp.moveaxis(parts.reshape(batch, shards, -1, tile, parts.shape[-1]), 2, 0)

    def join(parts: jax.Array) -> jax.Array:
        whole = jnp.moveaxis(parts, 0, 2).reshape(batch, shards, -1, parts.shape[-1])
        return whole[:, :, :own].reshape(batch, length, -1)

    return parts, join


def mesh_grid(rows: int, length: int) -> tuple[int, int]:
    """Into how many parts the current mesh splits rows and length; 1 where one does not divide."""
    mesh = current_mesh()
    if mesh is None:
        return 1, 1
    data, seq = mesh.shape["data"], mesh.shape["seq"]
    return (1 if rows % data else data), (1 if length % seq else seq)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on each device: metrics, counters."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows (axis 0) of a batch are split over ``data``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def token_sharding(mesh: Mesh, axis: int = 1) -> NamedSharding:
    """Rows are split over ``data``, and their length, ``axis``, over ``seq``."""
    return NamedSharding(mesh, PartitionSpec("data", *(None,) * (axis - 1), "seq"))


def rows_of_process(mesh: Any, batch_size: int, process: int | None = None) -> np.ndarray:
    """Which rows of a batch a process reads: those that its devices hold a part of.

    Processes whose devices split the length of the same rows read the same rows.

    Args:
      mesh: a mesh of ``make_mesh``, or what has its ``shape`` and ``devices``.
      batch_size: rows of the whole batch.
      process: default this one.

    Returns:
      Row numbers, increasing, int64.

    Raises:
      ValueError: ``batch_size`` does not divide by the data axis.
    """
    data = mesh.shape["data"]
    if batch_size % data:
        lower, upper = batch_size // data * data, -(-batch_size // data) * data
        raise ValueError(
            f"batch_size={batch_size} does not divide over the mesh's data axis of {data}; choose "
            + (f"{lower} or {upper}" if lower else f"{upper}")
            + ", or a smaller data axis"
        )
    blocks = _data_blocks(mesh, jax.process_index() if process is None else process)
    size = batch_size // data
    return (blocks[:, None] * size + np.arange(size)).reshape(-1)


def _data_blocks(mesh: Any, process: int) -> np.ndarray:
    """Places on the data axis of the devices of a process, increasing."""
    mine = np.vectorize(lambda device: device.process_index == process)(mesh.devices)
    return np.flatnonzero(mine.any(axis=(1, 2)))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Puts a host batch on the mesh, rows split over ``data``, their length over ``seq``.

    Rows whose length does not divide get more padding. With several processes each one passes its
    own rows, those of ``rows_of_process``, and the result is the global batch.

    Args:
      batch: arrays ``(B, ...)`` that agree on ``B``; "segment_ids", if any, ``(B, ..., L)``. Arrays
        whose shape begins with that of "segment_ids", or without it of "inputs", have a length.
      mesh: a mesh of ``make_mesh``.

    Raises:
      ValueError: ``B`` does not divide by the data axis, segment ids are out of order (see
        ``pallas_kernels.common.segments.check``), or a length does not divide by the seq axis and
        there are no segment ids that tell padding from tokens.
    """
    if "segment_ids" in batch:
        # The last place where they can be read: a step sees traced ones.
        ids = np.asarray(batch["segment_ids"])
        segments.check(ids.reshape(-1, ids.shape[-1]))
    data, blocks = mesh.shape["data"], np.arange(mesh.shape["data"])
    if jax.process_count() > 1:
        blocks = _data_blocks(mesh, jax.process_index())
    for name, value in batch.items():
        rows = value.shape[0] * data // len(blocks)
        if value.shape[0] % len(blocks):
            raise ValueError(
                f"batch['{name}'] has {rows} rows, which do not divide over the mesh's data axis "
                f"of {mesh.shape['data']}; choose a batch_size that is a multiple of "
                f"{mesh.shape['data']}, or a smaller data axis"
            )
    placed = {}
    tokens = np.shape(batch.get("segment_ids", batch.get("inputs", ())))
    for name, value in batch.items():
        array, sharding = np.asarray(value), batch_sharding(mesh)
        if len(tokens) > 1 and array.shape[: len(tokens)] == tokens:
            sharding = token_sharding(mesh, len(tokens) - 1)
            array = _lengthened(name, array, len(tokens) - 1, mesh, "segment_ids" in batch)
        if jax.process_count() == 1:
            placed[name] = jax.device_put(array, sharding)
        else:
            placed[name] = _global_array(array, sharding, blocks)
    return placed


def _global_array(x: np.ndarray, sharding: NamedSharding, blocks: np.ndarray) -> jax.Array:
    """The array of all processes, of which ``x`` is what is at ``blocks`` of the data axis."""
    size = len(x) // len(blocks)

    def part(index: Any) -> np.ndarray:
        block = (index[0].start or 0) // size
        place = int(np.searchsorted(blocks, block)) * size
        return x[(slice(place, place + size), *index[1:])]

    shape = (size * sharding.mesh.shape["data"], *x.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)


def _lengthened(name: str, x: np.ndarray, axis: int, mesh: Mesh, padded: bool) -> np.ndarray:
    """``x`` with zeros behind, until its length divides over the seq axis."""
    shards = mesh.shape["seq"]
    missing = -x.shape[axis] % shards
    if not missing:
        return x
    if not padded:
        raise ValueError(
            f"batch['{name}'] has a length of {x.shape[axis]}, which does not divide over the "
            f"mesh's seq axis of {shards}, and without segment_ids it cannot be padded; choose "
            f"{x.shape[axis] + missing}, or add segment_ids"
        )
    return np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
