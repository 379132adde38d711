"""Text: the sentiment of IMDB reviews from their bytes, at most 4,096.

Data: --data-dir with aclImdb_v1.tar.gz (84 MB), the Large Movie Review Dataset.
"""

from typing import Final

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets.models import (
    EXAMPLES,
    Presets,
    Shape,
    b2s6,
    lru,
    on,
    resized,
    rotary,
    rsqrt,
    s4,
    s4d,
    s4d_ft,
    s5,
    trained,
    transformer,
)
from seqmodels.data.lra import TextConfig
from seqmodels.mixers import S4Config, S5Config

TASK: Final = "text"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """The first 1,024 bytes of each review."""
    short = on(paper, TextConfig(max_length=1024), (640, 1024))
    small = resized(short, layers=2, width=64, state=32)
    return trained(small, steps=2_500, batch_size=16, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """The first 2,048 bytes of each review."""
    short = on(paper, TextConfig(max_length=2048), (768, 1280, 2048))
    small = resized(short, layers=2, width=96, state=32)
    return trained(small, steps=7_000, batch_size=16, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """16 epochs."""
    return trained(paper, steps=16 * EXAMPLES[TASK] // 64, batch_size=64)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(
                state_size=192, blocks=12, c_init="lecun_normal", bidirectional=True,
                dt_global=True,
            ),
            width=256, gate="half_glu2", dropout=0.1, batch_size=50, epochs=35,
            rates=(1e-3, 4e-3), weight_decay=0.07, warmup_epochs=0,
        ),
        "s4": s4(
            TASK,
            mixer=S4Config(state_size=4, n_ssm=1, bidirectional=True, dt_global=True),
            batch_size=16, steps=50_000,
        ),
        **s4d(TASK, batch_size=16, steps=50_000),
        "s4d-ft": s4d_ft(
            TASK, 5.0, mixer={"n_ssm": 1, "dt_global": True}, batch_size=32, steps=20_000
        ),
        "b2s6": b2s6(TASK, width=256, rate=1e-2, batch_size=16, epochs=40, weight_decay=0.05),
        "lru": lru(TASK, "imdb", factor=0.1, batch_size=32, steps=50_000, dropout=0.1),
        "transformer": transformer(
            TASK, layers=4, heads=4, sizes=(256, 256, 1024), dropout=0.1,
            train=rsqrt(TASK, warmup=8_000, steps=20_000),
        ),
        "rotary": rotary(
            TASK, layers=6, width=512, heads=8, mlp=2048, rate=5e-4, batch_size=32, epochs=30
        ),
    },
    shape=Shape(layers=6, width=256, batch_size=16, steps=50_000, dropout=0.1),
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
