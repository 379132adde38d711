"""Based: linear attention with a Taylor feature map and a normaliser.

Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", ICML
2024 (arXiv:2402.18668), section 4.
"""

import dataclasses
from typing import ClassVar, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.feature_maps import taylor, taylor_features
from seqmodels.layers.heads import merge_heads, split_heads
from seqmodels.mixers.base import RecurrentState, Segments
from seqmodels.mixers.matrix import QKV, WIDEST, MatrixConfig, MatrixMixer, Sizes
from seqmodels.ranges import Size

_EPSILON = 1e-12
"""Added to the normaliser, as in the published code: padding has none."""


@dataclasses.dataclass(frozen=True)
class TaylorConfig(MatrixConfig):
    """Configuration that layers with the Taylor feature map have.

    Attributes:
      heads: H; values are ``width / heads`` wide.
      feature_size: K, channels of a head's queries and keys, before the feature map.
    """

    heads: Size = 16
    feature_size: Size = 16


@dataclasses.dataclass(frozen=True)
class BasedConfig(TaylorConfig):
    """Configuration of a Based layer; the defaults are the paper's."""

    mixer: ClassVar[str] = "based"


Config = TypeVar("Config", bound=TaylorConfig)


class TaylorMixer(MatrixMixer[Config]):
    """Linear attention over ``taylor(q)``, ``taylor(k)`` and values with a 1 behind them.

    What the 1 sums to is the normaliser, in the last column of ``"recurrent_state"``
    ``(B, H, F, V + 1)``.
    """

    @property
    def sizes(self) -> Sizes:
        config = self.config
        value = self.per_head(float(self.width), config.heads, "values")
        if value >= WIDEST:
            raise ValueError(
                f"{config.mixer} mixer: heads={config.heads} of {value} channels each (width "
                f"{self.width}) must be narrower than {WIDEST}; choose more heads"
            )
        return Sizes(config.heads, config.heads, taylor_features(config.feature_size), value + 1)

    def features(self, x: Float[Array, "b l d"], name: str) -> Float[Array, "b l h f"]:
        """The feature map of a projection."""
        size = self.config.feature_size
        logits = split_heads(self.project(x, self.config.heads * size, name), size)
        return taylor(logits).astype(x.dtype)

    def values(self, x: Float[Array, "b l d"], name: str) -> Float[Array, "b l h v"]:
        """A projection to each head's values, and their 1."""
        v = split_heads(self.project(x, self.width, name), self.sizes.value - 1)
        return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

    def tokens(self, x: Float[Array, "b l d"]) -> QKV:
        q, k = (self.features(x, name) for name in ("q_proj", "k_proj"))
        return QKV(q, k, self.values(x, "v_proj"))

    def normalised(
        self, o: Float[Array, "b l h v"], x: Float[Array, "b l d"]
    ) -> Float[Array, "b l d"]:
        """Sums over their normaliser, projected; in ``x``'s dtype."""
        wide = o.astype(jnp.float32)
        y = wide[..., :-1] / (wide[..., -1:] + _EPSILON)
        return self.project(merge_heads(y.astype(x.dtype)), self.width, "o_proj")


class Based(TaylorMixer[BasedConfig]):
    """``y_t = W_o (sum_{s<=t} φ(q_t) . φ(k_s) v_s) / (sum_{s<=t} φ(q_t) . φ(k_s))``.

    Neither decay nor positions: ``φ(q) . φ(k) = 1 + s + s^2 / 2``, ``s = q . k / sqrt(K)``, see
    ``seqmodels.layers.feature_maps.taylor``.
    """

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        initial_state = state.reset_at_document_start(segments)["recurrent_state"]
        o, final_state = self.linear_attention(
            self.tokens(x), None, initial_state, segments, scale=1.0
        )
        return self.normalised(o, x), {"recurrent_state": final_state}
