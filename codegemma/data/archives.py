"""The files of tar and zip archives, with limits against archives made to do harm."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from codegemma.data.documents import FILE_RULES

RATIO_FROM_BYTES = 32_000_000


class ArchiveBomb(Exception):
    """An archive that unpacks to more than the limits allow; the rest of it is not read."""


@dataclass(frozen=True)
class ReadLimits:
    """The size above which a file is not read, and what an archive may hold before it counts as a bomb."""

    file_bytes: int = 1_000_000
    members: int = 200_000
    total_bytes: int = 4_000_000_000
    ratio: int = 200  # unpacked to packed size, once more than RATIO_FROM_BYTES are unpacked

    def check(self, members: int, unpacked: int, packed: int) -> None:
        """Raises ArchiveBomb where an archive of `packed` bytes holds too many members or too many bytes."""
        if members > self.members:
            raise ArchiveBomb(f"more than {self.members:,} members")
        is_dense = unpacked > RATIO_FROM_BYTES and unpacked > self.ratio * packed
        if unpacked > self.total_bytes or is_dense:
            raise ArchiveBomb(
                f"unpacks to more than {self.ratio} times its size or {self.total_bytes:,} bytes"
            )


@dataclass(frozen=True)
class FileEntry:
    """A file of a repository that is not read yet; `reason` says why it must not be, "" if it may."""

    path: str
    size: int = 0
    load: Callable[[], bytes] = bytes
    reason: str = ""


def path_refusal(path: str) -> str:
    """Why a file at this path of an archive or table must not be read; "" if it may."""
    parts = path.replace("\\", "/").split("/")
    if path.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", path):
        return "path leaves its root"
    return "vendored" if any(part in FILE_RULES["vendored"] for part in parts[:-1]) else ""


def zip_entries(path: Path, limits: ReadLimits) -> Iterator[FileEntry]:
    """The files of a zip archive, sorted by path.

    Raises ArchiveBomb, and what zipfile raises for damaged files.
    """
    packed, unpacked = path.stat().st_size, 0
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
        for count, info in enumerate(sorted(members, key=lambda info: info.filename), 1):
            unpacked += info.file_size
            limits.check(count, unpacked, packed)
            link = "symbolic link" if (info.external_attr >> 16) & 0o170000 == 0o120000 else ""
            locked = "unreadable" if info.flag_bits & 1 else ""

            def load(info: zipfile.ZipInfo = info) -> bytes:
                with archive.open(info) as file:  # the size in the header may be wrong
                    try:
                        return file.read(limits.file_bytes + 1)
                    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                        raise OSError(str(error)) from error

            yield FileEntry(
                info.filename, info.file_size, load, path_refusal(info.filename) or link or locked
            )


class _LimitedStream(io.RawIOBase):
    """A decompressed stream that stops at the limits, whatever the headers inside it say."""

    def __init__(self, path: Path, limits: ReadLimits):
        with path.open("rb") as file:
            magic = file.read(2)
        open_file: Any = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(magic, open)
        self.file: IO[bytes] = open_file(path, "rb")
        self.limits, self.packed, self.unpacked = limits, path.stat().st_size, 0

    def read(self, size: int = -1) -> bytes:
        self.limits.check(0, self.unpacked + max(0, size - RATIO_FROM_BYTES), self.packed)
        data = self.file.read(min(size, self.limits.total_bytes) if size >= 0 else self.limits.total_bytes)
        self.unpacked += len(data)
        self.limits.check(0, self.unpacked, self.packed)
        return data

    def close(self) -> None:
        self.file.close()


def tar_entries(path: Path, limits: ReadLimits) -> Iterator[FileEntry]:
    """The files of a tar archive, in the archive's order: load each before taking the next.

    Raises ArchiveBomb, and what tarfile raises for damaged files.
    """
    stream = _LimitedStream(path, limits)
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=1) as archive:
            declared = 0
            for count, member in enumerate(archive, 1):
                declared += member.size  # checked before tarfile skips over it, block by block
                limits.check(count, declared, stream.packed)
                if member.isdir():
                    continue
                special = "symbolic link" if member.issym() or member.islnk() else "not a regular file"

                def load(member: tarfile.TarInfo = member) -> bytes:
                    file = archive.extractfile(member)
                    return file.read() if file else b""

                name = re.sub(r"^(\./)+", "", member.name)
                reason = path_refusal(name) or ("" if member.isreg() else special)
                yield FileEntry(name, member.size, load, reason)
    finally:
        stream.close()
