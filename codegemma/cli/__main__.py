"""The program `codegemma`. It heeds Ctrl-C before it imports anything that takes time."""

import os
import signal


def main() -> None:
    """Runs the process's own command line."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: a background job
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        from codegemma.cli import interrupt

        interrupt.watch()
    from codegemma.cli import main as command_line

    command_line.main()


if __name__ == "__main__":
    main()
