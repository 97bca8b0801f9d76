"""Files as wholes: a read-only map of one, and a new one that appears only when it is complete."""

from __future__ import annotations

import glob
import hashlib
import importlib
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

_MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def mapped(path: Path) -> mmap.mmap:
    """The file's bytes, read from disk as they are used. Raises ValueError on an empty file, OSError as `open` does."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: the file is empty: download it again")
        _MAPS.add(found := mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return found


def let_go() -> None:
    """Takes the pages of mapped files out of this process; they are read again where they are needed again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for found in _MAPS:
            found.madvise(mmap.MADV_DONTNEED)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block ends well and removed when it does not."""
    part = _part(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def resuming(path: Path, stamp: str) -> Iterator[BinaryIO]:
    """As `replacing`, but a file whose block was interrupted stays, and is handed out again for the same stamp.

    Not after the machine stopped, since then nobody knows what of the file reached the disk.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    stamp += boot.read_text() if boot.exists() else ""
    part = _part(path, f"at-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}")
    for other in path.parent.glob(f".{glob.escape(path.name)}.at-*.part"):
        if other != part:
            other.unlink(missing_ok=True)
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise ValueError(f"{path}: is being written by another process: wait for it") from None
        try:
            yield file
        except ValueError:  # trying again would end in the same way
            part.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, path)


def lock(file: IO[Any], wait: bool = True) -> None:
    """A lock between processes, until the file is closed. Systems without flock have none: there the atomic rename alone
    keeps files whole. Raises BlockingIOError where another has it and `wait` is False."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """A directory to fill, renamed to `path` when the block ends well and removed when it does not."""
    part = _part(path)
    part.mkdir()
    try:
        yield part
        if path.exists():
            path.rmdir()  # only an empty one is replaced
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(path: Path, mark: str = "") -> Path:
    """Where a file grows until it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{mark or os.getpid()}.part")


def sweep(path: Path) -> None:
    """Removes what killed processes left beside `path`; what may be resumed stays."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        writer = old.name.split(".")[-2]
        if writer.isdigit() and not _alive(int(writer)):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def missing(module: str, what: str, extra: str) -> Any:
    """A library that only some formats need. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f'{what} need the package {module}: pip install "codegemma[{extra}]"') from None
