"""Several mixers side by side in one block, their outputs added.

Dong et al., "Hymba: A Hybrid-head Architecture for Small Language Models", 2024 (arXiv:2411.13676),
section 2; Zuo et al., "Falcon-H1: A Family of Hybrid-Head Language Models", 2025
(arXiv:2507.22448), section 2.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels.layers.projections import scaled
from seqmodels.mixers.attention import AttentionConfig
from seqmodels.mixers.base import MixerConfig, ParamLabel, RecurrentState, Segments
from seqmodels.mixers.mamba2 import Mamba2Config
from seqmodels.mixers.softmax import CachingMixer
from seqmodels.ranges import Positive


@dataclasses.dataclass(frozen=True)
class ParallelConfig(MixerConfig):
    """Configuration of mixers that see the same inputs.

    Attributes:
      mixers: the mixers' configs, one of a kind, causal and with a state.
      in_scales: what the inputs of each are multiplied by; () for 1.
      out_scales: what the outputs of each are multiplied by; () for 1.
    """

    mixer: ClassVar[str] = "parallel"

    mixers: tuple[MixerConfig, ...] = (Mamba2Config(), AttentionConfig())
    in_scales: tuple[Positive, ...] = ()
    out_scales: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [config.mixer for config in self.mixers]
        if len(names) < 2 or len(names) != len(set(names)):
            raise ValueError(f"ParallelConfig: mixers={names} must be several, one of a kind")
        for config in self.mixers:
            if not (config.causal and config.stateful):
                raise ValueError(
                    f"ParallelConfig: {config} must be causal and carry a state; set "
                    "bidirectional=False in it"
                )
        for field in ("in_scales", "out_scales"):
            scales = getattr(self, field)
            if scales and len(scales) != len(names):
                raise ValueError(
                    f"ParallelConfig: {field}={scales} must have one for each of {names}, or none"
                )

    @property
    def supports_packing(self) -> bool:
        return all(config.supports_packing for config in self.mixers)

    def at(self, layer: int, layers: int) -> "ParallelConfig":
        mixers = tuple(config.at(layer, layers) for config in self.mixers)
        return dataclasses.replace(self, mixers=mixers)

    def param_labels(self) -> dict[str, ParamLabel]:
        return self._named({c.mixer: c.param_labels() for c in self.mixers})

    def param_axes(self) -> dict[str, PartitionSpec]:
        return self._named({c.mixer: c.param_axes() for c in self.mixers})

    def _named(self, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {f"{mixer}/{k}": value for mixer, part in parts.items() for k, value in part.items()}

    def scales(self) -> list[tuple[float, float]]:
        """What each mixer's inputs and outputs are multiplied by."""
        ones = (1.0,) * len(self.mixers)
        return list(zip(self.in_scales or ones, self.out_scales or ones, strict=True))


class Parallel(CachingMixer[ParallelConfig]):
    """``y = sum_i b_i mixer_i(a_i x)``.

    Parameters: those of each mixer under its registered name. The state's ``state`` is a dict of
    the mixers' states, by the same names.
    """

    def mix(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: RecurrentState,
        after: RecurrentState,
    ) -> tuple[Float[Array, "b l d"], Any]:
        entering, kept = state.state, {}
        total = jnp.zeros_like(x)
        for config, scales in zip(self.config.mixers, self.config.scales(), strict=True):
            before = None if entering is None else entering[config.mixer]
            mixer = self._mixer(config, name=config.mixer)
            y, kept[config.mixer] = mixer(scaled(x, scales[0]), segments=segments, state=before)
            total = total + scaled(y, scales[1])
        # One that was given no cache cannot go on, nor can the others without it.
        return total, kept if all(after.state is not None for after in kept.values()) else None

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        return {
            config.mixer: self._mixer(config, parent=None).initial_state(
                batch_size, max_length=max_length, dtype=dtype
            )
            for config in self.config.mixers
        }

    def _mixer(self, config: MixerConfig, **module: Any) -> Any:
        from seqmodels.mixers import build  # the registry imports this module

        return build(config, self.width, **module)
