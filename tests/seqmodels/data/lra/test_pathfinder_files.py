"""Pathfinder images as Long Range Arena released them."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from seqmodels.data.lra.pathfinder import PathfinderConfig
from seqmodels.data.lra.pathfinder_files import read
from tests.seqmodels.data.lra import original_files as original

CONFIG = PathfinderConfig(train=8, validation=1, test=1, allow_partial=True)
FILES = original.pathfinder()
FOLDER = "curv_contour_length_14"
IMAGE, LIST = f"{FOLDER}/imgs/1/sample_3.png", f"{FOLDER}/metadata/1.npy"


def by_image(data):
    """Label by image, over all splits."""
    found = {}
    for examples in data.splits.values():
        rows = examples.tokens.reshape(len(examples), examples.lengths.max(initial=1))
        found |= {row.tobytes(): label for row, label in zip(rows, examples.labels, strict=True)}
    return found


def expected(files):
    pictures = {name: body for name, body in files.items() if name.endswith(".png")}
    return {
        np.asarray(Image.open(io.BytesIO(body))).tobytes(): int(name[-5]) % 2
        for name, body in pictures.items()
    }


@pytest.mark.parametrize("below", ["", "pathfinder32", "lra_release/lra_release/pathfinder32"])
def test_images_and_their_labels(tmp_path, below):
    original.write(tmp_path / below, FILES)
    data = read(CONFIG, tmp_path)
    assert [len(e) for e in data.splits.values()] == [8, 1, 1]
    assert by_image(data) == expected(FILES)
    other = read(dataclasses.replace(CONFIG, seed=1), tmp_path)
    assert by_image(other) == by_image(data)
    assert other.train.fingerprints() != data.train.fingerprints()
    np.testing.assert_allclose(data.test[0]["inputs"], data.test.tokens / 127.5 - 1, atol=1e-6)


def test_an_archive_and_lists_of_the_original_program(tmp_path):
    lines = [line.split() for line in FILES[LIST].decode().splitlines()]
    stream = io.BytesIO()
    np.save(stream, np.array(lines))
    files = {f"pathfinder32/{n}": b for n, b in (FILES | {LIST: stream.getvalue()}).items()}
    data = read(CONFIG, original.tar(tmp_path / "lra_release.gz", files))
    assert by_image(data) == expected(FILES)


def test_the_broken_copy_of_path_x_is_left_alone(tmp_path):
    right = original.pathfinder(size=128)
    wrong = {name: body for name, body in right.items() if "/0" not in name}
    files = {f"lra_release/pathfinder128/{n}": b"broken" for n in wrong}
    files |= {f"lra_release/lra_release/pathfinder128/{n}": b for n, b in right.items()}
    config = dataclasses.replace(CONFIG, size=128)
    for where in (
        original.tar(tmp_path / "lra_release.gz", files),
        original.write(tmp_path, files),
    ):
        assert by_image(read(config, where)) == expected(right)


def test_other_sizes_in_an_archive_are_left_alone(tmp_path):
    files = {f"lra_release/lra_release/pathfinder32/{n}": b for n, b in FILES.items()}
    files |= {f"lra_release/lra_release/pathfinder256/{n}": b"large" for n in FILES}
    files |= {f"lra_release/pathfinder128/{n}": b"broken" for n in FILES}
    path = original.tar(tmp_path / "lra_release.gz", files)
    assert by_image(read(CONFIG, path)) == expected(FILES)


def test_other_difficulties_have_folders_of_their_own(tmp_path):
    easy = original.pathfinder(4, folder="curv_baseline")
    data = read(
        dataclasses.replace(CONFIG, difficulty="easy"), original.write(tmp_path, FILES | easy)
    )
    assert by_image(data) == expected(easy)


def huge():
    """A PNG that says that it has 2**60 pixels."""
    content = bytearray(FILES[IMAGE])
    content[16:24] = struct.pack(">II", 1 << 30, 1 << 30)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def jpeg():
    stream = io.BytesIO()
    Image.new("L", (32, 32)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({IMAGE: b""}, r"sample_3\.png cannot be used"),
        ({IMAGE: FILES[IMAGE][:-300]}, r"sample_3\.png cannot be used"),
        ({IMAGE: huge()}, r"sample_3\.png cannot be used"),
        ({IMAGE: jpeg()}, r"sample_3\.png cannot be used"),
        ({IMAGE: original.png(np.zeros((32, 31), np.uint8))}, "31 x 32 pixels of mode L, expected"),
        ({IMAGE: original.png(np.zeros((32, 32, 3), np.uint8))}, "32 x 32 pixels of mode RGB"),
        ({IMAGE: None}, r"metadata/1\.npy, line 4: imgs/1/sample_3\.png is not there"),
        ({LIST: None}, r"imgs/1/sample_0\.png has no label in metadata"),
        (
            {LIST: FILES[LIST] + b"imgs/1 sample_0.png 0 1\n"},
            "line 6: imgs/1/sample_0.png was list",
        ),
        ({LIST: FILES[LIST].replace(b" 1 1.0", b" 2 1.0")}, "line 2: label '2' is neither 0 nor 1"),
        ({LIST: b"imgs/1 sample_0.png\n"}, "line 1: expected folder, file, number and label"),
        ({f"again/{IMAGE}": FILES[IMAGE]}, "there more than once"),
    ],
)
def test_bad_files(tmp_path, change, message):
    files = {name: body for name, body in (FILES | change).items() if body is not None}
    with pytest.raises(ValueError, match=message):
        read(CONFIG, original.write(tmp_path, files))


def test_other_counts_need_an_option(tmp_path):
    with pytest.raises(ValueError, match=r"holds 10 images in curv_contour_length_14.*200000"):
        read(dataclasses.replace(CONFIG, allow_partial=False), original.write(tmp_path, FILES))
    with pytest.raises(ValueError, match="leave data_dir out to generate"):
        read(dataclasses.replace(CONFIG, size=64), tmp_path / "nowhere")
