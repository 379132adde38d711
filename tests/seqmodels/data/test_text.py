"""Texts: what a token is, windows, streams, evaluation, positions, errors."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data import text
from seqmodels.data.text import BOUNDARY

DOCUMENTS = [b"abcdefg", b"hi", b"jklmnopqrstuvwxyz"]
TEXT = text.encode(DOCUMENTS)
LETTERS = text.encode([bytes(range(100))])


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def test_documents_begin_with_a_boundary_and_the_text_ends_with_one():
    expected = [BOUNDARY, *b"abcdefg", BOUNDARY, *b"hi", BOUNDARY, *DOCUMENTS[2], BOUNDARY]
    assert TEXT.tokens.tolist() == expected
    assert TEXT.starts.tolist() == [0, 8, 11]
    assert (TEXT.documents, TEXT.bytes, TEXT.predictions) == (3, 26, 29)
    assert text.decode(TEXT.tokens.tolist()) == b"".join(DOCUMENTS)
    assert TEXT.digest != text.encode(DOCUMENTS[:2]).digest


def test_a_file_a_folder_and_a_separator(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "a.txt").write_bytes(b"one|more|")
    (tmp_path / "c.md").write_bytes(b"no")
    assert text.read_documents(tmp_path / "a.txt") == [b"one|more|"]
    assert text.read_documents(tmp_path / "a.txt", "|") == [b"one", b"more"]
    assert text.read_documents(tmp_path) == [b"one|more|", b"two"]


def test_texts_are_found_at_any_depth_and_in_either_case_in_the_order_of_their_paths(tmp_path):
    paths = ["B.TXT", "a.txt", "a/b.txt", "a/deep/er/c.Txt", "a0.txt", "z.txt/inner.txt"]
    for path in reversed(paths):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    for other in ("a/readme.md", "txt", "a/notes.txt.gz"):
        (tmp_path / other).write_text("no")
    assert text.read_documents(tmp_path) == [path.encode() for path in paths]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert text.read_documents(tmp_path / "link") == [b"a/b.txt", b"a/deep/er/c.Txt"]


def test_links_are_not_followed_out_of_the_folder_nor_read_twice(tmp_path):
    folder = tmp_path / "texts"
    (folder / "blobs").mkdir(parents=True)
    (tmp_path / "texts2").mkdir()  # begins like the folder's name
    for path in ("texts/a.txt", "texts/blobs/f00", "out.txt", "texts2/out.txt"):
        (tmp_path / path).write_text(path)
    for name, target in {
        "1.txt": tmp_path / "out.txt",
        "2.txt": tmp_path / "texts2" / "out.txt",
        "3.txt": folder / "a.txt",  # there already
        "4.txt": folder / "blobs" / "f00",
        "5.txt": folder / "missing",
        "6.txt": folder / "6.txt",
        "outside": tmp_path / "texts2",
        "around": folder,
    }.items():
        (folder / name).symlink_to(target)
    assert text.read_documents(folder) == [b"texts/a.txt", b"texts/blobs/f00"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("seen")
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot be read .*closed: permission denied"):
        text.read_documents(tmp_path)


def test_validation_is_the_end_of_the_text():
    train, held_out = text.split_documents(DOCUMENTS, 0.5)
    assert train == [b"abcdefg", b"hi", b"jklm"]
    assert held_out == [b"nopqrstuvwxyz"]
    train, held_out = text.split_documents([b"ab", b"cd"], 0.5)
    assert (train, held_out) == ([b"ab"], [b"cd"])


def check_rows(batch, length):
    """Targets are the next tokens, going around; a boundary begins another document."""
    around = TEXT.predictions
    for row, start in enumerate(batch["index"]):
        expected = TEXT.tokens[(start + np.arange(length + 1)) % around]
        np.testing.assert_array_equal(batch["inputs"][row], expected[:-1])
        np.testing.assert_array_equal(batch["targets"][row], expected[1:])
        changes = np.diff(batch["segment_ids"][row]) != 0
        np.testing.assert_array_equal(changes, expected[1:-1] == BOUNDARY)
    assert batch["weights"].min() == 1
    assert batch["segment_ids"].min() >= 1


def test_windows_cover_an_epoch_once_and_begin_elsewhere_in_the_next():
    options = {"length": 5, "batch_size": 2, "seed": 3}
    batches = take(text.train_batches(TEXT, **options), 20)
    for batch in batches:
        check_rows(batch, 5)
    # 29 // 5 - 1 = 4 windows: two batches an epoch.
    epochs = [np.concatenate([b["index"] for b in batches[i : i + 2]]) for i in range(0, 20, 2)]
    assert all(len(set(epoch % 5)) == 1 and len(set(epoch)) == 4 for epoch in epochs)
    assert len({epoch[0] % 5 for epoch in epochs}) > 2
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) > 2
    again = take(text.train_batches(TEXT, **options), 20)
    np.testing.assert_array_equal(batches[19]["inputs"], again[19]["inputs"])
    other = take(text.train_batches(TEXT, **options | {"seed": 4}), 2)
    assert any((a["index"] != b["index"]).any() for a, b in zip(batches, other, strict=False))


def test_streams_go_on_where_the_batch_before_ended_and_around_the_text():
    batches = take(text.train_batches(TEXT, length=4, batch_size=3, streams=True), 20)
    for batch in batches:
        check_rows(batch, 4)
    assert batches[0]["index"].tolist() == [0, 29 // 3, 58 // 3]
    for before, after in itertools.pairwise(batches):
        np.testing.assert_array_equal((before["index"] + 4) % 29, after["index"])
    ids = np.concatenate([batch["segment_ids"] for batch in batches], axis=1)
    tokens = np.concatenate([batch["inputs"] for batch in batches], axis=1)
    # Also across batches and turns, exactly the boundaries begin a document.
    np.testing.assert_array_equal(np.diff(ids) != 0, tokens[:, 1:] == BOUNDARY)


@pytest.mark.parametrize("streams", [False, True])
def test_a_restored_position_gives_the_same_batches(streams):
    options = {"length": 4, "batch_size": 2, "streams": streams}
    iterator = iter(text.train_batches(TEXT, **options))
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    again = iter(text.train_batches(TEXT, **options))
    again.set_state(state)
    for batch in expected:
        for name, value in next(again).items():
            np.testing.assert_array_equal(value, batch[name])


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("length", "batch_size"), [(5, 2), (4, 3), (29, 1), (50, 4), (1, 30)])
def test_evaluation_predicts_every_token_once(streams, length, batch_size):
    batches = text.eval_batches(TEXT, length=length, batch_size=batch_size, streams=streams)
    seen = np.zeros(TEXT.predictions, int)
    for batch in batches:
        assert batch["inputs"].shape == (batch_size, length)
        for row, start in enumerate(batch["index"]):
            count = int(batch["weights"][row].sum())
            np.testing.assert_array_equal(batch["weights"][row], np.arange(length) < count)
            np.testing.assert_array_equal(batch["segment_ids"][row] > 0, np.arange(length) < count)
            seen[start : start + count] += 1
            np.testing.assert_array_equal(
                batch["targets"][row, :count], TEXT.tokens[start + 1 : start + 1 + count]
            )
    np.testing.assert_array_equal(seen, 1)
    assert len(batches) == len(list(batches))


def test_evaluation_streams_continue():
    batches = list(text.eval_batches(LETTERS, length=8, batch_size=3, streams=True))
    tokens = np.concatenate([batch["inputs"] for batch in batches], axis=1)
    weights = np.concatenate([batch["weights"] for batch in batches], axis=1)
    rows = [row[mask > 0].tolist() for row, mask in zip(tokens, weights, strict=True)]
    assert list(itertools.chain(*rows)) == LETTERS.tokens[:-1].tolist()
    assert list(map(len, rows)) == [34, 34, 33]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text.encode([]), "documents is empty"),
        (lambda: text.split_documents([b"ab"], 0.01), "validation=0.01 of 2 bytes"),
        (lambda: text.train_batches(TEXT, length=0, batch_size=1), "length=0"),
        (lambda: text.train_batches(TEXT, length=1, batch_size=0), "batch_size=0"),
        (lambda: text.train_batches(TEXT, length=1, batch_size=1, seed=-1), "seed=-1"),
        (lambda: text.train_batches(TEXT, length=10, batch_size=3), "30 tokens, fewer than the 31"),
        (lambda: text.eval_batches(TEXT, length=0, batch_size=3), "length=0"),
        (lambda: text.read_documents(Path("/nowhere.txt")), "cannot be read"),
        (lambda: text.read_documents(Path("."), ""), "separator=''"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="holds no text"):
            text.read_documents(path)
