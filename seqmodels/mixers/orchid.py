"""Orchid: a circular convolution whose filter is made of the row itself.

Karami & Ghodsi, "Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling", NeurIPS
2024 (arXiv:2402.18508), section 3, with the second kind of its conditioning networks.
"""

import dataclasses
from typing import Any, ClassVar, NoReturn

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import uniform
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    BothSidesConfig,
    Mixer,
    ParamLabel,
    Segments,
    State,
    mask_padding,
    require_odd,
)
from seqmodels.ranges import Size


@dataclasses.dataclass(frozen=True)
class OrchidConfig(BothSidesConfig):
    """Configuration of an Orchid layer.

    Attributes:
      conv_size: taps of the short convolutions that the filter is made of, around the token.
    """

    mixer: ClassVar[str] = "orchid"

    conv_size: Size = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_odd(self, self.conv_size)

    @property
    def supports_packing(self) -> bool:
        return False  # a convolution does not stop where a document ends

    def param_labels(self) -> dict[str, ParamLabel]:
        return {"D": NO_DECAY_LABEL}

    def param_axes(self) -> dict[str, PartitionSpec]:
        return dict.fromkeys(("q_taps", "k_taps"), PartitionSpec("inner"))


class Orchid(Mixer[OrchidConfig]):
    """``y = W_o (g_2 (h * u + D u))``, ``u = g_1 v``, ``[v, g_1, g_2] = W_i x``.

    The filter is ``h_j = sum_t k_t q_{t+j} / n`` over the n tokens of the row, for q and k short
    convolutions of x; in frequencies ``conj(F k) F q / n``. All of these are circular, the end of a
    row, before its padding, next to its beginning: turning a row by some tokens leaves h as it is
    and turns y.

    Parameters: ``in_proj``, ``out_proj``, ``q_taps``, ``k_taps`` ``(D, W)``, ``D`` ``(D,)``. The
    filter and its convolution are float32.
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
        shape = (self.width, self.config.conv_size)
        init = uniform(self.config.conv_size)
        q_taps, k_taps = (self.param(name, init, shape) for name in ("q_taps", "k_taps"))
        v, before, after = jnp.split(dense(x, 3 * self.width, "in_proj"), 3, axis=-1)
        u = mask_padding(before * v, segments)
        seen = mask_padding(x, segments)
        y = ops.circular_mix(seen, u, q_taps, k_taps, segments=segments)
        skip = self.param("D", nn.initializers.ones, (self.width,), jnp.float32)
        y = y + jnp.broadcast_to(skip, y.shape) * u.astype(jnp.float32)
        y = dense(after * y.astype(x.dtype), self.width, "out_proj")
        return mask_padding(y, segments), None

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> NoReturn:
        """Raises ValueError: there is none."""
        self.require_stateful("initial_state")

    def require_stateful(self, argument: str) -> NoReturn:
        raise ValueError(
            f"orchid mixer: {argument} is refused, a bidirectional mixer sees the whole sequence "
            "and carries no state; take hyena to stream"
        )
