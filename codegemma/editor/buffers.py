"""An open document: its text, kept in step with the editor's edits, and positions in each of LSP's encodings."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property
from typing import Literal

Encoding = Literal["utf-8", "utf-16", "utf-32"]

_LINE_END = re.compile(r"\r\n|\r|\n")  # LSP's; str.splitlines knows more, such as the form feeds of C sources
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Text:
    """A text and where its lines start. Immutable, so that a thread may read it while the editor goes on."""

    def __init__(self, text: str, encoding: Encoding = "utf-16") -> None:
        self.text, self.encoding = text, encoding

    @cached_property
    def starts(self) -> list[int]:
        return [0, *(match.end() for match in _LINE_END.finditer(self.text))]

    @cached_property
    def newline(self) -> str:
        """How its first line ends."""
        found = _LINE_END.search(self.text)
        return found[0] if found else "\n"

    def offset(self, line: int, character: int) -> int:
        """The place in `text` of a position. Past the line is its end, past the text the text's end; inside a character
        is before it."""
        if line >= len(self.starts):
            return len(self.text)
        start = self.starts[line]
        end = self.starts[line + 1] if line + 1 < len(self.starts) else len(self.text)
        content = self.text[start:end].rstrip("\r\n")
        if self.encoding == "utf-32" or content.isascii():
            return start + min(character, len(content))
        units = 0
        for at, letter in enumerate(content):
            units += _units(letter, self.encoding)
            if units > character:
                return start + at
        return start + len(content)

    def position(self, offset: int) -> tuple[int, int]:
        """(line, character) of a place in `text`."""
        line = bisect_right(self.starts, offset) - 1
        before = self.text[self.starts[line] : offset]
        return line, sum(_units(letter, self.encoding) for letter in before)

    def edited(self, start: tuple[int, int], end: tuple[int, int], text: str) -> Text:
        """The text with what stands between two positions replaced."""
        first, last = sorted((self.offset(*start), self.offset(*end)))
        return Text(self.text[:first] + text + self.text[last:], self.encoding)


def plain(text: str) -> str:
    """As a model reads it: lines end with \\n, halves of surrogate pairs are joined, or replaced where one is alone."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _units(letter: str, encoding: Encoding) -> int:
    point = ord(letter)
    if encoding == "utf-32":
        return 1
    if encoding == "utf-16":
        return 1 + (point > 0xFFFF)
    return 1 + (point > 0x7F) + (point > 0x7FF) + (point > 0xFFFF)
