"""Sets up an editor (`codegemma setup`): shows the lines that one of its files needs, or writes them there.

editors.toml has the texts. docs/editors.md has the `advice` for each editor; a test compares them.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from codegemma.files import atomic_write

MARKS = (
    "codegemma: the lines from here were made by `codegemma setup`",
    "codegemma: the end of them",
)
SETUPS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("editors.toml").read_text("utf-8"))


@dataclass(frozen=True)
class EditorSetup:
    """What an editor needs: `text` in `file`. `remark` says what to do first or what to expect. editors.toml
    explains the fields."""

    title: str
    file: str
    kind: Literal["file", "block", "json"]
    language: str
    text: str
    remark: str
    comment: str = ""


def setup(editor: str, program: str = "codegemma") -> EditorSetup:
    """What an editor needs to run the command `program`. Raises ValueError for an unknown editor."""
    if editor not in SETUPS:
        raise ValueError(f"no set-up for {editor!r}: there are {', '.join(SETUPS)}")
    template = EditorSetup(**SETUPS[editor])  # type: ignore[arg-type]
    # Lua, TOML and Emacs Lisp quote a path as JSON does.
    text = template.text.replace("PROGRAM", json.dumps(program, ensure_ascii=False))
    if editor == "vscode" and program != "codegemma":
        text = json.dumps(json.loads(text) | {"codegemma.command": program}, indent=2) + "\n"
    remark = template.remark.replace("PROGRAM", program).replace("EXTENSION", shlex.quote(extension()))
    return replace(template, text=text, remark=remark)


def extension() -> str:
    """The path of the extension of Visual Studio Code, which `make vscode` builds."""
    return str(Path(__file__).with_name("codegemma.vsix"))


def program() -> str:
    """`codegemma` if the shell finds it, else its path beside this Python."""
    path = Path(sys.executable).with_name("codegemma")
    return "codegemma" if shutil.which("codegemma") or not path.exists() else str(path)


def advice(editor: str, program: str = "codegemma") -> str:
    """What to do and what to paste into which file, in Markdown."""
    needed = setup(editor, program)
    return f"{needed.remark}\n\nInto `{needed.file}`:\n\n```{needed.language}\n{needed.text}```"


def write(editor: str, program: str) -> str:
    """Adds our settings to the editor's file and returns a diff. A copy of the old file stays beside it.

    A second call changes nothing. Raises ValueError, and writes nothing, if the file cannot be parsed.
    """
    needed = setup(editor, program)
    file = location(needed.file)
    old = file.read_text("utf-8") if file.exists() else ""
    if needed.kind == "json":
        new = merged_json(old, json.loads(needed.text), str(file))
    else:
        new = needed.text if needed.kind == "file" else merged_block(old, needed, str(file))
    if new == old:
        return f"{file} is set up already."
    diff = "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(file), str(file)))
    written = f"{file} is written."
    if old:
        written += f"\nThe old one is {_back_up(file)}."
    with atomic_write(file.resolve()) as out:  # a symbolic link stays one
        out.write(new.encode())
    return "\n".join((needed.remark, diff.rstrip("\n"), written))


def _back_up(file: Path) -> Path:
    """Copies a file to a free path beside it. An older copy stays, since it is the user's own text."""
    first = file.with_name(f"{file.name}.before-codegemma")
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    for copy in itertools.chain([first], others):
        with suppress(FileExistsError):
            with atomic_write(copy, replace=False) as out:
                out.write(file.read_bytes())
            shutil.copystat(file, copy)
            break
    return copy


def location(file: str) -> Path:
    """Where a file of editors.toml is on this machine."""
    names = [file]
    if file.endswith("Code/User/settings.json") and sys.platform in ("darwin", "win32"):
        appdata = os.environ.get("APPDATA", "~")
        folder = "~/Library/Application Support" if sys.platform == "darwin" else appdata
        names = [file.replace("~/.config", folder)]
    elif file == "~/.emacs.d/init.el":  # Emacs reads the first of these that exists
        names = ["~/.emacs", "~/.emacs.el", file, "~/.config/emacs/init.el"]
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    paths = {name: Path(name.replace("~/.config", config, 1)).expanduser() for name in names}
    existing = (path for path in paths.values() if path.exists())
    return next(existing, None) or paths.get(file, paths[names[0]])


