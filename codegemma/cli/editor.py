"""The command line's verbs for editors: lsp, setup, stats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

if TYPE_CHECKING:
    from codegemma.serve.stats import Shown

Editor = Literal["vscode", "neovim", "helix", "emacs", "continue", "zed"]


def lsp(
    model: Annotated[
        str | None,
        Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="The model to load; the packaged default model where left out.",
        ),
    ] = None,
    server: Annotated[
        str | None, Option(metavar="URL", help="Ask this server instead of loading a model.")
    ] = None,
    api_key_file: Annotated[Path | None, Option(metavar="FILE", help="Its key.")] = None,
    adapter: Annotated[
        str,
        Option(
            metavar="PATH",
            help="An adapter to put on, such as `codegemma tune` makes; none is the base, "
            "auto the model's own.",
        ),
    ] = "auto",
    threads: Annotated[
        int | None,
        Option(
            "-t",
            "--threads",
            min=1,
            show_default=False,
            help="The CPUs that this process may use, where left out.",
        ),
    ] = None,
    quantize: Annotated[
        Literal["q8_0", "q4_0"] | None, Option(help="Turn float weights into blocks while loading.")
    ] = None,
    cache: Annotated[
        Path | None,
        Option(metavar="FILE", help="Keep the prompt cache in this file from one session to the next."),
    ] = None,
) -> None:
    """Be the language server of an editor, over stdin and stdout.

    `codegemma setup` says how an editor starts it.
    """
    try:
        from codegemma.editor.lsp import serve
        from codegemma.editor.sources import opener
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("codegemma"):
            raise
        raise ValueError(f'codegemma lsp needs {error.name}: pip install "codegemma[serve]"') from error
    serve(opener(model, server, api_key_file, threads, quantize, cache, adapter))


def setup(
    editor: Annotated[Editor, Argument(help="Which one.")],
    write: Annotated[
        bool, Option("--write", help="Change the editor's file; its old one is kept beside it.")
    ] = False,
) -> None:
    """Show how to set up an editor, or do it."""
    from codegemma.editor import setup as editors

    print(editors.write(editor) if write else editors.advice(editor, editors.program()))


def stats(
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    days: Annotated[int, Option(min=1, max=365, help="Days in the picture.")] = 30,
    off: Annotated[bool, Option("--off", help="Record nothing from now on.")] = False,
    on: Annotated[bool, Option("--on", help="Record again.")] = False,
    clear: Annotated[bool, Option("--clear", help="Delete what was recorded.")] = False,
) -> None:
    """Show what came of suggestions in editors: shown, accepted, how fast.

    The figures stay in a file on this machine; nothing sends them anywhere.
    """
    from codegemma.serve import stats as kept

    if on and off:
        raise ValueError("--on and --off: pass one of them")
    if on or off:
        kept.set_recording(on)
    if clear:
        kept.clear()
    rows = kept.load()
    if as_json:
        print(
            json.dumps(
                {
                    "file": str(kept.file()),
                    "recording": kept.recording(),
                    "all": kept.summary(rows),
                    "languages": kept.by_language(rows),
                }
            )
        )
    elif not (on or off or clear):
        _show(rows, days)
    if not as_json:
        print(f"{kept.file()}: recording is {'on' if kept.recording() else 'off'}")


def _show(rows: list[Shown], days: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from codegemma.serve import stats as kept

    table = Table("language", "shown", "accepted", "of characters", "median", "95%", box=None, pad_edge=False)
    for name, row in [*kept.by_language(rows).items(), ("all", kept.summary(rows))]:
        table.add_row(
            name,
            f"{row['shown']:,}",
            _share(row["accepted_share"]),
            _share(row["characters_kept_share"]),
            _ms(row["latency_ms_median"]),
            _ms(row["latency_ms_95"]),
        )
    Console(highlight=False).print(table)
    print(f"\n{kept.picture(rows, days)}\n")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


VERBS = (lsp, setup, stats)
