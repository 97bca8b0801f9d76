"""Checksums of weight files: those that a format has (ZIP's), and SHA256SUMS in the folders that we write."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

SUMS = "SHA256SUMS"  # `sha256sum -c` checks it too
# Orbax's arrays, HDF5, safetensors and PyTorch's archives: no reader checks a checksum in these files.
WEIGHTS = ("checkpoint/**/*", "*.h5", "*.safetensors", "*.ckpt")


def write(folder: Path) -> None:
    """Writes the SHA-256 of each weight file of a folder."""
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()})
    lines = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))


def problems(path: Path) -> Iterator[str]:
    """What the checksums of a checkpoint find: files that changed since they were written, or are missing."""
    folder = path if path.is_dir() else path.parent
    if (folder / SUMS).is_file():
        for line in (folder / SUMS).read_text("utf-8", "replace").splitlines():
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
            if match is None or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
                continue
            file = folder / match[2]
            if path.is_file() and file != path:
                continue
            if not file.is_file():
                yield f"{match[2]} is missing, which {SUMS} names: download or convert it again"
            elif _sha256(file) != match[1]:
                yield (
                    f"{match[2]} was changed or damaged after {SUMS} was written: "
                    "download or convert it again"
                )
    for file in [path] if path.is_file() else sorted(folder.glob("*.ckpt")):
        if zipfile.is_zipfile(file):
            yield from _zip_problems(file)


def _zip_problems(file: Path) -> Iterator[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            if bad := archive.testzip():
                yield f"{file.name}: the checksum of {bad} is wrong: download or convert the file again"
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        yield f"{file.name}: it cannot be unpacked ({error}): download or convert it again"


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
