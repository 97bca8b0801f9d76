"""Prints a row: its files, their origin, and each split in colours with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codegemma.data.folder import load_tokenizer
from codegemma.data.pack import Rows
from codegemma.prompts import parse_fim

WHY = {
    "node": "the middle is one syntax node, drawn in proportion to its size",
    "siblings": "the middle is a run of neighbours in the syntax tree, nearest to a random span",
    "lines": "the middle is lines without the first one's indentation and the last one's line break",
    "line": "the middle is one line with its indentation and its line break",
    "whole lines": "the middle is lines with their indentation and their line breaks",
    "function end": "the middle is the last lines of a function, and nothing follows",
    "rest of line": "the middle is the rest of a line from where somebody would stop typing",
    "characters": "the middle lies between two random characters",
    "line characters": "the middle lies between two random characters of one line",
    "natural suffix": "the middle begins at a random character, the suffix where a syntax node ends",
    "argument": "the middle is an argument of a call, or all from one to the last",
    "string": "the middle begins inside a string and ends in it or at its end",
    "ten lines": "the middle is one to ten lines with their indentation and their line breaks",
    "line break": "the middle begins with a line break and has one to ten lines",
    "indentation": "the middle begins inside a line's indentation",
    "typed word": "the middle begins before a word and its blank, as where the cursor cuts a word",
    "word": "the middle begins inside a word and ends in it or at its end",
    "empty": "the middle is empty: nothing is missing at a random character",
    "whole": "not split: the whole text is learned from left to right",
}
PLACED_BY = {  # the values of the column "via" of the table of examples
    "graph": "placed by the dependency graph",
    "beside tests": "no import links it: by path, with tests after what they test",
    "alone": "on its own",
}
PARTS = ("prefix", "middle", "suffix")


def parts(rows: Rows, number: int) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """(record, {prefix, middle, suffix}) of each example of a row, read back from its ids.

    The files in front of an example are named in the record ("context"), and their texts left out.
    """
    tokenizer = load_tokenizer(rows.files.tokenizer)
    tokens_T = rows[number]["tokens"]
    for record in rows.examples(number):
        ids = tokens_T[record["start"] : record["end"]].tolist()
        for _ in record.get("context", ()):
            ids = ids[ids.index(tokenizer.control.file_separator) + 1 :]
        fim = parse_fim(tokenizer, ids)
        if record["layout"] == "prefix":
            text = fim.prefix
            if record["kind"] == "code":
                text = text.removeprefix(record["path"] + "\n")
            yield record, {"prefix": "", "middle": text, "suffix": ""}
        else:
            yield record, {name: getattr(fim, name) for name in PARTS}


def show(folder: str | Path, row: int = 0, console: Any = None) -> None:
    """Prints a row. Raises ValueError where the folder holds no finished rows, or no such row."""
    from rich.console import Console
    from rich.text import Text

    rows, console = Rows(folder), console or Console()
    if not 0 <= row < len(rows):
        rule = f"it has rows 0 to {len(rows) - 1:,}" if len(rows) else "it has no rows: build it again"
        raise ValueError(f"row {row} of {folder}: {rule}")
    arrays = rows[row]
    filled, learned = int((arrays["segments"] > 0).sum()), int(arrays["loss"].sum())
    size = f"{filled:,} tokens of {len(arrays['segments']):,}, {learned:,} of them learned"
    console.print(f"row {row} of {len(rows):,}: {size}", style="bold")
    for record, texts in parts(rows, row):
        console.rule(Text(f"{record['repository']}  {record['path']}"), align="left")
        commit = f", commit {record['commit'][:12]}" if record["commit"] else ""
        place = f"segment {record['segment']}, tokens {record['start']:,} to {record['end']:,}"
        origin = f"licence {record['licence'] or 'none found'}; from {record['source']}{commit}"
        console.print(Text(f"{place}; {origin}; {PLACED_BY[record['via']]}", "dim"))
        if record.get("context"):
            console.print(Text(f"behind {', '.join(record['context'])}", "dim"))
        console.print(Text(f"{record['layout'].upper()}: {WHY[record['boundary']]}", "italic"))
        body = Text()
        for name, style in zip(PARTS, ("cyan", "bold black on yellow", "magenta"), strict=True):
            body.append(texts[name], style if record["layout"] != "prefix" else "")
        console.print(body)
    console.print(Text("prefix", "cyan"), Text("middle", "bold black on yellow"), Text("suffix", "magenta"))