# --------------------------------------------------------------------------------------------------- merging
def merged_block(old: str, needed: EditorSetup, name: str) -> str:
    """The text `old` of the file `name` with our lines between their marks; at its end if it had none."""
    first, last = (f"{needed.comment} {mark}\n" for mark in MARKS)
    start, end = old.find(first), old.find(last)
    if (start < 0) != (end < 0) or end < start:
        raise ValueError(
            f"{name} does not have the two marks of `codegemma setup` in their order: remove what it wrote "
            'there, with the comment lines that begin with "codegemma:", keep the rest, and try again'
        )
    before, after = (old[:start], old[end + len(last) :]) if start >= 0 else (old, "")
    text = needed.text
    if needed.language == "toml":
        text = _without_languages(text, before + after, name)
    if start < 0 and old:
        before += "\n" if old.endswith("\n") else "\n\n"
    return before + first + text + last + after


def _without_languages(text: str, others: str, name: str) -> str:
    """Our lines for Helix without the languages that `others`, the user's lines, set up already."""
    try:
        configured = {table.get("name") for table in tomllib.loads(others).get("language", [])}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name} is not valid TOML ({error}): mend it first") from error
    header = "[[language]]\n"
    kept, *tables = text.split(header)
    for table in tables:
        language = tomllib.loads(table)["name"]
        note = f'# add "codegemma" to the language-servers of {language} above\n'
        kept += note if language in configured else header + table
    return kept


def merged_json(old: str, ours: Mapping[str, Any], name: str) -> str:
    """The JSON text `old`, which may have comments, with our settings. Everything else stays as it is."""
    text = old if old.strip() else "{\n}\n"
    try:
        present = json.loads(without_comments(text))
        spans, inside = _members(text)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}): mend it first") from error
    if not isinstance(present, dict):
        raise ValueError(f"{name} must hold a JSON object, as settings do: mend it first")
    edits, added = [], []
    for key, value in ours.items():
        wanted = _union(present.get(key), value)
        shown = json.dumps(wanted, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        if key not in present:
            added.append(f"\n  {json.dumps(key)}: {shown}")
        elif wanted != present[key]:
            edits.append((*spans[key], shown))
    edits.append((inside, inside, ",".join(added) + "," * bool(added and present)))
    for start, end, piece in sorted(edits, reverse=True):
        text = text[:start] + piece + text[end:]
    return text


_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|[{}\[\],:]|[^\s{}\[\],:"/]+', re.S)


def _tokens(text: str) -> list[re.Match[str]]:
    return [match for match in _TOKEN.finditer(text) if not match[0].startswith(("//", "/*"))]


def without_comments(text: str) -> str:
    """JSON without comments and without commas before a closing bracket."""
    tokens = [match[0] for match in _tokens(text)]
    pairs = zip(tokens, [*tokens[1:], ""], strict=True)
    return " ".join(token for token, after in pairs if not (token == "," and after in ("}", "]")))


def _members(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """The span of each value in the outermost object, by key, and the offset behind its opening brace."""
    spans: dict[str, tuple[int, int]] = {}
    key: str | None = None
    depth = start = end = 0
    tokens = _tokens(text)
    for index, match in enumerate(tokens):
        token = match[0]
        if depth == 1 and token in (",", "}") and key is not None:
            spans[key], key = (start, end), None
        if depth == 1 and token == ":" and key is None:
            key, start = json.loads(tokens[index - 1][0]), tokens[index + 1].start()
        depth += (token in ("{", "[")) - (token in ("}", "]"))
        end = match.end()
    return spans, tokens[0].end()


def _union(present: Any, ours: Any) -> Any:
    """Two JSON values merged: objects key by key; otherwise ours replaces the present one."""
    if isinstance(present, dict) and isinstance(ours, Mapping):
        return present | {key: _union(present.get(key), value) for key, value in ours.items()}
    return ours
