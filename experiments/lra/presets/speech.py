"""Speech: words from raw audio, 16,000 steps; S5's settings of Speech Commands, else Path-X's.

Data: --data-dir with speech_commands_v0.02.tar.gz (2.4 GB), or with the recordings of the Free
Spoken Digit Dataset (16 MB), and with it --allow-partial.
"""

from typing import Final

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets import path_x
from experiments.lra.presets.models import EXAMPLES, Presets, resized, s5, trained
from seqmodels.mixers import S5Config

TASK: Final = "speech"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """A small model, for a few minutes."""
    small = resized(paper, layers=2, width=32, state=32)
    return trained(small, steps=200, batch_size=16, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """A small model, for longer."""
    small = resized(paper, layers=4, width=32, state=32)
    return trained(small, steps=1_000, batch_size=16, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """An epoch."""
    return trained(paper, steps=EXAMPLES[TASK] // 32, batch_size=32)


PRESETS = Presets(
    TASK,
    published={
        "s5": s5(
            TASK,
            S5Config(
                state_size=128,
                blocks=16,
                c_init="lecun_normal",
                bidirectional=True,
                decay="noBCdecay",
            ),
            width=96, gate="half_glu1", dropout=0.1, batch_size=16, epochs=40,
            rates=(2e-3, 8e-3), weight_decay=0.04,
        ),
    },
    like=path_x.PRESETS,
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)  # fmt: skip
