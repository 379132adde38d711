"""Path-X: Pathfinder with images of 128 x 128 pixels, 16,384 steps.

Data: generated, nothing to download; or pathfinder128/ of Long Range Arena's release (7.7 GB), the
inner of two folders of that name.
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
from experiments.lra.presets.pathfinder import fewer
from seqmodels.mixers import S4Config, S5Config

TASK: Final = "path-x"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """Short contours, and few images: shows that the step runs, and its speed."""
    small = resized(fewer(paper, 2_000, "easy"), layers=2, width=32, state=32)
    return trained(small, steps=60, batch_size=4, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """Few images, of which nothing can be learned yet."""
    small = resized(fewer(paper, 2_000, "hard"), layers=2, width=32, state=32)
    return trained(small, steps=500, batch_size=8, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """Half an epoch, in which nobody has left the level of chance."""
    return trained(paper, steps=EXAMPLES[TASK] // 64, batch_size=32)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(
                state_size=256,
                blocks=16,
                c_init="complex_normal",
                bidirectional=True,
                dt_min=1e-4,
                decay="BandCdecay",
            ),
            width=128, gate="half_glu1", batch_size=32, epochs=75, rates=(6e-4, 1.8e-3),
            weight_decay=0.06, batchnorm_momentum=0.9,
        ),
        "s4": s4(
            TASK,
            mixer=S4Config(state_size=64, bidirectional=True, dt_min=1e-4),
            batch_size=16, steps=500_000, rates=(1e-3, 1e-3),
        ),
        # The paper had steps of up to 0.01, with which S4D-Lin fails here (S4D-DFouT).
        **s4d(TASK, dt_min=1e-4, batch_size=16, steps=500_000, rates=(5e-4, 5e-4)),
        "s4d-ft": s4d_ft(
            TASK, 5.0, mixer={"dt_min": 1e-4},
            width=128, rates=(1e-3, 1e-3), weight_decay=0.03, batch_size=20, steps=1_250_000,
            warmup=200_000,
        ),
        "b2s6": b2s6(TASK, width=128, rate=1e-3, batch_size=24, epochs=120, weight_decay=0.03),
        "lru": lru(TASK, "pathx", factor=0.25, batch_size=32, steps=250_000, dropout=0.0),
        "transformer": transformer(
            TASK, layers=1, heads=2, sizes=(32, 16, 32), dropout=0.1, learned=True,
            pooling="mean", train=cosine(TASK, 1e-3, batch_size=64, steps=500_000, clip_norm=1.0),
        ),
        # The authors' windows of 4,096 and maximum over time are full attention and mean here.
        "rotary": rotary(
            TASK, layers=4, width=128, heads=4, mlp=128, rate=5e-4, batch_size=32, epochs=50
        ),
    },
    shape=Shape(layers=6, width=128, batch_size=32, steps=250_000),
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
