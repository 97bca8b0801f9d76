"""Prints docs/cli.md: the help of every verb, as the terminal shows it."""

import os
from collections.abc import Iterator
from typing import Any

import typer

from codegemma.cli import main as cli


def pages(command: Any, context: Any) -> Iterator[tuple[str, str]]:
    """(command, help) of a command and of all commands below it."""
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield context.command_path, text
    for name in command.list_commands(context) if isinstance(command, cli.Verbs) else ():
        below = command.get_command(context, name)
        yield from pages(below, below.make_context(name, ["--help"], parent=context, resilient_parsing=True))


def document() -> str:
    """The page, as docs/cli.md holds it."""
    os.environ["COLUMNS"] = "100"
    root = typer.main.get_command(cli.app)
    context = root.make_context("codegemma", [], resilient_parsing=True)
    return "# Every option\n" + "".join(
        f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in pages(root, context)
    )


if __name__ == "__main__":
    print(document(), end="")
