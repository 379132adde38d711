"""Softmax attention to the whole past, or to the whole document.

Vaswani et al., "Attention Is All You Need", 2017; grouped heads: Ainslie et al., "GQA", 2023;
rotary embedding: Su et al., "RoFormer", 2021; norms of queries and keys: Henry et al., "Query-Key
Normalization for Transformers", 2020.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

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

    bidirectional: bool = False

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional


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
    ) -> tuple[Float[Array, "b l d"], Any]:
        positions = state.positions(segments, x.shape[1])
        q, k, v = self.tokens(x, positions)
        segment_index = index_of(segments)
        if state.state is None:
            o = ops.attention(
                q, k, v, causal=self.causal, q_segments=segment_index, k_segments=segment_index
            )
            return self.output_projection(o, x), None
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
            o = ops.attention(q, past_k, past_v, causal=False, q_segments=ones, k_segments=seen)
        else:
            seen = jnp.where(slots < before[:, None], jnp.int32(1), -1)
            all_k, all_v = (
                jnp.concatenate([state.state[name].astype(x.dtype), new], axis=1)
                for name, new in (("k", k), ("v", v))
            )
            keys = jnp.concatenate([seen, segment_index], axis=1)
            o = ops.attention(q, all_k, all_v, q_segments=segment_index, k_segments=keys)
        return overflow(
            self.output_projection(o, x), (positions < 0) | (positions >= capacity)
        ), kept

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        shape = (batch_size, self.require_length(max_length), self.config.groups, self.head_size)
        return {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
