"""The `codegemma` command: its table of verbs, and how errors become exit codes.

Answers go to stdout, everything else to stderr. Exit codes: 0 for success; 1 where a
comparison, a check or an evaluation failed, or the reader of stdout has gone; 2 for bad input and for what
cannot be read or written, which the message explains; 130 for Ctrl-C. A verb's module is imported when the
verb is named or listed, and imports what it works with when it runs, so that every verb starts fast.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from codegemma import __version__
from codegemma.cli import interrupt, shell
from codegemma.cli.options import VerbContext, command
from codegemma.cli.output import note, notes, show_cursor
from codegemma.extras import install_command
from codegemma.files import discard_unfinished, explain

# Each verb: the module and the function in this room, and the extra of the package that it needs.
VERBS: dict[str, tuple[str, str]] = {
    "complete": ("complete:complete", ""),
    "generate": ("complete:generate", ""),
    "chat": ("chat:chat", ""),
    "models": ("models:models", ""),
    "bench": ("models:bench", ""),
    "convert": ("convert:convert", "formats"),
    "verify": ("convert:verify", "formats"),
    "inspect": ("convert:inspect", "formats"),
    "export": ("convert:export", "formats"),
    "card": ("convert:card", "formats"),
    "pull": ("models:pull", "hub"),
    "install": ("models:install", "hub"),
    "train": ("train:train", "train"),
    "tune": ("train:tune", "train"),
    "serve": ("serve:serve", "serve"),
    "lsp": ("editor:lsp", "serve"),
    "setup": ("editor:setup", "serve"),
    "stats": ("editor:stats", "serve"),
    "data build": ("data:build", "data"),
    "data show": ("data:show", "data"),
    "data report": ("data:report", "data"),
    "eval card": ("evals:card", "eval"),
    "eval run": ("evals:run_benchmarks", "eval"),
    "eval compare": ("evals:compare", "eval"),
    "eval list": ("evals:list_benchmarks", "eval"),
    "eval doctor": ("evals:doctor", "eval"),
}
GROUPS = {
    "data": "Turn repositories into fill-in-the-middle training rows.",
    "eval": "Measure a model on the benchmarks of the model card.",
}


class Verbs(TyperGroup):
    """The verbs of a group, each imported when it is asked for."""

    context_class = VerbContext
    prefix = ""  # "data " for the verbs of `codegemma data`

    def list_commands(self, ctx: Any) -> list[str]:
        verbs = [verb.removeprefix(self.prefix) for verb in VERBS if verb.startswith(self.prefix)]
        return list(dict.fromkeys(verb.split()[0] for verb in verbs))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        path = f"{self.prefix}{cmd_name}"
        if path in GROUPS:
            text = GROUPS[path]
            group = Verbs(
                name=cmd_name, help=text, short_help=text, no_args_is_help=True, rich_markup_mode=None
            )
            group.prefix = f"{path} "
            return group
        if path not in VERBS:
            return None
        module, _, function = VERBS[path][0].partition(":")
        return command(getattr(import_module(f"codegemma.cli.{module}"), function), path)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`eval humaneval mbpp` is `eval run humaneval mbpp`."""
        verbs = self.list_commands(ctx)
        if self.prefix == "eval " and args[0] not in verbs:
            args = ["run", *args]
        if args[0] not in verbs and not ctx.resilient_parsing:
            from difflib import get_close_matches

            for name in get_close_matches(args[0], verbs, 1):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {name!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs a verb. Raises ValueError naming the extra where a library that it needs is not installed."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _plain(error)
            raise
        except ModuleNotFoundError as error:
            verb = f"{self.prefix}{ctx.invoked_subcommand}"
            if verb not in VERBS or (error.name or "").startswith("codegemma") or not VERBS[verb][1]:
                raise
            remedy = install_command(VERBS[verb][1])
            raise ValueError(f"codegemma {verb} needs {error.name}: {remedy}") from error


def _plain(error: typer.BadParameter) -> str:
    """What is wrong with an option's value, in plainer words than those of the library that validated it."""
    faults = getattr(error.__cause__, "errors", None)
    if faults is None:
        return error.message
    fault = faults()[0]
    rule = re.sub(r"^Value error, |,? unable to .*$", "", fault["msg"]).rstrip(",")
    if "Input should" not in rule:
        return rule
    return f"{rule.replace('Input should', 'it must')}, got {fault['input']!r}"


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="CodeGemma on this machine: completes, generates, chats, and measures itself.",
)


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:  # not while a shell asks what may follow --version
        print(f"codegemma {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Handles the options before the verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line, by default the process's own. Leaves by SystemExit."""
    notes.clear()
    interrupt.before_leaving(discard_unfinished, show_cursor)
    shell.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        try:
            try:
                app(arguments, prog_name="codegemma")
            finally:
                if sys.stdout:
                    sys.stdout.flush()  # at Python's end it would be too late for a message
        except OSError as error:
            if error.filename != "stdout":
                _fail(explain(error))
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python would write the rest again when it ends
            if isinstance(error, BrokenPipeError):  # its reader has gone, and needs no message
                sys.exit(1)
            _fail(f"stdout cannot be written ({error.strerror}): send the output elsewhere")
        except ValueError as error:
            _fail(str(error))


def _fail(reason: str) -> None:
    with suppress(OSError):  # stderr takes no more: silence
        print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
