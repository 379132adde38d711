"""IMDB: found in a folder or an archive, read safely, split as documented."""

import io
import re
import shutil
import tarfile

import numpy as np
import pytest

from seqmodels.data.lra import text
from seqmodels.data.lra.text import TextConfig


def config(max_length=12, validation=4, seed=0):
    """A config for the few reviews that a test makes."""
    return TextConfig(max_length, validation, seed, allow_partial=True)


def reviews():
    """Path in the data set -> content: 10 reviews for each split and class."""
    contents = {}
    for split in ("train", "test"):
        for name, rating in (("neg", 2), ("pos", 9)):
            for i in range(10):
                # "10_2.txt" sorts before "1_2.txt"; the third is longer than max_length
                body = f"{split}{name}{i + 1}" + "é<br />!" * (i == 2)
                contents[f"aclImdb/{split}/{name}/{i + 1}_{rating}.txt"] = body.encode()
    return contents


OTHERS = {
    "aclImdb/README": b"read me",
    "aclImdb/train/unsup/1_0.txt": b"no label",
    "aclImdb/train/pos/notes.txt": b"no review",
    "aclImdb/train/urls_pos.txt": b"http://",
}


def write_folder(root, contents):
    for path, body in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(body)
    return root


def write_archive(path, contents, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as archive:
        for name, body in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        for member, body in extra:
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path


def read(path, how=None, **options):
    return text.read(how or config(), path, progress=False, **options)


def words(examples):
    """The reviews back as bytes, with their labels."""
    items = [examples[i] for i in range(len(examples))]
    return [(bytes((item["inputs"] - 1).tolist()), item["label"]) for item in items]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", reviews() | OTHERS)


def test_tokens_labels_and_order(folder):
    data = read(folder)
    assert (data.vocabulary_size, data.num_classes) == (257, 2)
    expected = [f"testneg{i}".encode() for i in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    expected[3] = "testneg3é<br />!".encode()[:12]  # cut between bytes, not characters
    assert words(data.test)[:10] == [(body, 0) for body in expected]
    assert [label for _, label in words(data.test)] == [0] * 10 + [1] * 10
    assert data.test.lengths.max() == 12
    assert data.test.tokens.max() == 0xC3 + 1
    assert data.test.tokens.min() > 0


def test_validation_is_held_out_of_training_evenly(folder):
    data = read(folder)
    assert np.bincount(data.validation.labels).tolist() == [2, 2]
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    whole = read(folder, config(validation=0))
    assert not len(whole.validation)
    assert sorted(words(data.train) + words(data.validation)) == sorted(words(whole.train))
    held_out = [words(read(folder, config(seed=seed)).validation) for seed in range(4)]
    assert held_out[0] == words(data.validation)
    assert len({tuple(each) for each in held_out}) > 1


def test_repeated_reviews_are_not_held_out(tmp_path):
    contents = reviews()
    for i in range(1, 8):
        contents[f"aclImdb/train/neg/{i}_2.txt"] = b"again"
    folder = write_folder(tmp_path, contents)
    for seed in range(5):
        assert b"again" not in dict(words(read(folder, config(seed=seed)).validation))


def test_the_same_from_every_kind_of_source(folder, tmp_path):
    expected = read(folder)
    (tmp_path / "packed").mkdir()
    sources = [
        folder / "aclImdb",
        write_archive(tmp_path / "a.tar", reviews() | OTHERS, "w"),
        write_archive(tmp_path / "a.tgz", reviews() | OTHERS, "w:gz"),
        write_archive(tmp_path / "a.tar.xz", dict(reversed(reviews().items())), "w:xz"),
        write_archive(tmp_path / "packed" / "aclImdb_v1.tar.gz", reviews()).parent,
    ]
    for source in sources:
        data = read(source, workers=2)
        for split, examples in expected.splits.items():
            assert words(data.splits[split]) == words(examples)


def test_nothing_but_reviews_is_taken_from_an_archive(tmp_path):
    hard = tarfile.TarInfo("aclImdb/train/pos/78_9.txt")
    hard.type, hard.linkname = tarfile.LNKTYPE, "aclImdb/train/pos/1_9.txt"
    names = [
        "aclImdb/train/pos/../../../81_9.txt",
        "aclImdb/train/pos/82_9.txt/83_9.txt",
        "other/aclImdb/train/pos/84_9.txt",
    ]
    extra = [(hard, b""), *((tarfile.TarInfo(name), b"evil") for name in names)]
    archive = write_archive(tmp_path / "a.tar.gz", reviews(), extra=extra)
    before = sorted(tmp_path.rglob("*"))
    data = read(archive, config(100, validation=0))
    assert len(data.train) == len(data.test) == 20
    assert b"evil" not in dict(words(data.train))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"secret")
    link = tarfile.TarInfo("aclImdb/train/pos/77_9.txt")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    names = ["../aclImdb/train/pos/79_9.txt", "/aclImdb/train/pos/80_9.txt", str(tmp_path / "x")]
    for member in (link, *map(tarfile.TarInfo, names)):
        archive = write_archive(tmp_path / "a.tar.gz", reviews(), extra=[(member, b"")])
        with pytest.raises(ValueError, match="leads out of it"):
            read(archive, config(100, validation=0))
    assert not (tmp_path / "x").exists()


def test_links_in_a_folder_are_ignored(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "aclImdb/train/pos/77_9.txt").symlink_to(tmp_path / "secret")
    assert len(read(folder, config(validation=0)).train) == 20


def remove(path):
    return lambda root: shutil.rmtree(root / path)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (remove("aclImdb"), "holds neither train/ and test/"),
        (remove("aclImdb/test"), "holds neither train/ and test/"),
        (remove("aclImdb/test/pos"), "has no folder test/pos"),
        (
            lambda root: [path.unlink() for path in (root / "aclImdb/train/neg").iterdir()],
            "no review train/neg/",
        ),
        (
            lambda root: (root / "aclImdb/train/neg/3_2.txt").write_bytes(b""),
            r"the review train/neg/3_2\.txt .* is empty",
        ),
    ],
)
def test_an_incomplete_folder_is_explained(folder, spoil, problem):
    spoil(folder)
    with pytest.raises(ValueError, match=problem) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    assert "Large Movie Review Dataset v1.0" in str(caught.value)


