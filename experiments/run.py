"""What all experiments share: run directories and results."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import terminal
from experiments.errors import UsageError
from seqmodels import ranges
from seqmodels.config import from_dict, to_dict
from seqmodels.parallel.mesh import MESH_AXES, make_mesh
from seqmodels.ranges import Checked
from seqmodels.training import processes
from seqmodels.training.checkpoint import Checkpoints, differences
from seqmodels.training.config import TrainConfig
from seqmodels.training.errors import RunDirectoryError
from seqmodels.training.loop import Outcome
from seqmodels.training.metrics import (
    TIMING_FIELDS,
    finite,
    read_jsonl,
    unbounded,
    write_atomically,
)
from seqmodels.training.run_directory import read_starts
from seqmodels.training.state import TrainState, abstract_state
from seqmodels.training.task import Task


def absolute(path: Path | str | None) -> str | None:
    """The path from the root, with ~ resolved; None stays None."""
    return None if path is None else os.path.abspath(Path(path).expanduser())


def mesh_sizes(text: str | None) -> dict[str, int]:
    """``data=2,seq=4`` as sizes by axis; none for None.

    Raises:
      UsageError: no such axis, one twice, or a size that is no whole number.
    """
    sizes: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        axis, equals, size = part.strip().partition("=")
        if axis not in MESH_AXES or not equals or axis in sizes or not size.lstrip("-").isdecimal():
            raise UsageError(
                f"--mesh {text!r} must give each axis one size, e.g. data=2,seq=4; the axes are "
                f"{', '.join(MESH_AXES)}"
            )
        sizes[axis] = int(size)
    return sizes


def mesh_of(text: str | None) -> Mesh:
    """The mesh of ``--mesh``: of the devices that it has, by default the first alone.

    Raises:
      UsageError, ValueError: it cannot be read, or there are not so many devices.
    """
    given = mesh_sizes(text)
    data, model, seq = (given.get(axis, 1) for axis in MESH_AXES)
    devices = jax.devices()
    if data != -1:
        devices = devices[: max(1, data * model * seq)]
    return make_mesh(data, model, seq, devices)


def say_padding(lengths: Sequence[int], seq: int) -> None:
    """Tells of rows that get more padding, so that their length divides over the mesh."""
    for length in lengths:
        if missing := -length % seq:
            terminal.say(
                f"rows of {length} tokens are padded to {length + missing}, a multiple of seq={seq}"
            )


def unescaped(text: str) -> str:
    """The text with \\n, \\t, \\r and a doubled backslash in place of what they stand for.

    Shells pass these on as two characters; any other backslash stays.
    """
    meaning = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: meaning[found[1]], text)


def locate(checkpoint: Path) -> tuple[Path, int | None]:
    """The run directory and the step, if one is named.

    Raises:
      UsageError: the path is not in a run directory.
    """
    path = checkpoint.expanduser()
    candidates: list[tuple[Path, int | None]] = [(path, None), (path.parent, None)]
    if path.name.isdecimal():
        candidates.append((path.parent.parent, int(path.name)))
    for run_dir, step in candidates:
        if (run_dir / "config.json").exists():
            return run_dir, step
    raise UsageError(
        f"--checkpoint {checkpoint}: no run there; give a run directory (it has a config.json), "
        "its checkpoints/ or checkpoints/<step>"
    )


@dataclasses.dataclass(frozen=True)
class Locations(Checked):
    """Where a run's data are, and what they were; in the run directory as data.json.

    Attributes:
      cache_dir: where prepared data are kept; empty where nothing is prepared.
      data_dir: the raw data, a file or a folder.
      digest: of the data, to notice others.
      source: the folder of the checkpoint that the run began with, if it did with one.
    """

    cache_dir: str
    data_dir: str | None
    digest: str
    source: str = ""

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


def require_same_data(locations: Locations) -> None:
    """Refuses processes that would train on other data than the first; all of them call this."""
    processes.require_equal({"data": locations.digest}, "give all processes the same data")


def require_names(arguments: Any, saved: Mapping[str, Any], run_dir: Path) -> None:
    """Refuses a command line that names another experiment than the run to resume.

    Args:
      arguments: of the command, with a field for each name, None where nothing is asked for.
      saved: what the names are in the run.
      run_dir: of the run.

    Raises:
      UsageError: a name differs.
    """
    for name, value in saved.items():
        given = getattr(arguments, name)
        if given not in (None, value):
            raise UsageError(
                f"--{name} {given}: the run in {run_dir} has {value}; leave --{name} out, or start "
                "in another --run-dir"
            )


def result_path(results_dir: Path, name: str, config: Any) -> Path:
    """Where the result goes.

    Raises:
      UsageError: it would replace that of another config, or ``results_dir`` can be no folder.
    """
    path = results_dir / f"{name}.json"
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise UsageError(f"--results-dir {results_dir}: {there} is a file; name a folder")
    if path.exists():
        saved = read_object(path).get("config", {})
        different = differences(_completed(saved, type(config)), finite(to_dict(config)))
        if different:
            raise UsageError(
                f"{path} is the result of another config ({'; '.join(different)}); "
                "choose another --results-dir, or move it away"
            )
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return found


def check_record(record: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raises ValueError unless what was read from a file has these fields, declared as configs'."""
    for name, hint in fields.items():
        if name not in record:
            raise ValueError(f"{name} is missing")
        ranges.check(name, record[name], hint)


