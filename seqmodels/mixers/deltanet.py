"""DeltaNet: a matrix state that replaces, in part, what it holds under a key.

Yang, Wang, Zhang, Shen & Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length", NeurIPS 2024.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.matrix import DeltaConfig, DeltaMixer, Sizes
from seqmodels.mixers.published import Published
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(DeltaConfig):
    """Configuration of a DeltaNet layer; the defaults are those of the 1.3B model.

    Attributes:
      heads: H.
      expand_k, expand_v: channels of all keys and of all values, as multiples of the width.
    """

    mixer: ClassVar[str] = "deltanet"

    heads: Size = 16
    expand_k: Positive = 1.0
    expand_v: Positive = 1.0


DELTANET_1_3B = Published(width=2048, layers=24, config=DeltaNetConfig())
"""16 heads of 128."""


class DeltaNet(DeltaMixer[DeltaNetConfig]):
    """``S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}^T k_t)^T``, ``o_t = S_t^T q_t / sqrt(K)``, a norm.

    Queries, keys and values are linear maps, short convolutions and ``silu``; queries and keys
    have norm 1; ``β_t = sigmoid(W_b x_t)`` for each head. The output is ``W_o RMSNorm(o_t)`` with
    one scale ``(V,)`` for all heads.
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
        entering = state.reset_at_document_start(segments)
        tokens, windows = self.convolved(x, entering, segments)
        o, final_state = self.delta_rule(
            tokens, self.beta(x), None, entering["recurrent_state"], segments
        )
        return self.output_projection(o), {"recurrent_state": final_state, **windows}
