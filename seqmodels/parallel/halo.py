"""The tokens next to a shard: what a short convolution or a window sees of other shards.

For use inside `jax.shard_map`. Each shard that the halo reaches into is one collective-permute, and
all of them are independent of each other; what moves is ``width`` tokens, whatever the length of
the row. Their derivative, by JAX, sends the halo's gradient back to where the tokens came from.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from seqmodels.parallel import collectives, validate


def halo_before(
    x: Shaped[Array, "b l *d"],
    width: int,
    *,
    segments: Int[Array, "b l"] | None = None,
    initial: Shaped[Array, "b w *d"] | None = None,
    axis: str = collectives.AXIS,
) -> Shaped[Array, "b w *d"]:
    """The last ``width`` tokens before this shard, in their order.

    Args:
      x: this shard's tokens, of any dtype.
      width: how many tokens, at least 0; a shard may be shorter.
      segments: numbers of the documents along the row, as ``Segments.index``, 0 on padding. If
        given, tokens of other documents than that of this shard's first token are zeros.
      initial: what stands before the row, the same on all of its shards; zeros if None. It belongs
        to the first document of the row.
      axis: the mesh axis that splits the length.

    Returns:
      ``(B, width, ..)`` in x's dtype.

    Raises:
      ValueError: a negative ``width``, an ``initial`` that does not fit, no such axis.
    """
    return _halo(x, width, segments, initial, axis, before=True)


def halo_after(
    x: Shaped[Array, "b l *d"],
    width: int,
    *,
    segments: Int[Array, "b l"] | None = None,
    initial: Shaped[Array, "b w *d"] | None = None,
    axis: str = collectives.AXIS,
) -> Shaped[Array, "b w *d"]:
    """The first ``width`` tokens behind this shard, in their order.

    The mirror of ``halo_before``: with ``segments``, tokens of other documents than that of this
    shard's last token are zeros; ``initial`` stands behind the row's last token, and belongs to the
    document of that.
    """
    return _halo(x, width, segments, initial, axis, before=False)


def _halo(x, width, segments, initial, axis, *, before: bool):
    shape = (x.shape[0], width, *x.shape[2:])
    if width < 0:
        raise ValueError(f"halo: width must be at least 0, got {width}")
    if initial is not None and (initial.shape != shape or initial.dtype != x.dtype):
        raise ValueError(
            f"halo: initial must be {shape} {x.dtype} for x {x.shape}, "
            f"got {initial.shape} {initial.dtype}"
        )
    validate.same_tokens("halo", "segments", segments, "x", x)
    halo = _fetch(x, width, axis, before)
    if initial is not None:
        halo = jnp.where(_beyond(width, x, axis, before), _moved(initial, x, axis, before), halo)
    if segments is None:
        return halo
    own = segments[:, :1] if before else segments[:, -1:]
    theirs = _fetch(segments, width, axis, before)
    if initial is not None:
        # What is beyond the row is of its first or last document.
        edge = _fetch_edge(segments, axis, before)
        theirs = jnp.where(_beyond(width, segments, axis, before), edge, theirs)
    same = (theirs == own) & (own != 0)
    return jnp.where(same.reshape(*shape[:2], *(1,) * (x.ndim - 2)), halo, jnp.zeros_like(halo))


def _fetch(x, width: int, axis: str, before: bool):
    """The tokens, zeros for those beyond the row."""
    length, size = x.shape[1], collectives.axis_size(axis)
    parts, missing = [], width
    for distance in range(1, size):
        if missing == 0:
            break
        count = min(length, missing)
        near = x[:, length - count :] if before else x[:, :count]
        parts.append(collectives.shift(near, distance if before else -distance, axis))
        missing -= count
    beyond = jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype)
    parts = [*parts, beyond] if missing or not parts else parts
    return jnp.concatenate(parts[::-1] if before else parts, axis=1)


def _places(width: int, length: int, axis: str, before: bool):
    """``(width,)``, the places in the row of the halo's tokens."""
    first = jax.lax.axis_index(axis) * jnp.int32(length)
    first = first - width if before else first + length
    return first + jnp.arange(width, dtype=jnp.int32)


def _beyond(width: int, x, axis: str, before: bool):
    """Which of the halo's tokens are not of the row, ``(1, width, 1, ..)``."""
    places = _places(width, x.shape[1], axis, before)
    end = collectives.axis_size(axis) * x.shape[1]
    return (places < 0 if before else places >= end).reshape(1, width, *(1,) * (x.ndim - 2))


def _moved(initial, x, axis: str, before: bool):
    """``initial`` where this shard's halo has it; what else there is, is not looked at."""
    width, length = initial.shape[1], x.shape[1]
    shards = jax.lax.axis_index(axis)
    if not before:
        shards = collectives.axis_size(axis) - 1 - shards
    # How far the row's end lies inside the halo.
    inside = jnp.minimum(shards * jnp.int32(length), width)
    rest = jnp.zeros_like(initial)
    both = jnp.concatenate([initial, rest] if before else [rest, initial], axis=1)
    first = inside if before else width - inside
    return jax.lax.dynamic_slice_in_dim(both, first, width, axis=1)


def _fetch_edge(segments, axis: str, before: bool):
    """The document of the row's first or last token, ``(B, 1)``."""
    if before:
        return jnp.ones_like(segments[:, :1])  # documents are numbered from 1
    return collectives.gather(segments[:, -1:], axis)[-1]
