"""Metrics on disk: JSON lines for programs, TensorBoard for eyes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

# The only fields in which a resumed run may differ from an unbroken one.
TIMING_FIELDS = frozenset({"wall_seconds", "tokens_per_second", "compile_seconds"})


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; none if there is no file.

    A last line that a killed process left incomplete is ignored.

    Raises:
      ValueError: another line is not a JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):  # no newline: the write was cut off
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append(record)
    return records


def truncate_jsonl(path: Path, step: int) -> None:
    """Drops the records after ``step``, atomically."""
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    write_atomically(path, "".join(_line(record) for record in kept))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a complete new one, or leaves it as it is."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def unbounded(value: Any) -> Any:
    """The inverse of ``finite``, for values in which no text is one of its three."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, Mapping):
        return {key: unbounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [unbounded(item) for item in value]
    return value


class JsonLines:
    """Appends records to a file, each visible to readers at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Returns when the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """``metrics.jsonl`` and TensorBoard's event files of one run.

    Args:
      directory: the run directory.
      resume_step: the restored step of a resumed run: records after it are dropped.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        path = directory / "metrics.jsonl"
        purge_step = None
        if resume_step is not None:
            truncate_jsonl(path, resume_step)
            purge_step = resume_step + 1
        self._jsonl = JsonLines(path)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record; numbers also go to TensorBoard as ``kind/name``."""
        self._jsonl.write({"kind": kind, "step": step, **values})
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        self._jsonl.sync()
        self._board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *unused: Any) -> None:
        self._jsonl.close()
        self._board.close()


class NoMetrics:
    """A ``MetricsWriter`` that writes nothing: that of all processes but the first."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *unused: Any) -> None:
        pass
