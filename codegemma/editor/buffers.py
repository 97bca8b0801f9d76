"""An open document: its text, kept in step with the editor's edits, and positions in LSP's encodings."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

Encoding = Literal["utf-8", "utf-16", "utf-32"]

_LINE_END = re.compile(r"\r\n|\r|\n")  # LSP's; str.splitlines has more, such as the form feeds in C sources
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Buffer:
    """An open document. Immutable, so that a thread may read it while the user goes on editing.

    `encoding`: in which the editor counts characters within a line; `path`: None if the document is not in a
    file; `language`: the editor's name for its language.
    """

    text: str
    encoding: Encoding = "utf-16"
    path: Path | None = None
    language: str = ""

    @cached_property
    def line_starts(self) -> list[int]:
        """The offset in `text` of each line's first character."""
        return [0, *(match.end() for match in _LINE_END.finditer(self.text))]

    @cached_property
    def newline(self) -> str:
        """How the first line ends; "\\n" if there is only one line."""
        match = _LINE_END.search(self.text)
        return match[0] if match else "\n"

    def offset(self, line: int, character: int) -> int:
        """The offset in `text` of an LSP position.

        A position past the end of its line means that end, one past the last line the end of the text, and
        one inside a character that character's start.
        """
        if line >= len(self.line_starts):
            return len(self.text)
        start, *following = self.line_starts[line : line + 2]
        content = self.text[start : following[0] if following else None].rstrip("\r\n")
        if self.encoding == "utf-32" or content.isascii():
            return start + min(character, len(content))
        ends = [*accumulate(_code_units(letter, self.encoding) for letter in content)]
        return start + bisect_right(ends, character)

    def position(self, offset: int) -> tuple[int, int]:
        """The LSP position (line, character) of an offset in `text`."""
        line = bisect_right(self.line_starts, offset) - 1
        return line, _code_units(self.text[self.line_starts[line] : offset], self.encoding)

    def edited(self, start: tuple[int, int], end: tuple[int, int], text: str) -> Buffer:
        """The buffer with the text between two positions replaced."""
        first, last = sorted((self.offset(*start), self.offset(*end)))
        return replace(self, text=self.text[:first] + text + self.text[last:])


def normalize(text: str) -> str:
    """Text as a model reads it: \\n ends each line, surrogate pairs are joined, lone ones replaced."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _code_units(text: str, encoding: Encoding) -> int:
    """The length of a text in code units of an encoding. A lone surrogate counts as one character."""
    width = int(encoding.removeprefix("utf-")) // 8
    return len(text.encode(f"{encoding}-le" if width > 1 else encoding, "surrogatepass")) // width
