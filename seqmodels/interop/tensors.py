"""Tensors of a checkpoint: one safetensors file, or several and an index; nothing is unpickled."""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  (numpy's bfloat16, by which safetensors names it)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from seqmodels.interop.fields import read_json
from seqmodels.interop.origin import CONFIG, GENERATION, Tensor
from seqmodels.training.metrics import write_atomically

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PICKLED = "pytorch_model*.bin"
_CONVERSION = (
    "import glob, torch; from safetensors.torch import save_file; "
    "files = [torch.load(f, map_location='cpu', weights_only=True) "
    f"for f in sorted(glob.glob('{_PICKLED}'))]; "
    "save_file({k: v.clone().contiguous() for d in files for k, v in d.items()}, "
    f"'{SINGLE}', metadata={{'format': 'pt'}})"
)


class Checkpoint:
    """The tensors in a folder, read one by one; a context manager.

    Raises:
      ValueError: a file that is missing, truncated, or not where the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, str] = {}
        self._of_text: dict[str, str] = {}
        if (folder / SINGLE).exists():
            self._files = {SINGLE: _open(folder / SINGLE)}
            self._where = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
            return
        if not (folder / INDEX).exists():
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{_way_out(folder)}")
        self._where = _weight_map(folder / INDEX)
        self._files = {file: _open(folder / file) for file in sorted(set(self._where.values()))}
        held = {file: set(opened.keys()) for file, opened in self._files.items()}
        for name, file in self._where.items():
            if name not in held[file]:
                raise ValueError(f"{folder / file} lacks {name}, which {INDEX} says it has")
        for file, names in held.items():
            stray = sorted(name for name in names if self._where.get(name) != file)
            if stray:
                raise ValueError(f"{folder / file} has {stray[0]}, which {INDEX} does not say")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for opened in self._files.values():
            opened.__exit__(kind, error, trace)

    def dtype(self, name: str) -> str:
        """As safetensors calls it: "F32", "BF16", ..."""
        return self._slice(name).get_dtype()

    def tensor(self, name: str) -> np.ndarray:
        """The tensor called ``name``."""
        return self._files[self._where[name]].get_tensor(self._name_in_file(name))

    def keep_text(self, text_only: Callable[[str], str | None]) -> None:
        """Forgets tensors that are not the text model's, and what the others are called; see
        ``Family.text_only``."""
        where, self._where = self._where, {}
        for name, file in where.items():
            kept = text_only(name)
            if kept is not None:
                self._where[kept] = file
                self._of_text[kept] = name

    def respell(self, name: str, others: tuple[str, ...]) -> None:
        """Has a tensor be called ``name`` that the files call by the first of ``others``."""
        for other in others:
            if name not in self._where and other in self._where:
                self._where[name] = self._where.pop(other)
                self._stored[name] = other

    def described(self) -> tuple[Tensor, ...]:
        """All tensors, without their numbers."""
        return tuple(
            Tensor(name, self._stored.get(name, name), _DTYPES.get(dtype, dtype))
            for name, dtype in sorted((name, self.dtype(name)) for name in self._where)
        )

    def drop_copy(self, name: str, *, of: str) -> None:
        """Forgets a tensor if it is there; ValueError unless it is equal to the other."""
        if name not in self._where or of not in self._where:
            return
        if not np.array_equal(self.tensor(name), self.tensor(of)):
            raise ValueError(
                f"{self.folder}: {name} differs from {of}, but tie_word_embeddings says that they "
                "are one"
            )
        del self._where[name]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError with the first name that is missing, misshapen or unexpected."""
        for name, shape in shapes.items():
            if name not in self._where:
                raise ValueError(f"{self.folder}: the tensor {name} {shape} is missing")
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{self.folder}: {name} has shape {found}, expected {shape}")
            if self.dtype(name) not in _DTYPES:
                raise ValueError(
                    f"{self.folder}: {name} has dtype {self.dtype(name)}, expected one of "
                    + ", ".join(_DTYPES)
                )
        unexpected = sorted(set(self._where) - set(shapes), key=natural)
        if unexpected:
            raise ValueError(
                f"{self.folder}: the tensor {unexpected[0]} is not expected in such a model"
            )

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(self._name_in_file(name))

    def _name_in_file(self, name: str) -> str:
        stored = self._stored.get(name, name)
        return self._of_text.get(stored, stored)


def natural(name: str) -> list[Any]:
    """A key that sorts layer 10 behind layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write(folder: Path, arrays: Mapping[str, np.ndarray], max_file_bytes: int) -> None:
    """Writes all ``arrays``, in several files with an index if they are larger than one may be.

    Raises:
      ValueError: there is a checkpoint in the folder.
    """
    for name in (SINGLE, INDEX, CONFIG, GENERATION):
        if (folder / name).exists():
            raise ValueError(f"{folder} has a {name} already; give a folder without one")
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, array in arrays.items():
        if parts[-1] and sum(a.nbytes for a in parts[-1].values()) + array.nbytes > max_file_bytes:
            parts.append({})
        parts[-1][name] = array
    if len(parts) == 1:
        save_file(parts[0], folder / SINGLE, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file beside the index."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path} has no weight_map")
    for name, file in where.items():
        # A name with a folder in it could be that of any file of the machine.
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {name} is said to be in {file!r}, which is not the name of a "
                "safetensors file in the folder"
            )
    return where


def _way_out(folder: Path) -> str:
    """What to do about a folder with tensors in files of another kind."""
    if any(folder.glob(_PICKLED)):
        return (
            ", only pickled tensors, which are never read; convert them by: "
            f'cd {shlex.quote(str(folder.absolute()))} && python -c "{_CONVERSION}"'
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f", only {', '.join(others)}; rename one that holds all tensors to {SINGLE}"
    return ""


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy").__enter__()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
