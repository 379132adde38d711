"""Pathfinder as Long Range Arena released it: folders of PNG files with a list of labels each.

`pathfinder32/curv_contour_length_14/imgs/<batch>/sample_<i>.png` and, beside `imgs`,
`metadata/<batch>.npy`, which is text: a line per image with folder, file, number and label first.
(The original program's own lists, arrays of text, are read too.) The archive holds two folders
`pathfinder128`; the inner one, `lra_release/lra_release/pathfinder128`, is the right one.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from seqmodels.data.examples import TaskData
from seqmodels.data.lra.pathfinder import TOTAL, PathfinderConfig, task_data
from seqmodels.data.lra.sources import Layout

FOLDERS = {
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}
_NPY = b"\x93NUMPY"

Labels = dict[str, tuple[int, str]]  # path of the image below its folder -> label, and where read


def layout(config: PathfinderConfig) -> Layout:
    """Where the images of a size and difficulty are."""
    size, folder = config.size, FOLDERS[config.difficulty]
    return Layout(
        files=rf"{folder}/(?:imgs/\d+/sample_\d+\.png|metadata/\d+\.npy)",
        archives=("lra_release*", f"pathfinder{size}*.tar*"),
        most=64_000_000,
        where=(
            "get lra_release.gz (7.7 GB, a compressed tar archive) from "
            "https://storage.googleapis.com/long-range-arena/lra_release.gz and pass its folder "
            f"pathfinder{size} (the inner one, where there are two) as data_dir, or leave data_dir "
            "out to generate the data"
        ),
        # Other sizes, and the copy that is broken, in an archive of everything.
        never=rf"(?:^|/)(?:pathfinder(?!{size}/)\d+/|(?<!lra_release/)lra_release/pathfinder128/)",
    )


def locate(config: PathfinderConfig, data_dir: str | Path) -> Path:
    """The folder of the size, where `data_dir` is one above it; otherwise `data_dir`."""
    path = Path(data_dir).expanduser()
    below = f"pathfinder{config.size}"
    for inner in ("lra_release/lra_release", "lra_release", ""):
        if (path / inner / below).is_dir():
            return path / inner / below
    return path


def read(config: PathfinderConfig, data_dir: str | Path) -> TaskData:
    """Reads the images of one size and difficulty, and splits them at random.

    Raises:
      ValueError: an image is missing, listed twice, not listed, no PNG, or of another size or mode,
        or there are not 200,000 (see `PathfinderConfig.allow_partial`); a label is neither 0 nor
        1. Names the file, and the line where there is one.
    """
    data_dir = locate(config, data_dir)
    labels: Labels = {}
    images: dict[str, np.ndarray] = {}
    for name, content in layout(config).read(data_dir):
        where, short = f"{data_dir}, {name}", "/".join(name.split("/")[-3:])
        if name.endswith(".npy"):
            for path, label, line in _labels(content, where):
                if path in labels:
                    raise ValueError(f"{line}: {path} was listed before, at {labels[path][1]}")
                labels[path] = label, line
        else:
            if short in images:
                raise ValueError(f"{where}: {short} is there more than once")
            images[short] = _image(content, config.size, where)
    for path, (_, line) in labels.items():
        if path not in images:
            raise ValueError(f"{line}: {path} is not there; get the data anew")
    unlisted = next((path for path in images if path not in labels), None)
    if unlisted is not None:
        raise ValueError(f"{data_dir}: {unlisted} has no label in metadata/; get the data anew")
    if len(images) != TOTAL and not config.allow_partial:
        raise ValueError(
            f"{data_dir} holds {len(images)} images in {FOLDERS[config.difficulty]}, the published "
            f"data {TOTAL}: get them whole, or use what is there with --allow-partial"
        )
    names = sorted(images, key=_order)
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(names))
    together = np.empty((len(names), config.size, config.size), np.uint8)
    for row, i in enumerate(order):
        together[row] = images.pop(names[i])
    answers = np.array([labels[names[i]][0] for i in order], np.int32)
    return task_data(config, together, answers, source="Long Range Arena's images")


def _order(path: str) -> tuple[int, int]:
    _, batch, file = path.split("/")
    return int(batch), int(file.removeprefix("sample_").removesuffix(".png"))


def _labels(content: bytes, where: str) -> list[tuple[str, int, str]]:
    """Path below the folder, label, and where it was read, of each image in a list."""
    if content.startswith(_NPY):
        try:
            rows = np.load(io.BytesIO(content), allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{where} is not a list of images: {error}") from error
        lines = [row.tolist() for row in rows]
    else:
        text = content.decode("utf-8", errors="replace")
        lines = [line.split() for line in text.splitlines() if line.strip()]
    found = []
    for number, fields in enumerate(lines, start=1):
        line = f"{where}, line {number}"
        if len(fields) < 4:
            raise ValueError(f"{line}: expected folder, file, number and label")
        folder, file, _, label = map(str, fields[:4])
        if label not in ("0", "1"):
            raise ValueError(f"{line}: label {label[:20]!r} is neither 0 nor 1")
        found.append((f"{folder}/{file}", int(label), line))
    return found


def _image(content: bytes, size: int, where: str) -> np.ndarray:
    """`(size, size)` uint8."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (size, size) or image.mode != "L":
                width, height = image.size
                raise ValueError(
                    f"{width} x {height} pixels of mode {image.mode}, expected {size} x {size} gray"
                )
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be used: {error}") from error
