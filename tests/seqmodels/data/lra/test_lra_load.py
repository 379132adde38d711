"""`load`: cached by everything that the data depend on."""

import dataclasses

import numpy as np
import pytest

from seqmodels.data import cache, lra
from seqmodels.data.lra import (
    CifarConfig,
    ListOpsConfig,
    MnistConfig,
    PathfinderConfig,
    RetrievalConfig,
    SpeechConfig,
    TextConfig,
    listops,
    load,
    pathfinder,
)
from tests.seqmodels.data.lra import original_files as original

SMALL = ListOpsConfig(8, 40, max_depth=5, train=50, validation=10, test=5)


def same(first, second):
    facts = ("name", "vocabulary_size", "num_classes", "description")
    return all(getattr(first, fact) == getattr(second, fact) for fact in facts) and all(
        np.array_equal(getattr(first.splits[split], array), getattr(second.splits[split], array))
        for split in first.splits
        for array in ("tokens", "offsets", "labels")
    )


@pytest.fixture
def generated(monkeypatch):
    """The configs that were really generated, not read from the cache."""
    configs = []
    generate = listops.generate

    def counted(config, **options):
        configs.append(config)
        return generate(config, **options)

    monkeypatch.setattr(listops, "generate", counted)
    return configs


def listops_data(folder, config=SMALL, **options):
    return load(config, cache_dir=folder, progress=False, **options)


def test_the_second_time_comes_from_the_cache(tmp_path, generated):
    first = listops_data(tmp_path)
    second = listops_data(str(tmp_path), workers=2)
    assert len(generated) == 1
    assert same(first, second)
    assert same(first, listops.generate(SMALL, progress=False))


def test_every_field_counts(tmp_path, generated):
    changes = {"min_length": 9, "max_length": 41, "max_depth": 6, "max_arguments": 9, "seed": 1}
    changes |= {"train": 51, "validation": 11, "test": 6, "allow_partial": True}
    assert set(changes) == {field.name for field in dataclasses.fields(SMALL)}
    configs = [SMALL, *(dataclasses.replace(SMALL, **{k: v}) for k, v in changes.items())]
    for config in configs:
        listops_data(tmp_path, config)
    assert generated == configs


def test_tsv_files_are_read_and_noticed_when_they_change(tmp_path, generated):
    listops_data(tmp_path / "cache")
    for seed in (1, 2):
        other = listops.generate(dataclasses.replace(SMALL, seed=seed), progress=False)
        listops.write_tsv(tmp_path / "tsv", other)
        config = dataclasses.replace(SMALL, allow_partial=True)
        data = listops_data(tmp_path / "cache", config, data_dir=tmp_path / "tsv")
        assert np.array_equal(data.train.tokens, other.train.tokens)
    assert data.description["source"] == "Long Range Arena's tsv files"
    with pytest.raises(ValueError, match=r"basic_train\.tsv holds 50 samples.*--allow-partial"):
        listops_data(tmp_path / "cache", data_dir=tmp_path / "tsv")  # not from the cache
    with pytest.raises(ValueError, match="does not hold"):  # not the generated data instead
        listops_data(tmp_path / "cache", data_dir=tmp_path)


