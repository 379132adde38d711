"""CIFAR-10 and MNIST: what is read is what is there, and what cannot be right is refused."""

import dataclasses
import gzip
import lzma
import pickle

import numpy as np
import pytest
from PIL import Image

from seqmodels.data.lra.images import CifarConfig, MnistConfig, read_cifar, read_mnist
from tests.seqmodels.data.lra import original_files as original

GRAY = CifarConfig(validation=5, allow_partial=True)
COLOUR = dataclasses.replace(GRAY, colour=True)
DIGITS = MnistConfig(validation=5, allow_partial=True)


def rows(examples):
    """`(n, L, C)` as stored."""
    return examples.tokens.reshape(len(examples), -1, examples.tokens.shape[1])


def records():
    files = original.cifar()
    return {n: np.frombuffer(body, np.uint8).reshape(-1, 3073) for n, body in files.items()}


def test_colours_stand_side_by_side_row_by_row(tmp_path):
    data = read_cifar(COLOUR, original.write(tmp_path, original.cifar()))
    assert {split: len(e) for split, e in data.splits.items()} == {
        "train": 15, "validation": 5, "test": 4,
    }  # fmt: skip
    record = records()["test_batch.bin"][2]
    pixel = (7 * 32 + 3, record[1:].reshape(3, 32, 32)[:, 7, 3])
    assert rows(data.test)[2, pixel[0]].tolist() == pixel[1].tolist()
    assert data.test.labels[2] == record[0]
    inputs = data.test[2]["inputs"]
    assert inputs.shape == (1024, 3)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.247, 0.2435, 0.2616])
    np.testing.assert_allclose(inputs[pixel[0]], (pixel[1] / 255 - mean) / std, atol=2e-3)


def test_gray_is_that_of_pillow(tmp_path):
    data = read_cifar(GRAY, original.write(tmp_path, original.cifar()))
    record = records()["test_batch.bin"][1]
    planes = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(planes)).convert("L"))
    assert np.array_equal(rows(data.test)[1].reshape(32, 32), expected)


def test_validation_is_held_out_by_the_seed(tmp_path):
    folder = original.write(tmp_path, original.cifar())
    data, other = (read_cifar(dataclasses.replace(GRAY, seed=seed), folder) for seed in (0, 1))
    every = data.train.fingerprints() + data.validation.fingerprints()
    assert len(set(every)) == 20
    assert data.validation.fingerprints() != other.validation.fingerprints()
    with pytest.raises(ValueError, match="validation=20 leaves none of 20"):
        read_cifar(dataclasses.replace(GRAY, validation=20), folder)


def python_batches(protocol):
    files = {}
    for name, body in records().items():
        batch = {"data": body[:, 1:], "labels": body[:, 0].tolist(), "batch_label": "training"}
        files[name.removesuffix(".bin")] = pickle.dumps(batch, protocol)
    return files


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_python_version_is_the_binary_one(tmp_path, protocol):
    binary = read_cifar(GRAY, original.write(tmp_path / "a", original.cifar()))
    python = read_cifar(GRAY, original.write(tmp_path / "b", python_batches(protocol)))
    for split in binary.splits:
        assert np.array_equal(binary.splits[split].tokens, python.splits[split].tokens)
        assert np.array_equal(binary.splits[split].labels, python.splits[split].labels)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "folder of it", "xz files", "deeper"])
def test_where_files_may_be(tmp_path, kind):
    files = original.cifar()
    below = {f"cifar-10-batches-bin/{name}": body for name, body in files.items()}
    if kind.startswith("tar"):
        ending = kind.removeprefix("tar.")
        path = original.tar(tmp_path / f"cifar-10-binary.{kind}", below, f"w:{ending}")
    elif kind == "folder of it":
        path = original.tar(tmp_path / "cifar-10-binary.tar.gz", below).parent
    elif kind == "xz files":
        path = original.write(tmp_path, {f"{n}.xz": lzma.compress(b) for n, b in files.items()})
    else:
        path = original.write(tmp_path, below)
    assert len(read_cifar(GRAY, path).test) == 4


