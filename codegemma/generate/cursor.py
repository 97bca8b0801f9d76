"""Prepares an Infill for its prompt: removes the token that the cursor cuts, turns files into comments.

`resolve` calls `at_cursor`. Only the prompt changes; the answer still belongs at the original cursor.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePath

from codegemma.generate.request import Infill
from codegemma.tokenizer import Tokenizer

MAX_TYPED = 64  # the longest word, in characters, that is removed; a longer one is data, not code
# What begins a comment, and in which languages (by name or file extension). In all others it is "//".
_COMMENT_MARKS = {
    "#": {"python", "py", "pyi", "ruby", "rb", "shell", "sh", "bash", "zsh", "perl", "pl", "r", "julia", "jl"}
    | {"yaml", "yml", "toml", "cmake", "make", "makefile", "mk", "dockerfile", "elixir", "ex", "exs", ""},
    "--": {"lua", "sql", "haskell", "hs", "elm", "ada", "adb", "vhdl"},
}
_INDENTATION = re.compile(
    r"\n( +)(?=[^\s*])"
)  # skips the lines of C comments, " * ...", which stand one blank further right
_STEP_SAMPLE = 4096  # characters before the cursor that are searched for the file's indentation
_WORD_END = re.compile(r"\w+$")


def at_cursor(tokenizer: Tokenizer, infill: Infill, reads_files: bool) -> tuple[Infill, str, int]:
    """The infill to make a prompt of; the text that the answer must begin with, so that it restores what was
    removed; and how many characters of that text stand before the cursor. `reads_files`: see `resolve`."""
    infill = infill.normalized()
    if infill.files and not reads_files:
        infill = with_comments(infill)
    if not infill.heal:
        return infill, "", 0
    infill, typed = typed_piece(tokenizer, infill)
    return infill, typed if typed.strip() else indentation(typed, infill), len(typed)


def typed_piece(tokenizer: Tokenizer, infill: Infill) -> tuple[Infill, str]:
    """The infill without the piece of text that ends at its cursor, and that piece ("token healing").

    The piece is the line's indentation, or the word before the cursor with the blank that its token begins
    with. In training, a model sees the tokens of whole words and whole indentations; after the tokens of a
    word or indentation that breaks off, it goes wrong. So the prompt leaves the piece out, and the answer has
    to begin with its text.
    """
    start = infill.prefix.rfind("\n") + 1
    line = infill.prefix[max(start, len(infill.prefix) - 4 * MAX_TYPED) :]
    word = _WORD_END.search(line)
    if not line.strip(" \t") and len(line) < 4 * MAX_TYPED:
        typed = line
    elif word is None or len(word[0]) > MAX_TYPED:
        return infill, ""
    else:
        ids, size = tokenizer.encode(line), len(word[0].encode())
        count = next(n for n in range(1, len(ids) + 1) if len(tokenizer.decode_bytes(ids[-n:])) >= size)
        while tokenizer.decode_bytes(ids[-count:])[0] & 0xC0 == 0x80:  # inside a character
            count += 1
        typed = tokenizer.decode(ids[-count:])
    return replace(infill, prefix=infill.prefix[: len(infill.prefix) - len(typed)]), typed


def indentation(typed: str, infill: Infill) -> str:
    """The typed blanks of a line, rounded up to a multiple of the file's indentation step (4, 2 or 1)."""
    if not typed or typed.strip(" "):  # with tabs: each is a whole step
        return typed
    widths = [len(blanks) for blanks in _INDENTATION.findall(f"\n{infill.prefix[-_STEP_SAMPLE:]}")]
    steps = (4, 2) if len(widths) > 2 else (1,)
    step = next((n for n in steps if sum(w % n == 0 for w in widths) >= 0.9 * len(widths)), 1)
    return typed + " " * (-len(typed) % step)


def with_comments(infill: Infill) -> Infill:
    """The infill with its other files as comments in front of its text.

    For models that were not trained with other files in front: these would take the separator after a file
    for the end of the document.
    """
    language = infill.language or PurePath(infill.path or "").suffix.lstrip(".")
    mark = next((mark for mark, names in _COMMENT_MARKS.items() if language.lower() in names), "//")
    lines = [line for file in infill.files for line in (file.path, *file.text.splitlines()) if line.strip()]
    comments = "".join(f"{mark} {line.rstrip()}\n" for line in lines)
    return replace(infill, prefix=comments + infill.prefix, files=())
