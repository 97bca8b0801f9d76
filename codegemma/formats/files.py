"""Files as wholes: a read-only map of one, and a new one that appears only when it is complete."""

from __future__ import annotations

import importlib
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def mapped(path: Path) -> mmap.mmap:
    """The file's bytes, read from disk as they are used. Raises ValueError on an empty file, OSError as `open` does."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: the file is empty: download it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """A directory to fill, renamed to `path` when the block ends well and removed when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.rmdir()                 # only an empty one is replaced
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def missing(module: str, what: str, extra: str) -> Any:
    """A library that only some formats need. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f'{what} need the package {module}: pip install "codegemma[{extra}]"') from None
