"""Gated linear attention: a decay for each key channel, from a low-rank gate.

Yang, Wang, Shen, Panda & Kim, "Gated Linear Attention Transformers with Hardware-Efficient
Training", ICML 2024, section 4.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.heads import LowRank, split_heads
from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.matrix import MatrixConfig, MatrixMixer, Sizes
from seqmodels.mixers.published import Published
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class GLAConfig(MatrixConfig):
    """Configuration of a gated linear attention layer; the defaults are the paper's.

    Attributes:
      heads: H.
      expand_k, expand_v: channels of all keys and of all values, as multiples of the width.
      gate_rank: rank of the map from inputs to the decays' logits.
      gate_temperature: the log decay is ``logsigmoid(logits) / gate_temperature``.
    """

    mixer: ClassVar[str] = "gla"

    heads: Size = 4
    expand_k: Positive = 0.5
    expand_v: Positive = 1.0
    gate_rank: Size = 16
    gate_temperature: Positive = 16.0


GLA_1_3B = Published(width=2048, layers=24, config=GLAConfig())
"""4 heads of 256 keys and 512 values."""


class GLA(MatrixMixer[GLAConfig]):
    """``S_t = diag(α_t) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t / sqrt(K)``, a gated norm, a map.

    ``α_t = sigmoid(W_2 W_1 x_t + b)^(1/16)``; the output is
    ``W_o (RMSNorm(o_t) * silu(W_g x_t))`` with one scale ``(V,)`` for all heads.
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
        logits = LowRank(
            sizes.heads * sizes.key,
            config.gate_rank,
            config.init_std,
            use_bias=True,
            dtype=jnp.float32,
            name="gk_proj",
        )(x)
        decay = jax.nn.log_sigmoid(split_heads(logits, sizes.key)) / config.gate_temperature
        initial_state = state.reset_at_document_start(segments)["recurrent_state"]
        o, final_state = self.linear_attention(self.tokens(x), decay, initial_state, segments)
        gate = self.project(x, sizes.heads * sizes.value, "g_proj")
        return self.output_projection(o, gate), {"recurrent_state": final_state}
