"""Gated associative memory: a short convolution and a look-up in a trained bank, side by side.

Acharya, "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
2025 (arXiv:2509.00605), section 3.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import Mixer, MixerConfig, RecurrentState, Segments, mask_padding
from seqmodels.mixers.published import Published
from seqmodels.parallel.parameters import INTO
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class GAMConfig(MixerConfig):
    """Configuration of a gated associative memory; the defaults are the paper's.

    Attributes:
      slots: vectors in the bank.
      conv_size: taps W of the convolution.
    """

    mixer: ClassVar[str] = "gam"

    slots: Size = 512
    conv_size: Size = 3

    def param_axes(self) -> dict[str, PartitionSpec]:
        return {"memory": PartitionSpec(None, "embed"), "gate_proj/kernel": INTO}


GAM_22M = Published(width=512, layers=6, config=GAMConfig())
"""The model of WikiText-2 and TinyStories."""


class GAM(Mixer[GAMConfig]):
    """``y = sigmoid(g_1) * conv(x) + sigmoid(g_2) * softmax(x M^T) M``, ``[g_1, g_2] = W_g x + b``.

    The bank M is a parameter, which tokens read and none writes: what a token sees of others, it
    sees through the convolution.

    Parameters: ``memory`` ``(slots, D)``, ``conv/kernel`` ``(W, D)``, ``conv/bias`` ``(D,)``,
    ``gate_proj`` with a ``kernel`` ``(D, 2 D)`` and a ``bias``.
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
        conv = ShortConv(config.conv_size, activation=None, name="conv")
        near, window = conv(x, entering, segments=segments)
        gates = jax.nn.sigmoid(dense(x, 2 * self.width, "gate_proj", use_bias=True))
        first, second = jnp.split(gates, 2, axis=-1)
        y = first * near + second * self._recalled(x)
        return mask_padding(y, segments), state.update(window, segments, x.shape[1])

    def _recalled(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """``softmax(x M^T) M``; scores and their softmax in float32."""
        shape = (self.config.slots, self.width)
        memory = self.param("memory", nn.initializers.xavier_uniform(), shape, jnp.float32)
        memory = memory.astype(x.dtype)
        scores = jnp.dot(x, memory.T, preferred_element_type=jnp.float32)
        return jnp.dot(jax.nn.softmax(scores, axis=-1).astype(x.dtype), memory)

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is the window of the convolution, ``(B, W - 1, D)`` in ``dtype``."""
        window = start_window(batch_size, self.config.conv_size, self.width, dtype)
        return RecurrentState.start(window, batch_size)
