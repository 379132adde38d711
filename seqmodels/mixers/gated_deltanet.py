"""Gated DeltaNet: the delta rule with a decay for each head.

Yang, Kautz & Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", ICLR 2025.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.heads import log_of_uniform, step_bias
from seqmodels.mixers.base import NO_DECAY_LABEL, ParamLabel, RecurrentState, Segments
from seqmodels.mixers.matrix import DeltaConfig, DeltaMixer, Sizes
from seqmodels.mixers.published import Published
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaConfig):
    """Configuration of a Gated DeltaNet layer; the defaults are those of the 1.3B model.

    Attributes:
      heads: H, heads of values.
      key_heads: G, heads of queries and keys; None for as many as of values. It divides ``heads``,
        and head h of values reads head ``h // (heads / key_heads)`` of keys.
      head_size: K.
      expand_v: V as a multiple of K.
    """

    mixer: ClassVar[str] = "gated_deltanet"

    heads: Size = 6
    key_heads: Size | None = None
    head_size: Size = 256
    expand_v: Positive = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_heads is not None and self.heads % self.key_heads:
            raise ValueError(
                f"GatedDeltaNetConfig: key_heads={self.key_heads} must divide heads={self.heads}"
            )

    def param_labels(self) -> dict[str, ParamLabel]:
        return dict.fromkeys(("A_log", "dt_bias"), NO_DECAY_LABEL)


GATED_DELTANET_1_3B = Published(width=2048, layers=21, config=GatedDeltaNetConfig())
"""6 heads of 256 keys and 512 values."""

QWEN3_NEXT = Published(
    width=2048,
    layers=36,
    config=GatedDeltaNetConfig(
        heads=32, key_heads=16, head_size=128, expand_v=1.0, norm_epsilon=1e-6
    ),
)
"""The linear layers of Qwen3-Next-80B-A3B: 16 heads of keys and 32 of values, 128 wide."""


class GatedDeltaNet(DeltaMixer[GatedDeltaNetConfig]):
    """``S' = α_t S_{t-1}``, ``S_t = S' + β_t k_t (v_t - S'^T k_t)^T``, ``o_t = S_t^T q_t``.

    Outputs are scaled by ``1 / sqrt(K)``. Queries, keys, values and ``β_t`` are DeltaNet's;
    ``log α_t = -exp(A_log) softplus(W_a x_t + dt_bias)`` for each head of values. ``exp(A_log)``
    starts uniform in (0, 16), ``softplus(dt_bias)`` log-uniform in [0.001, 0.1]. The output is
    ``W_o (RMSNorm(o_t) * silu(W_g x_t))`` with one scale ``(V,)`` for all heads.
    """

    @property
    def sizes(self) -> Sizes:
        config = self.config
        groups = config.heads if config.key_heads is None else config.key_heads
        value = self.per_head(
            config.expand_v * config.head_size * config.heads, config.heads, "values"
        )
        return Sizes(groups, config.heads, config.head_size, value)

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        entering, sizes = state.reset_at_document_start(segments), self.sizes
        tokens, windows = self.convolved(x, entering, segments)
        decay, initial_state = self._log_decay(x), entering["recurrent_state"]
        o, final_state = self.delta_rule(tokens, self.beta(x), decay, initial_state, segments)
        gate = self.project(x, sizes.heads * sizes.value, "g_proj")
        return self.output_projection(o, gate), {"recurrent_state": final_state, **windows}

    def _log_decay(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h"]:
        heads = self.config.heads
        step = self.project(x.astype(jnp.float32), heads, "a_proj")
        # Not from 0: a head that starts there has no gradient to leave it.
        rate = jnp.exp(self.param("A_log", log_of_uniform(1e-4, 16.0), (heads,)))
        bias = jnp.broadcast_to(self.param("dt_bias", step_bias(), (heads,)), step.shape)
        return -jnp.broadcast_to(rate, step.shape) * jax.nn.softplus(step + bias)
