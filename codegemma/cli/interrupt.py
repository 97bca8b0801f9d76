"""Ctrl-C: the process leaves at once with exit code 130, or a verb does what it has declared.

Python's way is an exception at any moment in the main thread. It gets lost in callbacks of C++ libraries or
aborts them, shows the libraries' tracebacks, and comes only when a kernel or a compiler has returned. Here a
separate thread acts on the signal. Where `watch` was not called, as in a program that calls `main`, Python's
way remains.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

EXIT_CODE = 130
_leaving = threading.Lock()  # held once the process is leaving
_cleanups: list[Callable[[], None]] = []  # run before the process leaves
_actions: list[Callable[[], None]] = []  # what to do in place of leaving, the innermost last


def watch() -> None:
    """From now on, Ctrl-C makes this process leave. Call it first, in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, _in_main_thread)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_act, args=(reader,), daemon=True).start()
    # As a last step Python restores the system's handler, by which Ctrl-C would kill a process that is done.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def before_leaving(*cleanups: Callable[[], None]) -> None:
    """Sets what is called before the process leaves. It must take no locks: the main thread may hold any."""
    _cleanups[:] = cleanups


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """In the block, Ctrl-C does not make the process leave, but calls `action` in a separate thread."""
    _actions.append(action)
    try:
        yield
    finally:
        _actions.remove(action)


@contextmanager
def as_exception() -> Iterator[None]:
    """In the block, Ctrl-C is a KeyboardInterrupt, for a question to the user."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave(message: str = "") -> NoReturn:
    """Ends this process and its children at once with exit code 130, after a message on stderr."""
    if not _leaving.acquire(blocking=False):  # another thread is leaving already
        while True:
            time.sleep(1)
    for cleanup in _cleanups:
        with suppress(Exception):
            cleanup()
    if processes := sys.modules.get("multiprocessing"):
        for child in processes.active_children():
            child.kill()
    if message:
        os.write(2, f"{message}\n".encode())
    os._exit(EXIT_CODE)


def _act(reader: int) -> None:
    while number := os.read(reader, 1):
        # A library, such as a web server, may have replaced our handler with its own.
        if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is _in_main_thread:
            _actions[-1]() if _actions else leave()


def _in_main_thread(*_: Any) -> None:
    """Leaves, as `_act` does, unless there is an action.

    `_act` alone is not enough: the main thread could end before it with another exit code, and an event loop
    may have replaced the wakeup pipe, so that `_act` sees no signal.
    """
    if not _actions:
        leave()
