"""The form in which mixers state their published sizes."""

from typing import Generic, NamedTuple, TypeVar

from seqmodels.mixers.base import MixerConfig

Config = TypeVar("Config", bound=MixerConfig)


class Published(NamedTuple, Generic[Config]):
    """A published model's use of a mixer.

    Attributes:
      width: of the residual stream.
      layers: how many of the model's layers hold the mixer.
      config: of the mixer.
    """

    width: int
    layers: int
    config: Config
