"""Pathfinder: whether two discs lie on one contour, images of 32 x 32 pixels, 1,024 steps.

Data: generated, nothing to download; or pathfinder32/ of Long Range Arena's release (7.7 GB).
"""

import dataclasses
from typing import Final

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets.models import (
    EXAMPLES,
    Presets,
    Shape,
    b2s6,
    cosine,
    lru,
    on,
    resized,
    rotary,
    s4,
    s4d,
    s4d_ft,
    s5,
    trained,
    transformer,
)
from seqmodels.data.lra import PathfinderConfig
from seqmodels.data.lra.pathfinder import Difficulty
from seqmodels.mixers import S4Config, S5Config

TASK: Final = "pathfinder"


def fewer(paper: ExperimentConfig, images: int, difficulty: Difficulty) -> ExperimentConfig:
    """The experiment with so many images to train on."""
    assert isinstance(paper.data, PathfinderConfig)
    data = dataclasses.replace(
        paper.data,
        difficulty=difficulty,
        train=images,
        validation=max(images // 40, 20),
        test=max(images // 20, 40),
    )
    return on(paper, data)


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """Short contours, and fewer images."""
    small = resized(fewer(paper, 40_000, "easy"), layers=2, width=32, state=32)
    return trained(small, steps=800, batch_size=32, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """Fewer images."""
    small = resized(fewer(paper, 80_000, "hard"), layers=3, width=64, state=32)
    return trained(small, steps=4_000, batch_size=32, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """9 epochs."""
    return trained(paper, steps=9 * EXAMPLES[TASK] // 128, batch_size=128)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(state_size=256, blocks=8, c_init="trunc_standard_normal", bidirectional=True),
            width=192, gate="half_glu1", dropout=0.05, batch_size=64, epochs=200,
            rates=(9e-4, 4.5e-3), weight_decay=0.03, batchnorm_momentum=0.9,
        ),
        "s4": s4(
            TASK,
            mixer=S4Config(state_size=64, bidirectional=True),
            batch_size=64, steps=500_000, rates=(1e-3, 4e-3),
        ),
        **s4d(
            TASK, batch_size=64, steps=500_000, rates=(1e-3, 4e-3), weight_decay=0.03,
            pooling="last",
        ),
        "s4d-ft": s4d_ft(
            TASK, 3.0, mixer={"n_ssm": 1},
            rates=(1e-3, 4e-3), weight_decay=0.03, batch_size=50, steps=800_000, warmup=150_000,
        ),
        "b2s6": b2s6(TASK, width=256, rate=4e-3, batch_size=48, epochs=250, weight_decay=0.03),
        "lru": lru(TASK, "pathfinder", factor=0.25, batch_size=64, steps=500_000, dropout=0.0),
        "transformer": transformer(
            TASK, layers=4, heads=4, sizes=(32, 16, 32), dropout=0.2, pooling="mean",
            train=cosine(TASK, 1e-3, batch_size=512, steps=62_400),
        ),
        "rotary": rotary(
            TASK, layers=4, width=128, heads=8, mlp=128, rate=5e-4, batch_size=64, epochs=200
        ),
    },
    shape=Shape(layers=6, width=256, batch_size=64, steps=500_000),
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