COUNTS = "train/neg 10, train/pos 10, test/neg 10, test/pos 9"


def test_a_data_set_that_is_not_whole_is_refused_or_else_reported(folder, caplog, monkeypatch):
    monkeypatch.setattr(text, "_REVIEWS_OF_A_CLASS", 10)
    text.read(TextConfig(validation=4), folder, progress=False)
    (folder / "aclImdb/test/pos/3_9.txt").unlink()
    problem = f"{folder}/aclImdb holds {COUNTS} reviews; the whole data set has 10 of each"
    with pytest.raises(ValueError, match=f"{re.escape(problem)}.*--allow-partial"):
        text.read(TextConfig(validation=4), folder, progress=False)
    assert not caplog.records
    read(folder)
    (record,) = caplog.records
    assert record.getMessage() == problem


def test_reviews_in_capital_letters_are_seen(folder, tmp_path):
    expected = read(folder)
    path = folder / "aclImdb/test/pos/3_9.txt"
    path.rename(path.with_suffix(".TXT"))
    body = reviews()
    body["aclImdb/test/pos/3_9.TXT"] = body.pop("aclImdb/test/pos/3_9.txt")
    for source in (folder, write_archive(tmp_path / "a.tar", body, "w")):
        assert words(read(source).test) == words(expected.test)


def test_a_class_that_is_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    (folder / "aclImdb/test/pos").rename(tmp_path / "elsewhere")
    (folder / "aclImdb/test/pos").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has no folder test/pos \(a link out of it"):
        read(folder)


def test_wrong_paths_are_explained(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"data_dir='{tmp_path}/no' does not exist")):
        read(tmp_path / "no")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ValueError, match="file is not a tar archive"):
        read(tmp_path / "file")
    for name in ("aclImdb_v1.tar.gz", "aclImdb_v2.tar"):
        write_archive(tmp_path / name, reviews())
    with pytest.raises(ValueError, match=r"several archives \(aclImdb_v1.tar.gz, aclImdb_v2.tar\)"):
        read(tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_damaged_archive_is_explained(mode, tmp_path):
    whole = write_archive(tmp_path / "a.tar", reviews(), mode).read_bytes()
    assert len(read(tmp_path / "a.tar").test) == 20
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) * 3 // 4 if mode == "w" else -1])
    with pytest.raises(ValueError, match=r"a\.tar is damaged .*Large Movie Review Dataset"):
        read(tmp_path / "a.tar")


def test_too_large_a_validation_split(folder):
    with pytest.raises(ValueError, match="validation=20 is too much for 20 training reviews"):
        read(folder, config(validation=20))


@pytest.mark.parametrize("changes", [{"max_length": 0}, {"validation": -1}, {"seed": -1}])
def test_bad_configs_are_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name}={value} must be (at least|positive|in)"):
        TextConfig(**changes)


def test_the_fingerprint_follows_the_source(folder, tmp_path):
    first = text.source_fingerprint(folder)
    assert first == text.source_fingerprint(folder / "aclImdb")
    (folder / "aclImdb/train/unsup/2_0.txt").write_bytes(b"not read")
    assert first == text.source_fingerprint(folder)
    (folder / "aclImdb/train/neg/1_2.txt").write_bytes(b"another review")
    assert first != text.source_fingerprint(folder)
    archives = [write_archive(tmp_path / f"{i}.tar", reviews(), "w") for i in (1, 2)]
    assert len({text.source_fingerprint(archive) for archive in archives}) == 1
