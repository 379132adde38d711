"""What all experiments share: errors, changes of a config by path, run directories, results."""

import copy
import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from seqmodels.arguments import INT32, integer
from seqmodels.config import from_dict, to_dict
from seqmodels.parallel.mesh import make_mesh
from seqmodels.training.checkpoint import Checkpoints, differences
from seqmodels.training.config import TrainConfig
from seqmodels.training.errors import RunDirectoryError, TrainingError
from seqmodels.training.metrics import TIMING_FIELDS, finite, read_jsonl, write_atomically
from seqmodels.training.state import TrainState, abstract_state
from seqmodels.training.task import Task

Config = TypeVar("Config")


class UsageError(ValueError):
    """The command line asks for something that does not exist."""

    exit_code = 2


def main_guard(main: Callable[[], None], *, show_traceback: bool) -> int:
    """Runs ``main``; errors the user can act on become one line on stderr.

    Args:
      main: the program.
      show_traceback: print the whole traceback as well.

    Returns:
      The exit code: 0, or the error's.
    """
    try:
        main()
    except (ValueError, OSError, TrainingError, NotImplementedError) as error:
        if show_traceback:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def absolute(path: Path | str | None) -> str | None:
    """The path from the root, with ~ resolved; None stays None."""
    return None if path is None else os.path.abspath(Path(path).expanduser())


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with the fields at these dotted paths replaced.

    Raises:
      UsageError: there is no such field, or the value does not fit it.
    """
    data = copy.deepcopy(to_dict(config))
    for path, value in changes.items():
        _replace(data, path, value)
    try:
        return from_dict(type(config), data, where="config")
    except ValueError as error:
        raise UsageError(str(error)) from error


def _replace(data: Any, path: str, value: Any) -> None:
    """Sets one value in nested dicts and lists; the keys of group_learning_rates may be new."""
    *parents, last = path.split(".")
    node = data
    for depth, name in enumerate(parents):
        node = _child(node, name, ".".join(parents[: depth + 1]))
    if isinstance(node, dict) and parents[-1:] == ["group_learning_rates"]:
        node[last] = value
        return
    _child(node, last, path)
    node[int(last) if isinstance(node, list) else last] = value


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, dict) and name in node:
        return node[name]
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return node[int(name)]
    if isinstance(node, dict):
        known = ", ".join(node)
    else:
        known = f"0 to {len(node) - 1}" if isinstance(node, list) else "no fields"
    raise UsageError(f"the config has no field {path!r}; there it has {known}")


def parse_changes(settings: list[str]) -> dict[str, Any]:
    """``["train.steps=10"]`` -> ``{"train.steps": 10}``; values are JSON, or else plain text.

    Raises:
      UsageError: there is no "=".
    """
    changes = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {setting!r} must look like train.learning_rate=0.001")
        try:
            changes[path] = json.loads(text)
        except ValueError:
            changes[path] = text
    return changes


def unescaped(text: str) -> str:
    """The text with \\n, \\t, \\r and a doubled backslash in place of what they stand for.

    Shells pass these on as two characters; any other backslash stays.
    """
    meaning = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: meaning[found[1]], text)


def check_integer(option: str, value: int | None, least: int, most: int = INT32) -> None:
    """Raises UsageError for an option of the command line out of its range; None is not given."""
    try:
        if value is not None:
            integer(option, value, least, most)
    except ValueError as error:
        raise UsageError(str(error)) from error


def locate(checkpoint: Path) -> tuple[Path, int | None]:
    """The run directory and the step, if one is named.

    Raises:
      UsageError: the path is not in a run directory.
    """
    path = checkpoint.expanduser()
    candidates: list[tuple[Path, int | None]] = [(path, None), (path.parent, None)]
    if path.name.isdigit():
        candidates.append((path.parent.parent, int(path.name)))
    for run_dir, step in candidates:
        if (run_dir / "config.json").exists():
            return run_dir, step
    raise UsageError(
        f"--checkpoint {checkpoint}: no run there; give a run directory (it has a config.json), "
        "its checkpoints/ or checkpoints/<step>"
    )


@dataclasses.dataclass(frozen=True)
class Locations:
    """Where a run's data are, and what they were; in the run directory as data.json.

    Attributes:
      cache_dir: where prepared data are kept; empty where nothing is prepared.
      data_dir: the raw data, a file or a folder.
      digest: of the data, to notice others.
    """

    cache_dir: str
    data_dir: str | None
    digest: str

    def write(self, run_dir: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_atomically(run_dir / "data.json", text)

    @classmethod
    def read(cls, run_dir: Path) -> "Locations":
        """Raises RunDirectoryError if there is none."""
        try:
            return cls(**json.loads((run_dir / "data.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunDirectoryError(f"cannot read {run_dir / 'data.json'}: {error}") from error


def result_path(results_dir: Path, name: str, config: Any) -> Path:
    """Where the result goes; UsageError if it would replace that of another config."""
    path = results_dir / f"{name}.json"
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8")).get("config", {})
        different = differences(_completed(saved, type(config)), finite(to_dict(config)))
        if different:
            raise UsageError(
                f"{path} is the result of another config ({'; '.join(different)}); "
                "choose another --results-dir, or move it away"
            )
    return path


def _completed(saved: dict[str, Any], kind: type) -> dict[str, Any]:
    """A saved config with the defaults of fields that are newer than the file."""
    try:
        return finite(to_dict(from_dict(kind, saved)))
    except ValueError:
        return saved


def restore(
    task: Task, train: TrainConfig, identity: Mapping[str, Any], checkpoints: Path, step: int
) -> TrainState:
    """The state of one checkpoint, on the first device.

    Args:
      task: the model.
      train: how it was trained.
      identity: the whole config as JSON, as the run directory has it.
      checkpoints: their directory.
      step: which of them.

    Raises:
      CheckpointError: it cannot be read.
    """
    template = abstract_state(task, train, make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(checkpoints, identity, read_only=True) as saved:
        return saved.restore(template, step)[0]


def chosen_step(run_dir: Path, identity: Mapping[str, Any]) -> int:
    """The step that the run was tested at, or else its latest checkpoint.

    Raises:
      CheckpointError: there is none.
    """
    step = recorded(run_dir).get("test_step")
    if step is None:
        with Checkpoints(run_dir / "checkpoints", identity, read_only=True) as checkpoints:
            step = checkpoints.latest()
    return step


def recorded(run_dir: Path) -> dict[str, Any]:
    """The result of a run; empty before there is one."""
    path = run_dir / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def history(run_dir: Path) -> dict[str, Any]:
    """What is published of how a run went, "starts", "environment" and "curve": no path of the
    machine it ran on."""
    starts = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    hidden = ("command", "started")
    return {
        "starts": len(starts),
        "environment": {name: value for name, value in starts[-1].items() if name not in hidden},
        "curve": [
            {name: value for name, value in record.items() if name not in {"order", *TIMING_FIELDS}}
            for record in read_jsonl(run_dir / "metrics.jsonl")
        ],
    }


def write_result(result: Mapping[str, Any], run_dir: Path, path: Path) -> None:
    """Writes the result to the run directory and to ``path``."""
    text = json.dumps(finite(result), indent=1, allow_nan=False) + "\n"
    write_atomically(run_dir / "result.json", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
