"""Stdout and stderr, which may be closed, or unable to take more."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare() -> None:
    """Call it first: it replaces closed streams, and makes the errors of stdout name it.

    When a shell asks for completions, stderr is dropped: it would be printed into the line that is typed.
    """
    _replace_closed()
    if os.environ.get("_CODEGEMMA_COMPLETE"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _name_stdout()


def _replace_closed() -> None:
    """What goes to a closed stream (`>&-`) is dropped, and no file that is opened gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8"))


class _Stdout(io.FileIO):
    """Stdout, whose errors name it as those of other files do."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from None


def _name_stdout() -> None:
    before: Any = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(before.fileno(), "w", closefd=False)),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering or before.write_through,
    )
