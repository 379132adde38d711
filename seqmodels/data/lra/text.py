"""Text: the sentiment of IMDB reviews from their bytes, as in Long Range Arena.

The reviews are the labelled part of the Large Movie Review Dataset v1.0 (Maas et al. 2011): 25,000
for training, 25,000 for the test, half of each positive. A token is a byte plus one and 0 is
padding, a vocabulary of 257. Label 1 is positive.

The data set has no validation split, and Long Range Arena and the recipes built on it choose the
best epoch on the test split. Here `validation` reviews are held out of training instead. A review
whose text occurs more than once in the training split is never held out, so no held-out text is
trained on. (About a hundred texts are in both the training and the test split, as distributed.)
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from seqmodels.data import archive
from seqmodels.data.cache import fingerprint
from seqmodels.data.examples import Examples, TaskData, offsets_of
from seqmodels.ranges import Checked, Count, Seed, Size

WHERE = (
    "get aclImdb_v1.tar.gz, the Large Movie Review Dataset v1.0 (Maas et al. 2011), from "
    "https://ai.stanford.edu/~amaas/data/sentiment/ and pass the archive or its folder as data_dir"
)
CLASSES = ("neg", "pos")  # the position is the label
SPLITS = ("train", "test")

_REVIEWS_OF_A_CLASS = 12_500
_ROOT = "aclImdb"
_FILE = re.compile(r"\d+_\d+\.(?i:txt)")  # <id>_<rating>.txt
_MEMBER = re.compile(
    rf"(?:\./)?{_ROOT}/({'|'.join(SPLITS)})/({'|'.join(CLASSES)})/({_FILE.pattern})"
)

_log = logging.getLogger(__name__)

Reviews = dict[tuple[str, str], dict[str, bytes]]  # by split and class: file name -> text


@dataclass(frozen=True)
class TextConfig(Checked):
    """How to read the reviews.

    Attributes:
      max_length: bytes kept of each review, from its start; 4096 in Long Range Arena's paper.
      validation: training reviews held out, the same share of each class; 0 holds out none.
      seed: which ones.
      allow_partial: accept another number of reviews than the data set's 12,500 of each split and
        class; they are logged instead.

    Raises:
      ValueError: a value is out of range.
    """

    max_length: Size = 4096
    validation: Count = 2_500
    seed: Seed = 0
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Tokens that a row has at most."""
        return self.max_length


def read(
    config: TextConfig, data_dir: str | Path, *, workers: int = 1, progress: bool = True
) -> TaskData:
    """Reads the reviews from a folder or an archive; nothing is unpacked to disk.

    Args:
      data_dir: the folder `aclImdb`, a folder that holds it or its archive, or the archive
        (`.tar`, `.tar.gz`, `.tar.xz`), in the layout `aclImdb/{train,test}/{pos,neg}/7_8.txt`.
        Whatever else they hold, such as the unlabelled reviews, is ignored.
      workers: threads that read files of a folder.

    Raises:
      ValueError: the data set is not there or damaged, a class of it is absent, a review is empty,
        the numbers are not the official ones (see `TextConfig.allow_partial`), or `validation` is
        more than there is.
    """
    source = locate(data_dir)
    with tqdm(desc="IMDB", unit=" reviews", disable=not progress) as bar:
        if source.is_dir():
            reviews = _read_folder(source, config.max_length, workers, bar)
        else:
            reviews = _read_archive(source, config.max_length, bar)
    _check(reviews, source, config.allow_partial)
    train, test = (_examples(reviews, split) for split in SPLITS)
    held_out = _held_out(config, train)
    return TaskData(
        name="text",
        train=train.select(np.flatnonzero(~held_out)),
        validation=train.select(np.flatnonzero(held_out)),
        test=test,
        vocabulary_size=257,
        num_classes=2,
        description={"source": "Large Movie Review Dataset v1.0", "classes": list(CLASSES)},
    )


def locate(data_dir: str | Path) -> Path:
    """The folder `aclImdb` or the archive that `data_dir` means.

    Raises:
      ValueError: it is neither there nor unambiguous.
    """
    path = Path(data_dir).expanduser()
    if path.is_file():
        if archive.is_tar(path):
            return path
        raise ValueError(f"{path} is not a tar archive; {WHERE}")
    if not path.is_dir():
        raise ValueError(f"data_dir={str(path)!r} does not exist; {WHERE}")
    for folder in (path, path / _ROOT):
        if all((folder / split).is_dir() for split in SPLITS):
            missing = [
                f"{split}/{name}"
                for split in SPLITS
                for name in CLASSES
                if not _is_inside(folder, folder / split / name)
            ]
            if missing:
                raise ValueError(
                    f"{folder} has no folder {', '.join(missing)} (a link out of it is not "
                    f"followed); {WHERE}"
                )
            return folder
    archives = sorted(path.glob(f"{_ROOT}*.tar*"))
    if len(archives) == 1:
        return locate(archives[0])
    if archives:
        names = ", ".join(archive.name for archive in archives)
        raise ValueError(f"{path} holds several archives ({names}): pass one of them as data_dir")
    raise ValueError(
        f"{path} holds neither train/ and test/, nor {_ROOT}/train and {_ROOT}/test, "
        f"nor {_ROOT}*.tar*; {WHERE}"
    )


