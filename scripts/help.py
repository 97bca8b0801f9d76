"""Prints docs/cli.md: the help of every verb, as it stands."""

import os
from typing import Any

import typer

from codegemma.cli import main as cli


def pages(command: Any, context: Any) -> list[tuple[str, str]]:
    """(command, help) of a command and of all commands below it."""
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    found = [(context.command_path, text)]
    for name in command.list_commands(context) if isinstance(command, cli.Verbs) else ():
        below = command.get_command(context, name)
        found += pages(below, below.make_context(name, ["--help"], parent=context, resilient_parsing=True))
    return found


def document() -> str:
    os.environ["COLUMNS"] = "100"
    root = typer.main.get_command(cli.app)
    context = root.make_context("codegemma", [], resilient_parsing=True)
    return "# Every option\n" + "".join(
        f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in pages(root, context)
    )


if __name__ == "__main__":
    print(document(), end="")
