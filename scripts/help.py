"""Prints docs/cli.md: the help of every verb, as it stands."""

import contextlib
import io
import os

import typer

from codegemma.cli import main as cli


def help_of(app: typer.Typer, program: str, *verbs: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app([*verbs, "--help"], prog_name=program)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def pages() -> list[tuple[str, str]]:
    """(command, help) of the program, its verbs, and the verbs of what is mounted."""
    found = [("codegemma", help_of(cli.app, "codegemma"))]
    for name in _verbs(cli.app):
        if name in cli.MOUNTED:
            sub = cli.mounted(name)
            found.append((f"codegemma {name}", help_of(sub, f"codegemma {name}")))
            found += [
                (f"codegemma {name} {verb}", help_of(sub, f"codegemma {name}", verb)) for verb in _verbs(sub)
            ]
        else:
            found.append((f"codegemma {name}", help_of(cli.app, "codegemma", name)))
    return found


def _verbs(app: typer.Typer) -> list[str]:
    return list(typer.main.get_command(app).commands)


def document() -> str:
    os.environ["COLUMNS"] = "100"
    return "# Every option\n" + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in pages())


if __name__ == "__main__":
    print(document(), end="")
