"""ListOps: the value of nested lists of operators on digits, 501 to 1,999 tokens.

Data: generated, nothing to download; or listops-1000/ of Long Range Arena's release.
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
from seqmodels.data.lra import ListOpsConfig
from seqmodels.mixers import S4Config, S5Config

TASK: Final = "listops"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """Trees of 65 to 199 tokens instead of 501 to 1,999."""
    small = on(paper, ListOpsConfig(min_length=64, max_length=200), (136, 200))
    return trained(resized(small, layers=6, width=64), steps=2_500, batch_size=50, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """The published data."""
    return trained(resized(paper, layers=4, width=64), steps=6_000, batch_size=32, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """20 epochs."""
    return trained(paper, steps=20 * EXAMPLES[TASK] // 100, batch_size=100)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(
                state_size=16,
                blocks=8,
                c_init="lecun_normal",
                bidirectional=True,
                decay="BfastandCdecay",
            ),
            layers=8, width=128, gate="half_glu2", batch_size=50, epochs=40, rates=(1e-3, 3e-3),
            weight_decay=0.04,
        ),
        "s4": s4(
            TASK,
            mixer=S4Config(state_size=4, n_ssm=1, bidirectional=True, dt_global=True),
            prenorm=False, batch_size=32, steps=120_000,
        ),
        **s4d(TASK, layers=8, width=128, prenorm=False, batch_size=50, steps=80_000),
        "s4d-ft": s4d_ft(
            TASK, 3.0, mixer={"n_ssm": 1, "dt_global": True},
            width=128, rates=(4e-3, 8e-3), weight_decay=0.03, batch_size=32, steps=150_000,
            warmup=5_000,
        ),
        "b2s6": b2s6(
            TASK, layers=8, width=128, prenorm=False, rate=8e-3, batch_size=32, epochs=120,
            weight_decay=0.03,
        ),
        "lru": lru(TASK, "listops", factor=0.5, batch_size=32, steps=80_000, dropout=0.0),
        "transformer": transformer(
            TASK, layers=4, heads=8, sizes=(512, 512, 1024), dropout=0.1,
            train=rsqrt(TASK, warmup=1_000, steps=5_000),
        ),
        "rotary": rotary(
            TASK, layers=6, width=512, heads=8, mlp=2048, rate=1e-4, batch_size=32, epochs=40
        ),
    },
    shape=Shape(layers=8, width=128, batch_size=50, steps=80_000),
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
