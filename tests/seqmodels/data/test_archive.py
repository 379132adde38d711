"""Tar archives: whole ones are read whole, damaged ones are refused wherever the damage is."""

import bz2
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest

from seqmodels.data import archive

MODES = ["w", "w:gz", "w:bz2", "w:xz"]
# Incompressible, so that a compressed stream is about as long as what it holds.
FILES = {f"folder/{i}.txt": np.random.default_rng(i).bytes(300 + 111 * i) for i in range(8)}


def tar(files=FILES, mode="w"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as out:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            out.addfile(member, io.BytesIO(body))
    return stream.getvalue()


def read(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    return dict(archive.members(path, 10_000))


def refused(tmp_path, content):
    try:
        read(tmp_path, content)
    except archive.DamagedError as error:
        return str(error).startswith(f"{tmp_path / 'a.tar'} is damaged (")
    return False


def flipped(content, place):
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("mode", MODES)
def test_whole_archives_are_read(mode, tmp_path):
    assert read(tmp_path, tar(mode=mode)) == FILES
    assert dict(archive.members(tmp_path / "a.tar", 5)) == {n: b[:5] for n, b in FILES.items()}


@pytest.mark.parametrize("mode", MODES[1:])
def test_one_flipped_bit_of_a_compressed_archive_is_found(mode, tmp_path):
    content = tar(mode=mode)
    # gzip's header, of ten bytes, has no checksum: its time and system change nothing. Nor do the
    # bits that fill bzip2's last byte.
    places = np.linspace(10, len(content) - 2, 60).astype(int).tolist()
    assert [at for at in places if not refused(tmp_path, flipped(content, at))] == []


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_cut_compressed_archive_is_found(mode, tmp_path):
    content = tar(mode=mode)
    ends = [1, 4, 8, 12, 40, len(content) // 2]
    assert [end for end in ends if not refused(tmp_path, content[:-end])] == []


def test_a_plain_archive_that_lacks_its_end_is_found_wherever_it_was_cut(tmp_path):
    content = tar()
    end = len(content.rstrip(b"\0"))
    end += -end % 512 + 2 * 512
    edges = [512 * k + extra for k in range(1, end // 512) for extra in (-100, 0)]
    assert [at for at in edges if not refused(tmp_path, content[:at])] == []
    assert read(tmp_path, content[:end]) == FILES  # tar's padding to whole records is no content


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    content = tar()
    headers = [at for at in range(0, len(content), 512) if content[at:].startswith(b"folder/")]
    assert len(headers) == len(FILES)
    assert [at for at in headers if not refused(tmp_path, flipped(content, at + 20))] == []


@pytest.mark.parametrize("mode", MODES)
def test_what_follows_the_end_is_read_or_refused(mode, tmp_path):
    more = {"second/1.txt": b"more"}
    assert read(tmp_path, tar(mode=mode) + tar(more, mode)) == FILES | more
    assert refused(tmp_path, tar() + b"text" * 200)


def test_an_empty_file_is_damaged(tmp_path):
    assert refused(tmp_path, b"")
    assert not archive.is_tar(tmp_path / "a.tar")


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def with_members(*members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for member in members:
            out.addfile(member)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("member", "refuse"),
    [
        (tarfile.TarInfo("../a"), True),
        (tarfile.TarInfo("/etc/a"), True),
        (tarfile.TarInfo("a/../../b"), True),
        (tarfile.TarInfo("a/../b"), False),
        (tarfile.TarInfo("./..a"), False),
        (link("a/b", "../../c", tarfile.SYMTYPE), True),
        (link("a/b", "../c", tarfile.SYMTYPE), False),
        (link("a/b", "/etc/passwd", tarfile.SYMTYPE), True),
        (link("a/b", "../c", tarfile.LNKTYPE), True),
    ],
)
def test_paths_and_links_that_leave_an_archive_are_refused(member, refuse, tmp_path):
    assert refused(tmp_path, with_members(member)) == refuse


def test_an_absurdly_large_member_is_refused_by_its_header(tmp_path):
    member = tarfile.TarInfo("a")
    member.size = archive.LARGEST + 1
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(archive.DamagedError, match=r"'a' has 17179869185 bytes"):
        list(archive.members(tmp_path / "a.tar", 10))


def test_only_what_is_wanted_is_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar())
    wanted = dict(archive.members(path, 10_000, lambda name: "3" in name))
    assert list(wanted) == ["folder/3.txt"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_single_files(compress, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(compress(b"0123456789" * 9))
    assert archive.content(path, 90) == b"0123456789" * 9
    with pytest.raises(archive.DamagedError, match="holds more than the 89 bytes"):
        archive.content(path, 89)
    if compress is not bytes:
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(archive.DamagedError, match="is damaged"):
            archive.content(path, 90)
