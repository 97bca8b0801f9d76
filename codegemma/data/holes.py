"""The holes that editors ask for: tables of weights for named recipes, and how each kind is cut.

splits.py has the kinds by syntax, by lines and at random. Those here begin or end where an editor's cursor
stands and those seldom do: with a line break, with blanks, inside an indentation, a word, a string or an
argument, or inside a line. They work in every language; where a kind needs a grammar that is missing, or the
text has no place for it, the hole lies between random characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegemma.data import splits, syntax
from codegemma.data.draw import Draw
from codegemma.data.splits import Kind, Split, line_spans, log_uniform, to_characters

if TYPE_CHECKING:
    import tree_sitter

# 45 % begin at random characters, 18 % follow syntax, 33 % lines, and 4 % a word that was begun (arXiv
# 2207.14255, 2506.00204).
EDITOR_HOLES: dict[Kind, float] = {
    "characters": 0.13,
    "line characters": 0.17,
    "natural suffix": 0.10,
    "word": 0.03,
    "empty": 0.02,
    "node": 0.07,
    "siblings": 0.05,
    "argument": 0.03,
    "string": 0.03,
    "rest of line": 0.12,
    "ten lines": 0.08,
    "line break": 0.08,
    "indentation": 0.05,
    "typed word": 0.04,
}
# "To make the suffix start in a more syntactically natural point rather than purely random distribution"
# (CodeGemma's model card).
CODEGEMMA_HOLES: dict[Kind, float] = {"natural suffix": 1.0}

MAY_BE_BLANK: frozenset[Kind] = frozenset({"empty", "line characters", "natural suffix"})  # their middles
MAX_LINES = 10
AROUND = 1500  # characters before and after `within` that are searched too where it has no place for a hole
MAX_TRIES = 16
_WORD = re.compile(r"\w{2,}")
_REST_OF_LINE = re.compile(r".*")
_TYPED = re.compile(
    r"(?: |(?<!\w))(\w+)"
)  # a word as the language server takes it out of a prompt, with its blank
_INDENTATION = re.compile(r"^[ \t]+(?=\S)", re.M)
_ARGUMENTS = re.compile(r"arguments$|argument_list$")  # types of nodes
_STRING = re.compile(r"string")
_OPENING, _CLOSING = re.compile(r"[\w@$]{0,3}[\"'`#]*"), re.compile(r"[\"'`#]*$")  # marks of a string


@dataclass(frozen=True)
class Place:
    """Where a hole may lie: it begins in text[within], or before that in the line that runs into it, and
    should have at most `limit` characters."""

    text: str
    language: str
    within: range
    limit: int

    @property
    def part(self) -> str:
        """The text in which the hole begins."""
        return self.text[self.within.start : self.within.stop]

    @property
    def line_start(self) -> int:
        """The start of the line in which the text begins."""
        return self.text.rfind("\n", 0, self.within.start) + 1

    @property
    def stop(self) -> int:
        """The end of a line up to which a hole may reach."""
        end = self.text.find("\n", self.within.stop + self.limit)
        return end if end >= 0 else len(self.text)


Span = tuple[int, int]


def draw_hole(
    text: str,
    language: str,
    draw: Draw,
    kind: Kind,
    within: range | None = None,
    max_characters: int | None = None,
) -> Split:
    """A hole of a kind. Arguments as those of `splits.split`, which cuts the kinds that are not in CUTS."""
    if kind in CUTS:
        within = within or range(len(text))
        around = range(max(0, within.start - AROUND), min(len(text), within.stop + AROUND))
        for searched in (within, around):
            if span := CUTS[kind](Place(text, language, searched, max_characters or len(text)), draw):
                return Split(*span, kind)
        kind = "characters"
    return splits.split(text, language, draw, {kind: 1.0}, within, max_characters)


# ------------------------------------------------------------------------------------------------ characters
def _line_characters(place: Place, draw: Draw) -> Span | None:
    """Between two characters of one line, which may be inside words and strings, or the same."""
    lines = line_spans(place.part)
    if not lines:
        return None
    start, end = lines[draw.below(len(lines))]
    first, last = sorted(start + draw.below(end - start + 1) for _ in range(2))
    return place.within.start + first, place.within.start + last


def _empty(place: Place, draw: Draw) -> Span:
    offset = place.within.start + draw.below(len(place.within) + 1)
    return offset, offset


def _word(place: Place, draw: Draw) -> Span | None:
    """From inside a word to its end or, as often, to a character before that."""
    words = [match.span() for match in _WORD.finditer(place.part)]
    if not words:
        return None
    start, end = words[draw.below(len(words))]
    first = start + 1 + draw.below(end - start - 1)
    last = end if draw.uniform() < 0.5 else first + 1 + draw.below(end - first)
    return place.within.start + first, place.within.start + last


def _typed_word(place: Place, draw: Draw) -> Span | None:
    """From before a word and its blank to the line's end, the word's end, or a character inside the word.

    Where the cursor cuts a word, the language server leaves it out of the prompt; the answer begins with it.
    """
    text, within = place.text, place.within
    starts = [match.start() for match in _TYPED.finditer(text, within.start, within.stop)]
    if not starts:
        return None
    start = starts[draw.below(len(starts))]
    word, rest = _TYPED.match(text, start), _REST_OF_LINE.match(text, start)
    assert word and rest  # the first was found just now, the other matches any text
    share = draw.uniform()
    if share < 0.5:
        return start, rest.end()
    return start, word.end() if share < 0.75 else word.start(1) + 1 + draw.below(len(word[1]))


# ----------------------------------------------------------------------------------------------------- lines
def _ten_lines(place: Place, draw: Draw) -> Span | None:
    """One to ten lines, with their indentation and line breaks."""
    span = _draw_lines(place, draw)
    if span is None:
        return None
    start, end = span
    return start, end + (place.text[end : end + 1] == "\n")


def _line_break(place: Place, draw: Draw) -> Span | None:
    """From the end of a line, line break first, to the end of one of the ten lines after it."""
    span = _draw_lines(place, draw)
    before = place.text[: span[0]].rstrip() if span else ""
    return (len(before), span[1]) if span and before else None


def _indentation(place: Place, draw: Draw) -> Span | None:
    """From inside a line's indentation to the end of that line or, as often, of one of the ten from it on."""
    indented = [
        match.span() for match in _INDENTATION.finditer(place.text, place.line_start, place.within.stop)
    ]
    if not indented:
        return None
    line, end = indented[draw.below(len(indented))]
    start = line + draw.below(end - line)
    lines = line_spans(place.text[line : place.stop])[: 1 if draw.uniform() < 0.5 else MAX_LINES]
    return start, line + lines[log_uniform(draw, len(lines)) - 1][1]


