"""A directory of arrays that is either whole and verified or built again.

An entry is written to a temporary sibling and renamed into place, its manifest last, so a reader
sees all of it or nothing. Reading checks the SHA-256 of every file. An entry that is damaged or of
another format is reported in one line and rebuilt. Builders may run at the same time: the first
one to finish is kept.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

FORMAT = 1

_MANIFEST = "manifest.json"
_ABANDONED_AFTER = 24 * 3600.0  # seconds without a change, after which a temporary is a leftover
_log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Contents = tuple[Arrays, dict[str, Any]]


class DamagedError(Exception):
    """A cache entry that must not be used; says what is wrong with it."""


def load_or_build(
    cache_dir: str | Path, name: str, config: Mapping[str, Any], build: Callable[[], Contents]
) -> Contents:
    """The entry for `config`, read from the cache or built and stored.

    Args:
      cache_dir: created if absent.
      name: what the entry's directory name starts with.
      config: JSON-able; all that the contents depend on. Its hash names the entry, so that
        another config never finds it.
      build: makes the arrays (any dtype but object) and a JSON-able description.

    Returns:
      The arrays, read-only, and the description as JSON gives it back.

    Raises:
      ValueError: `cache_dir` is a file.
      OSError: the disk is full (nothing is left behind) or cannot be written.
    """
    cache_dir = Path(cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cache_dir={str(cache_dir)!r} is not a directory") from None
    entry = cache_dir / f"{name}-{fingerprint(config)[:16]}"
    if entry.is_dir():
        try:
            return read(entry, config)
        except DamagedError as error:
            _log.warning("Building %s again: %s", entry, error)
    arrays, description = build()
    _remove_leftovers(entry)
    _publish(entry, config, arrays, description)
    for array in arrays.values():
        array.flags.writeable = False
    return arrays, json.loads(_json(description))


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(_json(value)).hexdigest()


def read(entry: Path, config: Mapping[str, Any]) -> Contents:
    """Reads an entry; its arrays are read-only.

    Raises:
      DamagedError: anything differs from what was written, or from `config`.
    """
    try:
        manifest = json.loads((entry / _MANIFEST).read_bytes())
        body = manifest["body"]
        if manifest["sha256"] != fingerprint(body):
            raise DamagedError("the manifest's checksum does not match")
        if body["format"] != FORMAT:
            raise DamagedError(f"format {body['format']}, this version reads format {FORMAT}")
        if _json(body["config"]) != _json(config):
            raise DamagedError("made from another config")
        arrays = {name: _read_array(entry, name, file) for name, file in body["files"].items()}
        return arrays, body["description"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"not readable ({error})") from None


def _read_array(entry: Path, name: str, facts: Mapping[str, Any]) -> np.ndarray:
    with open(_array_path(entry, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != facts["size"]:
            raise DamagedError(f"{name} has {size} bytes instead of {facts['size']}")
        if _sha256(file) != facts["sha256"]:
            raise DamagedError(f"the checksum of {name} does not match")
        file.seek(0)
        array = np.load(file, allow_pickle=False)
    array.flags.writeable = False
    return array


def _array_path(folder: Path, name: str) -> Path:
    if not name.isidentifier():
        raise ValueError(f"array name {name!r} is not an identifier")
    return folder / f"{name}.npy"


def _publish(
    entry: Path, config: Mapping[str, Any], arrays: Arrays, description: Mapping[str, Any]
) -> None:
    temporary = _sibling(entry)
    try:
        temporary.mkdir()
        _write(temporary, config, arrays, description)
        _rename(temporary, entry, config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = sum(array.nbytes for array in arrays.values()) / 1e6
        raise OSError(
            error.errno,
            f"no space left for {size:.0f} MB in {entry.parent}: "
            "free some space or choose another cache_dir",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path, config: Mapping[str, Any], arrays: Arrays, description: Mapping[str, Any]
) -> None:
    files = {}
    for name, array in arrays.items():
        with open(_array_path(folder, name), "w+b") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
            size = file.tell()
            file.seek(0)
            files[name] = {
                "size": size,
                "sha256": _sha256(file),
                "shape": array.shape,
                "dtype": str(array.dtype),
            }
    body = {"format": FORMAT, "config": config, "files": files, "description": description}
    body = json.loads(_json(body))
    with open(folder / _MANIFEST, "wb") as file:
        file.write(json.dumps({"sha256": fingerprint(body), "body": body}, indent=1).encode())
        _sync(file)


def _rename(temporary: Path, entry: Path, config: Mapping[str, Any]) -> None:
    """Moves `temporary` to `entry`, unless another builder has put a good entry there."""
    while True:
        try:
            temporary.rename(entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        try:
            read(entry, config)
            return
        except DamagedError:
            aside = _sibling(entry)
            with contextlib.suppress(FileNotFoundError):  # another builder was faster
                entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _sibling(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}-{uuid.uuid4().hex}")


def _remove_leftovers(entry: Path) -> None:
    """Removes what a killed builder of this entry has left, once it is certainly dead."""
    for path in entry.parent.glob(f".{entry.name}-*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_AFTER
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(file: BinaryIO) -> str:
    return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
