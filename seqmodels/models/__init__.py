"""Models: a backbone of mixer blocks and the heads on it."""

from collections.abc import Mapping
from typing import Any

from seqmodels.models import backbone
from seqmodels.models.backbone import Backbone, BackboneConfig, stack_layers, unstack_layers
from seqmodels.models.classifier import Classifier, ClassifierConfig, Matcher, MatcherConfig
from seqmodels.models.language import LanguageModel, LanguageModelConfig


def param_labels(
    config: BackboneConfig | ClassifierConfig | MatcherConfig | LanguageModelConfig,
    params: Mapping[str, Any],
) -> Any:
    """How the optimizer treats each parameter: a tree like ``params`` of ``ParamLabel``."""
    stack = config if isinstance(config, BackboneConfig) else config.backbone
    return backbone.param_labels(stack, params)


__all__ = [
    "Backbone",
    "BackboneConfig",
    "Classifier",
    "ClassifierConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Matcher",
    "MatcherConfig",
    "param_labels",
    "stack_layers",
    "unstack_layers",
]
