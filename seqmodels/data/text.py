"""Language-model data: text files as bytes, in packed windows or in contiguous streams.

A token is a byte, 0 to 255, or `BOUNDARY`. Every document begins with a boundary and the text ends
with one, so that a document's first byte and its end are predicted too.

A batch is a dict of numpy arrays:

    inputs       (B, L) int32
    targets      (B, L) int32    the next token of each input
    segment_ids  (B, L) int32    the document, from 1; 0 on padding, only in evaluation
    weights      (B, L) float32  1, or 0 on padding
    index        (B,)   int32    the position of the row's first token in the text
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]

BOUNDARY = 256
VOCABULARY = 257

_LARGEST_ID = 2**31 - 1
_EPOCHS_REMEMBERED = 2  # prefetching looks one epoch ahead at most


@dataclass(frozen=True, eq=False)
class Text:
    """Documents end to end.

    Attributes:
      tokens: `(T,)`: of each document a boundary and its bytes, uint16; then one more boundary.
      starts: `(documents,)` int64, the positions of the documents' boundaries.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.starts)

    @property
    def predictions(self) -> int:
        """Tokens that have one before them."""
        return len(self.tokens) - 1

    @property
    def bytes(self) -> int:
        return len(self.tokens) - self.documents - 1

    @property
    def digest(self) -> str:
        """Equal for equal tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).view(np.uint8).data).hexdigest()


def read_documents(path: Path, separator: str | None = None) -> list[bytes]:
    """The documents of a file, or of all text files of a folder (see `text_files`).

    Args:
      path: the file or folder.
      separator: None, one document a file; or what stands between the documents of a file.

    Raises:
      ValueError: there is no such file, it cannot be read, or there is no text in it.
    """
    if separator == "":
        raise ValueError("separator='' must be None or at least one character")
    path = Path(path).expanduser()
    try:
        files = text_files(path) if path.is_dir() else [path]
        contents = [file.read_bytes() for file in files]
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        where = "" if error.filename in (None, str(path)) else f"{error.filename}: "
        raise ValueError(
            f"data={str(path)!r} cannot be read ({where}{reason}); give a text file, or a folder "
            "with *.txt files"
        ) from error
    documents: list[bytes] = []
    for content in contents:
        documents += [content] if separator is None else content.split(separator.encode())
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(
            f"data={str(path)!r} holds no text; give a text file that is not empty, or a folder "
            "with *.txt files"
        )
    return documents


def text_files(folder: Path) -> list[Path]:
    """The files below `folder`, at any depth, whose names end in .txt or .TXT, each once.

    They are in the order of their paths, as strings with "/", on every platform. A link to a file
    stands for that file; links to folders, and out of `folder`, are not followed.

    Raises:
      OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    root = folder.resolve()
    found: set[Path] = set()
    for parent, _, names in os.walk(root, onerror=refuse):
        for name in names:
            path = Path(parent, name)
            if name.lower().endswith(".txt") and path.is_file():
                found.add(path.resolve())
    inside = (path for path in found if path.is_relative_to(root))
    return sorted(inside, key=lambda path: path.relative_to(root).as_posix())


def split_documents(
    documents: Sequence[bytes], validation: float
) -> tuple[list[bytes], list[bytes]]:
    """Documents for training, and the last `validation` of all bytes.

    A document on the line between them is cut in two.

    Raises:
      ValueError: the share leaves nothing for one of the two.
    """
    total = sum(map(len, documents))
    at = total - round(total * validation)
    if not 0 < at < total:
        raise ValueError(
            f"validation={validation} of {total} bytes leaves nothing for training or for "
            "validation; choose a share in (0, 1), or a longer text"
        )
    train, held_out = [], []
    for document in documents:
        train += [document[:at]] if at > 0 else []
        held_out += [document[at:]] if at < len(document) else []
        at = max(at - len(document), 0)
    return train, held_out


def encode(documents: Sequence[bytes]) -> Text:
    """The documents' tokens.

    Raises:
      ValueError: there are none.
    """
    if not documents:
        raise ValueError("documents is empty; a text needs at least one document")
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    tokens = np.full(ends[-1] + 1, BOUNDARY, np.uint16)
    for start, document in zip(starts, documents, strict=True):
        tokens[start + 1 : start + 1 + len(document)] = np.frombuffer(document, np.uint8)
    return Text(tokens, starts)


def joined(documents: Sequence[Sequence[int]], boundary: int) -> Text:
    """Documents that are tokens already, of any vocabulary: `boundary` is before and behind each.

    Raises:
      ValueError: there are none.
    """
    if not documents:
        raise ValueError("documents is empty; a text needs at least one document")
    parts = [np.array([boundary, *document], np.int32) for document in documents]
    ends = np.cumsum([len(part) for part in parts])
    tokens = np.concatenate([*parts, np.array([boundary], np.int32)])
    return Text(tokens, ends - [len(part) for part in parts])


def decode(tokens: Sequence[int]) -> bytes:
    """The bytes among the tokens."""
    return bytes(token for token in tokens if token < BOUNDARY)


