"""The program `codegemma`. It heeds Ctrl-C before it imports anything that takes time."""

import io
import os
import signal
import sys
from contextlib import suppress
from typing import Any


def main() -> None:
    """Runs the process's own command line."""
    _replace_closed_streams()
    _name_stdout()
    if os.environ.get("NO_COLOR"):
        os.environ.pop("FORCE_COLOR", None)  # libraries would heed both
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: a background job
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        from codegemma.cli import interrupt

        interrupt.watch()
    from codegemma.cli import main as command_line

    command_line.main()


def _replace_closed_streams() -> None:
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


if __name__ == "__main__":
    main()
