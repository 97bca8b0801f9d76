"""Files on disk: memory maps, writes that appear only when complete, locks, and the user's cache folder."""

from __future__ import annotations

import glob
import hashlib
import importlib
import mmap
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

_MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/codegemma`, by default ~/.cache/codegemma. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "codegemma")


def map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a file. Raises ValueError on an empty file, OSError as `open` does."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: the file is empty: download it again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _MAPS.add(data)
    return data


def unmap() -> None:
    """Frees the memory of mapped files: a page is read from disk again when it is used next."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for data in _MAPS:
            data.madvise(mmap.MADV_DONTNEED)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block succeeds and removed when it raises."""
    part = _part(path, f"{os.getpid()}-{threading.get_ident()}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def resumable_write(path: Path, stamp: str) -> Iterator[BinaryIO]:
    """As `atomic_write`, but an interrupted file is kept, and the next call with the same stamp continues it.

    The file is removed where the block raises ValueError, since it would do so again. It starts anew after a
    restart of the machine, since some writes may not have reached the disk. Raises ValueError while another
    process writes the same file.
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
        except ValueError:
            part.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, path)


def lock(file: IO[Any], wait: bool = True) -> None:
    """Locks a file against other processes until it is closed. Does nothing on systems without flock.

    Raises BlockingIOError where another process has the lock and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, renamed to `path` when the block succeeds and removed when it raises.

    It may replace an empty directory at `path`; OSError is raised where `path` is anything else."""
    part = _part(path, str(os.getpid()))
    part.mkdir()
    try:
        yield part
        if path.exists():
            path.rmdir()
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(path: Path, mark: str) -> Path:
    """The path of a file or directory until it is complete; `mark` says who writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{mark}.part")


def remove_leftovers(path: Path) -> None:
    """Removes unfinished files of dead processes beside `path`, except those that `resumable_write` needs."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        writer = part.name.split(".")[-2].split("-")[0]
        if writer.isdigit() and not _alive(int(writer)):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def require(module: str, feature: str, extra: str) -> Any:
    """Imports an optional library. Raises ValueError saying which extra of codegemma installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f'{feature} need the package {module}: pip install "codegemma[{extra}]"') from None
