"""What a verb shows on stderr beside its answer: notes, and the progress of long work."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

notes: list[str] = []  # the notes of this run, which --json repeats


def note(text: str) -> None:
    """Prints a note to stderr, and keeps it in `notes`."""
    notes.append(text)
    print(f"note: {text}", file=sys.stderr)


def status(text: str) -> None:
    """Shows a line on a terminal, in place of the one before; "" removes it. Shows nothing elsewhere."""
    if is_terminal():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def is_terminal() -> bool:
    """Whether stderr is a terminal that moves its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Progress:
    """Shows the progress of long work: a bar with an ETA for each task on a terminal, plain lines elsewhere.

    Use it as a context manager, and call it with the name of a task and its progress.
    """

    def __init__(self, unit: Literal["items", "bytes"] = "items") -> None:
        self._unit = unit
        self._bars: Any = None  # rich's Progress, from the first call on, if stderr is a terminal
        self._tasks: dict[str, Any] = {}  # task: rich's id of its bar, or the tenths that were printed

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, task: str, done: int, total: int | None, detail: str = "") -> None:
        """Shows that `done` of `total` (None: unknown) are done.

        Where stderr is no terminal, it prints a line at each tenth, and whenever there is a `detail`.
        """
        if sys.stderr.isatty():
            if self._bars is None:  # not earlier: a verb may ask the user something first
                self._bars = _bars(self._unit)
                self._bars.start()
            if task not in self._tasks:
                self._tasks[task] = self._bars.add_task(task, detail=detail)
            self._bars.update(self._tasks[task], completed=done, total=total, detail=detail)
            return
        tenths = 10 * done // total if total else 0
        if not detail and tenths <= self._tasks.get(task, 0):
            return
        self._tasks[task] = tenths
        if self._unit == "bytes":
            amount, whole, unit = f"{done / 1e9:.2f}", f"{(total or 0) / 1e9:.2f}", " GB"
        else:
            amount, whole, unit = f"{done:,}", f"{total or 0:,}", ""
        of_total = "" if total is None else f" of {whole}"
        print(f"{task} {amount}{of_total}{unit}{detail and ': '}{detail}", file=sys.stderr, flush=True)


def show_cursor() -> None:
    """Shows the cursor again, which a bar hides."""
    if is_terminal():
        os.write(2, b"\x1b[?25h")


def _bars(unit: str) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description:<10}"),
        progress.BarColumn(),
        progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[detail]}"),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # what goes to a pipe must not be drawn above the bar
    )
