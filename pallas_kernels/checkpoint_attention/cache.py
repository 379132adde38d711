"""What decoding keeps: the checkpoints of one document a row, and how long it is so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import segments, validate

_OP = "Cache.extend"


class Cache(NamedTuple):
    """The checkpoints of each row's document; `length / interval` of them are held.

        o = checkpoint_attention(q, k, v, interval=n, **cache.past(n))
        cache = cache.extend(k, v, interval=n)

    Attributes:
      k, v: `(B, P, G, K)` and `(B, P, G, V)`; what is behind the valid ones is never read.
      position: `(B,)` int32, tokens of the document so far.
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
        """For documents of up to `max_length` tokens."""
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
            "offset": self.position,
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
        runs = jnp.ones((batch, length), jnp.int32)
        if segment_ids is not None:
            validate.segment_ids(_OP, segment_ids, batch, length)
            runs = segments.runs(jnp.asarray(segment_ids))
        document = runs.max(1, keepdims=True)
        position = segments.positions(runs)
        position = position + jnp.where(runs == 1, self.position[:, None], 0)
        written = (runs == jnp.maximum(document, 1)) & ((position + 1) % interval == 0)
        slot = jnp.where(written, position // interval, self.k.shape[1])
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]
        new_k, new_v = (
            held.at[row, slot].set(x, mode="drop") for held, x in ((self.k, k), (self.v, v))
        )
        real = jnp.sum((runs == document) & (runs > 0), axis=1, dtype=jnp.int32)
        before = jnp.where(document[:, 0] > 1, 0, self.position)
        return Cache(new_k, new_v, before + real)
