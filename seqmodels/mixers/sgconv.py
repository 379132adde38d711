"""SGConv: a long convolution whose filter is a few parameters a scale, weaker the further away.

Li, Cai, Zhang, Chen & Dey, "What Makes Convolutional Models Great on Long Sequence Modeling?",
ICLR 2023 (arXiv:2210.09298), section 3, with the norm of the published code.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.long_filter import streamed, taps
from seqmodels.layers.short_conv import start_window
from seqmodels.mixers.base import (
    SSM_LABEL,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class SGConvConfig(MixerConfig):
    """Configuration of an SGConv layer.

    Attributes:
      length: taps of the filter: what is further away is not seen.
      scale_size: parameters of each scale and channel.
      decay: by what the filter weakens from one scale to the next, each twice as far as the last.
      bidirectional: a second filter from the right; it acts on the tokens *after* the current one.
    """

    mixer: ClassVar[str] = "sgconv"

    length: Size = 2048
    scale_size: Size = 64
    decay: Positive = 2.0
    bidirectional: bool = False

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional

    @property
    def supports_packing(self) -> bool:
        return False  # a convolution does not stop where a document ends

    @property
    def scales(self) -> int:
        return 1 + max(0, math.ceil(math.log2(self.length / self.scale_size)))

    def param_labels(self) -> dict[str, ParamLabel]:
        skip = ParamLabel(float32=True)
        return {**dict.fromkeys(("kernel", "kernel_norm"), SSM_LABEL), "D": skip}

    def param_axes(self) -> dict[str, PartitionSpec]:
        axes = PartitionSpec(None, None, "inner")
        return {"kernel": axes, "kernel_norm": PartitionSpec(None, "inner")}


class SGConv(Mixer[SGConvConfig]):
    """``y = K * u (+ K_right * u) + D u``; all arithmetic is float32.

    The filter is its scales one behind the other: scale i of n is ``scale_size`` parameters,
    stretched linearly to ``scale_size 2^max(0, i - 1)`` taps and multiplied by
    ``decay^(n - 1 - i)``. All of it is divided by its initial norm.

    Parameters: ``kernel`` ``(R, n, H, scale_size)`` for R directions, ``D`` ``(H,)``, and
    ``kernel_norm`` ``(R, H)``, the initial norms, which no gradient reaches. The state is the last
    ``length - 1`` inputs, so that pieces of a row give what the whole gives; see ``streamed``.
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
        u = mask_padding(x.astype(jnp.float32), segments)
        window = None if state is None else state.reset_at_document_start(segments)
        kernels = self._kernels(taps(self.config.length, u.shape[1], window))
        if self.stateful:
            y, window = streamed(u, kernels[0], window, segments, length=self.config.length)
        else:
            y = ops.long_conv(u, kernels[0], kernel_reverse=kernels[1])
        skip = self.param("D", nn.initializers.normal(1.0), (self.width,), jnp.float32)
        y = mask_padding(y + jnp.broadcast_to(skip, u.shape) * u, segments).astype(x.dtype)
        if not self.stateful:
            return y, None
        state = RecurrentState.start(None, x.shape[0]) if state is None else state
        return y, state.update(window, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is the inputs that the filter looks back on, ``(B, length - 1, D)``
        in float32."""
        self.require_stateful("initial_state")
        window = start_window(batch_size, self.config.length, self.width, jnp.float32)
        return RecurrentState.start(window, batch_size)

    def _kernels(self, taps: int) -> Float[Array, "r h taps"]:
        """The first taps of each direction's filter."""
        config = self.config
        ways = 2 if config.bidirectional else 1
        shape = (ways, config.scales, self.width, config.scale_size)
        pieces = self.param("kernel", nn.initializers.normal(1.0), shape, jnp.float32)
        whole = stretched(pieces, config.decay)[..., : config.length]
        norm = self.param("kernel_norm", lambda _: jnp.linalg.norm(whole, axis=-1))
        return whole[..., :taps] / jax.lax.stop_gradient(norm)[..., None]


def stretched(pieces: Float[Array, "r n h k"], decay: float) -> Float[Array, "r h taps"]:
    """The scales, stretched and weakened, one behind the other: ``K 2^(n - 1)`` taps."""
    scales = pieces.shape[1]
    parts = []
    for scale in range(scales):
        wide = _interpolated(pieces[:, scale], 2 ** max(0, scale - 1))
        parts.append(wide * decay ** (scales - 1 - scale))
    return jnp.concatenate(parts, axis=-1)


def _interpolated(piece: Float[Array, "r h k"], times: int) -> Float[Array, "r h n"]:
    """``times`` as many points, linearly in between, the ends held."""
    last = piece.shape[-1] - 1
    place = np.clip((np.arange(piece.shape[-1] * times) + 0.5) / times - 0.5, 0, last)
    before = place.astype(np.int32)
    share = (place - before).astype(np.float32)[None, None]
    after = np.minimum(before + 1, last)
    return piece[..., before] * (1 - share) + piece[..., after] * share
