"""Lightning attention: linear attention of activated heads with fixed decays.

Qin, Sun, Li, Shen, Sun & Zhong, "Lightning Attention-2: A Free Lunch for Handling Unlimited
Sequence Lengths in Large Language Models", 2024; the layer around it is that of MiniMax,
"MiniMax-01: Scaling Foundation Models with Lightning Attention", 2025, section 2.2.
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.matrix import QKV, MatrixConfig, MatrixMixer, Sizes, check_layer
from seqmodels.mixers.published import Published
from seqmodels.ranges import Count, Size


@dataclasses.dataclass(frozen=True)
class LightningConfig(MatrixConfig):
    """Configuration of a lightning attention layer.

    Attributes:
      heads: H.
      head_size: K and V.
      layer, layers: place of the layer, from 0, in a stack of so many; decays weaken with depth.
        A backbone sets both.
    """

    mixer: ClassVar[str] = "lightning"

    heads: Size = 16
    head_size: Size = 128
    layer: Count = 0
    layers: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self)

    def at(self, layer: int, layers: int) -> "LightningConfig":
        return dataclasses.replace(self, layer=layer, layers=layers)


LIGHTNING_MINIMAX_TEXT_01 = Published(
    width=6144, layers=70, config=LightningConfig(heads=64, head_size=128, layers=80)
)
"""64 heads of 128, in 7 of 8 layers; of the first layer."""


class Lightning(MatrixMixer[LightningConfig]):
    """``S_t = exp(-s_h) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``, a norm, a gate, a map.

    Queries, keys and values are ``silu`` of linear maps, queries unscaled. The slopes ``s_h`` are
    those of ``slopes``. The output is ``W_o (RMSNorm(o_t) * sigmoid(W_g x_t))`` with the norm over
    all heads together.
    """

    @property
    def sizes(self) -> Sizes:
        config = self.config
        return Sizes(config.heads, config.heads, config.head_size, config.head_size)

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        config, sizes = self.config, self.sizes
        tokens = QKV(*(jax.nn.silu(part) for part in self.tokens(x)))
        decay = -slopes(config.heads, config.layer, config.layers)
        initial_state = state.reset_at_document_start(segments)["recurrent_state"]
        o, final_state = self.linear_attention(tokens, decay, initial_state, segments, scale=1.0)
        gate = self.project(x, sizes.heads * sizes.value, "g_proj")
        y = self.output_projection(o, gate, jax.nn.sigmoid, per_head=False)
        return y, {"recurrent_state": final_state}


def slopes(heads: int, layer: int, layers: int) -> np.ndarray:
    """``2^(-8 (h + 1) / H) (1 - layer / (layers - 1) + 1e-5)``, float32 ``(H,)``."""
    depth = layer / max(layers - 1, 1)
    rate = np.exp2(-8.0 * (np.arange(heads) + 1) / heads)
    return (rate * (1.0 - depth + 1e-5)).astype(np.float32)