def source_fingerprint(data_dir: str | Path) -> str:
    """Changes when the data do: an archive's checksum, or names, sizes and times in a folder."""
    source = locate(data_dir)
    if source.is_file():
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    facts = []
    for split in SPLITS:
        for name in CLASSES:
            for entry in _files(source / split / name):
                status = entry.stat()
                facts.append([split, name, entry.name, status.st_size, status.st_mtime_ns])
    return fingerprint(sorted(facts))


def _is_inside(root: Path, folder: Path) -> bool:
    return folder.is_dir() and folder.resolve().is_relative_to(root.resolve())


def _files(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [
            entry
            for entry in entries
            if _FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]


def _no_reviews() -> Reviews:
    return {(split, name): {} for split in SPLITS for name in CLASSES}


def _read_folder(root: Path, max_length: int, workers: int, bar: tqdm) -> Reviews:
    def first_bytes(path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read(max_length)

    reviews = _no_reviews()
    with ThreadPoolExecutor(workers) as pool:
        for (split, name), texts in reviews.items():
            entries = _files(root / split / name)
            paths = [entry.path for entry in entries]
            for entry, text in zip(entries, pool.map(first_bytes, paths), strict=True):
                texts[entry.name] = text
                bar.update()
    return reviews


def _read_archive(path: Path, max_length: int, bar: tqdm) -> Reviews:
    reviews = _no_reviews()
    try:
        for name, text in archive.members(path, max_length):
            if match := _MEMBER.fullmatch(name):
                split, class_name, file_name = match.groups()
                reviews[split, class_name][file_name] = text
                bar.update()
    except archive.DamagedError as error:
        raise ValueError(f"{error}; {WHERE}") from error
    return reviews


def _check(reviews: Reviews, source: Path, allow_partial: bool) -> None:
    for (split, name), texts in reviews.items():
        if not texts:
            raise ValueError(f"no review {split}/{name}/<id>_<rating>.txt in {source}; {WHERE}")
        for file, text in texts.items():
            if not text:
                raise ValueError(f"the review {split}/{name}/{file} in {source} is empty; {WHERE}")
    counts = {f"{split}/{name}": len(texts) for (split, name), texts in reviews.items()}
    if set(counts.values()) != {_REVIEWS_OF_A_CLASS}:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        problem = (
            f"{source} holds {found} reviews; the whole data set has {_REVIEWS_OF_A_CLASS} of each"
        )
        if not allow_partial:
            raise ValueError(f"{problem}. Use what is there with --allow-partial, or {WHERE}")
        _log.warning("%s", problem)


def _examples(reviews: Reviews, split: str) -> Examples:
    """All reviews of a split, the negative ones first, each class in the order of file names."""
    texts: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES):
        texts += _in_order(reviews[split, name])
        labels += [label] * len(reviews[split, name])
    flat = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16) + 1
    offsets = offsets_of(np.array([len(text) for text in texts]))
    return Examples(flat.astype(np.uint16), offsets, np.array(labels, np.int32))


def _in_order(texts: dict[str, bytes]) -> Iterable[bytes]:
    return (texts[name] for name in sorted(texts))


def _held_out(config: TextConfig, train: Examples) -> np.ndarray:
    """`(n,)` bool: the validation reviews."""
    texts = [train.tokens[a:b].tobytes() for a, b in pairwise(train.offsets)]
    repeats = Counter(texts)
    unique = np.array([repeats[text] == 1 for text in texts])
    share = round(config.validation * np.mean(train.labels == 0))
    rng = np.random.Generator(np.random.Philox(config.seed))
    held_out = np.zeros(len(train), bool)
    for label, count in enumerate((share, config.validation - share)):
        candidates = np.flatnonzero(unique & (train.labels == label))
        if count and count >= len(candidates):
            raise ValueError(
                f"validation={config.validation} is too much for {len(train)} training reviews: "
                f"it would hold out {count} of {len(candidates)} distinct {CLASSES[label]} ones"
            )
        held_out[rng.permutation(candidates)[:count]] = True
    return held_out
