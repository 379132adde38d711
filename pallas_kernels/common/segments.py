"""Packed documents: from segment ids to what the kernels read.

A row of a batch may hold several documents one after the other. `segment_ids (B, L)` names the
document of each token; 0 is padding and stands only at the end of a row. State never crosses a
change of id, so what matters is not the id but the *segment index*, which numbers the documents of
a row 1, 2, ...: the ids 1, 2, 1 are three documents. Kernels see the index, or the step codes made
from it, never ids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

# What a recurrence does with the state before it takes a token (see `step_codes`).
CONTINUE, RESET, SKIP, ENTER = 0, 1, 2, 3


def index(segment_ids: Int32[Array, "b l"]) -> Int32[Array, "b l"]:
    """Segment index: the documents of each row numbered 1, 2, ...; 0 on padding.

    Args:
      segment_ids: `(B, L)` int32, any ids, 0 is padding.
    """
    changed = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids, axis=1) != 0],
        axis=1,
        dtype=jnp.int32,
    )
    return jnp.where(segment_ids == 0, 0, jnp.cumsum(changed, axis=1, dtype=jnp.int32))


def starts(segment_index: Int32[Array, "b l"]) -> Bool[Array, "b l"]:
    """True at the first token of each document, `(B, L)`; False on padding."""
    return (segment_index != _before(segment_index)) & (segment_index != 0)


def positions(segment_index: Int32[Array, "b l"]) -> Int32[Array, "b l"]:
    """Position of each token in its own document, from 0, `(B, L)` int32; 0 on padding."""
    index = jax.lax.broadcasted_iota(jnp.int32, segment_index.shape, 1)
    start = jax.lax.cummax(jnp.where(starts(segment_index), index, 0), axis=1)
    return jnp.where(segment_index == 0, 0, index - start)


def flip(x: jax.Array, segment_index: Int32[Array, "b l"] | None) -> jax.Array:
    """`x (B, L, ...)` with each row's real tokens in reverse order; padding stays at the end."""
    if segment_index is None:
        return jnp.flip(x, axis=1)
    real = segment_index != 0
    place = jax.lax.broadcasted_iota(jnp.int32, segment_index.shape, 1)
    last = jnp.sum(real, axis=1, keepdims=True, dtype=jnp.int32) - 1
    place = jnp.where(real, last - place, place)
    return jnp.take_along_axis(x, place.reshape(*place.shape, *(1,) * (x.ndim - 2)), axis=1)


def step_codes(segment_index: Int32[Array, "b l"], *, reverse: bool = False) -> Int32[Array, "b l"]:
    """What a recurrence does with its state before each token, `(B, L)` int32.

    `ENTER` (3) at the first real token in the direction of travel, which finds the row's initial
    state; `CONTINUE` (0) inside a document; `RESET` (1) where the next document begins; `SKIP` (2)
    on padding, which leaves the state untouched.
    """
    before = jnp.pad(segment_index[:, 1:], ((0, 0), (0, 1))) if reverse else _before(segment_index)
    code = jnp.where(segment_index != before, jnp.int32(RESET), CONTINUE)
    return jnp.where(segment_index == 0, SKIP, jnp.where(before == 0, ENTER, code))


def _before(segment_index):
    return jnp.pad(segment_index[:, :-1], ((0, 0), (1, 0)))


def check(segment_ids) -> None:
    """Validate ids on the host, where they are concrete.

    Args:
      segment_ids: `(B, L)` integers, anything numpy can read.

    Raises:
      ValueError: wrong rank or dtype, a negative id or one above int32's, or padding before a real
        token.
    """
    ids = np.asarray(segment_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"segment_ids must be integers of shape (B, L), got {ids.dtype} {ids.shape}"
        )
    if (ids < 0).any():
        row, token = np.argwhere(ids < 0)[0]
        raise ValueError(
            f"segment_ids must be >= 0 (0 is padding), got {ids[row, token]} in row {row} at "
            f"token {token}"
        )
    if ids.size and ids.max() > np.iinfo(np.int32).max:
        raise ValueError(f"segment_ids must fit int32, got {ids.max()}")
    broken = (ids[:, :-1] == 0) & (ids[:, 1:] != 0)
    if broken.any():
        row, token = np.argwhere(broken)[0]
        raise ValueError(
            f"padding (id 0) may stand only at the end of a row, but row {row} has a real token "
            f"after padding at {token + 1}; shift a left-padded row to the left, and give a "
            "document in the middle an id of its own"
        )
