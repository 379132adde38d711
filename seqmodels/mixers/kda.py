"""Kimi Delta Attention: the delta rule with a decay for each key channel.

Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025, section 3.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels.layers.heads import LowRank, log_of_uniform, split_heads, step_bias
from seqmodels.mixers.base import NO_DECAY_LABEL, ParamLabel, RecurrentState, Segments
from seqmodels.mixers.matrix import DeltaConfig, DeltaMixer, Sizes
from seqmodels.mixers.published import Published
from seqmodels.ranges import Negative, Size


@dataclasses.dataclass(frozen=True)
class KDAConfig(DeltaConfig):
    """Configuration of a Kimi Delta Attention layer.

    Attributes:
      heads: H.
      head_size: K and V, and the rank of the maps to decays and output gates.
      gate_bias: whether the map to the output gates has a bias.
      log_decay_bound: None, or the least log decay, negative: the decays' form is then
        ``log α_t = log_decay_bound * sigmoid(exp(A_log) (f_t + dt_bias))``.
    """

    mixer: ClassVar[str] = "kda"

    heads: Size = 16
    head_size: Size = 128
    gate_bias: bool = True
    log_decay_bound: Negative | None = None

    def param_labels(self) -> dict[str, ParamLabel]:
        return dict.fromkeys(("A_log", "dt_bias"), NO_DECAY_LABEL)

    def param_axes(self) -> dict[str, PartitionSpec]:
        return {"dt_bias": PartitionSpec("inner")}


KIMI_LINEAR = Published(width=2304, layers=20, config=KDAConfig(heads=32, gate_bias=False))
"""The KDA layers of Kimi-Linear-48B-A3B: 32 heads of 128."""


class KDA(DeltaMixer[KDAConfig]):
    """``S' = diag(α_t) S_{t-1}``, ``S_t = S' + β_t k_t (v_t - S'^T k_t)^T``, ``o_t = S_t^T q_t``.

    Outputs are scaled by ``1 / sqrt(K)``. Queries, keys, values and ``β_t`` are DeltaNet's;
    ``log α_t = -exp(A_log) softplus(f_t + dt_bias)`` for each key channel, with ``f_t = W_2 W_1
    x_t``, one ``A_log`` a head and one ``dt_bias`` a channel. ``exp(A_log)`` starts uniform in
    [1, 16), or as 1 with ``log_decay_bound``; ``softplus(dt_bias)`` log-uniform in [0.001, 0.1].
    The output is ``W_o (RMSNorm(o_t) * sigmoid(W_4 W_3 x_t + b))`` with one scale ``(V,)`` for all
    heads.
    """

    @property
    def sizes(self) -> Sizes:
        config = self.config
        return Sizes(config.heads, config.heads, config.head_size, config.head_size)

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        entering = state.reset_at_document_start(segments)
        tokens, windows = self.convolved(x, entering, segments)
        decay, initial_state = self._log_decay(x), entering["recurrent_state"]
        o, final_state = self.delta_rule(tokens, self.beta(x), decay, initial_state, segments)
        gate = self._low_rank("g_proj", use_bias=self.config.gate_bias)(x)
        return self.output_projection(o, gate, jax.nn.sigmoid), {
            "recurrent_state": final_state,
            **windows,
        }

    def _low_rank(self, name: str, *, use_bias: bool = False, dtype: Any = None) -> LowRank:
        config = self.config
        features = config.heads * config.head_size
        return LowRank(features, config.head_size, config.init_std, use_bias, dtype, name=name)

    def _log_decay(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h k"]:
        config = self.config
        shape = (config.heads, config.head_size)
        step = split_heads(self._low_rank("f_proj", dtype=jnp.float32)(x), config.head_size)
        bound = config.log_decay_bound
        start = log_of_uniform(1.0, 16.0) if bound is None else nn.initializers.zeros
        rate = jnp.exp(self.param("A_log", start, shape[:1], jnp.float32))[:, None]
        rate = jnp.broadcast_to(rate, step.shape)
        step = step + jnp.broadcast_to(self.param("dt_bias", step_bias(), shape), step.shape)
        if bound is None:
            return -rate * jax.nn.softplus(step)
        return bound * jax.nn.sigmoid(rate * step)