def train_batches(
    text: Text,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    streams: bool = False,
    prefetch: int = 8,
    own: np.ndarray | None = None,
) -> grain.IterDataset[Batch]:
    """Batches without end.

    As windows: each epoch cuts the text, from another offset, into rows of `length` tokens, and
    shuffles them by `seed`; rows that fill no batch are left out. As streams: row r of a batch goes
    on where row r of the batch before ended; the rows begin evenly spaced, and after the text's
    last document comes its first again.

    `own`, if given, are the rows of each batch that are made here, `(b,)` of 0 .. B - 1: what one
    of several processes reads. Which batches there are, and the state, do not depend on it.

    `iter(...)` has `get_state()` and `set_state(state)`, where the state is a JSON-able dict, and
    restoring it takes no replay.

    Raises:
      ValueError: an argument is out of range, or the text is too short for one batch.
    """
    _check(length, batch_size)
    for name, value in (("seed", seed), ("prefetch", prefetch)):
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    needed = length * (1 if streams else batch_size) + 1
    if len(text.tokens) < needed:
        raise ValueError(
            f"the text has {len(text.tokens)} tokens, fewer than the {needed} that length={length} "
            f"and batch_size={batch_size} need; use a longer text, or smaller values"
        )
    source: Any = Windows(text, length, batch_size, seed, own)
    if streams:
        source = Streams(text, length, batch_size, own)
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    return grain.MapDataset.source(source).to_iter_dataset(options)


def eval_batches(
    text: Text,
    *,
    length: int,
    batch_size: int,
    streams: bool = False,
    own: np.ndarray | None = None,
) -> grain.MapDataset[Batch]:
    """Batches that predict each token of the text once; has `len()` and can be iterated again.

    As windows, a token's context is what stands before it in its row; as streams, of which there
    are `batch_size`, also what earlier batches had in the row. `own` is as in `train_batches`.

    Raises:
      ValueError: an argument is out of range.
    """
    _check(length, batch_size)
    size = -(-text.predictions // batch_size) if streams else length
    cuts = np.arange(0, text.predictions, size)
    cuts = np.pad(cuts, (0, -len(cuts) % batch_size), constant_values=text.predictions)
    starts: np.ndarray = cuts.reshape(-1, batch_size)
    ends = np.minimum(starts + size, text.predictions)
    if streams:  # one row of starts, from which the batches go on
        starts = starts + np.arange(0, size, length)[:, None]
        ends = np.broadcast_to(ends, starts.shape)
    mine = slice(None) if own is None else own
    return grain.MapDataset.source(EvalRows(text, length, starts[:, mine], ends[:, mine]))


def rows(text: Text, starts: np.ndarray, length: int) -> Batch:
    """The batch of the rows that begin at `starts`; positions go around the text."""
    around = text.predictions  # the last boundary is the first one
    positions = starts[:, None] + np.arange(length + 1)
    tokens = text.tokens[positions % around].astype(np.int32)
    turns, places = np.divmod(positions[:, :-1], around)
    documents = np.searchsorted(text.starts, places, side="right") - 1 + turns * text.documents
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": (1 + documents % _LARGEST_ID).astype(np.int32),
        "weights": np.ones((len(starts), length), np.float32),
        "index": (starts % around).astype(np.int32),
    }


class Windows:
    """Random access to the endless batches of shuffled windows; see `train_batches`."""

    def __init__(
        self, text: Text, length: int, batch_size: int, seed: int, own: np.ndarray | None = None
    ) -> None:
        self.text, self.length, self.batch_size, self.seed = text, length, batch_size, seed
        self.own = slice(None) if own is None else own
        # One window less than there is room for leaves the offset free.
        self.windows = max(text.predictions // length - 1, batch_size)
        self.batches = self.windows // batch_size
        self._plans: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sys.maxsize  # what grain takes for endless

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, self.batches)
        return rows(self.text, self.plan(epoch)[place][self.own], self.length)

    def plan(self, epoch: int) -> np.ndarray:
        """Where the rows of an epoch's batches start, `(batches, B)` int64."""
        # Threads may race here; they then compute the same plan twice.
        plan = self._plans.get(epoch)
        if plan is None:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            spare = self.text.predictions - self.windows * self.length
            offset = rng.integers(0, min(spare, self.length - 1) + 1)
            order = rng.permutation(self.windows)[: self.batches * self.batch_size]
            plan = (offset + order * self.length).reshape(self.batches, self.batch_size)
            kept = sorted(self._plans.items())[1 - _EPOCHS_REMEMBERED :]
            self._plans = dict([*kept, (epoch, plan)])
        return plan


class Streams:
    """Random access to the endless batches of streams; see `train_batches`."""

    def __init__(
        self, text: Text, length: int, batch_size: int, own: np.ndarray | None = None
    ) -> None:
        self.text, self.length = text, length
        rows = np.arange(batch_size, dtype=np.int64) if own is None else own
        self.starts = rows * text.predictions // batch_size

    def __len__(self) -> int:
        return sys.maxsize  # what grain takes for endless

    def __getitem__(self, number: int) -> Batch:
        return rows(self.text, self.starts + number * self.length, self.length)


class EvalRows:
    """Random access to evaluation batches, from where each row starts to where it must end."""

    def __init__(self, text: Text, length: int, starts: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.length, self.starts, self.ends = text, length, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Batch:
        starts, ends = self.starts[number], self.ends[number]
        batch = rows(self.text, starts, self.length)
        real = starts[:, None] + np.arange(self.length) < ends[:, None]
        padded = ("inputs", "targets", "segment_ids", "weights")
        return batch | {
            name: np.where(real, batch[name], 0).astype(batch[name].dtype) for name in padded
        }


def _check(length: int, batch_size: int) -> None:
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
