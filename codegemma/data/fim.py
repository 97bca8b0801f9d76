"""Documents -> fill-in-the-middle training examples: where to split, in which order, what to learn from.

Nine splits in ten lie at syntax boundaries and their suffix begins before the line break, where an editor's would; one
in ten lies between random characters, without which models cannot infill inside a word (Bavarian et al. 2022, table 2;
AST-FIM, arXiv 2506.00204). CodeGemma's own splitter is not published. Every choice is a hash of what it is about.

Examples are whole files, or pieces that fill a row; or windows: short contexts around holes all over a file, from which
a model learns the layouts for less.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from codegemma.data import syntax
from codegemma.data.documents import Document
from codegemma.prompts import Label, Layout, fim_training, head, tail
from codegemma.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tree_sitter

Kind = Literal[
    "node", "siblings", "lines", "line", "whole lines", "function end", "rest of line", "characters", "whole"
]
KINDS: dict[Kind, float] = {
    "node": 0.35,
    "siblings": 0.20,
    "lines": 0.15,
    "rest of line": 0.20,
    "characters": 0.10,
}
# Windows are for holes as people leave them: of those that fit 64 to 160 tokens, six in ten are one line or less.
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
PARTS: frozenset[Label] = frozenset({"prefix", "suffix", "middle", "terminator"})
DEEPEST = 64  # ancestors of a place that take part in the draw of a node
MOST_LINES = 16  # of a middle in a window
ALONE = 0.25  # share of windows that end where the function around the hole does
TRIES = 16  # draws of a hole that fits its window


class Draw:
    """Random numbers that are a hash of a key and a counter: the same for any worker, order or restart."""

    def __init__(self, *key: object):
        self._hash = hashlib.blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=8)
        self._count = 0

    def uniform(self) -> float:
        """In [0, 1), 53 bits."""
        self._count += 1
        here = self._hash.copy()
        here.update(self._count.to_bytes(8, "big"))
        return (int.from_bytes(here.digest(), "big") >> 11) / (1 << 53)

    def below(self, count: int) -> int:
        return int(self.uniform() * count)


@dataclass(frozen=True)
class Split:
    """prefix = text[:start], middle = text[start:end], suffix = text[end:]; offsets in characters."""

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True)
class Recipe:
    """How examples are made. `loss` names the parts that the model learns to predict."""

    fim_rate: float = 0.8
    spm_rate: float = 0.5
    length: int = 8192
    seed: int = 0
    epoch: int = 0
    loss: Collection[Label] = PARTS
    window: tuple[int, int] | None = None  # tokens of an example, drawn evenly; None: whole files
    stride: int = 4000  # characters of code for one window
    suffix_limit: int | None = None  # tokens of a window's suffix, at most
    path_rate: float = 1.0  # share of the windows that begin with their path

    def __post_init__(self) -> None:
        for name, rate in (
            ("fim-rate", self.fim_rate),
            ("spm-rate", self.spm_rate),
            ("path-rate", self.path_rate),
        ):
            if not 0 <= rate <= 1:
                raise ValueError(
                    f"{name} must lie from 0 to 1, got {rate}: CodeGemma's are 0.8 to 0.9, 0.5 and 1"
                )
        if self.length < 64:
            raise ValueError(f"length must be at least 64 tokens, got {self.length}: CodeGemma reads 8192")
        if self.window and not 32 <= self.window[0] <= self.window[1] < self.length:
            raise ValueError(
                f"window must be FEWEST:MOST tokens, from 32 to below the row's {self.length}, got "
                f"{self.window[0]}:{self.window[1]}"
            )
        if self.stride < 1 or (self.suffix_limit is not None and self.suffix_limit < 1):
            raise ValueError(
                f"stride and suffix-limit must be at least 1, got {self.stride} and {self.suffix_limit}"
            )


@dataclass(frozen=True)
class Example:
    """A document, or a piece of one, as it stands in a row: text[offset:offset + size] of its file."""

    document: Document
    ids_T: np.ndarray  # int32
    loss_T: np.ndarray  # bool
    layout: Layout
    offset: int
    size: int
    split: Split
    order: int = 0  # place of the document in the packed order of its partition


# -------------------------------------------------------------------------------------------------- splits
def split(
    text: str,
    language: str,
    draw: Draw,
    kinds: Mapping[Kind, float] = KINDS,
    within: range | None = None,
    most: int | None = None,
) -> Split:
    """A split of a text of at least one character. Holes lie in `within` (syntax nodes may lead out of it); those of
    nodes, siblings and characters are made for at most `most` characters."""
    within, most = within or range(len(text)), most or len(text)
    share, kind = draw.uniform(), "characters"
    for name, weight in kinds.items():
        if share < weight:
            kind = name
            break
        share -= weight
    if kind in ("node", "siblings"):
        tree = _tree(text, language)
        low, high = (len(text[:at].encode()) for at in (within.start, within.stop))
        found = (_node if kind == "node" else _siblings)(tree, draw, low, high, most) if tree else None
        if found:
            return _before_break(text, *_characters(text, *found), kind)  # type: ignore[arg-type]
        kind = "lines"
    here = text[within.start : within.stop]
    if kind == "function end":
        at = within.start + draw.below(len(within))
        around = _function(text, language, at, at + 1)
        start, end = _run(_line_spans(text[around.start : around.stop]), draw, MOST_LINES, last=True)
        return Split(around.start + start, _behind_break(text, around.start + end), "function end")
    if kind != "characters" and here.strip():
        make = {"rest of line": _rest_of_line, "line": _line, "whole lines": _whole_lines}.get(kind, _lines)
        place = make(here, draw)
        return Split(within.start + place.start, within.start + place.end, place.kind)
    start, end = _span(draw, 0, len(here), most)
    return Split(within.start + start, within.start + end, "characters")


@lru_cache(maxsize=1)
def _tree(text: str, language: str) -> tree_sitter.Tree | None:
    return syntax.parse(text, language)


def _span(draw: Draw, low: int, high: int, most: int) -> tuple[int, int]:
    """Two places from `low` to `high`, or one and another at most `most` behind it where that is less."""
    first = low + draw.below(high - low + 1)
    last = low + draw.below(high - low + 1) if most >= high - low else min(high, first + draw.below(most + 1))
    return min(first, last), max(first, last)


def _node(tree: tree_sitter.Tree, draw: Draw, low: int, high: int, most: int) -> tuple[int, int] | None:
    """A named node, drawn in proportion to its size, without a walk over the tree.

    A place drawn evenly is kept with probability depth / DEEPEST, then one of the nodes around it is taken evenly: so a
    node's chance is the number of places inside it, times a constant.
    """
    for _ in range(4 * DEEPEST):
        at = low + draw.below(high - low) if high > low else low
        node = tree.root_node.named_descendant_for_byte_range(at, at)
        around: list[tree_sitter.Node] = []
        while node is not None and node.parent is not None and len(around) < DEEPEST:
            size = node.end_byte - node.start_byte
            if not node.is_error and 0 < size <= most and node.start_byte <= at < node.end_byte:
                around.append(node)
            node = node.parent
        if around and draw.uniform() * DEEPEST < len(around):
            chosen = around[draw.below(len(around))]
            return chosen.start_byte, chosen.end_byte
    return None


def _siblings(tree: tree_sitter.Tree, draw: Draw, low: int, high: int, most: int) -> tuple[int, int] | None:
    """A run of siblings: the children, of the smallest node around a random span, that match the span best."""
    first, last = _span(draw, low, high, most)
    node = tree.root_node.named_descendant_for_byte_range(first, last)
    children = [child for child in node.named_children if child.end_byte > child.start_byte] if node else []
    if not children:
        return (
            (node.start_byte, node.end_byte)
            if node and node.parent and node.end_byte > node.start_byte
            else None
        )
    start = min(range(len(children)), key=lambda i: abs(children[i].start_byte - first))
    end = min(range(start, len(children)), key=lambda i: abs(children[i].end_byte - last))
    return children[start].start_byte, children[end].end_byte


def _characters(text: str, start: int, end: int) -> tuple[int, int]:
    """Offsets in UTF-8 bytes -> in characters."""
    if text.isascii():
        return start, end
    data = text.encode()
    return len(data[:start].decode("utf-8", "ignore")), len(data[:end].decode("utf-8", "ignore"))


def _before_break(text: str, start: int, end: int, kind: Kind) -> Split:
    kept = len(text[start:end].rstrip("\r\n"))
    return Split(start, start + kept if kept else end, kind)


def _line_spans(text: str) -> list[tuple[int, int]]:
    """(start, end before the line break) of each line that is not blank."""
    return [match.span() for match in re.finditer(r"[^\r\n]+", text) if not match[0].isspace()]


def _run(spans: list[tuple[int, int]], draw: Draw, most: int, last: bool = False) -> tuple[int, int]:
    """Of some lines in a row, the last ones or any: one more often than many, the count is log-uniform."""
    count = max(1, min(len(spans), most, int(math.exp(draw.uniform() * math.log(min(len(spans), most) + 1)))))
    first = len(spans) - count if last else draw.below(len(spans) - count + 1)
    return spans[first][0], spans[first + count - 1][1]


def _lines(text: str, draw: Draw) -> Split:
    """Lines without their outer white space: the indentation belongs to the prefix, the line break to the suffix."""
    start, end = _run(_line_spans(text), draw, len(text))
    return Split(start + len(text[start:end]) - len(text[start:end].lstrip(" \t")), end, "lines")


def _whole_lines(text: str, draw: Draw, most: int = MOST_LINES, kind: Kind = "whole lines") -> Split:
    """Lines as HumanEval infilling removes them: with the indentation before and the line break behind them."""
    start, end = _run(_line_spans(text), draw, most)
    return Split(start, _behind_break(text, end), kind)


def _behind_break(text: str, at: int) -> int:
    return at + len(text[at : at + 2]) - len(text[at : at + 2].removeprefix("\r").removeprefix("\n"))


def _line(text: str, draw: Draw) -> Split:
    return _whole_lines(text, draw, 1, "line")


def _rest_of_line(text: str, draw: Draw) -> Split:
    """From where somebody would stop typing (the start, or behind a word or sign) to the end of the line."""
    spans = _line_spans(text)
    start, end = spans[draw.below(len(spans))]
    line = text[start:end]
    places = [
        match.start()
        for match in re.finditer(r"\S", line)
        if match.start() == 0 or not (line[match.start() - 1].isalnum() and line[match.start()].isalnum())
    ]
    return Split(start + places[draw.below(len(places))], end, "rest of line")


# ------------------------------------------------------------------------------------------------ examples
def fim(
    documents: Iterable[Document], tokenizer: Tokenizer, recipe: Recipe | None = None
) -> Iterator[Example]:
    """Each document as examples of at most `length` - 1 tokens (a row begins with <bos>); only code is split for FIM,
    and only code is shown in windows."""
    recipe = recipe or Recipe()
    for document in documents:
        if recipe.window and document.kind == "code":
            yield from _windows(document, tokenizer, recipe)
        else:
            yield from _examples(document, 0, document.text, tokenizer, recipe)


def _examples(
    document: Document, offset: int, text: str, tokenizer: Tokenizer, recipe: Recipe
) -> Iterator[Example]:
    """The text as one example if it fits, else cut at line breaks first, so that each piece nearly fills a row: prefix,
    suffix and middle always stand in one row, and the share of FIM examples is the share that was asked for."""
    example = _example(document, offset, text, tokenizer, recipe)
    size = len(example.ids_T)
    if size < recipe.length:
        yield example
        return
    if len(text) < 2:
        raise ValueError(
            f"{document.name}: its path alone fills a row of {recipe.length} tokens: raise length"
        )
    at = 0
    for piece in pieces(text, min(len(text) - 1, int(len(text) * 0.95 * recipe.length / size))):
        yield from _examples(document, offset + at, piece, tokenizer, recipe)
        at += len(piece)


def pieces(text: str, most: int) -> list[str]:
    """The text in pieces of at most `most` characters that end behind a line break, where one is in their last half."""
    cuts = [0]
    while len(text) - cuts[-1] > most:
        end = cuts[-1] + max(1, most)
        line = text.rfind("\n", cuts[-1] + most // 2, end) + 1
        cuts.append(line or end)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _example(document: Document, offset: int, text: str, tokenizer: Tokenizer, recipe: Recipe) -> Example:
    draw = Draw(recipe.seed, document.repository, document.path, offset, len(text), recipe.epoch)
    layout = _layout(draw, recipe) if document.kind == "code" and text else "prefix"
    place = split(text, document.language, draw) if layout != "prefix" else Split(0, len(text), "whole")
    path = document.path if document.kind == "code" else None
    return _made(document, offset, text, place, path, layout, tokenizer, recipe)


def _layout(draw: Draw, recipe: Recipe) -> Layout:
    if draw.uniform() >= recipe.fim_rate:
        return "prefix"
    return "spm" if draw.uniform() < recipe.spm_rate else "psm"


def _made(
    document: Document,
    offset: int,
    text: str,
    place: Split,
    path: str | None,
    layout: Layout,
    tokenizer: Tokenizer,
    recipe: Recipe,
) -> Example:
    """A window that is not FIM and ends before its file does has no end to learn."""
    prompt = fim_training(
        tokenizer,
        text[: place.start],
        text[place.start : place.end],
        text[place.end :],
        path,
        layout,
        "file_separator" if document.kind == "code" else "eos",
    )
    learned = np.concatenate([np.full(len(ids), label in recipe.loss) for label, ids in prompt.segments])
    if recipe.window and layout == "prefix" and offset + len(text) < len(document.text):
        learned[-1] = False
    return Example(document, np.array(prompt.ids, np.int32), learned, layout, offset, len(text), place)


# ------------------------------------------------------------------------------------------------- windows
def _windows(document: Document, tokenizer: Tokenizer, recipe: Recipe) -> Iterator[Example]:
    """One for every `stride` characters of the text, evenly: a shorter piece has a chance in proportion to it."""
    at = 0
    for piece in pieces(document.text, recipe.stride):
        draw = Draw(recipe.seed, document.repository, document.path, "window", at, len(piece), recipe.epoch)
        if piece.strip() and draw.uniform() * recipe.stride < len(piece):
            found = _window(document, range(at, at + len(piece)), draw, tokenizer, recipe)
            if found is not None:
                yield found
        at += len(piece)


def _window(
    document: Document, within: range, draw: Draw, tokenizer: Tokenizer, recipe: Recipe
) -> Example | None:
    """None where no hole of this piece fits the tokens that were drawn for the window."""
    assert recipe.window
    layout, text = _layout(draw, recipe), document.text
    most = recipe.window[0] + draw.below(recipe.window[1] - recipe.window[0] + 1)
    path = document.path if draw.uniform() < recipe.path_rate else None
    lines = len(tokenizer.encode(f"{path}\n")) if path else 0
    path, lines = (path, lines) if lines < most // 4 else (None, 0)
    room = most - lines - (4 if layout != "prefix" else 1)  # sentinels, terminator
    if layout == "prefix":
        start = within.start + _run(_line_spans(text[within.start : within.stop]), draw, 1)[0]
        ids = head(tokenizer, tokenizer.encode(text[start : start + 5 * room]), room)
        size = len(tokenizer.decode(ids))
        return _made(
            document,
            start,
            text[start : start + size],
            Split(0, size, "whole"),
            path,
            layout,
            tokenizer,
            recipe,
        )
    for _ in range(TRIES):
        place = split(text, document.language, draw, WINDOW_KINDS, within, 2 * room)
        middle = text[place.start : place.end]
        if middle.strip() and len(middle) < 5 * room and (size := len(tokenizer.encode(middle))) <= room // 2:
            alone = place.kind == "function end" or draw.uniform() < ALONE
            around = _function(text, document.language, place.start, place.end) if alone else range(len(text))
            start, end = _around(text, place, around, room - size, draw, tokenizer, recipe.suffix_limit)
            return _made(
                document,
                start,
                text[start:end],
                Split(place.start - start, place.end - start, place.kind),
                path,
                layout,
                tokenizer,
                recipe,
            )
    return None


def _around(
    text: str,
    place: Split,
    around: range,
    room: int,
    draw: Draw,
    tokenizer: Tokenizer,
    suffix_limit: int | None,
) -> tuple[int, int]:
    """Start and end of a window: a tenth to six tenths of `room` tokens for the suffix, the rest for the prefix, each
    lending the other what it does not need. Edges as in a prompt that is cut to a budget, by the same functions."""
    prefix = tokenizer.encode(text[max(around.start, place.start - 5 * room) : place.start])
    suffix = tokenizer.encode(text[place.end : min(around.stop, place.end + 5 * room)])
    limit = room if suffix_limit is None else 1 + draw.below(suffix_limit)
    most = min(limit, max(int(room * (0.1 + 0.5 * draw.uniform())), room - len(prefix)))
    suffix = head(tokenizer, suffix, most)
    prefix = tail(tokenizer, prefix, room - len(suffix))
    return place.start - len(tokenizer.decode(prefix)), place.end + len(tokenizer.decode(suffix))


def _function(text: str, language: str, start: int, end: int) -> range:
    """The lines of the smallest function around text[start:end]; the whole text where there is none."""
    tree = _tree(text, language)
    low, high = (len(text[:at].encode()) for at in (start, end))
    node = tree.root_node.named_descendant_for_byte_range(low, max(low, high - 1)) if tree else None
    while node is not None:
        first, last = _characters(text, node.start_byte, node.end_byte)
        if re.search("function|method", node.type) and first < start:
            line = text.find("\n", last) + 1
            return range(text.rfind("\n", 0, first) + 1, max(line or len(text), end))
        node = node.parent
    return range(len(text))
