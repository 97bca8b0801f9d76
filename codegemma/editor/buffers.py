"""An open document: its text, kept in step with the editor's edits, and positions in LSP's encodings.

The text lies in chunks. Each knows its length, its code units and where its lines end. An edit measures the
chunks that it touches; a position is found by bisection. So a keystroke costs the same in a line of 5 MB as
in a short one.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

from codegemma.tokenizer import without_surrogates

Encoding = Literal["utf-8", "utf-16", "utf-32"]

CHUNK_CHARACTERS = 4096
_LINE_END = re.compile(r"\r\n|\r|\n")  # LSP's; str.splitlines has more, such as the form feeds in C sources


@dataclass(frozen=True)
class Chunk:
    """A piece of a text, and its measures. It never ends between \\r and \\n.

    `units`: its length in code units; `line_ends`: the offset after each line end; `normalized_length`: its
    length once each line ends in \\n.
    """

    text: str
    units: int
    line_ends: tuple[int, ...]
    normalized_length: int


class Buffer:
    """An open document. It never changes, so that a thread may read it while the user goes on editing.

    `encoding`: the one in which the editor counts the characters of a line; `path`: None if the document is
    not in a file; `language`: the editor's name for its language.
    """

    def __init__(
        self,
        text: str | Sequence[Chunk],
        encoding: Encoding = "utf-16",
        path: Path | None = None,
        language: str = "",
    ) -> None:
        self.chunks = tuple(_chunks(text, encoding) if isinstance(text, str) else text)
        self.encoding, self.path, self.language = encoding, path, language
        self._starts = _sums(len(chunk.text) for chunk in self.chunks)
        self._units = _sums(chunk.units for chunk in self.chunks)
        self._lines = _sums(len(chunk.line_ends) for chunk in self.chunks)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def text(self) -> str:
        """The whole text, which no keystroke should need."""
        return "".join(chunk.text for chunk in self.chunks)

    @cached_property
    def newline(self) -> str:
        """How the first line ends; "\\n" if there is only one line."""
        if not self._lines[-1]:
            return "\n"
        end = self._line_start(1)
        return "\r\n" if self.slice(end - 2, end) == "\r\n" else self.slice(end - 1, end)

    def slice(self, start: int, end: int) -> str:
        """The text between two offsets; those outside the text mean its start or its end."""
        start, end = max(0, start), min(len(self), end)
        if start >= end:
            return ""
        first, last = self._chunk_at(start), self._chunk_at(end - 1)
        text = "".join(chunk.text for chunk in self.chunks[first : last + 1])
        return text[start - self._starts[first] : end - self._starts[first]]

    # ---------------------------------------------------------------------------------------- LSP positions
    def offset(self, line: int, character: int) -> int:
        """The offset in the text of an LSP position.

        A position past the end of its line means that end, one past the last line the end of the text, and
        one inside a character that character's start.
        """
        if line > self._lines[-1]:
            return len(self)
        start, end = self._line_start(line), len(self)
        if line < self._lines[-1]:
            end = self._line_start(line + 1)
            end -= 2 if self.slice(end - 2, end) == "\r\n" else 1
        target = self._units_before(start) + character
        index = min(bisect_right(self._units, target), len(self.chunks)) - 1
        if index < 0 or self._starts[index] > end:
            return end
        within = _fitting(self.chunks[index].text, target - self._units[index], self._count_units)
        return min(end, self._starts[index] + within)

    def position(self, offset: int) -> tuple[int, int]:
        """The LSP position (line, character) of an offset in the text."""
        if not self.chunks:
            return 0, 0
        index = self._chunk_at(offset)
        line = self._lines[index] + bisect_right(self.chunks[index].line_ends, offset - self._starts[index])
        return line, self._units_before(offset) - self._units_before(self._line_start(line))

    def edited(self, start: tuple[int, int], end: tuple[int, int], text: str) -> Buffer:
        """The buffer with the text between two positions replaced."""
        first, last = sorted((self.offset(*start), self.offset(*end)))
        return self.replaced(first, last, text)

    def replaced(self, start: int, end: int, text: str) -> Buffer:
        """The buffer with the text between two offsets replaced.

        The chunks on either side are measured again too: they may begin or end in half of a \\r\\n, and small
        ones grow together.
        """
        first = max(0, self._chunk_at(start) - 1)
        last = min(len(self.chunks), self._chunk_at(end) + 2)
        before = self.slice(self._starts[first], start)
        after = self.slice(end, self._starts[last])
        new = _chunks(before + text + after, self.encoding)
        chunks = (*self.chunks[:first], *new, *self.chunks[last:])
        return Buffer(chunks, self.encoding, self.path, self.language)

    # ------------------------------------------------------------------------------------- normalized lengths
    @cached_property
    def _normalized(self) -> list[int]:
        return _sums(chunk.normalized_length for chunk in self.chunks)

    def normalized_length(self, offset: int) -> int:
        """How many characters precede an offset once each line ends in \\n."""
        if not self.chunks:
            return 0
        index = self._chunk_at(offset)
        head = self.chunks[index].text[: offset - self._starts[index]]
        return self._normalized[index] + _normalized_length(head)

    def offset_of_normalized(self, length: int) -> int:
        """The offset before which there are `length` characters once each line ends in \\n."""
        if not self.chunks:
            return 0
        index = min(bisect_right(self._normalized, length), len(self.chunks)) - 1
        within = _fitting(self.chunks[index].text, length - self._normalized[index], _normalized_length)
        return self._starts[index] + within

    # -------------------------------------------------------------------------------------------- the index
    def _chunk_at(self, offset: int) -> int:
        """The number of the chunk that holds an offset; the last one at the end of the text."""
        return max(0, min(bisect_right(self._starts, offset), len(self.chunks)) - 1)

    def _line_start(self, line: int) -> int:
        if line == 0:
            return 0
        index = bisect_left(self._lines, line) - 1
        return self._starts[index] + self.chunks[index].line_ends[line - self._lines[index] - 1]

    def _units_before(self, offset: int) -> int:
        if not self.chunks:
            return 0
        index = self._chunk_at(offset)
        return self._units[index] + self._count_units(self.chunks[index].text[: offset - self._starts[index]])

    def _count_units(self, text: str) -> int:
        return _code_units(text, self.encoding)


def normalize(text: str) -> str:
    """Text as a model reads it: \\n ends each line, surrogate pairs are joined, lone ones replaced."""
    return without_surrogates(text).replace("\r\n", "\n").replace("\r", "\n")


def _chunks(text: str, encoding: Encoding) -> list[Chunk]:
    chunks, start = [], 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        end += text[end - 1 : end + 1] == "\r\n"
        chunks.append(_measured(text[start:end], encoding))
        start = end
    return chunks


def _measured(text: str, encoding: Encoding) -> Chunk:
    line_ends = tuple(match.end() for match in _LINE_END.finditer(text))
    return Chunk(text, _code_units(text, encoding), line_ends, _normalized_length(text))


def _sums(numbers: Iterable[int]) -> list[int]:
    return list(accumulate(numbers, initial=0))


def _fitting(text: str, length: int, measure: Callable[[str], int]) -> int:
    """How many of the first characters of a text measure at most `length`."""
    return bisect_right(range(len(text) + 1), length, key=lambda count: measure(text[:count])) - 1


def _code_units(text: str, encoding: Encoding) -> int:
    """The length of a text in code units of an encoding. A lone surrogate counts like any character of its
    range: one unit in UTF-16 and UTF-32, three in UTF-8."""
    if encoding == "utf-32" or text.isascii():
        return len(text)
    if encoding == "utf-16":
        return len(text.encode("utf-16-le", "surrogatepass")) // 2
    return len(text.encode("utf-8", "surrogatepass"))


def _normalized_length(text: str) -> int:
    return len(text) - text.count("\r\n")
