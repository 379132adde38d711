"""Convolutions as long as the row, with the inputs that they look back on as state."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.short_conv import start_window
from seqmodels.segments import Segments


def taps(length: int, row: int, window: Any) -> int:
    """How many taps of a filter of ``length`` a row of ``row`` tokens meets."""
    return min(length, row) if window is None else length


def streamed(
    u: Float[Array, "b l h"],
    kernel: Float[Array, "h k"],
    window: Float[Array, "b w h"] | None,
    segments: Segments | None,
    *,
    length: int,
) -> tuple[Float[Array, "b l h"], Float[Array, "b w h"]]:
    """``y_t = sum_j kernel_j u_{t-j}``, and the window after each row's last real token.

    Exact at every cut of a row: a call costs a transform of the window and its tokens, a single
    token ``O(K)`` products a channel.

    Args:
      u: 0 on padding; float32 or bfloat16.
      kernel: by distance; the first ``taps(length, L, window)`` of a filter of ``length`` taps.
      window: the ``length - 1`` inputs before ``u``, the newest last; None for zeros.
      segments: one document in each row, and padding.
      length: taps of the whole filter.
    """
    size = u.shape[1]
    if window is None:
        y = ops.long_conv(u, kernel)
        window = start_window(u.shape[0], length, u.shape[2], u.dtype)
        line = jnp.concatenate([window, u], axis=1)
    else:
        line = jnp.concatenate([window.astype(u.dtype), u], axis=1)
        if size == 1:
            wide = line.astype(jnp.float32)
            y = jnp.einsum("bkh,hk->bh", wide, jnp.flip(kernel, 1), precision="highest")
            y = y[:, None].astype(u.dtype)
        else:
            y = ops.long_conv(u, kernel, window=window)
    if segments is None:
        return y, line[:, size:]
    places = segments.lengths[:, None] + jnp.arange(length - 1, dtype=jnp.int32)[None]
    return y, jnp.take_along_axis(line, places[..., None], axis=1)


class ImplicitFilter(nn.Module):
    """Filters ``(N, taps)`` that an MLP with sines gives as functions of the distance.

    ``h(t) = W_n sin(w * (.. sin(w * (W_0 z(t) + b_0)))) exp(-|δ| t)`` with ``t = j / (length - 1)``
    and ``z(t) = [t, cos(f t'), -sin(f t')]``, ``t' = 2 π j / length``, for frequencies f spread
    evenly from 1e-4. The decays δ, one a filter, let it fall to 0.01 within 0.3 to 1.5 of the
    length. Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models", ICML 2023
    (arXiv:2302.10866), section 3.3 and appendix D.3, with the published code's initial values.

    Parameters: ``dense_0`` to ``dense_n``, with biases but for the last, and ``frequency``
    ``(hidden,)``.

    Attributes:
      filters: N.
      length: taps; fewer are the first ones of as many.
      embedding: channels of z, an odd number.
      hidden, layers: width and number of the MLP's hidden layers.
      frequency: w, initially.
    """

    filters: int
    length: int
    embedding: int = 33
    hidden: int = 64
    layers: int = 3
    frequency: float = 14.0

    @nn.compact
    def __call__(self, taps: int) -> Float[Array, "n taps"]:
        z, t = self._places(taps)
        x = jnp.asarray(z)
        init = nn.initializers.constant(self.frequency)
        frequency = self.param("frequency", init, (self.hidden,), jnp.float32)
        for layer in range(self.layers):
            x = nn.Dense(self.hidden, name=f"dense_{layer}")(x)
            x = jnp.sin(jnp.broadcast_to(frequency, x.shape) * x)
        h = nn.Dense(self.filters, use_bias=False, name=f"dense_{self.layers}")(x)
        decay = np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, self.filters)
        return (h * jnp.asarray(np.exp(t[:, None] * decay), jnp.float32)).T

    def _places(self, taps: int) -> tuple[np.ndarray, np.ndarray]:
        """z and t of the first distances."""
        place = np.arange(taps)
        t = place / max(self.length - 1, 1)
        frequencies = np.linspace(1e-4, (self.embedding - 1) // 2 - 1, (self.embedding - 1) // 2)
        angles = 2 * np.pi * place[:, None] / self.length * frequencies
        z = np.concatenate([t[:, None], np.cos(angles), -np.sin(angles)], axis=1)
        return z.astype(np.float32), t

    @staticmethod
    def names(layers: int = 3) -> list[str]:
        """Names of the parameters."""
        dense = [f"dense_{layer}/{leaf}" for layer in range(layers) for leaf in ("kernel", "bias")]
        return [*dense, f"dense_{layers}/kernel", "frequency"]
