"""Small data sets in the layout of the originals."""

import io
import tarfile
import wave

import numpy as np
from PIL import Image


def cifar_records(count, seed):
    """`(count, 3073)` uint8: a label and three planes."""
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    return records


def cifar(count=4):
    """File name -> content of the binary version."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {name: cifar_records(count, i).tobytes() for i, name in enumerate(names)}


def idx(array):
    """An idx file of uint8."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def mnist(train=20, test=5):
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        files[f"{part}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, count, dtype=np.uint8))
    return files


def pairs(train=12, evaluate=4, test=4):
    files, number = {}, 0
    for part, count in (("train", train), ("eval", evaluate), ("test", test)):
        lines = []
        for _ in range(count):
            number += 1
            lines.append(f"{number % 2}.0\tA{number}\tB{number}\tpaper {number}\tother {number}é")
        files[f"new_aan_pairs.{part}.tsv"] = ("\n".join(lines) + "\n").encode()
    return files


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def pathfinder(count=10, size=32, folder="curv_contour_length_14"):
    """Two batches of images, the label the parity of the number."""
    rng = np.random.default_rng(size)
    files = {}
    for batch in range(2):
        lines = []
        for i in range(count // 2):
            name = f"sample_{i}.png"
            image = rng.integers(0, 256, (size, size), dtype=np.uint8)
            files[f"{folder}/imgs/{batch}/{name}"] = png(image)
            lines.append(f"imgs/{batch} {name} {i} {i % 2} 1.0 14 4 2 0.5 1 1")
        files[f"{folder}/metadata/{batch}.npy"] = ("\n".join(lines) + "\n").encode()
    return files


def wav(samples, rate=8000, channels=1, width=2):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(-3000, 3000, count).astype("<i2")


def digits(indices=(0, 4, 5, 9, 10, 49)):
    names = [f"{digit}_ann_{index}" for digit in range(10) for index in indices]
    return {f"fsdd/recordings/{name}.wav": wav(noise(20 + i, i)) for i, name in enumerate(names)}


def commands():
    names = [f"{word}/{i:08x}_nohash_0.wav" for word in ("yes", "no", "up") for i in range(4)]
    files = {name: wav(noise(30 + i, i), 16_000) for i, name in enumerate(names)}
    lists = {"validation_list.txt": names[::4], "testing_list.txt": names[1::4]}
    files |= {name: "\n".join(some).encode() for name, some in lists.items()}
    return files | {"_background_noise_/rain.wav": wav(noise(9), 16_000), "LICENSE": b"CC BY"}


def write(folder, files):
    """The files in a folder, which comes back."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar(path, files, mode="w:gz", extra=()):
    """The files, and further members, in an archive, whose path comes back."""
    with tarfile.open(path, mode) as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
        for member in extra:
            out.addfile(member)
    return path
