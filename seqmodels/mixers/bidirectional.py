"""Any causal mixer, from both sides: two of them, one of which reads every row backwards."""

import dataclasses
from typing import Any, ClassVar, NoReturn

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.mixers.base import (
    BothSidesConfig,
    Mixer,
    MixerConfig,
    ParamLabel,
    Segments,
    State,
)
from seqmodels.mixers.mamba import MambaConfig


@dataclasses.dataclass(frozen=True)
class BidirectionalConfig(BothSidesConfig):
    """Configuration of a layer that sees both sides of a token.

    Attributes:
      local: the mixer of each direction, which must be causal.
      tied: whether both directions share their parameters.
    """

    mixer: ClassVar[str] = "bidirectional"

    local: MixerConfig = dataclasses.field(default_factory=MambaConfig)
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.local.causal:
            raise ValueError(
                f"BidirectionalConfig: local={self.local} sees both sides already; take it alone, "
                "or set bidirectional=False in it"
            )

    @property
    def supports_packing(self) -> bool:
        return self.local.supports_packing

    def at(self, layer: int, layers: int) -> "BidirectionalConfig":
        return dataclasses.replace(self, local=self.local.at(layer, layers))

    def param_labels(self) -> dict[str, ParamLabel]:
        return self._of_sides(self.local.param_labels())

    def param_axes(self) -> dict[str, PartitionSpec]:
        return self._of_sides(self.local.param_axes())

    def _of_sides(self, named: dict[str, Any]) -> dict[str, Any]:
        return {f"{side}/{name}": value for side in _sides(self) for name, value in named.items()}


def _sides(config: BidirectionalConfig) -> tuple[str, ...]:
    return ("left",) if config.tied else ("left", "right")


class Bidirectional(Mixer[BidirectionalConfig]):
    """``y = left(x) + flip(right(flip(x)))``, a token's own share counted by both.

    Parameters: those of the mixers ``left`` and ``right``; only ``left`` if tied.
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
        from seqmodels.mixers import build  # the registry imports this module

        self.check(x, segments, state)
        sides = [build(self.config.local, self.width, name=n) for n in _sides(self.config)]
        y, _ = sides[0](x, segments=segments, deterministic=deterministic)
        back = None
        if segments is not None:
            ids = ops.flip(segments.ids, segments)
            back = Segments.from_ids(ids, single=segments.single)
        z, _ = sides[-1](ops.flip(x, segments), segments=back, deterministic=deterministic)
        return y + ops.flip(z, segments), None

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> NoReturn:
        """Raises ValueError: there is none."""
        self.require_stateful("initial_state")

    def require_stateful(self, argument: str) -> NoReturn:
        name = self.config.local.mixer
        raise ValueError(
            f"bidirectional mixer: {argument} is refused, a bidirectional mixer sees the whole "
            f"sequence and carries no state; take {name} alone to stream"
        )
