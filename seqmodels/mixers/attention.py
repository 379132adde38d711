"""Softmax attention to the whole past, or to the whole document.

Vaswani et al., "Attention Is All You Need", 2017; grouped heads: Ainslie et al., "GQA", 2023;
rotary embedding: Su et al., "RoFormer", 2021; norms of queries and keys: Henry et al., "Query-Key
Normalization for Transformers", 2020.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels import ops
from seqmodels.mixers.base import RecurrentState, Segments, index_of
from seqmodels.mixers.softmax import (
    SoftmaxConfig,
    SoftmaxMixer,
    all_segments,
    cleared,
    held,
    last_document,
    overflow,
    renewed,
    write,
)


@dataclasses.dataclass(frozen=True)
class AttentionConfig(SoftmaxConfig):
    """Configuration of an attention layer.

    Attributes:
      bidirectional: each token sees its whole document.
    """

    mixer: ClassVar[str] = "attention"
    writes: ClassVar[str | None] = "keys"

    bidirectional: bool = False

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional


@flax.struct.dataclass
class Keys:
    """What queries of some tokens attend to.

    Attributes:
      k, v: ``(B, S, G, K)``, the tokens' own and what a cache holds.
      positions: ``(B, L)`` int32, of the queries.
      q_segments, k_segments: documents of both, as ``seqmodels.ops.attention`` has them.
      capacity: of the cache; tokens at this position and behind come out as NaN.
      causal: whether queries see keys of their own row up to themselves only.
    """

    k: Any
    v: Any
    positions: Any
    q_segments: Any
    k_segments: Any
    capacity: int | None = flax.struct.field(pytree_node=False)
    causal: bool = flax.struct.field(pytree_node=False)

    def attend(self, q: Float[Array, "b l h k"]) -> Float[Array, "b l h k"]:
        """Softmax attention of queries, rotated as the keys are."""
        return ops.attention(
            q,
            self.k,
            self.v,
            causal=self.causal,
            q_segments=self.q_segments,
            k_segments=self.k_segments,
        )

    def overflow(self, y: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """NaN for tokens behind what the cache has room for."""
        if self.capacity is None:
            return y
        return overflow(y, (self.positions < 0) | (self.positions >= self.capacity))


class Attention(SoftmaxMixer[AttentionConfig]):
    """``W_o softmax(q_t k_s^T / sqrt(K)) v_s`` over ``s <= t``, or over all of the document.

    The state's cache ``{"k", "v"}: (B, max_length, G, K)`` holds the document's rotated keys and
    its values. Tokens at ``max_length`` and behind come out as NaN.
    """

    def mix(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: RecurrentState,
        after: RecurrentState,
    ) -> tuple[Float[Array, "b l d"], Any, Keys]:
        positions = state.positions(segments, x.shape[1])
        q, k, v = self.tokens(x, positions)
        kept = None
        if state.state is None:
            index = index_of(segments)
            keys = Keys(k, v, positions, index, index, None, self.causal)
        else:
            keys, kept = self._cached(x, k, v, positions, segments, state)
        return keys.overflow(self.output_projection(keys.attend(q), x)), kept, keys

    def _cached(
        self,
        x: Float[Array, "b l d"],
        k: Float[Array, "b l g k"],
        v: Float[Array, "b l g k"],
        positions: Int[Array, "b l"],
        segments: Segments | None,
        state: RecurrentState,
    ) -> tuple[Keys, dict[str, Array]]:
        """The keys with those of the cache, and the cache with those of these tokens."""
        before = held(state, segments)
        segment_index = all_segments(x, segments)
        chosen = segment_index == 1 if segments is None else last_document(segments)
        clean = state.state if segments is None else cleared(renewed(state, segments), state.state)
        kept = {
            name: write(clean[name], new, positions, chosen) for name, new in (("k", k), ("v", v))
        }
        capacity = kept["k"].shape[1]
        slots = jnp.arange(capacity, dtype=jnp.int32)[None]
        if x.shape[1] == 1:
            # One token has only its own document to see: that in the cache, itself included.
            seen = jnp.where(slots <= before[:, None], jnp.int32(1), -1)
            past_k, past_v = (kept[name].astype(x.dtype) for name in ("k", "v"))
            ones = jnp.ones_like(segment_index)
            return Keys(past_k, past_v, positions, ones, seen, capacity, causal=False), kept
        seen = jnp.where(slots < before[:, None], jnp.int32(1), -1)
        all_k, all_v = (
            jnp.concatenate([state.state[name].astype(x.dtype), new], axis=1)
            for name, new in (("k", k), ("v", v))
        )
        index = jnp.concatenate([seen, segment_index], axis=1)
        return Keys(all_k, all_v, positions, segment_index, index, capacity, causal=True), kept

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        shape = (batch_size, self.require_length(max_length), self.config.groups, self.head_size)
        return {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
