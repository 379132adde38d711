"""The command line that a result can be made with again."""

import shlex
from typing import Any

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets import experiment
from experiments.lra.pretrain import with_pretraining
from seqmodels.config import to_dict

PROG = "experiments.lra.train"


def command_of(config: ExperimentConfig, with_data: bool) -> str:
    """The command line that runs this experiment again, on any machine.

    Args:
      config: the experiment.
      with_data: it reads original files, whose place is called DATA_DIR.
    """
    seed, minutes = config.train.seed, config.minutes
    kind = None if config.pretrain is None else config.pretrain.kind
    preset = experiment(config.task, config.model, config.preset, seed)
    preset = with_pretraining(preset, kind)
    command = ["--task", config.task, "--model", config.model, "--preset", config.preset]
    command += ["--seed", str(seed)] if seed else []
    command += [] if kind is None else ["--pretrain", kind]
    command += [] if minutes is None else ["--minutes", f"{minutes:g}", "--steps"]
    command += [] if minutes is None else [str(config.train.steps)]
    command += ["--data-dir", "DATA_DIR"] if with_data else []
    before, now = (_leaves(to_dict(c)) for c in (preset, config))
    for name, value in now.items():
        if value == before.get(name) or name in ("minutes", "train.steps" if minutes else ""):
            continue
        values = value if isinstance(value, list) else [value]
        command += [f"--{name}", *map(str, values)]
    return shlex.join(["python", "-m", PROG, *command])


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The fields of a config by path, as the command line names them."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    parts = (_leaves(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}
