"""Where a text is split into prefix, middle and suffix.

Nine splits in ten follow syntax or lines. In whole files the suffix begins before the line break, as in an
editor; three of the kinds for windows take the line break into the middle (WINDOW_KINDS). One split in ten
lies between random characters: without those, models cannot infill inside a word (Bavarian et al. 2022, table
2; AST-FIM, arXiv 2506.00204). CodeGemma's splitter is not published. Recipes with other kinds: holes.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from codegemma.data import syntax
from codegemma.data.draw import Draw

if TYPE_CHECKING:
    import tree_sitter

Kind = Literal[
    "node",
    "siblings",
    "lines",
    "line",
    "whole lines",
    "function end",
    "rest of line",
    "characters",
    "whole",
    "line characters",
    "natural suffix",
    "argument",
    "string",
    "ten lines",
    "line break",
    "indentation",
    "typed word",
    "word",
    "empty",
]  # those after "whole" are cut in holes.py
KINDS: dict[Kind, float] = {
    "node": 0.35,
    "siblings": 0.20,
    "lines": 0.15,
    "rest of line": 0.20,
    "characters": 0.10,
}
# The holes of windows are like those in an editor: at 64 to 160 tokens, six in ten are one line or less.
WINDOW_KINDS: dict[Kind, float] = {
    "line": 0.16,
    "whole lines": 0.22,
    "function end": 0.08,
    "rest of line": 0.14,
    "node": 0.10,
    "siblings": 0.12,
    "lines": 0.08,
    "characters": 0.10,
}
MAX_DEPTH = 64  # nodes around a drawn offset that may become the middle
MAX_LINES = 16  # of a middle in a window


@dataclass(frozen=True)
class Split:
    """prefix = text[:start], middle = text[start:end], suffix = text[end:]; offsets in characters."""

    start: int
    end: int
    kind: Kind


def split(
    text: str,
    language: str,
    draw: Draw,
    kinds: Mapping[Kind, float] = KINDS,
    within: range | None = None,
    max_characters: int | None = None,
) -> Split:
    """A split of a text of at least one character.

    The middle lies in `within`, except that syntax nodes and ends of functions may reach out of it.
    `max_characters` limits the middle of the kinds "node" (in bytes) and "characters". The run of "siblings"
    is the one nearest to a span of at most that length, and may be longer.
    """
    within, limit = within or range(len(text)), max_characters or len(text)
    kind = draw_kind(draw, kinds)
    if kind in ("node", "siblings"):
        tree = syntax.parse(text, language)
        low, high = (len(text[:offset].encode()) for offset in (within.start, within.stop))
        draw_span = draw_node if kind == "node" else _draw_siblings
        if tree and (span := draw_span(tree, draw, low, high, limit)):
            start, end = to_characters(text, *span)
            size = len(text[start:end].rstrip("\r\n"))
            return Split(start, start + size if size else end, kind)
        kind = "lines"
    if kind == "function end":
        offset = within.start + draw.below(len(within))
        body = function_around(text, language, offset, offset + 1)
        if spans := line_spans(text[body.start : body.stop]):
            start, end = draw_lines(spans, draw, MAX_LINES, last=True)
            return Split(body.start + start, _after_break(text, body.start + end), kind)
    part = text[within.start : within.stop]
    if kind == "characters" or not part.strip():
        start, end = _draw_span(draw, 0, len(part), limit)
        return Split(within.start + start, within.start + end, "characters")
    start, end = _split_lines(part, draw, kind)
    return Split(within.start + start, within.start + end, kind)


def draw_kind(draw: Draw, kinds: Mapping[Kind, float]) -> Kind:
    """A kind, drawn by its weight; "characters" where the weights leave a share over."""
    share = draw.uniform()
    for kind, weight in kinds.items():
        if share < weight:
            return kind
        share -= weight
    return "characters"


def _draw_span(draw: Draw, low: int, high: int, limit: int) -> tuple[int, int]:
    """Two offsets from `low` to `high`, in order, at most `limit` apart."""
    first = low + draw.below(high - low + 1)
    if limit >= high - low:
        second = low + draw.below(high - low + 1)
    else:
        second = min(high, first + draw.below(limit + 1))
    return min(first, second), max(first, second)


# --------------------------------------------------------------------------------------------- syntax (bytes)
def draw_node(tree: tree_sitter.Tree, draw: Draw, low: int, high: int, limit: int) -> tuple[int, int] | None:
    """(start, end) of a named node, drawn in proportion to its size, without a walk over the tree.

    A uniform offset is accepted with probability (nodes around it) / MAX_DEPTH, then one of these nodes is
    drawn uniformly. So the probability of a node is its size times a constant.
    """
    for _ in range(4 * MAX_DEPTH):
        offset = low + draw.below(high - low) if high > low else low
        node = tree.root_node.named_descendant_for_byte_range(offset, offset)
        around: list[tree_sitter.Node] = []
        while node is not None and node.parent is not None and len(around) < MAX_DEPTH:
            size = node.end_byte - node.start_byte
            if not node.is_error and 0 < size <= limit and node.start_byte <= offset < node.end_byte:
                around.append(node)
            node = node.parent
        if around and draw.uniform() * MAX_DEPTH < len(around):
            node = around[draw.below(len(around))]
            return node.start_byte, node.end_byte
    return None


def _draw_siblings(
    tree: tree_sitter.Tree, draw: Draw, low: int, high: int, limit: int
) -> tuple[int, int] | None:
    """(start, end) of the run of siblings nearest to a random span, inside the smallest node around it."""
    first, last = _draw_span(draw, low, high, limit)
    node = tree.root_node.named_descendant_for_byte_range(first, last)
    if node is None:
        return None
    children = [child for child in node.named_children if child.end_byte > child.start_byte]
    if not children:
        is_part = node.parent and node.end_byte > node.start_byte
        return (node.start_byte, node.end_byte) if is_part else None
    start = min(range(len(children)), key=lambda i: abs(children[i].start_byte - first))
    end = min(range(start, len(children)), key=lambda i: abs(children[i].end_byte - last))
    return children[start].start_byte, children[end].end_byte


def to_characters(text: str, start: int, end: int) -> tuple[int, int]:
    """Offsets in UTF-8 bytes -> in characters."""
    if text.isascii():
        return start, end
    data = text.encode()
    return len(data[:start].decode("utf-8", "ignore")), len(data[:end].decode("utf-8", "ignore"))


def function_around(text: str, language: str, start: int, end: int) -> range:
    """The lines of the smallest function around text[start:end]; the whole text where there is none."""
    tree = syntax.parse(text, language)
    low, high = (len(text[:offset].encode()) for offset in (start, end))
    node = tree.root_node.named_descendant_for_byte_range(low, max(low, high - 1)) if tree else None
    while node is not None:
        first, last = to_characters(text, node.start_byte, node.end_byte)
        if re.search("function|method", node.type) and first < start:
            next_line = text.find("\n", last) + 1
            return range(text.rfind("\n", 0, first) + 1, max(next_line or len(text), end))
        node = node.parent
    return range(len(text))


# ----------------------------------------------------------------------------------------------------- lines
def _split_lines(text: str, draw: Draw, kind: Kind) -> tuple[int, int]:
    """(start, end) of a middle of lines, in a text that is not blank.

    "lines" leaves the indentation to the prefix and the line break to the suffix; "line" and "whole lines"
    include both, as in HumanEval infilling; "rest of line" begins where somebody would stop typing: at the
    start of the line, or after a word or sign.
    """
    spans = line_spans(text)
    if kind == "rest of line":
        start, end = spans[draw.below(len(spans))]
        line = text[start:end]
        visible = [match.start() for match in re.finditer(r"\S", line)]
        stops = [i for i in visible if i == 0 or not line[i - 1 : i + 1].isalnum()]
        return start + stops[draw.below(len(stops))], end
    limits = {"line": 1, "whole lines": MAX_LINES}
    start, end = draw_lines(spans, draw, limits.get(kind, len(text)))
    if kind in limits:
        return start, _after_break(text, end)
    return start + len(text[start:end]) - len(text[start:end].lstrip(" \t")), end


def line_spans(text: str) -> list[tuple[int, int]]:
    """(start, end before the line break) of each line that is not blank."""
    return [match.span() for match in re.finditer(r"[^\r\n]+", text) if not match[0].isspace()]


def draw_lines(spans: list[tuple[int, int]], draw: Draw, limit: int, last: bool = False) -> tuple[int, int]:
    """(start, end) of consecutive lines, or of the last ones. Their count is log-uniform, at most `limit`."""
    available = min(len(spans), limit)
    count = log_uniform(draw, available)
    first = len(spans) - count if last else draw.below(len(spans) - count + 1)
    return spans[first][0], spans[first + count - 1][1]


def log_uniform(draw: Draw, limit: int) -> int:
    """A number from 1 to `limit`, even on a log scale: half of the draws lie below the root of `limit`."""
    return max(1, min(limit, int(math.exp(draw.uniform() * math.log(limit + 1)))))


def _after_break(text: str, offset: int) -> int:
    """The offset after the line break at `offset`; `offset` itself where there is none."""
    following = text[offset : offset + 2]
    return offset + len(following) - len(following.removeprefix("\r").removeprefix("\n"))
