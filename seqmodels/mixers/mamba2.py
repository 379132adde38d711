"""Mamba-2: state-space duality behind a short convolution.

Dao & Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", ICML 2024 (arXiv:2405.21060), section 7.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqmodels.layers.heads import log_of_uniform, merge_heads, split_heads, step_bias
from seqmodels.layers.projections import dense, rms_normalise, uniform_fan_in
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import Mixer, RecurrentState, Segments, mask_padding
from seqmodels.mixers.published import Published
from seqmodels.mixers.ssd import SSDConfig, ssd, steps
from seqmodels.mixers.state_collapse import Mitigation, WindowState, mitigated_ssd
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class Mamba2Config(SSDConfig):
    """Configuration of a Mamba-2 layer; the other fields are ``SSDConfig``'s.

    Attributes:
      layers: depth of the model; the initial ``out_proj`` is smaller by ``sqrt(layers)``.
      norm: where the outputs' RMS norm is, within each group: "after_gate", "before_gate"; None for
        the gate alone.
      part_scales: None, or what z, x, B, C and dt are multiplied by (Falcon-H1).
      mitigation: of the collapse of the state on rows longer than those of the training, see
        ``seqmodels.mixers.state_collapse``; for inference on one document a row, token by token.
    """

    mixer: ClassVar[str] = "mamba2"

    layers: Size = 1
    norm: Literal["after_gate", "before_gate"] | None = "after_gate"
    part_scales: tuple[Positive, Positive, Positive, Positive, Positive] | None = None
    mitigation: Mitigation | None = None

    @property
    def stateful(self) -> bool:
        """A window needs the tokens that leave it, which no state holds."""
        return not isinstance(self.mitigation, WindowState)

    @property
    def supports_packing(self) -> bool:
        return self.mitigation is None


MAMBA2_130M = Published(768, 24, Mamba2Config(layers=24))
MAMBA2_370M = Published(1024, 48, Mamba2Config(layers=48))
MAMBA2_780M = Published(1536, 48, Mamba2Config(layers=48))
MAMBA2_1_3B = Published(2048, 48, Mamba2Config(layers=48))
MAMBA2_2_7B = Published(2560, 64, Mamba2Config(layers=64))
CODESTRAL_MAMBA_7B = Published(4096, 64, Mamba2Config(groups=8, layers=64))


class Mamba2(Mixer[Mamba2Config]):
    """``S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t x_t^T``, ``y_t = S_t^T C_t + D x_t`` for each head.

    ``[z, x, B, C, dt] = in_proj(u)``, ``[x, B, C] = silu(conv1d([x, B, C]))``,
    ``Δ = softplus(dt + dt_bias)``, ``A = -exp(A_log)``; the output is
    ``out_proj(RMSNorm(y * silu(z)))``, the norm over the channels of one group, or as ``norm``
    says.

    Parameters, names as in the published checkpoints: ``in_proj``, ``conv1d``, ``out_proj``, each
    with a ``kernel`` (inputs first), some a ``bias``; ``norm/scale`` ``(E,)``; ``A_log``, ``D``,
    ``dt_bias`` ``(H,)``. Step sizes, decays and states are float32.
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
        if state is None:
            state = self._start(x.shape[0], x.dtype)
        entering = state.reset_at_document_start(segments)
        inner, heads, shared = self._sizes
        parts = dense(x, 2 * (inner + shared) + heads, "in_proj", use_bias=config.use_bias)
        if config.part_scales is not None:
            sizes = np.array([inner, inner, shared, shared, heads])
            scales = np.repeat(config.part_scales, sizes)[None, None]
            parts = parts * jnp.asarray(scales, parts.dtype)
        gate, parts, dt = jnp.split(parts, [inner, 2 * (inner + shared)], axis=-1)
        conv = ShortConv(config.conv_size, config.use_conv_bias, name="conv1d")
        parts, window = conv(parts, entering["conv"], segments=segments)
        y, final_state = self._recur(parts, dt, entering["recurrent_state"], segments)
        y = self._gated(y, gate)
        init = uniform_fan_in(config.layers)
        y = dense(y, self.width, "out_proj", use_bias=config.use_bias, kernel_init=init)
        y = mask_padding(y, segments)
        if not self.stateful:
            return y, None
        after = {"conv": window, "recurrent_state": final_state}
        return y, state.update(after, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is a dict, ``"conv"`` ``(B, W - 1, E + 2 G N)`` in ``dtype``,
        ``"recurrent_state"`` float32 ``(B, H, N, P)``."""
        self.require_stateful("initial_state")
        return self._start(batch_size, dtype)

    def require_stateful(self, argument: str) -> None:
        if not self.stateful:
            raise ValueError(
                f"mamba2 mixer: {argument} is refused, mitigation={self.config.mitigation} carries "
                "no state; give whole rows, or take another mitigation"
            )

    def _start(self, batch_size: int, dtype: Any) -> RecurrentState:
        """What ``initial_state`` returns."""
        config, (inner, heads, shared) = self.config, self._sizes
        shape = (batch_size, heads, config.state_size, config.head_size)
        window = start_window(batch_size, config.conv_size, inner + 2 * shared, dtype)
        return RecurrentState.start(
            {"conv": window, "recurrent_state": jnp.zeros(shape, jnp.float32)}, batch_size
        )

    def _gated(self, y: Float[Array, "b l e"], gate: Float[Array, "b l e"]) -> Any:
        config = self.config
        if config.norm is None:
            return y * jax.nn.silu(gate)
        first = config.norm == "before_gate"
        return GatedGroupNorm(config.groups, config.norm_epsilon, first, name="norm")(y, gate)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """E, H, and G N, the channels of B and of C."""
        config = self.config
        heads, shared = config.heads(self.width), config.groups * config.state_size
        return config.inner(self.width), heads, shared

    def _recur(
        self,
        parts: Float[Array, "b l xbc"],
        dt: Float[Array, "b l h"],
        initial_state: Float[Array, "b h n p"],
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l e"], Float[Array, "b h n p"]]:
        """The recurrence over ``[x, B, C]`` and its skip connection, float32; the last state."""
        config, (inner, heads, shared) = self.config, self._sizes
        x, b, c = jnp.split(parts, [inner, inner + shared], axis=-1)
        x = split_heads(x, config.head_size)
        bias = self.param("dt_bias", step_bias(config.dt_min, config.dt_max), (heads,))
        a_log = self.param("A_log", log_of_uniform(1.0, 16.0), (heads,))
        skip = self.param("D", nn.initializers.ones, (heads,), jnp.float32)
        keys, queries = (split_heads(part, config.state_size) for part in (b, c))
        step = steps(dt, bias, config.time_step_limit)
        if config.mitigation is None:
            y, final_state = ssd(
                x, step, a_log, keys, queries, initial_state, segments, config.implementation
            )
        else:
            step = mask_padding(step, segments)  # padding then leaves the state as it is
            keys, queries = (jnp.repeat(p, heads // config.groups, axis=2) for p in (keys, queries))
            log_decay = -step * jnp.broadcast_to(jnp.exp(a_log), step.shape)
            values = x.astype(jnp.float32) * step[..., None]
            y, final_state = mitigated_ssd(
                config.mitigation, values, log_decay, keys, queries, initial_state
            )
        kept = jnp.broadcast_to(skip[:, None], x.shape) * x.astype(jnp.float32)
        return merge_heads(y.astype(jnp.float32) + kept).astype(parts.dtype), final_state


class GatedGroupNorm(nn.Module):
    """RMS norm of ``x * silu(gate)`` within each of ``groups`` parts of the channels, scaled.

    With ``before_gate`` that of ``x``, scaled, times ``silu(gate)``.
    """

    groups: int
    epsilon: float
    before_gate: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"], gate: Float[Array, "b l e"]) -> Any:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        wide, gate = x.astype(jnp.float32), jax.nn.silu(gate.astype(jnp.float32))
        wide = wide if self.before_gate else wide * gate
        y = rms_normalise(wide, self.epsilon, self.groups)
        y = y * jnp.broadcast_to(scale, y.shape)
        return (y * gate if self.before_gate else y).astype(x.dtype)
