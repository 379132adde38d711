"""The experiments: the published settings, and what smaller budgets change in them.

Presets: "paper", the published settings, or our recipe where nobody has published any; "cpu", two
cores for at most ten minutes, on easier data where those would be too long; "cpu-hour", two cores
for at most an hour; "gpu-15min", the paper's model for a quarter of an hour of an accelerator.
"""

import dataclasses
from typing import cast, get_args

from experiments.errors import check_name
from experiments.lra.convolutions import CONVOLUTIONS, convolution
from experiments.lra.experiment import ExperimentConfig, Model, Preset, Task
from experiments.lra.presets import (
    cifar,
    image,
    listops,
    mnist,
    path_256,
    path_x,
    pathfinder,
    pmnist,
    retrieval,
    speech,
    text,
)

TASKS = {
    module.PRESETS.task: module.PRESETS
    for module in (
        listops, text, retrieval, image, pathfinder, path_x, path_256, cifar, mnist, pmnist, speech,
    )
}  # fmt: skip
"""The presets of each task."""

PAPER: dict[tuple[str, str], ExperimentConfig] = {
    (task, model): config
    for task, presets in TASKS.items()
    for model, config in presets.published.items()
}
"""The settings, by task and model, that somebody has published."""


def experiment(task: str, model: str, preset: str, seed: int = 0) -> ExperimentConfig:
    """The experiment of a preset.

    Raises:
      UsageError: an unknown name; the message has the nearest known one.
      ValueError: the seed is out of range.
    """
    for what, name, known in (
        ("task", task, get_args(Task)),
        ("model", model, get_args(Model)),
        ("preset", preset, get_args(Preset)),
    ):
        check_name(what, name, known)
    if model in CONVOLUTIONS:
        return convolution(experiment(task, "s5", preset, seed), model)
    config = TASKS[cast(Task, task)].config(cast(Model, model), cast(Preset, preset))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
