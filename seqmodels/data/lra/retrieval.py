"""Retrieval: whether one paper cites the other, from the bytes of both (Radev et al. 2013).

The pairs are of the ACL Anthology Network, in Long Range Arena's files: 147,086 for training,
18,090 for validation, 17,437 for the test. A line is a label, two ids and two texts, with tabs
between. A token is a byte plus one and 0 is padding; both texts go through the same model (no
attention between them).
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmodels.data.examples import Examples, TaskData
from seqmodels.data.lra.sources import Layout, require_all
from seqmodels.ranges import Checked, Size

AAN = Layout(
    files=r"new_aan_pairs\.(?:train|eval|test)\.tsv",
    archives=("lra_release*", "*aan*.tar*", "tsv_data*.tar*"),
    most=1 << 32,
    where=(
        "get lra_release.gz (7.7 GB, a compressed tar archive) from "
        "https://storage.googleapis.com/long-range-arena/lra_release.gz and pass it, or its folder "
        "lra_release/tsv_data, as data_dir"
    ),
)
FILES = {"train": "train", "validation": "eval", "test": "test"}
PUBLISHED = {"train": 147_086, "validation": 18_090, "test": 17_437}
_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}


@dataclass(frozen=True)
class RetrievalConfig(Checked):
    """How to read the pairs.

    Attributes:
      max_length: bytes kept of each text, from its start.
      allow_partial: accept other numbers of pairs than the published ones.

    Raises:
      ValueError: a value is out of range.
    """

    max_length: Size = 4000
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Steps that a row has at most."""
        return self.max_length

    @property
    def validation(self) -> int:
        """Pairs of the published file."""
        return PUBLISHED["validation"]


def read(config: RetrievalConfig, data_dir: str | Path) -> TaskData:
    """Reads the three files.

    Raises:
      ValueError: one is missing or damaged, has another number of lines than published, or a line
        is malformed; names the file and the line.
    """
    splits: dict[str, Examples] = {}
    names = []
    wanted = {f"new_aan_pairs.{part}.tsv": split for split, part in FILES.items()}
    for name, content in AAN.read(data_dir):
        short = name.rsplit("/")[-1]
        names.append(short)
        where = f"{data_dir}, {name}"
        split = wanted[short]
        splits[split] = examples = _read_file(content, config.max_length, where)
        published = PUBLISHED[split]
        if len(examples) != published and not config.allow_partial:
            raise ValueError(
                f"{where} holds {len(examples)} pairs, the published file {published}: get it "
                "whole, or use what is there with --allow-partial"
            )
    require_all(names, list(wanted), data_dir, AAN.where)
    return TaskData(
        name="retrieval",
        **splits,
        vocabulary_size=257,
        num_classes=2,
        description={"source": "ACL Anthology Network, Long Range Arena's pairs"},
    )


def _read_file(content: bytes, max_length: int, where: str) -> Examples:
    texts: list[bytes] = []
    labels: list[int] = []
    for number, line in enumerate(io.BytesIO(content), start=1):
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != 5:
            raise ValueError(
                f"{where}, line {number}: expected a label, two ids and two texts with tabs "
                f"between, found {len(fields)} fields"
            )
        if fields[0] not in _LABELS:
            shown = fields[0][:20].decode(errors="replace")
            raise ValueError(f"{where}, line {number}: label {shown!r} is neither 0 nor 1")
        for which, text in zip(("first", "second"), fields[3:], strict=True):
            if not text.strip():
                raise ValueError(f"{where}, line {number}: the {which} text is empty")
        labels.append(_LABELS[fields[0]])
        texts += [text[:max_length] for text in fields[3:]]
    if not labels:
        raise ValueError(f"{where} is empty; {AAN.where}")
    tokens = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16)
    tokens += 1
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return Examples(tokens, offsets, np.array(labels, np.int32), parts=2)