def _draw_lines(place: Place, draw: Draw) -> Span | None:
    """(start, end before the line break) of one to ten lines that are not blank; the first begins or
    goes on in `within`."""
    base = place.line_start
    lines = line_spans(place.text[base : place.stop])
    firsts = sum(base + start < place.within.stop for start, _ in lines)
    if not firsts:
        return None
    first = draw.below(firsts)
    count = log_uniform(draw, min(MAX_LINES, len(lines) - first))
    return base + lines[first][0], base + lines[first + count - 1][1]


# ---------------------------------------------------------------------------------------------------- syntax
def _natural_suffix(place: Place, draw: Draw) -> Span | None:
    """From a random character to the end of a syntax node around it, where the suffix begins."""
    tree = syntax.parse(place.text, place.language)
    if tree is None:
        return None
    for _ in range(MAX_TRIES):
        start = place.within.start + draw.below(len(place.within))
        offset = len(place.text[:start].encode())
        ends = [
            node.end_byte
            for node in _nodes_around(tree, offset)
            if node.start_byte < offset < node.end_byte <= offset + place.limit
        ]
        if ends:
            return start, to_characters(place.text, offset, ends[draw.below(len(ends))])[1]
    return None


def _argument(place: Place, draw: Draw) -> Span | None:
    """One argument of a call, or all from one to the last."""
    calls = [node for node in _nodes(place) if _ARGUMENTS.search(node.type) and node.named_children]
    if not calls:
        return None
    arguments = calls[draw.below(len(calls))].named_children
    first = arguments[draw.below(len(arguments))]
    last = first if draw.uniform() < 0.5 else arguments[-1]
    return to_characters(place.text, first.start_byte, last.end_byte)


def _string(place: Place, draw: Draw) -> Span | None:
    """From inside a string to its end or, as often, to a character before that."""
    strings = [
        node
        for node in _nodes(place)
        if _STRING.search(node.type) and node.parent and not _STRING.search(node.parent.type)
    ]
    if not strings:
        return None
    node = strings[draw.below(len(strings))]
    start, end = to_characters(place.text, node.start_byte, node.end_byte)
    text = place.text[start:end]
    opening, closing = _OPENING.match(text), _CLOSING.search(text)
    assert opening and closing  # the patterns match any text
    start, end = start + opening.end(), start + closing.start()
    if start >= end:
        return None
    first = start + draw.below(end - start)
    stop = min(end, first + place.limit)
    return first, stop if draw.uniform() < 0.5 else first + 1 + draw.below(stop - first)


def _nodes_around(tree: tree_sitter.Tree, offset: int) -> Iterator[tree_sitter.Node]:
    """The named nodes around a byte, but not the root, the smallest first."""
    node = tree.root_node.named_descendant_for_byte_range(offset, offset)
    while node is not None and node.parent is not None:
        if not node.is_error:
            yield node
        node = node.parent


def _nodes(place: Place) -> Iterator[tree_sitter.Node]:
    """The named nodes that begin in the place's text; none without a grammar."""
    tree = syntax.parse(place.text, place.language)
    low, high = syntax.byte_offsets(place.text, (place.within.start, place.within.stop))
    stack = [tree.root_node] if tree else []
    while stack:
        node = stack.pop()
        if low <= node.start_byte < high:
            yield node
        stack += [child for child in node.named_children if child.end_byte > low and child.start_byte < high]


CUTS: dict[Kind, Callable[[Place, Draw], Span | None]] = {
    "line characters": _line_characters,
    "natural suffix": _natural_suffix,
    "argument": _argument,
    "string": _string,
    "ten lines": _ten_lines,
    "line break": _line_break,
    "indentation": _indentation,
    "typed word": _typed_word,
    "word": _word,
    "empty": _empty,
}


# ------------------------------------------------------------------------------------- edges of a hole
def begins_with(prefix: str, middle: str) -> str:
    """What a hole begins with, as an editor's cursor meets it."""
    line = prefix[prefix.rfind("\n") + 1 :]
    if not middle:
        return "nothing"
    if middle[0] in "\r\n":
        return "line break"
    if middle[0].isspace():
        return "blanks in an indentation" if not line.strip() else "blanks in a line"
    if not line.strip():
        return "text of a line"
    return "inside a word" if _is_word(line[-1:], middle[0]) else "inside a line"


def ends_with(middle: str, suffix: str) -> str:
    """Where a hole ends, as an editor's cursor meets it."""
    if not middle:
        return "nothing"
    if middle[-1] in "\r\n":
        return "line break"
    if not suffix or suffix[0] in "\r\n":
        return "end of a line"
    return "inside a word" if _is_word(middle[-1], suffix[0]) else "inside a line"


def _is_word(before: str, after: str) -> bool:
    return bool(re.fullmatch(r"\w\w", before + after))
