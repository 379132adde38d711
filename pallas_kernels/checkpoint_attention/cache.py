"""What decoding keeps: the checkpoints of one document a row, and how long it is so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.common import dispatch, segments, validate

_OP = "Cache.extend"
_MOST = 2**31 - 1


class Cache(NamedTuple):
    """The checkpoints of each row's document; `length / interval` of them are held.

        o = checkpoint_attention(q, k, v, interval=n, **cache.past(n))
        cache = cache.extend(k, v, interval=n)

    Attributes:
      k, v: `(B, P, G, K)` and `(B, P, G, V)`; what is behind the valid ones is never read.
      position: `(B,)` int32, tokens of the document so far; 2^31 - 1 if there are more, which
        are too many to be counted and, `max_length` being smaller, to have room.
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array

    @classmethod
    def empty(
        cls,
        batch: int,
        max_length: int,
        groups: int,
        key_size: int,
        value_size: int,
        *,
        interval: int,
        dtype: Any = jnp.bfloat16,
    ) -> Cache:
        """For documents of up to `max_length` tokens, fewer than 2^31."""
        rows = (batch, max(1, max_length // interval), groups)
        k, v = jnp.zeros((*rows, key_size), dtype), jnp.zeros((*rows, value_size), dtype)
        return cls(k, v, jnp.zeros(batch, jnp.int32))

    def past(self, interval: int) -> dict[str, jax.Array]:
        """The arguments of `checkpoint_attention` that continue the row."""
        length = jnp.minimum(self.position // interval, self.k.shape[1])
        return {
            "past_k": self.k,
            "past_v": self.v,
            "past_length": length,
            "offset": self.position % interval,  # no more of it counts
        }

    def extend(
        self, k: ArrayLike, v: ArrayLike, *, interval: int, segment_ids: ArrayLike | None = None
    ) -> Cache:
        """After L more tokens; writes what of them are checkpoints, in place where donated.

        Args:
          k, v: `(B, L, G, K)` and `(B, L, G, V)`, the arguments of `checkpoint_attention`.
          interval: its `interval`.
          segment_ids: its `segment_ids`; the cache is then of the last document of each row.

        A checkpoint behind the last that there is room for is dropped.

        Raises:
          ValueError: shapes or dtypes that are not the cache's.
        """
        k, v = jnp.asarray(k), jnp.asarray(v)
        for name, x, held in (("k", k, self.k), ("v", v, self.v)):
            sizes = (held.shape[0], None, *held.shape[2:])
            validate.shape(_OP, name, x, "(B, L, G, width) of the cache", sizes)
            validate.dtype(_OP, name, x, (held.dtype.name,), because=f"the cache is {held.dtype}")
        batch, length = k.shape[:2]
        segment_index = jnp.ones((batch, length), jnp.int32)
        if segment_ids is not None:
            validate.segment_ids(_OP, segment_ids, batch, length)
            segment_index = segments.index(jnp.asarray(segment_ids))
        document = segment_index.max(1, keepdims=True)
        position = segments.positions(segment_index)
        earlier = jnp.where(segment_index == 1, self.position[:, None], 0)
        counted = position < _MOST - earlier
        position = position + earlier
        written = (
            counted & (segment_index == jnp.maximum(document, 1)) & ((position + 1) % interval == 0)
        )
        slot = jnp.where(written, position // interval, self.k.shape[1])
        new_k, new_v = (_put(held, x, slot) for held, x in ((self.k, k), (self.v, v)))
        real = jnp.sum((segment_index == document) & (segment_index > 0), axis=1, dtype=jnp.int32)
        before = jnp.where(document[:, 0] > 1, 0, self.position)
        return Cache(new_k, new_v, before + jnp.minimum(real, _MOST - before))


def _row(slot):
    return jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0)


def _scattered(held, x, slot):
    """`held (B, P, G, width)` with `x (B, L, G, width)` at `slot (B, L)`; from P on is dropped."""
    return held.at[_row(slot), slot].set(x, mode="drop")


def _one_a_row(held, x, slot):
    """The same for L = 1 and bfloat16 on a CPU.

    There XLA computes a scatter or an update of a slice in float32: it would convert all of `held`
    twice. It leaves integers alone, and makes the change of type part of the update. Neither
    happens in place where the old value is read too, so what is dropped is a branch.
    """
    zero = jnp.int32(0)

    def put(row, held):
        token = jax.lax.dynamic_slice_in_dim(x, row, 1, 0)
        bits, token = (jax.lax.bitcast_convert_type(z, jnp.uint16) for z in (held, token))
        bits = jax.lax.dynamic_update_slice(bits, token, (row, slot[row, 0], zero, zero))
        return jax.lax.bitcast_convert_type(bits, held.dtype)

    def turn(row, held):
        room = slot[row, 0] < held.shape[1]
        return jax.lax.cond(room, put, lambda _, held: held, row, held)

    return jax.lax.fori_loop(zero, jnp.int32(held.shape[0]), turn, held)


def _written(held, x, slot):
    unsupported = {}
    if x.shape[1] > 1:
        unsupported["one a row"] = f"there are {x.shape[1]} tokens"
    elif held.dtype != jnp.bfloat16:
        unsupported["one a row"] = f"a scatter of {held.dtype} is in place"
    ways = {"scatter": _scattered, "one a row": _one_a_row}
    return dispatch.choose(
        _OP, ways, held, x, slot, default="scatter", cpu="one a row", unsupported=unsupported
    )


def _gradients(slot, dheld):
    """Gradients of what was held, 0 where it was overwritten, and of what was written."""
    dx = dheld.at[_row(slot), slot].get(mode="fill", fill_value=0)
    return dheld.at[_row(slot), slot].set(jnp.zeros((), dheld.dtype), mode="drop"), dx, None


_put = jax.custom_vjp(_written)
_put.defvjp(lambda held, x, slot: (_written(held, x, slot), slot), _gradients)
