"""The recurrent block of Griffin: a real gated linear recurrent unit behind a short convolution.

De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language
Models", 2024 (arXiv:2402.19427), section 2.4 and appendix A.
"""

import dataclasses
import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.common import products
from seqmodels import ops
from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    Implementation,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.mixers.published import Published
from seqmodels.ranges import Between, Size

_STEEPEST = 1000.0
"""Largest derivative of the root that scales the inputs; of a decay of 1 it would be infinite."""


@dataclasses.dataclass(frozen=True)
class RGLRUConfig(MixerConfig):
    """Configuration of Griffin's recurrent block.

    Attributes:
      lru_width: E, channels of the recurrence; None is the width.
      heads: blocks of the gates' block-diagonal matrices; divides E.
      conv_size: taps of the convolution.
      r_min, r_max: range of the initial decays at a recurrence gate of 1/8, uniform by area.
      layers: depth of the model; the initial ``linear_out`` is smaller by ``sqrt(layers / 2)``.
      implementation: of the kernel, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    mixer: ClassVar[str] = "rg_lru"

    lru_width: Size | None = None
    heads: Size = 8
    conv_size: Size = 4
    r_min: Between = 0.9
    r_max: Between = 0.999
    layers: Size = 1
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.r_min < self.r_max:
            raise ValueError(
                f"RGLRUConfig: need 0 < r_min < r_max < 1, got r_min={self.r_min} and "
                f"r_max={self.r_max}"
            )

    def param_labels(self) -> dict[str, ParamLabel]:
        return {"rg_lru/recurrent_param": NO_DECAY_LABEL}

    def param_axes(self) -> dict[str, PartitionSpec]:
        gates = itertools.product(("input", "recurrent"), ("weight", "bias"))
        return {f"rg_lru/{gate}_gate_{what}": PartitionSpec("inner") for gate, what in gates}


RECURRENTGEMMA_2B = Published(2560, 18, RGLRUConfig(heads=10, layers=26))
RECURRENTGEMMA_9B = Published(4096, 26, RGLRUConfig(heads=16, layers=38))
GRIFFIN_7B = Published(4096, 22, RGLRUConfig(lru_width=5632, heads=32, layers=32))


class RGLRU(Mixer[RGLRUConfig]):
    """``linear_out(gelu(linear_y(u)) * h)``, h the recurrence over ``conv_1d(linear_x(u))``.

    Parameters, names as in the published checkpoints: ``linear_x``, ``linear_y``, ``linear_out``,
    ``conv_1d``, each with a ``kernel`` (inputs first) and a ``bias``; under ``rg_lru`` those of
    ``RealGatedUnit``. Gates' sums, decays and states are float32.
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
        config, length = self.config, x.shape[1]
        lecun = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        gate = dense(x, self.inner, "linear_y", use_bias=True, kernel_init=lecun)
        inner = dense(x, self.inner, "linear_x", use_bias=True, kernel_init=lecun)
        small = nn.initializers.normal((0.01 / config.conv_size) ** 0.5)
        zeros = nn.initializers.zeros
        conv = ShortConv(config.conv_size, True, None, small, zeros, name="conv_1d")
        inner, window = conv(inner, entering["conv"], segments=segments)
        first = state.positions(segments, length) == 0
        unit = RealGatedUnit(config, name="rg_lru")
        h, final_state = unit(inner, entering["recurrent_state"], first, segments)
        y = jax.nn.gelu(gate, approximate=True) * h
        init = nn.initializers.variance_scaling(2.0 / config.layers, "fan_in", "normal")
        y = dense(y, self.width, "linear_out", use_bias=True, kernel_init=init)
        state = state.update({"conv": window, "recurrent_state": final_state}, segments, length)
        return mask_padding(y, segments), state

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is a dict, ``"conv"`` ``(B, W - 1, E)`` in ``dtype``,
        ``"recurrent_state"`` float32 ``(B, E)``."""
        window = start_window(batch_size, self.config.conv_size, self.inner, dtype)
        zeros = jnp.zeros((batch_size, self.inner), jnp.float32)
        return RecurrentState.start({"conv": window, "recurrent_state": zeros}, batch_size)

    @property
    def inner(self) -> int:
        """E, the channels of the recurrence; ValueError unless the heads divide them."""
        config = self.config
        inner = self.width if config.lru_width is None else config.lru_width
        if inner % config.heads:
            raise ValueError(
                f"rg_lru mixer: heads={config.heads} must divide the {inner} channels of the "
                "recurrence; change heads or lru_width"
            )
        return int(inner)


class RealGatedUnit(nn.Module):
    """``h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t)``, ``a_t = exp(-8 r_t softplus(Λ))``.

    ``r_t``, ``i_t`` are sigmoids of block-diagonal linear functions of ``x_t``. At the first token
    of a document the root is 1.

    Parameters: ``recurrent_param`` Λ ``(E,)``; ``recurrent_gate_weight``, ``input_gate_weight``
    ``(heads, E / heads, E / heads)``, inputs first; ``recurrent_gate_bias``, ``input_gate_bias``
    ``(heads, E / heads)``.
    """

    config: RGLRUConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l e"],
        initial_state: Float[Array, "b e"],
        first: Any,
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l e"], Float[Array, "b e"]]:
        """``h`` in ``x``'s dtype and the last one in float32; ``first (B, L)`` tells the starts."""
        config = self.config
        decays = self.param("recurrent_param", _decays(config.r_min, config.r_max), x.shape[-1:])
        rate = -8.0 * jax.nn.softplus(decays)
        log_a = self._gate(x, "recurrent_gate") * jnp.broadcast_to(rate, x.shape)
        scale = bounded_sqrt(-jnp.expm1(2.0 * log_a))
        scale = jnp.where(first[..., None], jnp.ones_like(scale), scale)
        drive = scale * self._gate(x, "input_gate") * x.astype(jnp.float32)
        h, final_state = ops.linear_scan(
            jnp.exp(log_a),
            drive,
            initial_state=initial_state,
            segments=segments,
            implementation=config.implementation,
        )
        return h.astype(x.dtype), final_state

    def _gate(self, x: Float[Array, "b l e"], name: str) -> Float[Array, "b l e"]:
        heads = self.config.heads
        size = x.shape[-1] // heads
        init = nn.initializers.normal(size**-0.5)
        weight = self.param(f"{name}_weight", init, (heads, size, size), jnp.float32)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (heads, size), jnp.float32)
        blocks = x.reshape(*x.shape[:-1], heads, size)
        z = products.einsum("blhi,hij->blhj", blocks, weight.astype(x.dtype))
        return jax.nn.sigmoid(z + jnp.broadcast_to(bias, z.shape)).reshape(x.shape)


@jax.custom_jvp
def bounded_sqrt(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``sqrt(x)`` whose derivative is at most 1000."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), 0.5 * dx * jax.lax.rsqrt(jnp.maximum(x, 0.25 * _STEEPEST**-2))


def _decays(r_min: float, r_max: float) -> Any:
    """Initialiser: Λ such that ``exp(-softplus(Λ))`` is uniform, by area, from r_min to r_max."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        square = jax.random.uniform(key, shape, jnp.float32, r_min**2, r_max**2)
        return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))

    return init
