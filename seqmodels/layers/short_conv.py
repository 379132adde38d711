"""The short causal convolution in front of gated recurrences, with its window as state."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels import ops
from seqmodels.segments import Segments


def uniform(conv_size: int) -> Any:
    """Initialiser: uniform within ``conv_size^(-1/2)`` of 0, as `torch.nn.Conv1d` by channel."""
    bound = conv_size**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ShortConv(nn.Module):
    """``y_t = act(bias + sum_j kernel_j x_{t-(W-1)+j})`` for each channel, within its document.

    Parameters: ``kernel`` ``(W, D)``, the newest token's tap last, and ``bias`` ``(D,)``; both as
    `torch.nn.Conv1d` initialises them unless ``kernel_init``, ``bias_init`` say otherwise.

    Attributes:
      conv_size: W.
      use_bias: whether there is a bias.
      activation: None or "silu".
      kernel_init, bias_init: initialisers; None for uniform within ``W^(-1/2)`` of 0.
    """

    conv_size: int = 4
    use_bias: bool = True
    activation: Literal["silu"] | None = "silu"
    kernel_init: Any = None
    bias_init: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        window: Float[Array, "b w d"] | None = None,
        *,
        segments: Segments | None = None,
        counted: Bool[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b w d"]]:
        """Outputs, zero on padding, and the window after each row's last real token.

        Args:
          x: float32 or bfloat16.
          window: the ``W - 1`` tokens before ``x``, all of the row's first document: a mixer takes
            it from ``RecurrentState.reset_at_document_start``, which zeroes it at a new document.
            Zeros if None; cast to ``x``'s dtype, in which the new window comes back.
          segments: documents; None: one in each row, and no padding.
          counted: which tokens enter windows, see ``ops.causal_conv1d``; None for all.

        Raises:
          ValueError: ``window`` or ``segments`` of a wrong shape.
        """
        width = x.shape[-1]
        init, shape = uniform(self.conv_size), (self.conv_size, width)
        kernel = self.param("kernel", self.kernel_init or init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init or init, (width,), jnp.float32)
        return ops.causal_conv1d(
            x,
            kernel,
            bias,
            activation=self.activation,
            initial_state=None if window is None else window.astype(x.dtype),
            segments=segments,
            counted=counted,
        )


def start_window(batch_size: int, conv_size: int, width: int, dtype: Any) -> Float[Array, "b w d"]:
    """The window before the first token: zeros ``(B, W - 1, D)``."""
    return jnp.zeros((batch_size, conv_size - 1, width), dtype)
