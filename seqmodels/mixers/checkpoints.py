"""Checkpoint attention over a document, and its cache: what RAT and SCOUT share."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checkpoint_attention import Cache
from seqmodels import ops
from seqmodels.layers.positions import clipped
from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.softmax import cleared, held, renewed


def attend_checkpoints(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    caches: dict[str, Array] | None,
    *,
    interval: int,
    state: RecurrentState,
    segments: Segments | None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b l h k"], dict[str, Array] | None]:
    """``checkpoint_attention`` that continues ``caches``, and the caches after it.

    ``caches`` are ``{"k", "v"}: (B, P, G, K)``, the checkpoints of each row's document; None where
    none are kept and nothing precedes. A token costs the update of one checkpoint, in place where
    the state is donated, and what it reads of them.
    """
    options: dict[str, Any] = {"interval": interval, "segments": segments}
    if caches is None:
        return ops.checkpoint_attention(q, k, v, implementation=implementation, **options), None
    before = clipped(held(state, segments))
    cache = Cache(caches["k"], caches["v"], before)
    o = ops.checkpoint_attention(q, k, v, cache=cache, implementation=implementation, **options)
    if segments is not None:
        caches = cleared(renewed(state, segments), caches)
    after = ops.extend_cache(Cache(caches["k"], caches["v"], before), k, v, **options)
    return o, {"k": after.k, "v": after.v}


def empty_checkpoints(
    batch: int, max_length: int, groups: int, size: int, interval: int, dtype: Any
) -> dict[str, Array]:
    """Room for the checkpoints of documents of up to ``max_length`` tokens."""
    cache = Cache.empty(batch, max_length, groups, size, size, interval=interval, dtype=dtype)
    return {"k": cache.k, "v": cache.v}


def beyond(positions: Int[Array, "b l"], caches: dict[str, Array] | None, interval: int) -> Array:
    """Tokens that should see checkpoints for which there was no room."""
    if caches is None:
        return jnp.zeros(positions.shape, bool)
    return (positions < 0) | (positions // interval > caches["k"].shape[1])
