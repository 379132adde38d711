"""Hydra: a bidirectional mixer whose matrix is quasiseparable.

Hwang, Lahoti, Puduppully, Dao & Gu, "Hydra: Bidirectional State Space Models Through Generalized
Matrix Mixers", NeurIPS 2024 (arXiv:2407.09941), section 3.
"""

import dataclasses
from typing import Any, ClassVar, NoReturn

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.heads import GatedNorm, merge_heads, split_heads, step_bias
from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv
from seqmodels.mixers.base import (
    BothSidesConfig,
    Mixer,
    RecurrentState,
    Segments,
    State,
    mask_padding,
    require_odd,
)
from seqmodels.mixers.published import Published
from seqmodels.mixers.ssd import SSDConfig, ssd, steps
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class HydraConfig(BothSidesConfig, SSDConfig):
    """Configuration of a Hydra layer: ``SSDConfig``'s fields; ``conv_size`` is odd."""

    mixer: ClassVar[str] = "hydra"

    state_size: Size = 64
    conv_size: Size = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        require_odd(self, self.conv_size)

    @property
    def supports_packing(self) -> bool:
        return False


HYDRA_BERT = Published(768, 23, HydraConfig())
"""The masked language model of the size of BERT-Base."""


class Hydra(Mixer[HydraConfig]):
    """``y_t = f_{t-1} + g_{t+1} + (W_D x_t + D) x_t``, f and g Mamba-2's recurrences both ways.

    ``[z, x, B, C, B', C', dt, dt'] = in_proj(u)``, then ``[x, B, C, B', C']`` through a convolution
    around the token and SiLU. ``f_t = C_t S_t`` comes from the left, ``g_t = C'_t S'_t`` from the
    right; both use one ``A = -exp(A_log)`` and one ``dt_bias``. The output is
    ``out_proj(RMSNorm(y) * silu(z))``.

    Parameters, names as in the published code: ``in_proj``, ``conv1d``, ``fc_D``, ``out_proj``,
    each with a ``kernel`` (inputs first), some a ``bias``; ``norm/scale`` ``(E,)``; ``A_log``,
    ``D``, ``dt_bias`` ``(H,)``. Step sizes and decays are float32.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: State = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], None]:
        self.check(x, segments, state)
        config, heads = self.config, self.config.heads(self.width)
        inner, mixed = config.inner(self.width), 4 * config.groups * config.state_size
        parts = dense(x, 2 * inner + mixed + 2 * heads, "in_proj", use_bias=config.use_bias)
        gate, parts, dt = jnp.split(parts, [inner, 2 * inner + mixed], axis=-1)
        parts = self._convolve(mask_padding(parts, segments))
        channels, selection = jnp.split(parts, [inner], axis=-1)
        # What padding does not write, no direction reads.
        channels = mask_padding(channels, segments)
        y = self._both_ways(split_heads(channels, config.head_size), selection, dt)
        y = y + self._diagonal(channels, heads)
        y = GatedNorm(config.norm_epsilon, name="norm")(merge_heads(y).astype(x.dtype), gate)
        y = dense(y, self.width, "out_proj", use_bias=config.use_bias)
        return mask_padding(y, segments), None

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Raises ValueError: there is none."""
        self.require_stateful("initial_state")

    def require_stateful(self, argument: str) -> NoReturn:
        raise ValueError(
            f"hydra mixer: {argument} is refused, a bidirectional mixer sees the whole sequence "
            "and carries no state; take mamba2 to stream"
        )

    def _convolve(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        """Taps from ``(W - 1) / 2`` tokens before to as many after; zeros beyond the row."""
        size, ahead = self.config.conv_size, self.config.conv_size // 2
        conv = ShortConv(size, self.config.use_conv_bias, name="conv1d")
        # What a token sees of those behind it, it sees as the token so much further ahead.
        row = jnp.pad(x, ((0, 0), (size - 1 - ahead, ahead), (0, 0)))
        return conv(row[:, size - 1 :], row[:, : size - 1])[0]

    def _both_ways(
        self,
        x: Float[Array, "b l h p"],
        selection: Float[Array, "b l bc"],
        dt: Float[Array, "b l hh"],
    ) -> Float[Array, "b l h p"]:
        """``f_{t-1} + g_{t+1}`` in float32."""
        config, heads = self.config, x.shape[2]
        bias = self.param("dt_bias", step_bias(config.dt_min, config.dt_max), (heads,))
        a_log = self.param("A_log", nn.initializers.zeros, (heads,), jnp.float32)

        # Parts are [B, C, B', C'].
        groups = [split_heads(z, config.state_size) for z in jnp.split(selection, 4, axis=-1)]
        shape = (x.shape[0], heads, config.state_size, config.head_size)
        sides = []
        for reverse in (False, True):
            b, c = groups[2 * reverse : 2 * reverse + 2]
            step = steps(jnp.split(dt, 2, axis=-1)[reverse], bias, config.time_step_limit)
            start = jnp.zeros(shape, jnp.float32)
            y, _ = ssd(x, step, a_log, b, c, start, None, config.implementation, reverse=reverse)
            y = y[:, 1:] if reverse else y[:, :-1]
            near = (0, 1) if reverse else (1, 0)
            sides.append(jnp.pad(y.astype(jnp.float32), ((0, 0), near, (0, 0), (0, 0))))
        return sides[0] + sides[1]

    def _diagonal(self, x: Float[Array, "b l e"], heads: int) -> Float[Array, "b l h p"]:
        """``(W_D x + D) x``, one factor a head, float32."""
        skip = self.param("D", nn.initializers.ones, (heads,), jnp.float32)
        factor = dense(x, heads, "fc_D").astype(jnp.float32)
        factor = factor + jnp.broadcast_to(skip, factor.shape)
        return factor[..., None] * split_heads(x, self.config.head_size).astype(jnp.float32)
