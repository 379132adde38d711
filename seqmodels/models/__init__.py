"""Models: a backbone of mixer blocks and the heads on it."""

from collections.abc import Mapping
from typing import Any

from seqmodels.models import backbone
from seqmodels.models.backbone import Backbone, BackboneConfig, stack_layers, unstack_layers
from seqmodels.models.classifier import Classifier, ClassifierConfig, Matcher, MatcherConfig
from seqmodels.models.language import LanguageModel, LanguageModelConfig

Config = BackboneConfig | ClassifierConfig | MatcherConfig | LanguageModelConfig


def param_labels(config: Config, params: Mapping[str, Any]) -> Any:
    """How the optimizer treats each parameter: a tree like ``params`` of ``ParamLabel``."""
    return backbone.param_labels(_stack(config), params)


def param_axes(config: Config, params: Mapping[str, Any]) -> Any:
    """Logical axes of each parameter: a tree like ``params`` of ``PartitionSpec``."""
    return backbone.param_axes(_stack(config), params)


def _stack(config: Config) -> BackboneConfig:
    return config if isinstance(config, BackboneConfig) else config.backbone


__all__ = [
    "Backbone",
    "BackboneConfig",
    "Classifier",
    "ClassifierConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Matcher",
    "MatcherConfig",
    "param_axes",
    "param_labels",
    "stack_layers",
    "unstack_layers",
]
