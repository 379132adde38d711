"""Monarch Mixer: a gated long convolution along the length, Monarch matrices along the width.

Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023
(arXiv:2310.12109), section 4.1, as the published M2-BERT has it.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.long_filter import streamed, taps
from seqmodels.layers.monarch import BLOCKS, MonarchDense
from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    Mixer,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.mixers.hyena import FilterConfig
from seqmodels.mixers.published import Published
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class MonarchConfig(FilterConfig):
    """Configuration of a Monarch mixer; the defaults are M2-BERT's.

    Attributes:
      bidirectional: a second filter from the right; it acts on the tokens *after* the current one.
      residual: another long convolution, of the layer's own inputs, is added behind the gate.
      width_blocks: None for dense projections into and out of the layer, or the number of blocks
        of Monarch matrices in their place.
    """

    mixer: ClassVar[str] = "monarch"

    length: Size = 128
    filter_embedding: Size = 5
    filter_width: Size = 128
    bidirectional: bool = True
    residual: bool = True
    width_blocks: Size | None = None

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Names of the long convolutions' filters."""
        return ("filter", "residual_filter") if self.residual else ("filter",)

    def param_labels(self) -> dict[str, ParamLabel]:
        labels = dict.fromkeys((f"{name}_bias" for name in self.convolutions), NO_DECAY_LABEL)
        for name in self.convolutions:
            labels |= self.filter_labels(name)
        return labels

    def param_axes(self) -> dict[str, PartitionSpec]:
        axes: dict[str, PartitionSpec] = {}
        for name in self.convolutions:
            axes |= self.filter_axes(name)
        if self.width_blocks is not None:
            layers = ("in_proj", "out_proj")
            names = (f"{layer}/{part}/kernel" for layer in layers for part in SIDES)
            axes |= dict.fromkeys(names, BLOCKS)
        return axes


SIDES = ("left", "right")

M2_BERT_80M = Published(width=768, layers=12, config=MonarchConfig())
M2_BERT_110M = Published(width=960, layers=12, config=MonarchConfig())


class Monarch(Mixer[MonarchConfig]):
    """``y = W_o (x_2 (K * (x_1 v)) + K' * u)``, ``[x_1, x_2, v] = conv(W_i u)``.

    K is one causal filter, or one from each side, of an ``ImplicitFilter``; K' likewise, on the
    inputs of the layer. The convolutions go through Fourier transforms, which are Monarch products
    of order 2: on TPUs they are computed as such, see ``pallas_kernels.long_conv``.

    Parameters: ``in_proj``, ``conv``, ``out_proj`` with biases; ``filter``, ``residual_filter`` and
    ``filter_bias``, ``residual_filter_bias`` ``(D,)``, the weights of the token itself. If causal,
    the state is the window of the short convolution and the inputs of the long ones.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], RecurrentState | None]:
        self.check(x, segments, state)
        config = self.config
        entering: dict[str, Any] = {"conv": None, **dict.fromkeys(config.convolutions)}
        if state is not None:
            entering = state.reset_at_document_start(segments)
        parts = self._project(x, 3 * self.width, "in_proj")
        conv = ShortConv(config.conv_size, activation=None, name="conv")
        parts, short = conv(parts, entering["conv"], segments=segments)
        first, second, v = jnp.split(parts, 3, axis=-1)
        inputs = {"filter": first * v, "residual_filter": x}
        after: dict[str, Any] = {"conv": short}
        convolved = {}
        for name in config.convolutions:
            u = mask_padding(inputs[name], segments)
            convolved[name], after[name] = self._convolve(u, name, entering[name], segments)
        y = second * convolved["filter"]
        if config.residual:
            y = y + convolved["residual_filter"]
        y = mask_padding(self._project(y, self.width, "out_proj"), segments)
        if not self.stateful:
            return y, None
        state = RecurrentState.start(None, x.shape[0]) if state is None else state
        return y, state.update(after, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is a dict, ``"conv"`` ``(B, W - 1, 3 D)`` and, by the filter's name, the
        inputs of each long convolution, ``(B, length - 1, D)``, in ``dtype``."""
        self.require_stateful("initial_state")
        config = self.config
        sizes = dict.fromkeys(config.convolutions, (config.length, self.width))
        sizes["conv"] = (config.conv_size, 3 * self.width)
        start = {name: start_window(batch_size, *size, dtype) for name, size in sizes.items()}
        return RecurrentState.start(start, batch_size)

    def _project(self, x: Float[Array, "b l d"], features: int, name: str) -> Array:
        blocks = self.config.width_blocks
        if blocks is None:
            return dense(x, features, name, use_bias=True)
        return MonarchDense(features, blocks, name=name)(x)

    def _convolve(
        self, u: Float[Array, "b l d"], name: str, window: Any, segments: Segments | None
    ) -> tuple[Float[Array, "b l d"], Any]:
        """``K * u`` with the weight of the token itself; the window after it, if causal."""
        config, ways = self.config, 1 if self.causal else 2
        count = taps(config.length, u.shape[1], window)
        filters = jnp.split(config.implicit(ways * self.width, name)(count), ways)
        if self.causal:
            y, window = streamed(u, filters[0], window, segments, length=config.length)
        else:
            y = ops.long_conv(u, filters[0], kernel_reverse=filters[1])
        init = nn.initializers.normal(1.0)
        bias = self.param(f"{name}_bias", init, (self.width,), jnp.float32)
        return y + jnp.broadcast_to(bias, u.shape).astype(u.dtype) * u, window
