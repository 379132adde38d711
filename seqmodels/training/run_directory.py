"""A run's directory: what was run, where and with which versions.

config.json         the whole experiment, enough to resume or evaluate
environment.json    one entry for each start: command, commit, versions, devices
metrics.jsonl       training and evaluation metrics
nonfinite.jsonl     batches whose loss or gradient was not finite, if any
tensorboard/        the same metrics as event files
checkpoints/<step>/ state, data position, config
"""

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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(f"{run_dir} is not a run directory: no config.json") from None
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from None


def check(run_dir: Path, config: Mapping[str, Any], *, resume: bool) -> None:
    """Checks that a run with ``config`` can begin, or with ``resume`` go on, in ``run_dir``.

    Raises:
      RunDirectoryError: a new run in the directory of another; or a resumed one whose directory
        is not a run or has another config.
    """
    if resume:
        different = differences(read_config(run_dir), config)
        if different:
            raise RunDirectoryError(
                f"{run_dir} belongs to another config: {'; '.join(different)}. "
                "Use the saved values, or start in another run directory"
            )
    elif (run_dir / "config.json").exists():
        raise RunDirectoryError(
            f"{run_dir} already holds a run: continue it with --resume, or choose another --run-dir"
        )


def prepare(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Makes the directory if it is not there; writes the config and notes this start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.json", json.dumps(config, indent=2) + "\n")
    _append_environment(run_dir / "environment.json")


def _append_environment(path: Path) -> None:
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_atomically(path, json.dumps([*starts, environment()], indent=2) + "\n")


def environment() -> dict[str, Any]:
    """What may explain a difference between two runs of one config."""
    devices = jax.devices()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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
    """``{"commit", "dirty"}`` of the checkout around ``directory``; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
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