def _completed(saved: Any, kind: type) -> dict[str, Any]:
    """A saved config with the defaults of fields that are newer than the file."""
    try:
        return finite(to_dict(from_dict(kind, unbounded(saved))))
    except ValueError:
        return saved if isinstance(saved, dict) else {}


def restore(
    task: Task,
    train: TrainConfig,
    config_dict: Mapping[str, Any],
    checkpoints: Path,
    step: int,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state of one checkpoint.

    Args:
      task: the model.
      train: how it was trained.
      config_dict: the whole config as JSON, as the run directory has it.
      checkpoints: their directory.
      step: which of them.
      mesh: where it goes; default the first device.

    Raises:
      CheckpointError: it cannot be read.
    """
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    template = abstract_state(task, train, mesh)
    with Checkpoints(checkpoints, config_dict, read_only=True) as saved:
        return saved.restore(template, step)[0]


def chosen_step(run_dir: Path, config_dict: Mapping[str, Any]) -> int:
    """The step that the run was tested at, or else its latest checkpoint.

    Raises:
      CheckpointError: there is none.
    """
    step = recorded(run_dir).get("test_step")
    if step is None:
        with Checkpoints(run_dir / "checkpoints", config_dict, read_only=True) as checkpoints:
            step = checkpoints.latest()
    return step


def recorded(run_dir: Path) -> dict[str, Any]:
    """The result of a run; empty before there is one."""
    path = run_dir / "result.json"
    return read_object(path) if path.exists() else {}


def selection(train: TrainConfig, outcome: Outcome) -> str:
    """How the checkpoint that is tested was chosen, in words."""
    if outcome.progress.best_step is None:
        return "last step"
    return {"accuracy": "best validation accuracy", "loss": "lowest validation loss"}[train.select]


def history(run_dir: Path) -> dict[str, Any]:
    """What is published of how a run went, "starts", "environment" and "curve": no path of the
    machine it ran on."""
    starts = read_starts(run_dir / "environment.json")
    hidden = ("command", "started")
    return {
        "starts": len(starts),
        "environment": {name: value for name, value in starts[-1].items() if name not in hidden},
        "curve": [
            {name: value for name, value in record.items() if name not in {"order", *TIMING_FIELDS}}
            for record in read_jsonl(run_dir / "metrics.jsonl")
        ],
    }


def validation(curve: Sequence[Mapping[str, Any]], step: int) -> Mapping[str, Any]:
    """The evaluation of a step in a run's curve, the last one if there are several; else empty."""
    found: Mapping[str, Any] = {}
    for record in curve:
        if (record["kind"], record["step"]) == ("eval", step):
            found = record
    return found


def write_result(result: Mapping[str, Any], run_dir: Path, path: Path) -> None:
    """Writes the result to the run directory and to ``path``."""
    text = json.dumps(finite(result), indent=1, allow_nan=False) + "\n"
    write_atomically(run_dir / "result.json", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
