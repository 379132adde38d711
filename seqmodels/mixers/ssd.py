"""State-space duality: what Mamba-2 and Hydra share.

Dao & Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", ICML 2024 (arXiv:2405.21060), sections 5 to 7.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    Implementation,
    MixerConfig,
    ParamLabel,
    Segments,
)
from seqmodels.mixers.ssm import check_step_range
from seqmodels.ranges import Positive, Range, Size

Limit = Annotated[float, Range("at least 0", 0)]


@dataclasses.dataclass(frozen=True)
class SSDConfig(MixerConfig):
    """Sizes of a layer over E channels, in heads of ``head_size``.

    Attributes:
      state_size: N, states of each channel.
      expand: E as a multiple of the width, unless ``num_heads`` says it.
      head_size: P, channels that share their decays.
      num_heads: None, or H = E / P.
      groups: G, sets of B and C; each serves as many heads.
      conv_size: taps of the convolution.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each head.
      use_bias: biases of the projections into and out of the layer.
      use_conv_bias: bias of the convolution.
      time_step_limit: the step sizes are clipped to this range.
      norm_epsilon: added to the mean square in the norm of the outputs.
      implementation: of the kernel, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    state_size: Size = 128
    expand: Size = 2
    head_size: Size = 64
    num_heads: Size | None = None
    groups: Size = 1
    conv_size: Size = 4
    dt_min: Positive = 1e-3
    dt_max: Positive = 1e-1
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_limit: tuple[Limit, Limit] = (0.0, float("inf"))
    norm_epsilon: Positive = 1e-5
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.time_step_limit
        if not low < high:
            raise ValueError(
                f"{type(self).__name__}: time_step_limit={self.time_step_limit} must be a range "
                "(low, high) with 0 <= low < high"
            )
        check_step_range(type(self).__name__, self.dt_min, self.dt_max)

    def param_labels(self) -> dict[str, ParamLabel]:
        return dict.fromkeys(("A_log", "D", "dt_bias"), NO_DECAY_LABEL)

    def heads(self, width: int) -> int:
        """H; ValueError unless the heads divide the channels and the groups the heads."""
        heads, rest = divmod(self.expand * width, self.head_size)
        if self.num_heads is not None:
            heads, rest = self.num_heads, 0
        if rest or heads % self.groups:
            raise ValueError(
                f"{self.mixer} mixer: head_size={self.head_size} must divide expand * width = "
                f"{self.expand * width}, and groups={self.groups} the heads, {heads}"
            )
        return heads

    def inner(self, width: int) -> int:
        """E, the channels of the recurrence."""
        return self.heads(width) * self.head_size


def steps(
    dt: Float[Array, "b l h"], bias: Float[Array, " h"], limit: tuple[float, float]
) -> Float[Array, "b l h"]:
    """``clip(softplus(dt + bias))``, float32."""
    wide = dt.astype(jnp.float32)
    return jnp.clip(jax.nn.softplus(wide + jnp.broadcast_to(bias, wide.shape)), *limit)


def ssd(
    x: Float[Array, "b l h p"],
    step: Float[Array, "b l h"],
    a_log: Float[Array, " h"],
    b: Float[Array, "b l g n"],
    c: Float[Array, "b l g n"],
    initial_state: Float[Array, "b h n p"],
    segments: Segments | None,
    implementation: str | None = None,
    *,
    reverse: bool = False,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h n p"]]:
    """``S_t = exp(-e^a_log Δ_t) S_{t-1} + Δ_t B_t x_t^T``, ``y_t = S_t^T C_t``, and the last S.

    Linear attention with queries C, keys B and values ``Δ x``. The state is float32.
    """
    return ops.linear_attention(
        c,
        b,
        (x.astype(jnp.float32) * step[..., None]).astype(x.dtype),
        -step * jnp.broadcast_to(jnp.exp(a_log), step.shape),
        scale=1.0,
        initial_state=initial_state,
        segments=segments,
        reverse=reverse,
        implementation=implementation,
    )
