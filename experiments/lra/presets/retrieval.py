"""Retrieval: whether one paper cites another, from the bytes of both, at most 4,000 each.

Data: --data-dir with tsv_data/ of Long Range Arena's release (7.7 GB).
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
from seqmodels.data.lra import RetrievalConfig
from seqmodels.mixers import S4Config, S5Config

TASK: Final = "retrieval"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """The first 1,000 bytes of each text."""
    short = on(paper, RetrievalConfig(max_length=1_000), (1_000,))
    small = resized(short, layers=2, width=64, state=32)
    return trained(small, steps=300, batch_size=16, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """The first 2,000 bytes of each text."""
    short = on(paper, RetrievalConfig(max_length=2_000), (1_000, 2_000))
    small = resized(short, layers=2, width=64, state=32)
    return trained(small, steps=2_000, batch_size=16, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """An epoch and a half."""
    return trained(paper, steps=3 * EXAMPLES[TASK] // 128, batch_size=64)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(
                state_size=256,
                blocks=16,
                c_init="trunc_standard_normal",
                bidirectional=True,
                dt_global=True,
            ),
            width=128, gate="half_glu1", batch_size=32, epochs=20, rates=(1e-3, 2e-3),
            weight_decay=0.05,
        ),
        "s4": s4(
            TASK,
            mixer=S4Config(state_size=4, n_ssm=1, bidirectional=True, dt_global=True),
            batch_size=64, steps=50_000,
        ),
        **s4d(TASK, batch_size=64, steps=50_000),
        "s4d-ft": s4d_ft(
            TASK, 3.0, mixer={"n_ssm": 1, "dt_global": True},
            width=128, rates=(1e-3, 4e-3), weight_decay=0.03, batch_size=64, steps=100_000,
            warmup=5_000,
        ),
        "b2s6": b2s6(TASK, width=128, rate=4e-3, batch_size=60, epochs=200, weight_decay=0.03),
        "lru": lru(TASK, "aan", factor=0.5, batch_size=64, steps=100_000, dropout=0.1),
        "transformer": transformer(
            TASK, layers=4, heads=4, sizes=(128, 128, 512), dropout=0.1,
            train=rsqrt(TASK, warmup=8_000, steps=5_000),
        ),
        "rotary": rotary(
            TASK, layers=4, width=128, heads=4, mlp=512, rate=5e-4, batch_size=32, epochs=20
        ),
    },
    shape=Shape(layers=6, width=256, batch_size=64, steps=50_000),
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
