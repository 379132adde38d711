"""Softmax cross entropy over a large vocabulary, a tile of tokens at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.common import compat
from seqmodels.parallel.mesh import current_mesh, mesh_grid
from seqmodels.training.task import Sums, classification_sums, weighted_sums

Project = Callable[[Array, Array], Array]


def tiled_sums(
    project: Project,
    table: Float[Array, "v d"],
    x: Float[Array, "b l d"],
    targets: Int[Array, "b l"],
    weights: Float[Array, "b l"],
    *,
    tile: int | None = 1024,
) -> Sums:
    """Weighted cross entropy, and number of correct predictions, summed over all tokens.

    The logits of one tile exist at a time, forward and backward: backward computes them again.
    Memory is ``tile`` times the vocabulary instead of ``B * L`` times. On a mesh every device has
    tiles of its own tokens, and of its part of the vocabulary where the model axis divides it: the
    table is gathered once, its gradient is summed over the devices once, and of a tile nothing
    moves but each token's maximum and sums over the vocabulary.

    Args:
      project: ``(table, (tokens, D)) -> (tokens, V)``, logits of some rows of the table.
      table: a row for each token of the vocabulary.
      x: hidden vectors.
      targets: ids below V.
      weights: of each token in the loss; tokens of weight 0 may hold anything.
      tile: tokens in a tile, on each device; None for all of them.

    Raises:
      ValueError: ``tile`` is not positive.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be positive, or None for all tokens at once")
    mesh = current_mesh()
    if mesh is None:
        return _tiles(project, table, x, targets, weights, tile, None)
    rows, columns = mesh_grid(*targets.shape)
    split = mesh.shape["model"] > 1 and table.shape[0] % mesh.shape["model"] == 0
    tokens = PartitionSpec("data" if rows > 1 else None, "seq" if columns > 1 else None)
    axes = tuple(axis for axis in tokens if axis is not None)

    def local(table: Array, x: Array, targets: Array, weights: Array) -> Sums:
        if axes:  # gradients of the table are added up here, and summed over devices at the end
            table, _ = compat.match_vma(table, jax.lax.axis_index(axes))
        sums = _tiles(project, table, x, targets, weights, tile, "model" if split else None)
        return jax.tree.map(lambda part: jax.lax.psum(part, axes), sums) if axes else sums

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec("model" if split else None), tokens, tokens, tokens),
        out_specs=PartitionSpec(),
    )(table, x, targets, weights)


def _tiles(
    project: Project,
    table: Array,
    x: Array,
    targets: Array,
    weights: Array,
    tile: int | None,
    axis: str | None,
) -> Sums:
    """The sums of the tokens of one device."""
    size = targets.size if tile is None else min(tile, targets.size)

    def cut(z: Array, *shape: int) -> Array:
        z = z.reshape(-1, *shape)
        z = jnp.pad(z, ((0, -targets.size % size),) + ((0, 0),) * len(shape))
        return z.reshape(-1, size, *shape)

    @jax.checkpoint
    def add(sums: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        hidden, targets, weights = part
        logits = project(table, hidden)
        count = classification_sums if axis is None else functools.partial(_split_sums, axis)
        return sums + count(logits, targets, weights), None

    zeros = (jnp.zeros((), jnp.float32) for _ in range(3))
    zero = Sums(*compat.match_vma(*zeros, jnp.ravel(weights)[0])[:3])
    parts = (cut(x, x.shape[-1]), cut(targets), cut(weights))
    return jax.lax.scan(add, zero, parts)[0]


def _split_sums(
    axis: str, logits: Float[Array, "b v"], targets: Int[Array, " b"], weights: Float[Array, " b"]
) -> Sums:
    """``classification_sums`` of logits whose vocabulary is split over ``axis``."""
    logits = logits.astype(jnp.float32)
    count = logits.shape[-1]
    first = jax.lax.axis_index(axis) * jnp.int32(count)
    here = jax.lax.stop_gradient(logits)
    best = jax.lax.pmax(jnp.max(here, axis=-1), axis)
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - best[:, None]), axis=-1), axis)
    own = targets - first
    mine = (own >= 0) & (own < count)
    picked = jnp.take_along_axis(logits, jnp.clip(own, 0, count - 1)[:, None], axis=-1)[:, 0]
    target = jax.lax.psum(jnp.where(mine, picked, 0.0), axis)
    # Of equal logits the first is the prediction, as argmax has it.
    place = jnp.where(jnp.max(here, axis=-1) == best, first + jnp.argmax(here, axis=-1), 2**31 - 1)
    predicted = jax.lax.pmin(place.astype(jnp.int32), axis)
    return weighted_sums(best + jnp.log(total) - target, predicted == targets, weights)
