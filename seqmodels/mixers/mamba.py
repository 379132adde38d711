"""Mamba: a selective state-space model behind a short convolution.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023
(arXiv:2312.00752), section 3; Zuo et al., "Falcon Mamba", 2024 (arXiv:2410.05355) for the norms of
what depends on the token, Lieber et al., "Jamba", 2024 (arXiv:2403.19887) for their scales; Yu &
Erichson, "Block-Biased Mamba for Long-Range Sequence Processing", NeurIPS 2025 (arXiv:2505.09022)
for blocks (B2S6).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.heads import step_bias
from seqmodels.layers.projections import dense, rms_normalise, uniform_fan_in
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.b2s6 import BlockRecurrence
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    SSM_LABEL,
    Implementation,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.mixers.published import Published
from seqmodels.mixers.ssm import check_step_range
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """Configuration of a Mamba layer; E = expand * width channels.

    Attributes:
      state_size: N, states of each channel.
      expand: E as a multiple of the width.
      conv_size: taps of the convolution.
      dt_rank: rank of the map from inputs to step sizes; None is ``ceil(width / 16)``.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each channel.
      use_bias: biases of the projections into and out of the layer.
      use_conv_bias: bias of the convolution.
      mixer_rms_eps: None, or the epsilon of RMS norms, without scales, of what each token gives to
        B, C and the step sizes (Falcon Mamba).
      mixer_rms_scales: the norms have scales (Jamba).
      blocks: None is Mamba; a number makes it B2S6. The channels are divided into so many blocks,
        B, C and step sizes come from a token's channels of the same block, A, B and C are complex,
        each channel adds a bias to B, and A and the step sizes are trained at the "ssm" rate.
        ``dt_rank`` is that of a block, None for ``ceil(width / 16 blocks)``.
      layers: depth of the model; the initial ``out_proj`` is smaller by ``sqrt(layers)``.
      implementation: of the kernel, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    mixer: ClassVar[str] = "mamba"
    writes: ClassVar[str | None] = "memory"

    state_size: Size = 16
    expand: Size = 2
    conv_size: Size = 4
    dt_rank: Size | None = None
    dt_min: Positive = 1e-3
    dt_max: Positive = 1e-1
    use_bias: bool = False
    use_conv_bias: bool = True
    mixer_rms_eps: Positive | None = None
    mixer_rms_scales: bool = False
    blocks: Size | None = None
    layers: Size = 1
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_range("MambaConfig", self.dt_min, self.dt_max)
        if self.blocks is not None and self.mixer_rms_eps is not None:
            raise ValueError(
                f"MambaConfig: mixer_rms_eps={self.mixer_rms_eps} with blocks={self.blocks}: one "
                "of them must be None"
            )
        if self.mixer_rms_scales and self.mixer_rms_eps is None:
            raise ValueError("MambaConfig: mixer_rms_scales=True needs norms; set mixer_rms_eps")

    def param_labels(self) -> dict[str, ParamLabel]:
        if self.blocks is None:
            norms = NORMS if self.mixer_rms_scales else ()
            names = ("A_log", "D", "dt_proj/bias", *(f"{norm}/scale" for norm in norms))
            return dict.fromkeys(names, NO_DECAY_LABEL)
        labels = dict.fromkeys(("B_bias", "D"), NO_DECAY_LABEL)
        labels |= dict.fromkeys(("A_log", "A_imag", "dt_proj", "dt_bias"), SSM_LABEL)
        return {f"blocks/{name}": label for name, label in labels.items()}

    def param_axes(self) -> dict[str, PartitionSpec]:
        if self.blocks is None:
            return {"A_log": PartitionSpec("inner")}
        names = ("A_log", "A_imag", "B_bias", "x_proj", "dt_proj")
        return {f"blocks/{name}": PartitionSpec("inner") for name in names}


NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
"""Those of what each token says of its step, of B and of C."""

MAMBA_130M = Published(768, 24, MambaConfig(layers=24))
MAMBA_370M = Published(1024, 48, MambaConfig(layers=48))
MAMBA_790M = Published(1536, 48, MambaConfig(layers=48))
MAMBA_1_4B = Published(2048, 48, MambaConfig(layers=48))
MAMBA_2_8B = Published(2560, 64, MambaConfig(layers=64))
FALCON_MAMBA_7B = Published(4096, 64, MambaConfig(mixer_rms_eps=1e-6, layers=64))


