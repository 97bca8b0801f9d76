"""Reading files from untrusted sources: JSON of bounded size, and errors of libraries as ValueErrors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codegemma.files import PLACEHOLDER_BYTES, refuse_placeholder

MAX_JSON = 1 << 24  # bytes; the header of a 7B's safetensors is under 100 kB
REMEDY = "download or convert it again"


def damaged(problem: str) -> ValueError:
    """The error for a file that no working program would write: the problem, and REMEDY."""
    return ValueError(f"{problem}: {REMEDY}")


@contextmanager
def refusing(problem: str, *errors: type[Exception], remedy: str = REMEDY) -> Iterator[None]:
    """Turns these errors in the block into a ValueError "problem (error): remedy"."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{problem} ({str(error)[:200] or type(error).__name__}): {remedy}") from None


@contextmanager
def naming(label: Path | str) -> Iterator[None]:
    """Puts the name of a file or tensor before the text of a ValueError or TypeError raised in the block."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label}: {error}") from None


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises ValueError where it is a placeholder (as of Git LFS), or OSError."""
    raw = path.read_bytes()
    refuse_placeholder(path, raw[:PLACEHOLDER_BYTES])
    return raw


def read_json(path: Path, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises ValueError naming the file, or OSError."""
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: is larger than {max_bytes:,} bytes: check that it is the right file")
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in which each name appears once; errors name `path`."""
    with refusing(f"{path}: is not valid JSON", ValueError, RecursionError):
        value = json.loads(raw, object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise damaged(f"{path}: must hold a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a name appears twice in it")
    return fields


def indexed_files(index: Path, extension: str) -> list[str]:
    """The weight files in the `weight_map` of an index, which gives a file or list of files for each tensor.

    Raises ValueError where they are not files of the index's own directory.
    """
    weight_map = read_json(index).get("weight_map")
    entries = weight_map.values() if isinstance(weight_map, dict) else [None]
    names: list[Any] = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(name, str) and re.fullmatch(rf"[\w.-]+\.{extension}", name) for name in names):
        raise damaged(f"{index}: weight_map must give a file of the same directory for each tensor")
    return sorted(set(names))
