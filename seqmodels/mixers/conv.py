"""A depthwise convolution alone: the mixer whose reach is known."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import Mixer, MixerConfig, RecurrentState, Segments
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class ConvConfig(MixerConfig):
    """Configuration of a convolution.

    Attributes:
      conv_size: taps W: the token and the ``W - 1`` before it. In ``BidirectionalConfig`` the
        layer sees ``2 W - 1`` tokens, itself in the middle.
    """

    mixer: ClassVar[str] = "conv"

    conv_size: Size = 4


class Conv(Mixer[ConvConfig]):
    """``y_t = bias + sum_j kernel_j x_{t-(W-1)+j}`` for each channel, within its document.

    Parameters: ``conv/kernel`` ``(W, D)``, the newest token's tap last, and ``conv/bias`` ``(D,)``,
    both uniform within ``W^(-1/2)`` of 0.
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
        conv = ShortConv(self.config.conv_size, activation=None, name="conv")
        y, window = conv(x, entering, segments=segments)
        return y, state.update(window, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is the window, ``(B, W - 1, D)`` in ``dtype``."""
        window = start_window(batch_size, self.config.conv_size, self.width, dtype)
        return RecurrentState.start(window, batch_size)
