"""What a checkpoint says beside what a model computes, to be written back as it was."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seqmodels.interop.fields import json_text, parsed, read_json
from seqmodels.models.language import LanguageModel

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: its name, the one that the files have for it, and its dtype."""

    name: str
    stored_name: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Origin:
    """The folder that a model was loaded from, without its numbers; hashable.

    Attributes:
      source: the folder's name, for messages.
      config: config.json as strict JSON.
      generation: generation_config.json likewise; None for none.
      tensors: all of them.
    """

    source: str
    config: str = dataclasses.field(repr=False)
    generation: str | None = dataclasses.field(repr=False)
    tensors: tuple[Tensor, ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, folder: Path, values: Mapping[str, Any], tensors: Iterable[Tensor]) -> "Origin":
        """The origin of a model in ``folder``, whose config.json holds ``values``."""
        path = folder / GENERATION
        generation = json_text(read_json(path)) if path.exists() else None
        return cls(str(folder), json_text(values), generation, tuple(tensors))

    @property
    def values(self) -> dict[str, Any]:
        """The fields of config.json."""
        return parsed(self.config)


class LoadedLanguageModel(LanguageModel):
    """A language model that knows its checkpoint; ``clone(config=...)`` knows it too.

    Attributes:
      origin: what `save` writes back; models that differ in nothing else are equal, and compile
        once.
    """

    origin: Origin = dataclasses.field(compare=False)
