"""A run's directory: what was run, where and with which versions.

config.json         the whole experiment, enough to resume or evaluate
environment.json    one entry for each start: command, commit, versions, devices
metrics.jsonl       training and evaluation metrics
nonfinite.jsonl     batches whose loss or gradient was not finite, if any
tensorboard/        the same metrics as event files
checkpoints/<step>/ state, data position, config
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import seqmodels
from seqmodels.training.checkpoint import differences
from seqmodels.training.errors import RunDirectoryError
from seqmodels.training.metrics import write_atomically

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config that a run directory was made with.

    Raises:
      RunDirectoryError: it is not a run directory, or its config is damaged.
    """
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunDirectoryError(f"{run_dir} is not a run directory: no config.json") from None
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise RunDirectoryError(f"{path} is damaged: it is not a JSON object")
    return config


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that may begin, or go on, in its directory; made by ``open_run``.

    Attributes:
      directory: where everything goes.
      config_dict: the whole experiment as JSON, which the run is known by.
      resume: go on from the latest checkpoint, or from the start if there is none.
    """

    directory: Path
    config_dict: Mapping[str, Any]
    resume: bool = False

    def prepare(self) -> None:
        """Makes the directory if it is not there; writes the config and notes this start."""
        self.write_config()
        _append_environment(self.directory / "environment.json")

    def write_config(self) -> None:
        """Makes the directory, if it is not there, one that can be resumed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config_dict, indent=2) + "\n"
        write_atomically(self.directory / "config.json", text)


def open_run(directory: Path, config_dict: Mapping[str, Any], *, resume: bool = False) -> Run:
    """The run, checked: nothing is written yet.

    Raises:
      RunDirectoryError: a new run in the directory of another; or a resumed one whose directory
        is not a run or has another config (fields in ``RESUMABLE`` may differ).
    """
    if resume:
        different = differences(read_config(directory), config_dict)
        if different:
            raise RunDirectoryError(
                f"{directory} belongs to another config: {'; '.join(different)}. "
                "Use the saved values, or start in another run directory"
            )
    elif (directory / "config.json").exists():
        raise RunDirectoryError(
            f"{directory} already holds a run: continue it with --resume, or choose another "
            "--run-dir"
        )
    return Run(directory, config_dict, resume)


def _append_environment(path: Path) -> None:
    starts = read_starts(path) if path.exists() else []
    write_atomically(path, json.dumps([*starts, environment()], indent=2) + "\n")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The entries of environment.json, one a start; RunDirectoryError if it is damaged."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise RunDirectoryError(f"{path} is damaged: it is not a list of starts")
    return starts


def environment() -> dict[str, Any]:
    """What may explain a difference between two runs of one config."""
    devices = jax.devices()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seqmodels": seqmodels.__version__,
        **source_version(Path(__file__).parent),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
    }


def source_version(directory: Path) -> dict[str, Any]:
    """``{"commit", "dirty"}`` of the checkout that ``directory`` is part of; None outside of one.

    An environment inside of another project's checkout, which git ignores, is not part of it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
