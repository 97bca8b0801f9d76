"""Where results go: to the terminal, and with --log to docs/log.md."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).parent.parent


def parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with --rounds and --log; it is described by the first line of a module's docstring."""
    arguments = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=rounds)
    arguments.add_argument("--log", action="store_true", help="append the result to docs/log.md")
    return arguments


def publish(entry: str, log: bool) -> None:
    """Prints an entry of the log, and appends it to docs/log.md if `log` is set."""
    print(entry)
    if log:
        with open(ROOT / "docs" / "log.md", "a") as file:
            file.write(entry)
