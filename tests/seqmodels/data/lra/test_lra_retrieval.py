"""Retrieval: pairs of texts from Long Range Arena's files."""

import dataclasses

import numpy as np
import pytest

from seqmodels.data.lra.retrieval import RetrievalConfig, read
from tests.seqmodels.data.lra import original_files as original

CONFIG = RetrievalConfig(max_length=8, allow_partial=True)
FILES = original.pairs()
TRAIN = "new_aan_pairs.train.tsv"


def text(ids):
    return bytes(int(i) - 1 for i in ids)


def test_pairs_in_order(tmp_path):
    data = read(CONFIG, original.write(tmp_path, FILES))
    assert {split: len(e) for split, e in data.splits.items()} == {
        "train": 12, "validation": 4, "test": 4,
    }  # fmt: skip
    first, second = data.train[2]["inputs"]
    assert (text(first), text(second)) == (b"paper 3", b"other 3\xc3")  # cut to eight bytes
    assert data.train.labels.tolist() == [1, 0] * 6
    assert (data.vocabulary_size, data.num_classes, data.train.parts) == (257, 2, 2)
    assert data.train.lengths.tolist() == [8] * 12


def test_lines_of_other_systems(tmp_path):
    plain = read(CONFIG, original.write(tmp_path / "a", FILES))
    crlf = {name: body.replace(b"\n", b"\r\n") for name, body in FILES.items()}
    for files in (crlf, {name: body.rstrip(b"\n") for name, body in FILES.items()}):
        other = read(CONFIG, original.write(tmp_path / "b", files))
        assert np.array_equal(other.train.tokens, plain.train.tokens)


def test_the_archive_of_the_release(tmp_path):
    below = {f"lra_release/lra_release/tsv_data/{name}": body for name, body in FILES.items()}
    path = original.tar(tmp_path / "lra_release.gz", below | {"lra_release/other": b"x"})
    for where in (path, tmp_path):
        assert len(read(CONFIG, where).train) == 12


def line(text):
    return FILES[TRAIN] + text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({TRAIN: b""}, r"train\.tsv is empty"),
        ({TRAIN: line(b"0\ta\tb\tonly one\n")}, "train.tsv, line 13: expected.*found 4 fields"),
        ({TRAIN: line(b"0\ta\tb\tone\ttwo\tthree\n")}, "line 13.*found 6 fields"),
        ({TRAIN: line(b"\n")}, "line 13.*found 1 fields"),
        ({TRAIN: line(b"2.0\ta\tb\tone\ttwo\n")}, "line 13: label '2.0' is neither 0 nor 1"),
        ({TRAIN: b"label\tid1\tid2\ttext1\ttext2\n"}, "line 1: label 'label' is neither"),
        ({TRAIN: line(b"0\ta\tb\t \ttwo\n")}, "line 13: the first text is empty"),
        ({TRAIN: line(b"0\ta\tb\tone\t\r\n")}, "line 13: the second text is empty"),
        ({"more/" + TRAIN: FILES[TRAIN]}, "more than once"),
    ],
)
def test_bad_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(CONFIG, original.write(tmp_path, FILES | change))


def test_missing_and_other_counts(tmp_path):
    folder = original.write(tmp_path, {TRAIN: FILES[TRAIN]})
    with pytest.raises(
        ValueError, match=r"does not hold new_aan_pairs\.eval\.tsv, new_aan_pairs\.t"
    ):
        read(CONFIG, folder)
    original.write(tmp_path, FILES)
    with pytest.raises(ValueError, match=r"eval\.tsv holds 4 pairs, the published file 18090"):
        read(dataclasses.replace(CONFIG, allow_partial=False), folder)
