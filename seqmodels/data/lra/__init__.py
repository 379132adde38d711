"""Long Range Arena's tasks (Tay et al. 2021, arXiv:2011.04006), and others of the same kind.

data = load(ListOpsConfig(), cache_dir="~/.cache/seqmodels")
data = load(TextConfig(), cache_dir="~/.cache/seqmodels", data_dir="~/data/aclImdb_v1.tar.gz")
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seqmodels.data import cache
from seqmodels.data.examples import Examples, Scaling, TaskData, check_disjoint
from seqmodels.data.lra import (
    images,
    listops,
    pathfinder,
    pathfinder_files,
    retrieval,
    speech,
    text,
)
from seqmodels.data.lra.images import CifarConfig, MnistConfig
from seqmodels.data.lra.listops import ListOpsConfig
from seqmodels.data.lra.pathfinder import PathfinderConfig
from seqmodels.data.lra.retrieval import RetrievalConfig
from seqmodels.data.lra.speech import SpeechConfig
from seqmodels.data.lra.text import TextConfig

__all__ = [
    "TASKS",
    "CifarConfig",
    "ListOpsConfig",
    "MnistConfig",
    "PathfinderConfig",
    "RetrievalConfig",
    "SpeechConfig",
    "TaskConfig",
    "TextConfig",
    "load",
]

TaskConfig = (
    ListOpsConfig
    | TextConfig
    | RetrievalConfig
    | CifarConfig
    | PathfinderConfig
    | MnistConfig
    | SpeechConfig
)

TASKS: dict[str, TaskConfig] = {
    "listops": ListOpsConfig(),
    "text": TextConfig(),
    "retrieval": RetrievalConfig(),
    "image": CifarConfig(),
    "pathfinder": PathfinderConfig(),
    "path-x": PathfinderConfig(size=128),
    "path-256": PathfinderConfig(size=256),
    "cifar": CifarConfig(colour=True),
    "mnist": MnistConfig(),
    "pmnist": MnistConfig(permuted=True),
    "speech": SpeechConfig(),
}
"""The published form of each task."""

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
      cache_dir: where prepared data are kept; see `seqmodels.data.cache`. Pathfinder images that
        are being generated are kept there block by block, so that a killed call, made again,
        continues.
      data_dir: where the original files are, as the tasks' modules say. ListOps and Pathfinder are
        generated from `config` without it.
      workers: processes or threads that prepare the data; all cores by default. The data do not
        depend on it.
      progress: show a progress bar.

    Raises:
      ValueError: an argument is wrong, `data_dir` does not hold what it should, or the splits
        share examples.
      OSError: the cache cannot be written.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if type(config) not in _SOURCES:
        raise ValueError(f"config must be one of {sorted(TASKS)}'s configs, got {config!r}")
    source = _SOURCES[type(config)]
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is None and source.generate is None:
        raise ValueError(f"{source.name} needs data_dir: {source.where}")
    name = source.name.lower()
    key = {
        "task": name,
        "revision": _REVISION,
        "config": asdict(config),
        "source": None if folder is None else source.fingerprint(config, folder),
    }
    cache_dir = Path(cache_dir).expanduser()
    parts = cache_dir / f"{name}-parts-{cache.fingerprint(key)[:16]}"
    work = Work(workers or os.cpu_count() or 1, progress, parts)

    def build() -> cache.Contents:
        if folder is not None:
            data = source.read(config, folder, work)
        else:
            assert source.generate is not None
            data = source.generate(config, work)
        check_disjoint(data, source.known)
        return _to_contents(data)

    contents = cache.load_or_build(cache_dir, name, key, build)
    shutil.rmtree(parts, ignore_errors=True)
    return _from_contents(contents)


@dataclass(frozen=True)
class Work:
    """How to prepare data: processes or threads, a progress bar, and a folder for what is done."""

    workers: int
    progress: bool
    parts: Path


@dataclass(frozen=True)
class Source:
    """Where a task's data come from.

    Attributes:
      name: of the task.
      read: from the original files.
      fingerprint: of these.
      where: how to get them.
      generate: instead, where that can be done.
      known: the share of a split that is in an earlier one as well, as the data are distributed.
    """

    name: str
    read: Callable[[Any, Path, Work], TaskData]
    fingerprint: Callable[[Any, Path], str]
    where: str
    generate: Callable[[Any, Work], TaskData] | None = None
    known: float = 0.0


def _generate_listops(config: ListOpsConfig, work: Work) -> TaskData:
    # Starting a process costs as much as generating some thousand samples.
    samples = config.train + config.validation + config.test
    processes = min(work.workers, -(-samples // 20_000))
    return listops.generate(config, workers=processes, progress=work.progress)


def _tsv_fingerprint(config: ListOpsConfig, folder: Path) -> str:
    if folder.is_file():
        status = folder.stat()
        return cache.fingerprint([folder.name, status.st_size, status.st_mtime_ns])
    digests = []
    for path in listops.tsv_paths(folder).values():
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return cache.fingerprint(digests)


_SOURCES: dict[type, Source] = {
    ListOpsConfig: Source(
        "ListOps",
        lambda config, folder, work: listops.read_tsv(
            folder, allow_partial=config.allow_partial, progress=work.progress
        ),
        _tsv_fingerprint,
        listops.WHERE,
        _generate_listops,
        known=0.01,
    ),
    TextConfig: Source(
        "Text",
        lambda config, folder, work: text.read(
            config, folder, workers=work.workers, progress=work.progress
        ),
        lambda config, folder: text.source_fingerprint(folder),
        text.WHERE,
        known=0.01,
    ),
    RetrievalConfig: Source(
        "Retrieval",
        lambda config, folder, work: retrieval.read(config, folder),
        lambda config, folder: retrieval.AAN.fingerprint(folder),
        retrieval.AAN.where,
        known=0.01,
    ),
    CifarConfig: Source(
        "CIFAR",
        lambda config, folder, work: images.read_cifar(config, folder),
        lambda config, folder: images.CIFAR.fingerprint(folder),
        images.CIFAR.where,
    ),
    MnistConfig: Source(
        "MNIST",
        lambda config, folder, work: images.read_mnist(config, folder),
        lambda config, folder: images.MNIST.fingerprint(folder),
        images.MNIST.where,
    ),
    PathfinderConfig: Source(
        "Pathfinder",
        lambda config, folder, work: pathfinder_files.read(config, folder),
        lambda config, folder: pathfinder_files.layout(config).fingerprint(
            pathfinder_files.locate(config, folder)
        ),
        "",
        lambda config, work: pathfinder.make(
            config, workers=work.workers, parts=work.parts, progress=work.progress
        ),
    ),
    SpeechConfig: Source(
        "Speech",
        lambda config, folder, work: speech.read(config, folder),
        lambda config, folder: speech.SPEECH.fingerprint(folder),
        speech.SPEECH.where,
    ),
}


def _to_contents(data: TaskData) -> cache.Contents:
    arrays = {
        f"{split}_{array}": getattr(examples, array)
        for split, examples in data.splits.items()
        for array in _ARRAYS
    }
    scaling = data.train.scaling
    facts: dict[str, Any] = {
        "name": data.name,
        "vocabulary_size": data.vocabulary_size,
        "num_classes": data.num_classes,
        "parts": data.train.parts,
        "scaling": None if scaling is None else asdict(scaling),
        "description": dict(data.description),
        "examples": {split: len(examples) for split, examples in data.splits.items()},
    }
    return arrays, facts


def _from_contents(contents: cache.Contents) -> TaskData:
    arrays, facts = contents
    scaling = None
    if facts.get("scaling") is not None:
        scaling = Scaling(**{name: tuple(values) for name, values in facts["scaling"].items()})
    splits = {
        split: Examples(
            **{array: arrays[f"{split}_{array}"] for array in _ARRAYS},
            parts=facts.get("parts", 1),
            scaling=scaling,
        )
        for split in _SPLITS
    }
    return TaskData(
        name=facts["name"],
        **splits,
        vocabulary_size=facts["vocabulary_size"],
        num_classes=facts["num_classes"],
        description=facts["description"],
    )
