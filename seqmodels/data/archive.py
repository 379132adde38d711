"""Tar archives and compressed files, read from beginning to end, so that damage is found.

Two checks stand at an archive's end, where a reader that has all members may never look: the
compressed stream's checksum, and the zero blocks that tell a whole archive from one that was cut
between two members. Python's tarfile also takes a damaged header for the end; here it is an error.
"""

import bz2
import gzip
import io
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_END = bytes(2 * tarfile.BLOCKSIZE)  # of every archive (POSIX pax, "ustar Interchange Format")
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


class DamagedError(ValueError):
    """An archive that must not be used; says which and why."""


def is_tar(path: Path) -> bool:
    """Whether the file begins as a tar archive does, plain or compressed."""
    return tarfile.is_tarfile(path)


LARGEST = 1 << 34
"""Bytes that a member may have; no data set here has a file of a quarter of that."""


def members(
    path: Path, most: int, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes]]:
    """The regular files of an archive (`.tar`, `.tar.gz`, `.tar.bz2`, `.tar.xz`), as they come.

    Whoever takes them all has had the whole archive checked; nothing is written to disk.

    Args:
      most: how many bytes of each are read, from its beginning.
      wanted: which names; the others are gone through, for the checks.

    Returns:
      Name and first `most` bytes of each.

    Raises:
      DamagedError: a checksum does not match, a header is damaged, the end is missing, a name or a
        link leads out of the archive, or a member has more than `LARGEST` bytes.
    """
    try:
        with _open(path) as stream:
            tail = _Tail(stream)
            # ignore_zeros: what stands after the end's zero blocks is read, and checked, as well.
            options: Any = {"fileobj": tail, "tarinfo": _Member, "ignore_zeros": True}
            with tarfile.open(mode="r|", **options) as archive:
                for member in archive:
                    _check(member)
                    if member.isreg() and wanted(member.name):
                        file = archive.extractfile(member)
                        assert file is not None  # it is a regular file
                        yield member.name, file.read(most)
            if tail.last != _END:
                raise tarfile.ReadError("it ends before the end-of-archive blocks")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error


def content(path: Path, most: int) -> bytes:
    """A file's content, decompressed.

    Raises:
      DamagedError: a checksum does not match, the end is missing, or it is more than `most` bytes.
    """
    try:
        with _open(path) as stream:
            found = stream.read(most + 1)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    if len(found) > most:
        raise DamagedError(f"{path} holds more than the {most} bytes that such a file has")
    return found


def _check(member: tarfile.TarInfo) -> None:
    """Nothing is written, but an archive made to write elsewhere is not one of a data set."""
    target = None
    if member.issym():
        target = posixpath.join(posixpath.dirname(member.name), member.linkname)
    elif member.islnk():
        target = member.linkname
    for name in filter(None, (member.name, member.linkname and target)):
        if name.startswith("/") or posixpath.normpath(name).split("/")[0] == "..":
            raise tarfile.ReadError(f"its member {member.name!r} leads out of it, to {name!r}")
    if member.size > LARGEST:
        raise tarfile.ReadError(f"its member {member.name!r} has {member.size} bytes")


def _open(path: Path) -> io.BufferedIOBase:
    """The file's content, decompressed."""
    with open(path, "rb") as file:
        head = file.read(max(map(len, _OPENERS)))
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return opener(path)
    return open(path, "rb")


class _Tail:
    """A stream that remembers the last bytes that were read from it."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        self.last = (self.last + block)[-len(_END) :]
        return block


class _Member(tarfile.TarInfo):
    """A member whose header must be whole."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):  # neither the end of the stream nor a block of zeros
                raise tarfile.ReadError(str(error)) from error
            raise