class Mamba(Mixer[MambaConfig]):
    """``h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t``, ``y_t = C_t h_t + D x_t``, times ``silu(z_t)``.

    ``[x, z] = in_proj(u)``, ``x = silu(conv1d(x))``, ``[δ, B, C] = x_proj(x)``,
    ``Δ = softplus(dt_proj(δ))``, ``A = -exp(A_log)``; the output is ``out_proj(y * silu(z))``.

    Parameters, names as in the published checkpoints: ``in_proj``, ``conv1d``, ``x_proj``,
    ``dt_proj``, ``out_proj``, each with a ``kernel`` (inputs first), some a ``bias``; ``A_log``
    ``(E, N)``; ``D`` ``(E,)``; a ``scale`` in each of ``NORMS``. Step sizes, A, D and states are
    float32.

    With blocks the recurrence, and all that belongs to it, is ``BlockRecurrence``, ``blocks``.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
        share: bool = False,
    ) -> tuple[Any, ...]:
        """As ``Mixer`` has it; with ``share`` also what is read of the state, ``(B, L, E)``, before
        its gate."""
        state, entering = self.enter(x, segments, state)
        config = self.config
        both = dense(x, 2 * self.inner, "in_proj", use_bias=config.use_bias)
        inner, gate = jnp.split(both, 2, axis=-1)
        conv = ShortConv(config.conv_size, config.use_conv_bias, name="conv1d")
        inner, window = conv(inner, entering["conv"], segments=segments)
        if config.blocks is not None:
            recurrence = self._blocks(config.blocks)
            y, final_state = recurrence(inner, entering["recurrent_state"], segments)
        else:
            parameters, (dt, b, c) = self._selection(inner)
            y, final_state = ops.selective_scan(
                inner,
                dt,
                B=b,
                C=c,
                gate=None if share else gate,
                dt_softplus=True,
                initial_state=entering["recurrent_state"],
                segments=segments,
                implementation=config.implementation,
                **parameters,
            )
        memory = y
        if share or config.blocks is not None:
            y = y * jax.nn.silu(gate)
        init = uniform_fan_in(config.layers)
        y = dense(y, self.width, "out_proj", use_bias=config.use_bias, kernel_init=init)
        state = state.update({"conv": window, "recurrent_state": final_state}, segments, x.shape[1])
        y = mask_padding(y, segments)
        return (y, state, memory) if share else (y, state)

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is a dict, ``"conv"`` ``(B, W - 1, E)`` in ``dtype``,
        ``"recurrent_state"`` float32 ``(B, E, N)``, complex64 with blocks."""
        kind = jnp.float32 if self.config.blocks is None else jnp.complex64
        zeros = jnp.zeros((batch_size, self.inner, self.config.state_size), kind)
        window = start_window(batch_size, self.config.conv_size, self.inner, dtype)
        return RecurrentState.start({"conv": window, "recurrent_state": zeros}, batch_size)

    @property
    def inner(self) -> int:
        """E, the channels of the recurrence."""
        return self.config.expand * self.width

    def _blocks(self, blocks: int) -> BlockRecurrence:
        config, rank = self.config, self.config.dt_rank
        rank = -(-self.width // (16 * blocks)) if rank is None else rank
        return BlockRecurrence(
            config.state_size, blocks, rank, config.dt_min, config.dt_max, name="blocks"
        )

    def _selection(self, x: Float[Array, "b l e"]) -> tuple[dict[str, Array], list[Array]]:
        """``A (E, N)``, ``D (E,)``, ``dt_bias (E,)``; and what each token says: its step before
        bias and softplus ``(B, L, E)``, B and C ``(B, L, N)``."""
        config, states = self.config, self.config.state_size
        rank = -(-self.width // 16) if config.dt_rank is None else config.dt_rank
        parts = dense(x, rank + 2 * states, "x_proj")
        dt, b, c = jnp.split(parts, [rank, rank + states], axis=-1)
        if config.mixer_rms_eps is not None:
            dt, b, c = self._normalised((dt, b, c), config.mixer_rms_eps)
        step = StepProjection(self.inner, config.dt_min, config.dt_max, name="dt_proj")
        dt, bias = step(dt)
        a_log = self.param("A_log", _log_of_state_numbers, (self.inner, states))
        skip = self.param("D", nn.initializers.ones, (self.inner,), jnp.float32)
        return {"A": -jnp.exp(a_log), "D": skip, "dt_bias": bias}, [dt, b, c]

    def _normalised(self, parts: tuple[Array, ...], epsilon: float) -> list[Array]:
        """What each token says of step, B and C, each over its root mean square."""
        if not self.config.mixer_rms_scales:
            return [rms_normalise(part, epsilon) for part in parts]
        return [
            nn.RMSNorm(epsilon=epsilon, name=name, dtype=part.dtype)(part)
            for name, part in zip(NORMS, parts, strict=True)
        ]


class StepProjection(nn.Module):
    """``x W`` and, for the kernel to add, the bias whose softplus is an initial step size."""

    features: int
    dt_min: float
    dt_max: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l r"]
    ) -> tuple[Float[Array, "b l e"], Float[Array, " e"]]:
        kernel = self.param("kernel", uniform_fan_in(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", step_bias(self.dt_min, self.dt_max), (self.features,))
        return jnp.dot(x, kernel.astype(x.dtype)), bias


def _log_of_state_numbers(key: Array, shape: tuple[int, int]) -> Array:
    """``ln(1), .., ln(N)`` for every channel (S4D-Real)."""
    channels, states = shape
    numbers = jnp.arange(1, states + 1, dtype=jnp.float32)
    return jnp.tile(jnp.log(numbers), (channels, 1))
