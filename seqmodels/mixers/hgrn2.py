"""HGRN2: linear attention whose keys are what the forget gates let go.

Qin, Yang, Sun, Shen, Li, Sun & Zhong, "HGRN2: Gated Linear RNNs with State Expansion", COLM 2024.
"""

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.heads import split_heads
from seqmodels.mixers.base import NO_DECAY_LABEL, ParamLabel, RecurrentState, Segments
from seqmodels.mixers.matrix import QKV, MatrixConfig, MatrixMixer, Sizes, check_layer
from seqmodels.mixers.published import Published
from seqmodels.ranges import Count, Size


@dataclasses.dataclass(frozen=True)
class HGRN2Config(MatrixConfig):
    """Configuration of an HGRN2 layer.

    Attributes:
      head_size: K and V; the width is ``heads * head_size``. None for 128 or, where that does not
        divide the width, the greatest divisor of both: one head of 64 at a width of 64.
      layer, layers: place of the layer, from 0, in a stack of so many. The lower bound of the
        forget gates starts at ``layer / layers``. A backbone sets both.
    """

    mixer: ClassVar[str] = "hgrn2"

    head_size: Size | None = None
    layer: Count = 0
    layers: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self)

    def at(self, layer: int, layers: int) -> "HGRN2Config":
        return dataclasses.replace(self, layer=layer, layers=layers)

    def param_labels(self) -> dict[str, ParamLabel]:
        return {"lower_bound": NO_DECAY_LABEL} if self.layer else {}


HGRN2_1_3B = Published(width=2048, layers=24, config=HGRN2Config(layers=24))
"""16 heads of 128; of the first layer."""


class HGRN2(MatrixMixer[HGRN2Config]):
    """``S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T``, ``o_t = S_t^T q_t / sqrt(K)``, a norm, a map.

    ``q_t = silu(W_q x_t)``, ``v_t = W_i x_t`` and ``f_t = b + (1 - b) sigmoid(W_f x_t)`` with a
    lower bound ``b`` for each channel: 0 in the first layer, later ``sigmoid(lower_bound)``, a
    parameter ``(D,)`` of the layer that starts where the published cumulative softmax over layers
    does, at ``layer / layers``. The published bounds are tied so that they grow with depth; these
    are free of each other. The output is ``W_o RMSNorm(o_t)``, normed over all heads together.
    """

    @property
    def sizes(self) -> Sizes:
        size = self.config.head_size or math.gcd(128, self.width)
        heads = self.width // size
        if heads * size != self.width:
            raise ValueError(
                f"hgrn2 mixer: head_size={size} must divide the width {self.width}; change one"
            )
        return Sizes(heads, heads, size, size)

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        size = self.sizes.key
        q = jax.nn.silu(self.project(x, self.width, "q_proj"))
        v = self.project(x, self.width, "i_proj")
        logits = self.project(x, self.width, "f_proj").astype(jnp.float32)
        decay, k = self._gate(logits)
        tokens = QKV(*(split_heads(part, size) for part in (q, k.astype(x.dtype), v)))
        decay = split_heads(decay, size)
        initial_state = state.reset_at_document_start(segments)["recurrent_state"]
        o, final_state = self.linear_attention(tokens, decay, initial_state, segments)
        return self.output_projection(o, per_head=False), {"recurrent_state": final_state}

    def _gate(
        self, logits: Float[Array, "b l d"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """``log f`` and ``1 - f``, neither from the other: both keep their digits."""
        keep, drop = jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
        if not self.config.layer:
            return keep, drop
        share = self.config.layer / self.config.layers
        start = nn.initializers.constant(math.log(share / (1.0 - share)))
        bound = jnp.broadcast_to(
            self.param("lower_bound", start, (self.width,), jnp.float32), logits.shape
        )
        keep = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + keep)
        # Rounding may put the logarithm of a gate near 1 above 0.
        return jnp.minimum(keep, 0.0), jax.nn.sigmoid(-bound) * drop
