"""Image: CIFAR-10 in gray, pixel by pixel, 1,024 steps.

Data: --data-dir with cifar-10-binary.tar.gz (162 MB) or the Python version.
"""

from typing import Final

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets.models import (
    EXAMPLES,
    Presets,
    Shape,
    b2s6,
    cosine,
    lru,
    resized,
    rotary,
    s4,
    s4d,
    s4d_ft,
    s5,
    trained,
    transformer,
)
from seqmodels.mixers import S4Config, S5Config

TASK: Final = "image"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """An epoch or less."""
    small = resized(paper, layers=2, width=64, state=32)
    return trained(small, steps=400, batch_size=50, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """A few epochs."""
    small = resized(paper, layers=3, width=64, state=32)
    return trained(small, steps=4_000, batch_size=32, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """18 epochs."""
    return trained(paper, steps=18 * EXAMPLES[TASK] // 100, batch_size=100)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(
                state_size=384,
                blocks=3,
                c_init="lecun_normal",
                bidirectional=True,
                clip_eigs=True,
                decay="BfastandCdecay",
            ),
            width=512, gate="half_glu1", dropout=0.1, batch_size=50, epochs=250,
            rates=(1e-3, 4.5e-3), weight_decay=0.07,
        ),
        "s4": s4(
            TASK,
            mixer=S4Config(state_size=64, n_ssm=1, bidirectional=True),
            width=512, prenorm=False, dropout=0.1, batch_size=50, steps=180_000,
        ),
        **s4d(
            TASK, n_ssm=2, width=512, norm="layer", prenorm=False, dropout=0.1, batch_size=50,
            steps=180_000,
        ),
        "s4d-ft": s4d_ft(
            TASK, 3.0,
            width=512, norm="layer", prenorm=False, dropout=0.1, weight_decay=0.01, batch_size=50,
            steps=180_000,
        ),
        "b2s6": b2s6(
            TASK, width=512, norm="layer", prenorm=False, rate=1e-2, batch_size=48, epochs=500,
            weight_decay=0.05,
        ),
        "lru": lru(TASK, "cifar", factor=0.25, batch_size=50, steps=180_000, dropout=0.1),
        "transformer": transformer(
            TASK, layers=1, heads=8, sizes=(128, 64, 128), dropout=0.3, learned=True,
            train=cosine(TASK, 5e-4, batch_size=256, steps=35_000),
        ),
        "rotary": rotary(
            TASK, layers=3, width=64, heads=4, mlp=128, rate=1e-3, batch_size=32, epochs=200
        ),
    },
    shape=Shape(layers=6, width=512, batch_size=50, steps=180_000, dropout=0.1),
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
