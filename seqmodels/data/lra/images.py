"""Images, pixel by pixel: CIFAR-10 in gray (Long Range Arena's Image) or colour, and MNIST.

CIFAR-10 (Krizhevsky 2009) has 50,000 training and 10,000 test images of 32 x 32 pixels in ten
classes, MNIST (LeCun et al. 1998) 60,000 and 10,000 of 28 x 28. Neither has a validation split;
`validation` training images are held out. A row is an image, row by row: 1,024 or 784 steps of one
channel or three. Gray is Pillow's, ITU-R 601, rounded.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmodels.data.examples import Examples, Scaling, TaskData
from seqmodels.data.lra import pickled
from seqmodels.data.lra.sources import Layout, require_all
from seqmodels.ranges import Checked, Count, Seed

CIFAR = Layout(
    files=r"(?:data_batch_[1-5]|test_batch)(?:\.bin)?",
    archives=("cifar-10-*.tar*",),
    most=40_000_000,
    where=(
        "get cifar-10-binary.tar.gz or cifar-10-python.tar.gz (162 MB, 163 MB) from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and pass the archive or its folder as data_dir"
    ),
)
MNIST = Layout(
    files=r"(?:train|t10k)-(?:images|labels)[-.]idx[13]-ubyte",
    archives=("*mnist*.tar*", "*MNIST*.tar*"),
    most=60_000_000,
    where=(
        "get train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz (11.6 MB together), e.g. from "
        "https://storage.googleapis.com/cvdf-datasets/mnist/, and pass their folder as data_dir"
    ),
)

_RECORD = 1 + 3 * 32 * 32
_BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
_IDX = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images", "labels")]
_GRAY = Scaling((122.6,), (61.0,))
_COLOUR = Scaling((125.31, 122.95, 113.86), (62.99, 62.09, 66.71))
_UNIT = Scaling((0.0,), (255.0,))

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CifarConfig(Checked):
    """How to read CIFAR-10.

    Attributes:
      colour: three channels instead of gray.
      validation: training images held out; 0 holds out none.
      seed: which ones.
      allow_partial: accept other numbers of images than 10,000 a file.

    Raises:
      ValueError: a value is out of range.
    """

    colour: bool = False
    validation: Count = 5_000
    seed: Seed = 0
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Steps that a row has at most."""
        return 32 * 32


@dataclass(frozen=True)
class MnistConfig(Checked):
    """How to read MNIST.

    Attributes:
      permuted: the pixels of every image in one order drawn from `permutation_seed`.
      validation: training images held out; 0 holds out none.
      seed: which ones.
      permutation_seed: of the order.
      allow_partial: accept other numbers of images than 60,000 and 10,000.

    Raises:
      ValueError: a value is out of range.
    """

    permuted: bool = False
    validation: Count = 6_000
    seed: Seed = 0
    permutation_seed: Seed = 42
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Steps that a row has at most."""
        return 28 * 28


def read_cifar(config: CifarConfig, data_dir: str | Path) -> TaskData:
    """Reads the binary or the Python version; a pickle is taken apart, never run.

    Raises:
      ValueError: a file is missing, damaged, of another length or has a label that is no class.
    """
    batches: dict[str, Split] = {}
    names = []
    for name, content in CIFAR.read(data_dir):
        stem = name.rsplit("/")[-1].removesuffix(".bin")
        names.append(stem)
        where = f"{data_dir}, {name}"
        read = _binary_batch if name.endswith(".bin") else _python_batch
        pixels, labels = batches[stem] = read(content, where)
        _check_count(where, len(pixels), 10_000, config.allow_partial)
        _check_labels(where, labels)
    require_all(names, _BATCHES, data_dir, CIFAR.where)
    train = [np.concatenate([batches[name][i] for name in _BATCHES[:5]]) for i in range(2)]
    scaling = _COLOUR if config.colour else _GRAY
    prepare = _interleaved if config.colour else _gray
    splits = _hold_out(prepare(train[0]), train[1], config.validation, config.seed, scaling)
    pixels, labels = batches["test_batch"]
    return TaskData(
        name="cifar" if config.colour else "image",
        train=splits[0],
        validation=splits[1],
        test=Examples.of_arrays(prepare(pixels), labels, scaling),
        vocabulary_size=None,
        num_classes=10,
        description={"source": "CIFAR-10", "image": [32, 32]},
    )


def _binary_batch(content: bytes, where: str) -> Split:
    if not content or len(content) % _RECORD:
        raise ValueError(
            f"{where}: {len(content)} bytes are not whole records of {_RECORD}: it is cut or of "
            f"another kind; {CIFAR.where}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0].astype(np.int32)


def _python_batch(content: bytes, where: str) -> Split:
    try:
        found = pickled.read(content)
        fields = {pickled.as_text(key): value for key, value in found.items()}
        pixels, labels = fields["data"], np.asarray(fields["labels"])
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{where} is not a batch of CIFAR-10: {error}; {CIFAR.where}") from error
    shapes = (getattr(pixels, "shape", None), getattr(pixels, "dtype", None), labels.shape)
    if shapes != ((len(labels), _RECORD - 1), np.uint8, (len(labels),)):
        raise ValueError(f"{where}: images of 32 x 32 and a label each were expected")
    return pixels, labels.astype(np.int32)


def _interleaved(planes: np.ndarray) -> np.ndarray:
    """`(n, 3072)` red, green and blue planes -> `(n, 1024, 3)`."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 1024).transpose(0, 2, 1))


