"""Softmax attention to a window of the past, with the first tokens of a document as sinks.

Windows: Beltagy, Peters & Cohan, "Longformer", 2020; sinks: Xiao et al., "Efficient Streaming
Language Models with Attention Sinks", 2023.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.positions import clipped
from seqmodels.mixers.base import RecurrentState, Segments, index_of
from seqmodels.mixers.softmax import (
    SoftmaxConfig,
    SoftmaxMixer,
    all_segments,
    held,
    last_document,
    renewed,
    write,
)
from seqmodels.ranges import Count, Size


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig(SoftmaxConfig):
    """Configuration of a sliding-window attention layer.

    Attributes:
      window: how many tokens a token sees, itself included.
      sinks: how many of a document's first tokens it sees besides.
    """

    mixer: ClassVar[str] = "sliding_window"

    window: Size = 2048
    sinks: Count = 0


SAMBA = SlidingWindowConfig(heads=12, window=2048)
"""Samba (Ren et al. 2024), for a width of 1536."""

RAT_WINDOW = SlidingWindowConfig(heads=16, window=1025)
"""The layer between those of RAT (Wei et al. 2025), for a width of 2048; a token sees 1024 others.
"""

GRIFFIN_2B = SlidingWindowConfig(heads=10, kv_heads=1, rotary_fraction=0.5, window=2049)
"""RecurrentGemma 2B (De et al. 2024), for a width of 2560; a token sees 2048 others."""


class SlidingWindow(SoftmaxMixer[SlidingWindowConfig]):
    """``W_o softmax(q_t k_s^T / sqrt(K)) v_s`` over ``t - window < s <= t`` and ``s < sinks``.

    Positions are those in the document, for sinks too: the paper on sinks instead numbers the keys
    that it keeps, which is another function of the tokens once sinks have left the window.

    The state holds rotated keys and values of the last ``window`` tokens, ``{"k", "v"}``, the
    newest last, and of the first ``sinks``, if any, ``{"sink_k", "sink_v"}``: it does not grow.
    A document may have any number of tokens. From 2^31 on the rotary angles between its tokens are
    as exact as ``layers.rotary`` says, but for those to sinks, which begin to repeat there.
    """

    def mix(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: RecurrentState,
        after: RecurrentState,
    ) -> tuple[Float[Array, "b l d"], Any]:
        config = self.config
        positions = state.positions(segments, x.shape[1])
        q, k, v = self.tokens(x, positions)
        positions = clipped(positions)
        segment_index = index_of(segments)
        key_index, key_positions, all_k, all_v = segment_index, positions, k, v
        if state.state is None:
            state = dataclasses.replace(state, state=self.empty(x.shape[0], None, x.dtype))
        else:
            segment_index = all_segments(x, segments)
            past_index, past_positions = self._past(clipped(held(state, segments)))
            key_index = jnp.concatenate([past_index, segment_index], axis=1)
            key_positions = jnp.concatenate([past_positions, positions], axis=1)
            past = {name: part.astype(x.dtype) for name, part in state.state.items()}
            parts = ("sink_", "") if config.sinks else ("",)
            all_k, all_v = (
                jnp.concatenate([*(past[part + name] for part in parts), new], axis=1)
                for name, new in (("k", k), ("v", v))
            )
        o = ops.attention(
            q,
            all_k,
            all_v,
            window=config.window,
            sinks=config.sinks,
            q_segments=segment_index,
            k_segments=key_index,
            k_positions=key_positions if config.sinks else None,
        )
        return self.output_projection(o, x), self._keep(k, v, positions, segments, state, after)

    def _past(self, before: Array) -> tuple[Array, Array]:
        """Runs and positions of the cached keys: sinks, then window; -1 where there is no key.

        A sink that is in the window still counts there.
        """
        config = self.config
        before = before[:, None]
        sinks = jnp.arange(config.sinks, dtype=jnp.int32)[None]
        sinks = jnp.where(sinks < before - config.window, sinks, -1)
        window = before - config.window + jnp.arange(config.window, dtype=jnp.int32)[None]
        positions = jnp.concatenate([sinks, jnp.maximum(window, -1)], axis=1)
        return jnp.where(positions < 0, jnp.int32(-1), 1), positions

    def _keep(self, k, v, positions, segments, state, after) -> dict[str, Array]:
        """The caches after these tokens."""
        config, old = self.config, state.state
        if segments is None:
            count = jnp.full(k.shape[:1], k.shape[1], jnp.int32)
            chosen = jnp.ones(k.shape[:2], bool)
        else:
            count, chosen = segments.lengths, last_document(segments)
        window = jnp.arange(config.window, dtype=jnp.int32)[None]
        place = (count[:, None] + window)[:, :, None, None]
        valid = (config.window - window <= clipped(after.position)[:, None])[:, :, None, None]
        fresh = renewed(state, segments)[:, None, None, None]
        kept = {}
        for name, new in (("k", k), ("v", v)):
            line = jnp.concatenate([old[name], new.astype(old[name].dtype)], axis=1)
            last = jnp.take_along_axis(line, place, axis=1)
            kept[name] = jnp.where(valid, last, jnp.zeros_like(last))
            if not config.sinks:
                continue
            sinks = old[f"sink_{name}"]
            sinks = jnp.where(fresh, jnp.zeros_like(sinks), sinks)
            first = chosen & (positions < config.sinks)
            kept[f"sink_{name}"] = write(sinks, new, positions, first)
        return kept

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        config = self.config

        def zeros(length: int) -> Array:
            return jnp.zeros((batch_size, length, config.groups, self.head_size), dtype)

        sizes = {"k": config.window, "v": config.window}
        if config.sinks:
            sizes |= {"sink_k": config.sinks, "sink_v": config.sinks}
        return {name: zeros(length) for name, length in sizes.items()}
