"""Members of tar and zip archives, read in memory: no file is ever written.

What a normal archive of text never holds is refused, with the names of the archive and the member: names that
lead outside (``../``, absolute, with a drive letter), links, devices, fifos, encryption, and bombs.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from recipe.project import RecipeError


class HostileArchive(RecipeError):
    """An archive that is made to do harm, or that no publisher of text would make."""


# What to do about a damaged file of a source.
REMEDY = "Delete its folder in data/ and run stage 01 with --force; if the file is your own, get it again"
MAX_MEMBERS = 100_000
MAX_BYTES = 1 << 30  # unpacked, a whole archive
MAX_RATIO = 200  # unpacked over packed bytes; the packaged sources have 1 to 7.4, deflate can reach 1,032
FREE_BYTES = 16 << 20  # up to this size, any ratio is harmless
# What the libraries raise for a damaged archive. ValueError: a bad name. NotImplementedError: an unknown
# compression.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    struct.error,
    NotImplementedError,
)


def tar_members(
    handle: IO[bytes], where: Path, pattern: re.Pattern[str], links: bool = False
) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files of a tar stream whose name matches.

    handle: the uncompressed stream. where: the archive on the disk, for messages and for the ratio.
    links: leave links out instead of refusing the archive. In Debian packages they are second names of a
    page. They are never followed.

    Raises RecipeError for a damaged or a hostile archive, at the member where it is noticed.
    """
    limit = _limit(where.stat().st_size)
    total = 0
    try:
        with tarfile.open(fileobj=_Counted(handle, limit, where), mode="r|") as archive:
            for number, member in enumerate(archive, 1):
                if number > MAX_MEMBERS:
                    raise _refused(where, member.name, f"is one of more than {MAX_MEMBERS:,} members")
                _check_name(where, member.name)
                if (member.issym() or member.islnk()) and links:
                    continue
                if not (member.isfile() or member.isdir()):
                    raise _refused(where, member.name, "is a link, a device or a fifo")
                total += member.size  # unpacked; the holes of a sparse file are not in the stream
                if total > limit:
                    raise _bomb(where, member.name, limit)
                if member.isfile() and pattern.search(member.name):
                    content = archive.extractfile(member)
                    assert content is not None  # isfile() has just said so
                    yield member.name, content.read()
    except _DAMAGE as error:
        raise RecipeError(f"{where}: damaged archive ({error}). {REMEDY}") from error


def zip_members(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a zip archive whose name matches.

    Raises RecipeError for a damaged or a hostile archive; for a hostile one before anything is unpacked.
    """
    limit = _limit(path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise _refused(path, members[-1].filename, f"is one of more than {MAX_MEMBERS:,} members")
            total = 0
            for member in members:
                _check_name(path, member.filename)
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(path, member.filename, "is a link, a device or a fifo")
                if member.flag_bits & 1:
                    raise _refused(path, member.filename, "is encrypted")
                total += member.file_size  # no more than this is read
                if total > limit:
                    raise _bomb(path, member.filename, limit)
            for member in members:
                if not member.is_dir() and pattern.search(member.filename):
                    yield member.filename, archive.read(member)
    except _DAMAGE as error:
        raise RecipeError(f"{path}: damaged archive ({error}). {REMEDY}") from error


def gunzip(packed: bytes, where: Path, member: str) -> bytes:
    """Unpack a gzip file that is a member of an archive, within the same limits. Raises RecipeError."""
    limit = _limit(len(packed))
    try:
        with gzip.open(io.BytesIO(packed)) as handle:
            content = handle.read(limit + 1)
    except _DAMAGE as error:
        raise RecipeError(f"{where}: {member}: damaged gzip file ({error}). {REMEDY}") from error
    if len(content) > limit:
        raise _bomb(where, member, limit)
    return content


def _limit(packed: int) -> int:
    """The maximum number of unpacked bytes for `packed` bytes."""
    return min(max(packed * MAX_RATIO, FREE_BYTES), MAX_BYTES)


def _check_name(where: Path, name: str) -> None:
    """Refuse a member name that would lead out of the target folder, on any system."""
    if not name:
        raise _refused(where, name, "has no name")
    parts = re.split(r"[/\\]", name)
    if ".." in parts or not parts[0] and len(parts) > 1 or re.match("[A-Za-z]:", name):
        raise _refused(where, name, "has a name that leads outside")


def _refused(where: Path, member: str, why: str) -> HostileArchive:
    shown = member[:200]  # a name can be as long as the archive
    return HostileArchive(
        f"{where}: refused: {shown!r} {why}. A normal archive of text does not do that: remove it"
    )


def _bomb(where: Path, member: str, limit: int) -> HostileArchive:
    return _refused(where, member, f"unpacks to more than {limit:,} bytes, the most for a file of its size")


class _Counted:
    """A stream that raises an error after `limit` bytes, because headers can be bombs, too."""

    def __init__(self, handle: IO[bytes], limit: int, where: Path) -> None:
        self.handle, self.left, self.limit, self.where = handle, limit, limit, where

    def read(self, size: int) -> bytes:
        block = self.handle.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise _bomb(self.where, "the stream", self.limit)
        return block
