"""A short convolution between gates: the local layer of LFM2's hybrids, and of Based's.

Liquid AI, "LFM2 Technical Report", 2025 (arXiv:2511.23404), section 2; Arora et al., "Zoology:
Measuring and Improving Recall in Efficient Language Models", 2023 (arXiv:2312.04927), for BaseConv.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import Mixer, MixerConfig, RecurrentState, Segments, mask_padding
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class GatedConvConfig(MixerConfig):
    """Configuration of a gated convolution; the defaults are LFM2's.

    Attributes:
      conv_size: taps W: the token and the ``W - 1`` before it.
      use_bias: biases in the projections and in the convolution.
      expand: channels E of the convolution as a multiple of the width.
      input_gate: whether there is a gate B before the convolution.
      activation: whether silu follows it.
    """

    mixer: ClassVar[str] = "gated_conv"

    conv_size: Size = 3
    use_bias: bool = False
    expand: Size = 1
    input_gate: bool = True
    activation: bool = False


BASE_CONV = GatedConvConfig(expand=2, input_gate=False, activation=True)
"""The convolution between the other layers of Based and JRT-RNN."""


class GatedConv(Mixer[GatedConvConfig]):
    """``[B, C, x] = in_proj(u)``, ``y = out_proj(C * act(conv(B * x)))``, within each document.

    Parameters, names as in the published checkpoints: ``in_proj``, ``conv`` and ``out_proj``, each
    with a ``kernel`` (inputs first; ``(W, E)`` of the convolution) and maybe a ``bias``.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], RecurrentState]:
        state, entering = self.enter(x, segments, state)
        config = self.config
        count = 3 if config.input_gate else 2
        parts = dense(x, count * self._inner, "in_proj", use_bias=config.use_bias)
        *before, after, inner = jnp.split(parts, count, axis=-1)
        inner = before[0] * inner if before else inner
        activation: Literal["silu"] | None = "silu" if config.activation else None
        conv = ShortConv(config.conv_size, config.use_bias, activation=activation, name="conv")
        inner, window = conv(inner, entering, segments=segments)
        y = dense(after * inner, self.width, "out_proj", use_bias=config.use_bias)
        return mask_padding(y, segments), state.update(window, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is the window of ``B * x``, ``(B, W - 1, E)`` in ``dtype``."""
        window = start_window(batch_size, self.config.conv_size, self._inner, dtype)
        return RecurrentState.start(window, batch_size)

    @property
    def _inner(self) -> int:
        return self.config.expand * self.width
