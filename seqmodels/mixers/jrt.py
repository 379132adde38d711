"""JRT-RNN: prefix linear attention, an encoder over the prompt and a decoder behind it in one op.

Arora et al., "Just read twice: closing the recall gap for recurrent language models", 2024
(arXiv:2407.05483), section 4.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from seqmodels import ops
from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.based import TaylorConfig, TaylorMixer
from seqmodels.mixers.matrix import QKV
from seqmodels.mixers.published import Published
from seqmodels.parallel.parameters import INTO
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class JRTConfig(TaylorConfig):
    """Configuration of prefix linear attention; the defaults are the paper's.

    Attributes:
      prefix: M, tokens of a document that the encoder reads.
    """

    mixer: ClassVar[str] = "jrt"

    prefix: Size = 1024

    @property
    def causal(self) -> bool:
        return False  # every token of the prefix sees all of it

    def param_axes(self) -> dict[str, PartitionSpec]:
        return dict.fromkeys(("k_encoder_proj/kernel", "v_encoder_proj/kernel"), INTO)


JRT_RNN_360M = Published(width=1024, layers=5, config=JRTConfig())
"""5 of 26 layers; the others are "sliding_window" and "gated_conv", see
``seqmodels.models.layouts``."""

JRT_RNN_1_3B = Published(width=1792, layers=7, config=JRTConfig())
"""7 of 36 layers."""


class JRT(TaylorMixer[JRTConfig]):
    """Based's sums, and over the prefix those of keys and values of another projection.

    ``y_t = W_o (sum_{s<=t} φ(q_t).φ(k_s) v_s + sum_{s<M} φ(q_t).φ(k'_s) v'_s) / Z_t`` with the same
    sums of ones as ``Z_t``: both halves share one normaliser and, once the prefix is read, one
    state. Tokens behind the prefix see no later token, and none in it sees one of them.

    A document's prefix is those of its first M tokens that are in the call with its first token:
    prompts are fed whole, or at least M tokens at first. What later calls bring is decoded.

    Parameters beside Based's: ``k_encoder_proj``, ``v_encoder_proj``.
    """

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        initial_state = state.reset_at_document_start(segments)["recurrent_state"]
        tokens = self.tokens(x)
        k = self.features(x, "k_encoder_proj")
        v = self.values(x, "v_encoder_proj")
        v = jnp.where(self._prefix(x, segments, state)[:, :, None, None], v, jnp.zeros_like(v))
        if segments is None or segments.single:
            whole = jnp.einsum(
                "blhf,blhv->bhfv", k, v, preferred_element_type=jnp.float32, precision="highest"
            )
            o, final_state = self.linear_attention(
                tokens, None, initial_state + whole, segments, scale=1.0
            )
        else:
            o, final_state = self.linear_attention(tokens, None, initial_state, segments, scale=1.0)
            encoded, whole = self._of_documents(QKV(tokens.q, k, v), segments)
            o, final_state = o + encoded, final_state + whole
        return self.normalised(o, x), {"recurrent_state": final_state}

    def _prefix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> Bool[Array, "b l"]:
        """The tokens that the encoder reads."""
        positions = state.positions(segments, x.shape[1])
        here = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        fresh = positions == (here if segments is None else segments.positions)
        chosen = fresh & (positions < self.config.prefix)
        return chosen if segments is None else chosen & segments.mask

    def _of_documents(
        self, tokens: QKV, segments: Segments
    ) -> tuple[Float[Array, "b l h v"], Float[Array, "b h f v"]]:
        """What each document's prefix gives to all of its tokens; the last one's sum.

        From the left with the token itself, and from the right; the token is counted once.
        """
        ways = [
            ops.linear_attention(
                *tokens,
                scale=1.0,
                segments=segments,
                reverse=reverse,
                implementation=self.config.implementation,
            )
            for reverse in (False, True)
        ]
        q, k, v = tokens
        own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
        own = own * v.astype(jnp.float32)
        sums = [y.astype(jnp.float32) for y, _ in ways]
        return (sums[0] + sums[1] - own).astype(v.dtype), ways[0][1]
