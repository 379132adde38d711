"""Long Range Arena's tasks (Tay et al. 2021, arXiv:2011.04006).

data = load(ListOpsConfig(), cache_dir="~/.cache/seqmodels")
data = load(TextConfig(), cache_dir="~/.cache/seqmodels", data_dir="~/data/aclImdb_v1.tar.gz")
"""

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seqmodels.data import cache
from seqmodels.data.examples import Examples, TaskData
from seqmodels.data.lra import listops, text
from seqmodels.data.lra.listops import ListOpsConfig
from seqmodels.data.lra.text import TextConfig

__all__ = ["TASKS", "ListOpsConfig", "TextConfig", "load"]

TaskConfig = ListOpsConfig | TextConfig

TASKS: dict[str, type[TaskConfig]] = {"listops": ListOpsConfig, "text": TextConfig}

# Raised when the same config and source give other data than before; old caches are left alone.
_REVISION = 2
_SPLITS = ("train", "validation", "test")
_ARRAYS = ("tokens", "offsets", "labels")


def load(
    config: TaskConfig,
    *,
    cache_dir: str | Path,
    data_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> TaskData:
    """A task's data, from the cache where it is there and whole.

    Args:
      config: the task and its parameters; see `TASKS`.
      cache_dir: where prepared data are kept; see `seqmodels.data.cache`.
      data_dir: for Text, where the reviews are (see `text.read`). For ListOps, a folder with Long
        Range Arena's tsv files, then read as they are instead of generating from `config`.
      workers: processes or threads that prepare the data; all cores by default. The data do not
        depend on it.
      progress: show a progress bar.

    Raises:
      ValueError: an argument is wrong, or `data_dir` does not hold what it should.
      OSError: the cache cannot be written.
    """
    cores = os.cpu_count() or 1
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    folder = None if data_dir is None else Path(data_dir).expanduser()

    if isinstance(config, ListOpsConfig):
        name = "listops"
        source = None if folder is None else _tsv_fingerprint(folder)
        # Starting a process costs as much as generating some thousand samples.
        samples = config.train + config.validation + config.test
        processes = workers or min(cores, -(-samples // 20_000))

        def make() -> TaskData:
            if folder is not None:
                return listops.read_tsv(
                    folder, allow_partial=config.allow_partial, progress=progress
                )
            return listops.generate(config, workers=processes, progress=progress)

    elif isinstance(config, TextConfig):
        name = "text"
        if folder is None:
            raise ValueError(f"Text needs data_dir: {text.WHERE}")
        source = text.source_fingerprint(folder)

        def make() -> TaskData:
            return text.read(config, folder, workers=workers or cores, progress=progress)

    else:
        raise ValueError(f"config must be one of {sorted(TASKS)}'s configs, got {config!r}")

    key = {"task": name, "revision": _REVISION, "config": asdict(config), "source": source}
    contents = cache.load_or_build(
        Path(cache_dir).expanduser(), name, key, lambda: _to_contents(make())
    )
    return _from_contents(contents)


def _tsv_fingerprint(folder: Path) -> str:
    digests = []
    for path in listops.tsv_paths(folder).values():
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return cache.fingerprint(digests)


def _to_contents(data: TaskData) -> cache.Contents:
    arrays = {
        f"{split}_{array}": getattr(examples, array)
        for split, examples in data.splits.items()
        for array in _ARRAYS
    }
    facts: dict[str, Any] = {
        "name": data.name,
        "vocabulary_size": data.vocabulary_size,
        "num_classes": data.num_classes,
        "description": dict(data.description),
        "examples": {split: len(examples) for split, examples in data.splits.items()},
    }
    return arrays, facts


def _from_contents(contents: cache.Contents) -> TaskData:
    arrays, facts = contents
    splits = {
        split: Examples(*(arrays[f"{split}_{array}"] for array in _ARRAYS)) for split in _SPLITS
    }
    return TaskData(
        name=facts["name"],
        **splits,
        vocabulary_size=facts["vocabulary_size"],
        num_classes=facts["num_classes"],
        description=facts["description"],
    )
