"""Multi-scale retention: a fixed decay for each head, rotated queries and keys.

Sun, Dong, Huang, Ma, Xia, Xue, Wang & Wei, "Retentive Network: A Successor to Transformer for Large
Language Models", 2023, sections 2.1 to 2.3.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float

from seqmodels.layers.rotary import rotary
from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.matrix import MatrixConfig, MatrixMixer, Sizes
from seqmodels.mixers.published import Published
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class RetNetConfig(MatrixConfig):
    """Configuration of a retention layer; the defaults are the paper's.

    Attributes:
      heads: H.
      expand_k, expand_v: channels of all keys and of all values, as multiples of the width.
      rotary_base: of the rotary embedding.
    """

    mixer: ClassVar[str] = "retnet"

    heads: Size = 8
    expand_k: Positive = 1.0
    expand_v: Positive = 2.0
    rotary_base: Positive = 1e4


RETNET_1_3B = Published(width=2048, layers=24, config=RetNetConfig())
"""8 heads of 256 keys and 512 values."""


class RetNet(MatrixMixer[RetNetConfig]):
    """``S_t = γ_h S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t / sqrt(K)``, a gated norm, a map.

    ``γ_h = 1 - 2^(-5-h)``. Queries and keys carry the rotary embedding; of xPos only the rotation
    is there, its decay is ``γ``. The output is ``W_o (RMSNorm(o_t) * silu(W_g x_t))`` with one
    scale ``(V,)`` for all heads.
    """

    @property
    def sizes(self) -> Sizes:
        config = self.config
        key = self.per_head(config.expand_k * self.width, config.heads, "keys")
        value = self.per_head(config.expand_v * self.width, config.heads, "values")
        return Sizes(config.heads, config.heads, key, value)

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        config, sizes = self.config, self.sizes
        tokens = self.tokens(x)
        positions = state.positions(segments, x.shape[1])
        q, k = (rotary(part, positions, config.rotary_base) for part in (tokens.q, tokens.k))
        initial_state = state.reset_at_document_start(segments)["recurrent_state"]
        tokens = tokens._replace(q=q, k=k)
        o, final_state = self.linear_attention(
            tokens, log_decays(config.heads), initial_state, segments
        )
        gate = self.project(x, sizes.heads * sizes.value, "g_proj")
        return self.output_projection(o, gate), {"recurrent_state": final_state}


def log_decays(heads: int) -> np.ndarray:
    """``log γ_h``, float32 ``(H,)`` (equation 8)."""
    return np.log1p(-np.exp2(-5.0 - np.arange(heads))).astype(np.float32)
