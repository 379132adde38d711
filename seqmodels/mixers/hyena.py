"""Hyena: long convolutions with implicit filters, between gates.

Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models", ICML 2023
(arXiv:2302.10866), section 3.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels.layers.long_filter import ImplicitFilter, streamed, taps
from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.mixers.published import Published
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class FilterConfig(MixerConfig):
    """Configuration of mixers with implicit filters, see ``seqmodels.layers.long_filter``.

    Attributes:
      length: taps of the filters: what is further away is not seen.
      conv_size: taps of the short convolution before them.
      filter_embedding: channels of the distance, an odd number.
      filter_width, filter_layers: of the hidden layers that make the filters.
      filter_frequency: initial factor of their sines.
    """

    length: Size = 2048
    conv_size: Size = 3
    filter_embedding: Size = 33
    filter_width: Size = 64
    filter_layers: Size = 3
    filter_frequency: Positive = 14.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter_embedding % 2 == 0 or self.filter_embedding < 3:
            raise ValueError(
                f"{type(self).__name__}: filter_embedding={self.filter_embedding} must be an odd "
                "number of at least 3: the distance, cosines and as many sines"
            )

    @property
    def supports_packing(self) -> bool:
        return False  # a convolution does not stop where a document ends

    def filter_labels(self, name: str) -> dict[str, ParamLabel]:
        """Labels of a filter's parameters: no weight decay, as in the published code."""
        return {
            f"{name}/{leaf}": NO_DECAY_LABEL for leaf in ImplicitFilter.names(self.filter_layers)
        }

    def filter_axes(self, name: str) -> dict[str, PartitionSpec]:
        """Logical axes of a filter's matrices: hidden layers, then the channels."""
        last = self.filter_layers
        hidden = {f"{name}/dense_{i}/kernel": PartitionSpec(None, "mlp") for i in range(last)}
        return hidden | {f"{name}/dense_{last}/kernel": PartitionSpec("mlp", "inner")}

    def implicit(self, filters: int, name: str) -> ImplicitFilter:
        """The module of so many filters; a child of the calling module."""
        return ImplicitFilter(
            filters,
            self.length,
            self.filter_embedding,
            self.filter_width,
            self.filter_layers,
            self.filter_frequency,
            name=name,
        )


@dataclasses.dataclass(frozen=True)
class HyenaConfig(FilterConfig):
    """Configuration of a Hyena operator; the defaults are those of the language models.

    Attributes:
      order: projections that are multiplied, one more than there are long convolutions.
    """

    mixer: ClassVar[str] = "hyena"

    order: Size = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 2:
            raise ValueError(f"HyenaConfig: order={self.order} must be at least 2")

    def param_labels(self) -> dict[str, ParamLabel]:
        return {**self.filter_labels("filter"), "bias": NO_DECAY_LABEL}

    def param_axes(self) -> dict[str, PartitionSpec]:
        return {**self.filter_axes("filter"), "bias": PartitionSpec(None, "inner")}


HYENA_153M = Published(width=864, layers=18, config=HyenaConfig())
"""The language model of 2,048 tokens."""


class Hyena(Mixer[HyenaConfig]):
    """``v <- h_i * (x_i v) + b_i x_i v`` for i from ``order - 1`` to 1, then ``y = W_o (x_0 v)``.

    ``[v, x_0, ..] = conv(W_i u)``, a short causal convolution. The filters h_i are those of an
    ``ImplicitFilter``, and their transforms float32.

    Parameters: ``in_proj``, ``conv``, ``out_proj``, each with a ``kernel`` and a ``bias``;
    ``filter``; ``bias`` ``(order - 1, D)``. The state is the window of the short convolution and
    the last ``length - 1`` inputs of each long one.
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
        self.check(x, segments, state)
        config, width = self.config, self.width
        entering = self._entering(x, segments, state)
        parts = dense(x, (config.order + 1) * width, "in_proj", use_bias=True)
        conv = ShortConv(config.conv_size, activation=None, name="conv")
        parts, short = conv(parts, entering["conv"], segments=segments)
        v, *gates = jnp.split(parts, config.order + 1, axis=-1)

        longs = config.order - 1
        count = taps(config.length, x.shape[1], entering["windows"][0])
        filters = jnp.split(config.implicit(longs * width, "filter")(count), longs)
        bias = self.param("bias", nn.initializers.normal(1.0), (longs, width), jnp.float32)
        windows: list[Array] = []
        for i in reversed(range(longs)):
            v = mask_padding(v * gates[i + 1], segments)
            wide, window = streamed(
                v, filters[i], entering["windows"][i], segments, length=config.length
            )
            windows.insert(0, window)
            skip = jnp.broadcast_to(bias[i], v.shape) * v.astype(jnp.float32)
            v = (wide.astype(jnp.float32) + skip).astype(x.dtype)
        y = dense(v * gates[0], width, "out_proj", use_bias=True)
        after = {"conv": short, "windows": windows}
        state = RecurrentState.start(None, x.shape[0]) if state is None else state
        return mask_padding(y, segments), state.update(after, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is a dict, ``"conv"`` ``(B, W - 1, (order + 1) D)`` and ``"windows"``,
        a list of ``(B, length - 1, D)``, in ``dtype``."""
        config = self.config
        windows = [
            start_window(batch_size, config.length, self.width, dtype)
            for _ in range(config.order - 1)
        ]
        channels = (config.order + 1) * self.width
        short = start_window(batch_size, config.conv_size, channels, dtype)
        return RecurrentState.start({"conv": short, "windows": windows}, batch_size)

    def _entering(
        self, x: Array, segments: Segments | None, state: RecurrentState | None
    ) -> dict[str, Any]:
        """The state that enters; None for windows of zeros."""
        if state is None:
            return {"conv": None, "windows": [None] * (self.config.order - 1)}
        return state.reset_at_document_start(segments)
