"""Path-256: Pathfinder with images of 256 x 256 pixels, 65,536 steps, by Path-X's settings.

Data: generated, nothing to download; or pathfinder256/ of Long Range Arena's release (7.7 GB).
"""

from typing import Final

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets import path_x
from experiments.lra.presets.models import EXAMPLES, Presets, resized, trained
from experiments.lra.presets.pathfinder import fewer

TASK: Final = "path-256"


def cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """Short contours, and few images: shows that the step runs, and its speed."""
    small = resized(fewer(paper, 400, "easy"), layers=2, width=32, state=32)
    return trained(small, steps=30, batch_size=2, rate=2e-3)


def hour(paper: ExperimentConfig) -> ExperimentConfig:
    """Few images, of which nothing can be learned yet."""
    small = resized(fewer(paper, 400, "hard"), layers=2, width=32, state=32)
    return trained(small, steps=200, batch_size=2, rate=2e-3)


def gpu(paper: ExperimentConfig) -> ExperimentConfig:
    """A tenth of an epoch, of which nothing can be learned yet."""
    return trained(paper, steps=EXAMPLES[TASK] // 160, batch_size=16)


PRESETS = Presets(
    TASK,
    published={},
    like=path_x.PRESETS,
    changes={"cpu": cpu, "cpu-hour": hour, "gpu-15min": gpu},
)
