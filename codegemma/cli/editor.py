"""The verbs for editors: `lsp`, `setup` and `stats`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from codegemma.cli.options import ModelOptions
from codegemma.files import read_text

if TYPE_CHECKING:
    from codegemma.serve.stats import Shown

Editor = Literal["vscode", "neovim", "helix", "emacs", "continue", "zed"]


def lsp(
    model: ModelOptions,
    server: str | None = None,
    api_key_file: Path | None = None,
    adapter: str = "auto",
    cache: Path | None = None,
) -> None:
    """Run the language server of an editor, over stdin and stdout.

    `codegemma setup` says how an editor starts it.
    """
    from codegemma.editor.lsp import serve
    from codegemma.editor.sources import LocalSource, RemoteSource, SuggestionSource

    if server and adapter != "auto":
        raise ValueError(
            "--adapter is for a model in this process: start the server with --adapter NAME=PATH, and name "
            "it in the editor's setting `adapter`"
        )

    def make_suggestion_source() -> SuggestionSource:
        if server:
            return RemoteSource(server, read_text(api_key_file).strip() if api_key_file else "")
        loaded = model.load(cache)
        loaded.prefer(adapter)
        return LocalSource(loaded, cache)

    # A normal exit would wait until the thread that reads stdin gets its next line.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    serve(make_suggestion_source)


def setup(editor: Editor, write: bool = False) -> None:
    """Show how to set up an editor, or do it."""
    from codegemma.editor import setup as setups

    print((setups.write if write else setups.advice)(editor, setups.program()))


def stats(
    as_json: bool = False,
    days: Annotated[int, Option(min=1, max=365)] = 30,
    off: bool = False,
    on: bool = False,
    clear: bool = False,
) -> None:
    """Show how many suggestions were shown and accepted in editors, and how fast they came.

    The figures stay in a file on this machine; nothing sends them anywhere.
    """
    from codegemma.serve import stats as records

    if on and off:
        raise ValueError("--on and --off: pass one of them")
    if on or off:
        records.set_recording(on)
    if clear:
        records.clear()
    rows = records.load()
    if as_json:
        facts = {
            "file": str(records.file()),
            "recording": records.recording(),
            "all": records.summary(rows),
            "languages": records.by_language(rows),
        }
        print(json.dumps(facts))
        return
    if not (on or off or clear):
        _print_table(rows, days)
    print(f"{records.file()}: recording is {'on' if records.recording() else 'off'}")


def _print_table(rows: list[Shown], days: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from codegemma.serve import stats as records

    titles = ("language", "shown", "accepted", "characters accepted", "median latency", "95th percentile")
    table = Table(*titles, box=None, pad_edge=False)
    for name, row in [*records.by_language(rows).items(), ("all", records.summary(rows))]:
        shares = [row["accepted_share"], row["characters_kept_share"]]
        latencies = [row["latency_ms_median"], row["latency_ms_95"]]
        cells = ["-" if share is None else f"{share:.0%}" for share in shares]
        cells += ["-" if latency is None else f"{latency:,.0f} ms" for latency in latencies]
        table.add_row(name, f"{row['shown']:,}", *cells)
    Console(highlight=False).print(table)
    print(f"\n{records.picture(rows, days)}\n")
