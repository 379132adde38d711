"""Trained baselines that see a few tokens only: another model's experiment with convolutions in it.

What the critics of Long Range Arena trained beside the published models (Miralles-González et al.
2025, arXiv:2501.14850), at their two sizes.
"""

import dataclasses
import typing

from experiments.lra.experiment import ExperimentConfig, Model
from seqmodels.mixers import BidirectionalConfig, ConvConfig

CONVOLUTIONS = {"conv5": 5, "conv61": 61}
"""How many tokens one layer of each sees, the one in the middle included."""


def convolution(config: ExperimentConfig, model: str) -> ExperimentConfig:
    """The experiment with a depthwise convolution in place of each mixer; all else is the same."""
    backbone = config.classifier.backbone
    conv = BidirectionalConfig(ConvConfig(conv_size=(CONVOLUTIONS[model] + 1) // 2))
    backbone = dataclasses.replace(
        backbone, layout=(conv.mixer,) * len(backbone.layout), mixers=(conv,)
    )
    return dataclasses.replace(
        config,
        model=typing.cast(Model, model),
        classifier=dataclasses.replace(config.classifier, backbone=backbone),
        train=dataclasses.replace(config.train, group_learning_rates={}),
    )
