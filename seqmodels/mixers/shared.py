"""Layers that read what an earlier block of the same model has computed: SambaY's second half.

Ren et al., "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long Generation", 2025
(arXiv:2507.06607), section 2; one cache for many layers: Sun et al., "You Only Cache Once", NeurIPS
2024 (arXiv:2405.05254). They stand in a backbone, behind a block that gives what they read.
"""

import dataclasses
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from seqmodels.layers.heads import split_heads
from seqmodels.layers.projections import dense
from seqmodels.mixers.attention import Keys
from seqmodels.mixers.base import (
    Mixer,
    MixerConfig,
    Segments,
    State,
    mask_padding,
)
from seqmodels.mixers.softmax import Heads, SoftmaxConfig

Config = TypeVar("Config", bound=MixerConfig)


@dataclasses.dataclass(frozen=True)
class GMUConfig(MixerConfig):
    """Configuration of a gated memory unit; as wide inside as the memory that it reads."""

    mixer: ClassVar[str] = "gmu"
    reads: ClassVar[str | None] = "memory"


class GMU(Mixer[GMUConfig]):
    """``y = out_proj(silu(in_proj(x)) * m)``, m what an earlier Mamba layer read of its state.

    That is ``C_t h_t + D x_t`` before its gate, ``(B, L, E)``. No state of its own: the memory is
    that of the same tokens. Parameters: ``in_proj`` ``(D, E)``, ``out_proj`` ``(E, D)``.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: State = None,
        deterministic: bool = True,
        shared: Float[Array, "b l e"] | None = None,
    ) -> tuple[Float[Array, "b l d"], None]:
        self.check(x, segments, state)
        require_shared(self.config, shared)
        assert shared is not None
        gate = jax.nn.silu(dense(x, shared.shape[-1], "in_proj"))
        return mask_padding(dense(gate * shared, self.width, "out_proj"), segments), None

    def initial_state(self, batch_size: int, **options: Any) -> None:
        """None: there is nothing to carry."""


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig(SoftmaxConfig):
    """Configuration of attention to the keys and values of an earlier attention layer.

    Heads, their size and their rotation are to be those of that layer.
    """

    mixer: ClassVar[str] = "cross_attention"
    reads: ClassVar[str | None] = "keys"


class CrossAttention(Heads[CrossAttentionConfig]):
    """``W_o softmax(q_t k_s^T / sqrt(K)) v_s``, keys and values an earlier layer's, and its cache.

    Parameters: ``q_proj``, ``o_proj``, and those of the options. No state of its own.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: State = None,
        deterministic: bool = True,
        shared: Keys | None = None,
    ) -> tuple[Float[Array, "b l d"], None]:
        self.check(x, segments, state)
        require_shared(self.config, shared)
        assert shared is not None
        config, size = self.config, self.head_size
        if (config.groups, size) != shared.k.shape[2:]:
            raise ValueError(
                f"cross_attention mixer: heads of {size} channels in kv_heads={config.groups} "
                f"groups do not fit the keys {shared.k.shape[2:]} of the attention before it; set "
                "heads, kv_heads and head_size as there"
            )
        q = split_heads(self.project(x, config.heads * size, "q_proj"), size)
        if config.qk_norm:
            q = self.normed(q, "q_norm")
        q = self.rotate(self.scores_scaled(q), shared.positions)
        y = shared.overflow(self.output_projection(shared.attend(q), x))
        return mask_padding(y, segments), None

    def initial_state(self, batch_size: int, **options: Any) -> None:
        """None: the cache is the earlier layer's."""


def require_shared(config: MixerConfig, shared: Any) -> None:
    """Raises ValueError where there is nothing to read."""
    if shared is None:
        raise ValueError(
            f"{config.mixer} mixer: it reads the {config.reads} of an earlier block and stands in "
            "a backbone behind one that has them; give shared to call it alone"
        )
