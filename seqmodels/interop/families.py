"""What a family of models is to the loader."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from seqmodels.interop.fields import Fields
from seqmodels.interop.layout import Join, Slot
from seqmodels.models.language import LanguageModelConfig

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model, and how one library writes it.

    Attributes:
      model_type, architecture: as transformers' config.json has them.
      mixers: registered names of its layers' mixers.
      read: config.json -> our config.
      write: our config -> the fields of config.json; ValueError for what it cannot say.
      names: beginnings of our parameters' paths and of their names. ``{}`` is a layer's number, in
        ``expert_{}`` and after it an expert's; "mixer" may be the mixer's registered name instead,
        where its kind decides.
      joins: the tensors that hold several parameters, of a model of this config.
      experts_apart: each expert's matrices are tensors of their own.
      text_only: the name of a tensor in a checkpoint that holds more than the text model -> its
        name there, None for one of another part.
      implied: our config's fields, ``part.field``, that config.json has under another form or
        leaves to a default, so that what `read` makes of them may look different.
    """

    model_type: str
    architecture: str
    mixers: frozenset[str]
    read: Callable[[Fields], LanguageModelConfig]
    write: Callable[[LanguageModelConfig], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    implied: frozenset[str] = frozenset()
    joins: Callable[[LanguageModelConfig], tuple[Join, ...]] = lambda _: ()
    experts_apart: bool = False
    text_only: Callable[[str], str | None] | None = None

    @property
    def embedding(self) -> str:
        """The embedding's name."""
        return self.theirs("embedding/embedding")

    def theirs(self, path: str, layout: tuple[str, ...] = ()) -> str:
        """Our parameter's path -> its name in the checkpoint, joined or not."""
        numbers, patterns = _patterns(path, layout)
        for pattern in patterns:
            for ours, theirs in self.names:
                if pattern.startswith(ours):
                    rest = pattern.removeprefix(ours)
                    rest = re.sub(r"(^|/)(kernel|scale)$", r"\1weight", rest)
                    return theirs.format(*numbers) + rest.replace("/", ".")
        raise ValueError(f"{self.model_type} checkpoints have no parameter for our {path}")

    def slots(
        self, config: LanguageModelConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Slot]:
        """Names of tensors -> what is in them.

        Args:
          config: the model's.
          shapes: of all parameters, in torch's layout, by our paths.
        """
        layout = config.backbone.layout
        found: dict[str, Slot] = {}
        joined: dict[str, tuple[Join, dict[int, str]]] = {}
        joins = {ours: join for join in self.joins(config) for ours in join.ours}
        for path, shape in shapes.items():
            numbers, patterns = _patterns(path, layout)
            pattern = next((pattern for pattern in patterns if pattern in joins), None)
            if pattern is None:
                found[self.theirs(path, layout)] = Slot({path: shape})
                continue
            join = joins[pattern]
            parts = joined.setdefault(join.theirs.format(*numbers), (join, {}))[1]
            parts[join.ours.index(pattern)] = path
        for name, (join, parts) in joined.items():
            paths = [parts[i] for i in sorted(parts)]
            found[name] = Slot({p: shapes[p] for p in paths}, join.groups, join.stacked)
        return found


def _patterns(path: str, layout: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
    """The numbers in a path, and it without them, first with the mixer's name if that is known."""
    numbers = re.findall(r"(?:block|expert)_(\d+)/", path)
    pattern = re.sub(r"(block|expert)_\d+/", r"\1_{}/", path)
    if not numbers or int(numbers[0]) >= len(layout):
        return numbers, (pattern,)
    return numbers, (pattern.replace("/mixer/", f"/{layout[int(numbers[0])]}/", 1), pattern)


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


def _mixers(config: LanguageModelConfig) -> list[Any]:
    """The mixers' configs, and those of the mixers in them."""
    outer = config.backbone.mixers
    return [*outer, *(inner for mixer in outer for inner in getattr(mixer, "mixers", ()))]


def differences(one: LanguageModelConfig, two: LanguageModelConfig, but: frozenset[str]) -> str:
    """The first difference in what two configs compute, in words; "" for none."""
    pairs: list[tuple[str, Any, Any]] = [("", one, two)]
    pairs.append(("backbone.", one.backbone, two.backbone))
    mixers = {config.mixer: config for config in _mixers(two)}
    for config in _mixers(one):
        if config.mixer in mixers:
            pairs.append(("mixer.", config, mixers[config.mixer]))
    for prefix, a, b in pairs:
        for field in dataclasses.fields(a):
            name = prefix + field.name
            if name in TRAINING_ONLY | but | {"backbone", "backbone.mixers", "mixer.mixers"}:
                continue
            x, y = getattr(a, field.name), getattr(b, field.name)
            if x != y:
                return f"{type(a).__name__}.{field.name}={x!r} (only {y!r} can be written)"
    return ""
