"""What a family of models is to the loader."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from seqmodels.interop.fields import Fields
from seqmodels.models.language import LanguageModelConfig

HEAD = "lm_head.weight"
_CONVOLUTIONS = ("conv1d", "conv_1d")


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model, and how one library writes it.

    Attributes:
      model_type, architecture: as transformers' config.json has them.
      read: config.json -> our config.
      write: our config -> the fields of config.json; ValueError for what it cannot say.
      names: beginnings of our parameters' paths and of their names; ``{}`` is a layer's number.
      implied: our config's fields, ``part.field``, that config.json has under another form or
        leaves to a default, so that what `read` makes of them may look different.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], LanguageModelConfig]
    write: Callable[[LanguageModelConfig], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    implied: frozenset[str] = frozenset()

    @property
    def embedding(self) -> str:
        """The embedding's name."""
        return self.theirs("embedding/embedding")

    def theirs(self, path: str) -> str:
        """Our parameter's path -> its name in the checkpoint."""
        layer = re.search(r"block_(\d+)/", path)
        number = layer.group(1) if layer else ""
        pattern = path.replace(f"block_{number}/", "block_{}/") if layer else path
        for ours, theirs in self.names:
            if pattern.startswith(ours):
                rest = pattern.removeprefix(ours)
                rest = re.sub(r"(^|/)(kernel|scale)$", r"\1weight", rest)
                return theirs.replace("{}", number) + rest.replace("/", ".")
        raise ValueError(f"{self.model_type} checkpoints have no parameter for our {path}")


def spellings(name: str) -> tuple[str, ...]:
    """Other names of a tensor: mamba_ssm's, and those in files of a model without a head."""
    if name == HEAD:
        return ()
    native = name.replace(".embeddings.", ".embedding.")
    return (native, *(whole.partition(".")[2] for whole in (name, native)))


def merged(
    values: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """``values`` with what differs between ``old`` and ``new`` changed; also in objects in them."""
    result = dict(values)
    for name, value in new.items():
        if name in old and old[name] == value:
            continue
        inner = result.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merged(inner, old.get(name, {}), value)
        result[name] = value
    return result


def to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """A parameter in torch's layout: outputs first; ``(D, 1, W)`` of a convolution."""
    *_, module, leaf = path.split("/")
    if leaf != "kernel":
        return array
    return array.T[:, None] if module in _CONVOLUTIONS else array.T


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of ``to_theirs``."""
    *_, module, leaf = path.split("/")
    if leaf != "kernel":
        return array
    return array[:, 0].T if module in _CONVOLUTIONS else array.T


TRAINING_ONLY = frozenset({
    "dtype",
    "embedding_std",
    "backbone.batchnorm_momentum",
    "backbone.decay_vectors",
    "backbone.dropout",
    "backbone.mlp_tile",
    "backbone.remat",
    "backbone.scan_layers",
    "mixer.dt_max",
    "mixer.dt_min",
    "mixer.implementation",
    "mixer.init_std",
    "mixer.layers",
    "mixer.r_max",
    "mixer.r_min",
})  # fmt: skip
"""Fields of our configs that say nothing about what the trained model computes."""


def differences(one: LanguageModelConfig, two: LanguageModelConfig, but: frozenset[str]) -> str:
    """The first difference in what two configs compute, in words; "" for none."""
    pairs: list[tuple[str, Any, Any]] = [("", one, two)]
    pairs.append(("backbone.", one.backbone, two.backbone))
    mixers = {config.mixer: config for config in two.backbone.mixers}
    for config in one.backbone.mixers:
        if config.mixer in mixers:
            pairs.append(("mixer.", config, mixers[config.mixer]))
    for prefix, a, b in pairs:
        for field in dataclasses.fields(a):
            name = prefix + field.name
            if name in TRAINING_ONLY | but | {"backbone", "backbone.mixers"}:
                continue
            x, y = getattr(a, field.name), getattr(b, field.name)
            if x != y:
                return f"{type(a).__name__}.{field.name}={x!r} (only {y!r} can be written)"
    return ""
