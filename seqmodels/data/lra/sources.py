"""Files of a data set as it was downloaded: a folder, an archive, or a folder with the archive."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqmodels.data import archive
from seqmodels.data.cache import fingerprint

_COMPRESSED = r"(?:\.gz|\.bz2|\.xz)?"


@dataclass(frozen=True)
class Layout:
    """What a data set consists of and where people get it.

    Attributes:
      files: a pattern of the paths of its files, from any folder above them.
      archives: patterns (as of `Path.glob`) of the names of its archives.
      most: bytes of the largest file.
      where: how to get it, for messages.
      never: a pattern of what paths that are left alone contain, None for nothing.
    """

    files: str
    archives: tuple[str, ...]
    most: int
    where: str
    never: str | None = None

    def locate(self, data_dir: str | Path) -> Path:
        """The folder or the archive that `data_dir` means.

        Raises:
          ValueError: there is neither, or more than one archive.
        """
        path = Path(data_dir).expanduser()
        if path.is_file():
            if archive.is_tar(path):
                return path
            raise ValueError(f"{path} is not a tar archive; {self.where}")
        if not path.is_dir():
            raise ValueError(f"data_dir={str(path)!r} does not exist; {self.where}")
        if next(self._paths(path), None) is not None:
            return path
        archives = sorted({found for name in self.archives for found in path.glob(name)})
        if len(archives) == 1:
            return self.locate(archives[0])
        if archives:
            names = ", ".join(found.name for found in archives)
            raise ValueError(
                f"{path} holds several archives ({names}): pass one of them as data_dir"
            )
        raise ValueError(f"{path} holds nothing of this data set; {self.where}")

    def read(self, data_dir: str | Path) -> Iterator[tuple[str, bytes]]:
        """Path, from the root of the folder or archive, and content of each file.

        A folder's come in order; links are not followed. Files that are compressed on their own
        come decompressed, and their names without the ending.

        Raises:
          ValueError: as `locate`, or a file is damaged or absurdly large.
        """
        source = self.locate(data_dir)
        try:
            if source.is_dir():
                for path in self._paths(source):
                    name = path.relative_to(source).as_posix()
                    yield _plain(name), archive.content(path, self.most)
                return
            for name, body in archive.members(source, self.most + 1, self._wanted):
                if len(body) > self.most:
                    raise archive.DamagedError(
                        f"{source}: its member {name!r} holds more than {self.most} bytes"
                    )
                yield name, body
        except archive.DamagedError as error:
            raise ValueError(f"{error}; {self.where}") from error

    def fingerprint(self, data_dir: str | Path) -> str:
        """Changes when a file's name, size or time does."""
        source = self.locate(data_dir)
        paths = self._paths(source) if source.is_dir() else iter([source])
        facts = []
        for path in paths:
            status = path.stat()
            name = path.relative_to(source.parent).as_posix()
            facts.append([name, status.st_size, status.st_mtime_ns])
        return fingerprint(facts)

    def _wanted(self, name: str) -> bool:
        if self.never is not None and re.search(self.never, name):
            return False
        return re.fullmatch(rf"(?:.*/)?{self.files}", name) is not None

    def _paths(self, folder: Path) -> Iterator[Path]:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                relative = _plain(path.relative_to(folder).as_posix())
                if self._wanted(relative) and not path.is_symlink():
                    yield path


def _plain(name: str) -> str:
    return re.sub(rf"{_COMPRESSED}$", "", name)


def require_all(
    found: Sequence[str], needed: Sequence[str], data_dir: str | Path, where: str
) -> None:
    """Refuses a data set that lacks files, or has one twice.

    Raises:
      ValueError: names them.
    """
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"{data_dir} does not hold {', '.join(missing)}; {where}")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ValueError(f"{data_dir} holds {', '.join(twice)} more than once; {where}")
