"""Every field of every config has a type and a range, and a value outside of it is named."""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal

import pytest

from experiments.lm.presets import DataConfig
from seqmodels import ranges
from seqmodels.config import from_dict, to_dict
from seqmodels.data.lra import ListOpsConfig, TextConfig
from seqmodels.mixers import REGISTRY, RetNetConfig, S5Config
from seqmodels.models import BackboneConfig, ClassifierConfig, LanguageModelConfig, MatcherConfig
from seqmodels.ranges import Checked, Count, NonNegative, Positive, Range, Seed, Share, Size
from seqmodels.training.config import MeshConfig, TrainConfig

BACKBONE = BackboneConfig(layout=("s5",), mixers=(S5Config(),), width=8)
CLASSIFIER = ClassifierConfig(BACKBONE, num_classes=2, vocabulary_size=3)
CONFIGS = [
    *(kind() for kind, _ in REGISTRY.values()), BACKBONE, CLASSIFIER, MatcherConfig(CLASSIFIER),
    LanguageModelConfig(BACKBONE, vocabulary_size=3), TrainConfig(), MeshConfig(), ListOpsConfig(),
    TextConfig(), DataConfig(),
]  # fmt: skip


def members(hint):
    """The declared types of a field, without their ranges, and with those of a tuple or a dict."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return members(args[0])
    if origin in (typing.Union, types.UnionType, tuple, dict):
        return {kind for arg in args if arg is not Ellipsis for kind in members(arg)}
    return {hint}


def test_every_number_is_declared_with_its_range():
    """A bare int or float would take any value, sizes of -1 among them."""
    for config in CONFIGS:
        for name, hint in ranges.hints(type(config)).items():
            numbers = members(hint) & {int, float}
            declared = "Range(" in repr(hint)
            assert bool(numbers) == declared, (type(config).__name__, name, hint)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_wrong_kinds_and_values_of_every_field_are_refused(config):
    kind, data = type(config), to_dict(config)
    for name, hint in ranges.hints(kind).items():
        kinds = members(hint)
        wrong: list[Any] = [object()]
        wrong += [] if type(None) in kinds else [None]
        wrong += [True] if bool not in kinds else [1, "True"]
        wrong += [3.5, -2, 2**40] if int in kinds and float not in kinds else []
        wrong += [math.nan, "1", -math.inf] if float in kinds else []
        wrong += [7] if str in kinds and not kinds & {int, float} else []
        for value in wrong:
            with pytest.raises(ValueError, match=name):
                from_dict(kind, {**data, name: value})


def test_the_example_of_a_field_that_may_not_be_none():
    data = to_dict(RetNetConfig())
    with pytest.raises(ValueError, match=r"RetNetConfig.rotary_base=None must be a number"):
        from_dict(RetNetConfig, {**data, "rotary_base": None})


@dataclasses.dataclass(frozen=True)
class Part(Checked):
    size: Size = 1


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Outside of the packages whose annotations the tests check by other means."""

    size: Size = 1
    count: Count | None = None
    seed: Seed = 0
    share: Share = 0.0
    rate: Positive = 1.0
    any_rate: float = 0.0
    limit: Annotated[float, Range("at least 0", 0)] = math.inf
    flag: bool = False
    rule: Literal["zoh", "bilinear"] = "zoh"
    gate: Literal["glu"] | None = None
    sizes: tuple[Size, ...] = (1,)
    pair: tuple[int, float] = (1, 2.0)
    rates: dict[str, NonNegative] = dataclasses.field(default_factory=dict)
    part: Part = Part()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("size", (1, 2**31 - 1)), ("count", (0, None)), ("seed", (0, 2**32 - 1)),
        ("share", (0, 0.0, 0.999)), ("rate", (1, 1e-300, 1e300)), ("any_rate", (-1, 3.5)),
        ("limit", (0, math.inf)), ("flag", (True, False)), ("rule", ("bilinear",)),
        ("gate", ("glu", None)), ("sizes", ((), (1, 2))), ("pair", ((-3, 1),)),
        ("rates", ({"ssm": 0}, {})), ("part", (Part(3),)),
    ],
)  # fmt: skip
def test_values_in_range(field, values):
    for value in values:
        assert getattr(Config(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 0, "Config: size=0 must be positive and below 2\\*\\*31"),
        ("size", 2**31, "size=2147483648 must be positive and below"),
        ("size", True, "size=True must be an integer"),
        ("size", 1.0, "size=1.0 must be an integer"),
        ("size", None, "size=None must be an integer"),
        ("count", -1, "count=-1 must be at least 0 and below 2\\*\\*31 or None"),
        ("seed", 99999999999999999999, "seed=9+ must be in \\[0, 2\\*\\*32\\)"),
        ("seed", -1, "seed=-1 must be in"),
        ("share", 1.0, "share=1.0 must be in \\[0, 1\\)"),
        ("share", math.nan, "share=nan must be in"),
        ("rate", 0.0, "rate=0.0 must be positive and finite"),
        ("rate", math.inf, "rate=inf must be positive and finite"),
        ("rate", 10**400, "must be finite"),
        ("rate", True, "rate=True must be a number"),
        ("any_rate", math.nan, "any_rate=nan must be finite"),
        ("any_rate", math.inf, "any_rate=inf must be finite"),
        ("limit", math.nan, "limit=nan must be at least 0"),
        ("flag", 1, "flag=1 must be True or False"),
        ("rule", "euler", "Config: rule='euler' is not one of 'zoh', 'bilinear'"),
        ("gate", "relu", "Config: gate='relu' is not one of 'glu' or None"),
        ("sizes", [1], "sizes=\\[1\\] must be a tuple"),
        ("sizes", (1, 0), "sizes\\[1\\]=0 must be positive"),
        ("pair", (1,), "pair=\\(1,\\) must have 2 entries"),
        ("rates", {"ssm": -1.0}, "rates\\['ssm'\\]=-1.0 must be at least 0"),
        ("rates", {1: 1.0}, "a key=1 must be text"),
        ("rates", [], "rates=\\[\\] must be a mapping"),
        ("part", 3, "part=3 must be a Part"),
    ],
)
def test_values_out_of_range_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})