def test_text_is_cached_by_its_source(tmp_path, monkeypatch):
    root = tmp_path / "aclImdb"
    for split in ("train", "test"):
        for name in ("neg", "pos"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1_1.txt").write_text(f"first {split} {name}")
    config = TextConfig(validation=0, allow_partial=True)

    def read(config=config):
        return load(config, cache_dir=tmp_path / "cache", data_dir=root, progress=False)

    first = read()
    monkeypatch.setattr(lra.text, "_read_folder", None)  # not read again
    assert same(first, read())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--allow-partial"):  # not from the cache
        read(TextConfig(validation=0))
    (root / "train" / "pos" / "1_1.txt").write_bytes(b"second")
    assert not same(first, read())


def test_text_needs_its_data(tmp_path):
    with pytest.raises(ValueError, match=r"Text needs data_dir: get aclImdb_v1\.tar\.gz"):
        load(TextConfig(), cache_dir=tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="workers=0"):
        listops_data(tmp_path, workers=0)
    assert not list(tmp_path.iterdir())


def test_a_damaged_entry_is_generated_again(tmp_path, generated):
    first = listops_data(tmp_path)
    (entry,) = tmp_path.iterdir()
    content = bytearray((entry / "train_tokens.npy").read_bytes())
    content[-1] ^= 1
    (entry / "train_tokens.npy").write_bytes(content)
    assert same(first, listops_data(tmp_path))
    assert len(generated) == 2


def test_the_names_of_the_tasks():
    assert lra.TASKS["listops"] == ListOpsConfig()
    assert lra.TASKS["path-x"] == PathfinderConfig(size=128)
    assert len(set(lra.TASKS.values())) == len(lra.TASKS) == 11
    assert cache.FORMAT == 1


def original_of(task):
    """Files, and a config that takes them."""
    cases = {
        "retrieval": (original.pairs(), RetrievalConfig(allow_partial=True)),
        "image": (original.cifar(), CifarConfig(validation=2, allow_partial=True)),
        "pathfinder": (original.pathfinder(), PathfinderConfig(allow_partial=True)),
        "mnist": (original.mnist(), MnistConfig(validation=2, allow_partial=True)),
        "speech": (original.digits(), SpeechConfig(allow_partial=True)),
    }
    return cases[task]


@pytest.mark.parametrize("task", ["retrieval", "image", "pathfinder", "mnist", "speech"])
def test_original_files_are_cached_until_they_change(task, tmp_path):
    files, config = original_of(task)
    folder = original.write(tmp_path / "data", files)

    def read():
        return load(config, cache_dir=tmp_path / "cache", data_dir=folder, progress=False)

    first, second = read(), read()
    assert same(first, second)
    for split, examples in first.splits.items():
        other = second.splits[split]
        assert (examples.parts, examples.scaling) == (other.parts, other.scaling)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    next(path for path in sorted(folder.rglob("*")) if path.is_file()).touch()
    read()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(ValueError, match="--allow-partial"):
        load(
            dataclasses.replace(config, allow_partial=False),
            cache_dir=tmp_path / "cache", data_dir=folder,
        )  # fmt: skip
    if task != "pathfinder":
        with pytest.raises(ValueError, match="needs data_dir: get "):
            load(config, cache_dir=tmp_path / "cache")


def test_a_test_row_in_train_is_refused(tmp_path):
    files = original.cifar()
    files["test_batch.bin"] = files["data_batch_2.bin"]
    config = CifarConfig(validation=0, allow_partial=True)
    with pytest.raises(ValueError, match="4 of the 4 examples of the test split are in an earlier"):
        load(
            config, cache_dir=tmp_path / "cache", data_dir=original.write(tmp_path / "data", files)
        )


def test_a_generation_that_was_killed_continues_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(pathfinder._BLOCK, 32, 4)
    monkeypatch.setitem(pathfinder._TRIES, 32, 128)
    config = PathfinderConfig(difficulty="easy", train=12, validation=2, test=2)
    draw, drawn = pathfinder.draw_block, []

    def killed(*arguments):
        drawn.append(arguments[-1])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(pathfinder, "draw_block", killed)
    with pytest.raises(KeyboardInterrupt):
        load(config, cache_dir=tmp_path, workers=1, progress=False)
    data = load(config, cache_dir=tmp_path, workers=1, progress=False)
    assert drawn == [0, 1, 2, 2, 3]
    assert [len(e) for e in data.splits.values()] == [12, 2, 2]
    (entry,) = tmp_path.iterdir()
    assert entry.name.startswith("pathfinder-")
    images, _ = pathfinder.generate(32, 16, seed=0, difficulty="easy", processes=1)
    assert np.array_equal(data.train.tokens.reshape(-1, 32, 32), images[:12])
