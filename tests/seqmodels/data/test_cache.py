"""The cache: whole or built again, whatever happens to its files."""

import errno
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from seqmodels.data import cache

CONFIG = {"size": 3, "name": "x"}


class Builder:
    """Counts how often it is asked to build."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"numbers": np.arange(1000), "labels": np.array([1, 2], np.int32)}, {"note": "hello"}


@pytest.fixture
def build():
    return Builder()


def load(folder, build, config=CONFIG):
    arrays, description = cache.load_or_build(folder, "things", config, build)
    assert np.array_equal(arrays["numbers"], np.arange(1000))
    assert arrays["labels"].dtype == np.int32
    assert description == {"note": "hello"}
    return arrays


def entry_of(folder):
    (entry,) = folder.iterdir()  # also: no temporary directory is left
    return entry


def test_builds_once_and_then_reads(tmp_path, build):
    load(tmp_path / "new" / "cache", build)
    arrays = load(tmp_path / "new" / "cache", build)
    assert build.calls == 1
    assert not arrays["numbers"].flags.writeable
    manifest = json.loads((entry_of(tmp_path / "new" / "cache") / "manifest.json").read_text())
    facts = manifest["body"]["files"]["numbers"]
    assert (facts["shape"], facts["dtype"]) == ([1000], "int64")


def test_another_config_is_another_entry(tmp_path, build):
    load(tmp_path, build)
    load(tmp_path, build, {**CONFIG, "size": 4})
    load(tmp_path, build, dict(reversed(CONFIG.items())))  # the order of keys does not count
    assert build.calls == 2
    assert len(list(tmp_path.iterdir())) == 2


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite_manifest(entry, **changes):
    path = entry / "manifest.json"
    body = json.loads(path.read_text())["body"] | changes
    path.write_text(json.dumps({"sha256": cache.fingerprint(body), "body": body}))


DAMAGE = {
    "a flipped byte": (lambda e: flip(e / "numbers.npy", -5), "checksum of numbers"),
    "a flipped byte in the header": (lambda e: flip(e / "labels.npy", 20), "checksum of labels"),
    "a truncated array": (lambda e: os.truncate(e / "numbers.npy", 100), "numbers has 100 bytes"),
    "a longer array": (lambda e: os.truncate(e / "numbers.npy", 10**5), "numbers has 100000 bytes"),
    "a missing array": (lambda e: (e / "labels.npy").unlink(), "labels.npy is missing"),
    "a missing manifest": (lambda e: (e / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda e: os.truncate(e / "manifest.json", 90), "not readable"),
    "an empty manifest": (lambda e: (e / "manifest.json").write_text("{}"), "not readable"),
    "an edited manifest": (
        lambda e: (e / "manifest.json").write_text(
            (e / "manifest.json").read_text().replace("hello", "hullo")
        ),
        "the manifest's checksum",
    ),
    "another format": (lambda e: rewrite_manifest(e, format=99), "format 99"),
    "another config": (lambda e: rewrite_manifest(e, config={}), "another config"),
    "a path out of the entry": (
        lambda e: rewrite_manifest(e, files={"../../secret": {"size": 1}}),
        "not an identifier",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_repaired(damage, tmp_path, build, caplog):
    load(tmp_path, build)
    spoil, message = DAMAGE[damage]
    spoil(entry_of(tmp_path))
    with caplog.at_level(logging.WARNING):
        load(tmp_path, build)
    assert build.calls == 2
    (record,) = caplog.records
    assert message in record.getMessage()
    assert str(entry_of(tmp_path)) in record.getMessage()
    assert "\n" not in record.getMessage()
    load(tmp_path, build)
    assert build.calls == 2


def test_every_single_flipped_byte_of_a_manifest_is_noticed(tmp_path, build):
    load(tmp_path, build)
    entry = entry_of(tmp_path)
    for place in range(0, (entry / "manifest.json").stat().st_size, 7):
        flip(entry / "manifest.json", place)
        with pytest.raises(cache.DamagedError):
            cache.read(entry, CONFIG)
        flip(entry / "manifest.json", place)
    cache.read(entry, CONFIG)


def test_pickles_are_neither_written_nor_read(tmp_path, build):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        cache.load_or_build(tmp_path, "x", {}, lambda: ({"a": np.array([{}], object)}, {}))
    assert not list(tmp_path.iterdir())

    load(tmp_path, build)
    entry = entry_of(tmp_path)
    np.save(entry / "labels.npy", np.array([{}], object), allow_pickle=True)
    body = json.loads((entry / "manifest.json").read_text())["body"]
    content = (entry / "labels.npy").read_bytes()
    files = body["files"]
    files["labels"] |= {"size": len(content), "sha256": cache.hashlib.sha256(content).hexdigest()}
    rewrite_manifest(entry, files=files)
    with pytest.raises(cache.DamagedError, match="allow_pickle=False"):
        cache.read(entry, CONFIG)


@pytest.mark.parametrize("failing", ["numbers.npy", "labels.npy", "manifest.json"])
def test_a_full_disk_is_said_plainly_and_leaves_nothing(failing, tmp_path, build, monkeypatch):
    sync = cache._sync

    def full(file):
        if file.name.endswith(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(cache, "_sync", full)
    with pytest.raises(OSError, match="choose another cache_dir") as caught:
        load(tmp_path, build)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_damaged_entry_for_next_time(tmp_path, build, monkeypatch):
    load(tmp_path, build)
    flip(entry_of(tmp_path) / "numbers.npy", -1)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
        with pytest.raises(OSError, match="no space left"):
            load(tmp_path, build)
    load(tmp_path, build)
    assert build.calls == 3


def test_other_errors_pass_and_leave_nothing(tmp_path, monkeypatch):
    def fail():
        raise KeyError("the builder's own")

    with pytest.raises(KeyError, match="the builder's own"):
        cache.load_or_build(tmp_path, "x", {}, fail)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_cache_directory(tmp_path, build):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is not a directory"):
            load(path, build)


def test_killed_while_writing(tmp_path, build):
    script = """
        import os, signal, sys
        import numpy as np
        from seqmodels.data import cache
        sync, calls = cache._sync, []
        def killed(file):
            sync(file)
            calls.append(file)
            if len(calls) == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        cache._sync = killed
        arrays = {"numbers": np.arange(1000), "labels": np.array([1, 2], np.int32)}
        config = {"size": 3, "name": "x"}
        cache.load_or_build(sys.argv[1], "things", config, lambda: (arrays, {"note": "hello"}))
    """
    for step in ("1", "3"):  # after the first array; after the manifest, before the renaming
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), step]
        assert subprocess.run(command, check=False).returncode == -9
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 2

    load(tmp_path, build)
    assert build.calls == 1
    assert all(path.exists() for path in leftovers)  # perhaps somebody is still writing there
    long_ago = time.time() - 2 * 24 * 3600
    for path in leftovers:
        os.utime(path, (long_ago, long_ago))
    (entry,) = set(tmp_path.iterdir()) - set(leftovers)
    flip(entry / "numbers.npy", -1)
    load(tmp_path, build)
    assert entry_of(tmp_path) == entry


@pytest.mark.parametrize("damaged", [False, True])
def test_builders_at_the_same_time(damaged, tmp_path, build):
    if damaged:
        load(tmp_path, build)
        flip(entry_of(tmp_path) / "numbers.npy", -1)
    gate = threading.Barrier(4)
    failures = []

    def built_together():
        gate.wait()  # nobody has published before everybody has started
        return Builder()()

    def run():
        try:
            load(tmp_path, built_together)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    calls = build.calls
    load(tmp_path, build)
    assert build.calls == calls
    entry_of(tmp_path)