def _gray(planes: np.ndarray) -> np.ndarray:
    """`(n, 3072)` planes -> `(n, 1024, 1)`."""
    red, green, blue = (planes.reshape(-1, 3, 1024)[:, i].astype(np.uint32) for i in range(3))
    gray = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return gray.astype(np.uint8)[:, :, None]


def read_mnist(config: MnistConfig, data_dir: str | Path) -> TaskData:
    """Reads the four idx files.

    Raises:
      ValueError: one is missing, damaged, of another size or has a label that is no class.
    """
    arrays: dict[str, np.ndarray] = {}
    names = []
    for name, content in MNIST.read(data_dir):
        stem = re.sub(r"[-.]idx[13]-ubyte$", "", name.rsplit("/")[-1])
        names.append(stem)
        where = f"{data_dir}, {name}"
        shape = (28, 28) if stem.endswith("images") else ()
        arrays[stem] = array = _idx(content, shape, where)
        published = 60_000 if stem.startswith("train") else 10_000
        _check_count(where, len(array), published, config.allow_partial)
        if not shape:
            _check_labels(where, array)
    require_all(names, _IDX, data_dir, MNIST.where)
    order = np.arange(28 * 28)
    if config.permuted:
        order = np.random.Generator(np.random.Philox(config.permutation_seed)).permutation(order)
    halves = []
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        if len(images) != len(labels):
            raise ValueError(f"{data_dir}: {len(images)} {part} images have {len(labels)} labels")
        halves.append((images.reshape(-1, 28 * 28, 1)[:, order], labels.astype(np.int32)))
    splits = _hold_out(*halves[0], config.validation, config.seed, _UNIT)
    return TaskData(
        name="pmnist" if config.permuted else "mnist",
        train=splits[0],
        validation=splits[1],
        test=Examples.of_arrays(*halves[1], _UNIT),
        vocabulary_size=None,
        num_classes=10,
        description={
            "source": "MNIST",
            "image": [28, 28],
            **({"order": order.tolist()} if config.permuted else {}),
        },
    )


def _idx(content: bytes, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The uint8 array of an idx file: 0, 0, 8, dimensions, the size of each, values."""
    dimensions = 1 + len(shape)
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"{where}: not an idx file of {dimensions}-D uint8; {MNIST.where}")
    sizes = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if sizes[1:] != shape:
        raise ValueError(f"{where}: images of {sizes[1:]} pixels, expected {shape}; {MNIST.where}")
    if len(content) - start != np.prod(sizes, dtype=object):
        raise ValueError(
            f"{where}: {len(content) - start} values do not fill {sizes}: it is cut or longer than "
            f"it says; {MNIST.where}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _check_count(where: str, found: int, published: int, allow_partial: bool) -> None:
    if found != published and not allow_partial:
        raise ValueError(
            f"{where} holds {found} images, the published file {published}: get it whole, or use "
            "what is there with --allow-partial"
        )


def _check_labels(where: str, labels: np.ndarray) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= 10))
    if len(wrong):
        raise ValueError(f"{where}, record {wrong[0]}: label {labels[wrong[0]]} is not in [0, 10)")


def _hold_out(
    images: np.ndarray, labels: np.ndarray, validation: int, seed: int, scaling: Scaling
) -> list[Examples]:
    """Training and validation examples, each in the files' order."""
    if validation and validation >= len(images):
        raise ValueError(f"validation={validation} leaves none of {len(images)} training images")
    chosen = np.zeros(len(images), bool)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(images))
    chosen[order[:validation]] = True
    return [Examples.of_arrays(images[rows], labels[rows], scaling) for rows in (~chosen, chosen)]
