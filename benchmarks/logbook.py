"""Where results go: to the terminal, and with --log to docs/log.md."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).parent.parent


def parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--log", action="store_true", help="append the result to docs/log.md")
    return made


def publish(entry: str, log: bool) -> None:
    print(entry)
    if log:
        with open(ROOT / "docs" / "log.md", "a") as file:
            file.write(entry)
