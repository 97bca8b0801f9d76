"""The program `codegemma`. It heeds Ctrl-C before it imports anything that takes time."""

import os
from _signal import SIG_IGN, SIGINT, getsignal, signal  # the module `signal` takes time: it imports enum


def main() -> None:
    """Runs the process's own command line."""
    in_background = getsignal(SIGINT) == SIG_IGN  # of a shell without job control
    if not in_background:
        signal(SIGINT, lambda *_: os._exit(130))
    from codegemma.cli import streams

    streams.prepare()
    if os.environ.get("NO_COLOR"):
        os.environ.pop("FORCE_COLOR", None)  # libraries would heed both
    if not in_background:
        from codegemma.cli import interrupt

        interrupt.watch()
    from codegemma.cli import main as command_line

    command_line.main()


if __name__ == "__main__":
    main()