def without(files, name):
    return {n: body for n, body in files.items() if n != name}


CIFAR = original.cifar()
PICKLE = b"cos\nsystem\n(S'x'\ntR."
WRONG_LABEL = CIFAR["test_batch.bin"][:3073] + b"\x0a" + CIFAR["test_batch.bin"][3074:]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds nothing of this data set; get cifar-10-binary"),
        (without(CIFAR, "data_batch_3.bin"), "does not hold data_batch_3; get"),
        (CIFAR | {"a/test_batch.bin": CIFAR["test_batch.bin"]}, "holds test_batch more than once"),
        (CIFAR | {"test_batch.bin": CIFAR["test_batch.bin"][:-1]}, r"test_batch\.bin: 12291 bytes"),
        (CIFAR | {"test_batch.bin": b""}, r"test_batch\.bin: 0 bytes are not whole records"),
        (CIFAR | {"test_batch.bin": WRONG_LABEL}, r"test_batch\.bin, record 1: label 10 is not in"),
        (without(CIFAR, "test_batch.bin") | {"test_batch": PICKLE}, "calls os system"),
        (
            without(CIFAR, "test_batch.bin") | {"test_batch.bin.xz": lzma.compress(b"0" * 9)[:-9]},
            r"test_batch\.bin\.xz is damaged",
        ),
        (without(CIFAR, "test_batch.bin") | {"test_batch.bin.gz": gzip.compress(bytes(1 << 26))},
         "holds more than the 40000000 bytes"),
    ],
)  # fmt: skip
def test_bad_cifar(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_cifar(GRAY, original.write(tmp_path, files))


def test_other_counts_need_an_option(tmp_path):
    folder = original.write(tmp_path, CIFAR | original.mnist())
    with pytest.raises(ValueError, match=r"holds 4 images, the published file 10000.*--allow-par"):
        read_cifar(CifarConfig(), folder)
    with pytest.raises(ValueError, match=r"t10k-images.* holds 5 images, the published file 10000"):
        read_mnist(MnistConfig(), folder)


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_row_by_row_and_permuted(tmp_path, compressed):
    files = original.mnist()
    if compressed:
        files = {f"{name}.gz": gzip.compress(body) for name, body in files.items()}
    folder = original.write(tmp_path, files)
    plain = read_mnist(DIGITS, folder)
    permuted = read_mnist(dataclasses.replace(DIGITS, permuted=True), folder)
    raw = np.frombuffer(original.mnist()["t10k-images-idx3-ubyte"], np.uint8, offset=16)
    raw = raw.reshape(5, 784)
    assert np.array_equal(rows(plain.test)[..., 0], raw)
    order = np.array(permuted.description["order"])
    assert sorted(order.tolist()) == list(range(784))
    assert not np.array_equal(order, np.arange(784))
    assert np.array_equal(rows(permuted.test)[..., 0], raw[:, order])
    assert np.array_equal(plain.test.labels, permuted.test.labels)
    np.testing.assert_allclose(plain.test[0]["inputs"][:, 0], raw[0] / 255, rtol=1e-6)
    assert (len(plain.train), len(plain.validation)) == (15, 5)


MNIST = original.mnist()
LABELS, IMAGES = "t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LABELS: b""}, "not an idx file of 1-D uint8"),
        ({LABELS: MNIST[IMAGES]}, "not an idx file of 1-D uint8"),
        ({LABELS: original.idx(np.full(5, 11, np.uint8))}, "record 0: label 11 is not in"),
        ({LABELS: original.idx(np.zeros(4, np.uint8))}, "5 t10k images have 4 labels"),
        ({IMAGES: MNIST[IMAGES][:-1]}, "3919 values do not fill"),
        ({IMAGES: MNIST[IMAGES] + b"0"}, "3921 values do not fill"),
        ({IMAGES: original.idx(np.zeros((5, 28, 27), np.uint8))}, r"images of \(28, 27\) pixels"),
    ],
)
def test_bad_mnist(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_mnist(DIGITS, original.write(tmp_path, MNIST | change))
