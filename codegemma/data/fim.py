"""Documents -> fill-in-the-middle training examples: where to split, in which order, what to learn from.

Nine splits in ten lie at syntax boundaries and their suffix begins before the line break, where an editor's would; one
in ten lies between random characters, without which models cannot infill inside a word (Bavarian et al. 2022, table 2;
AST-FIM, arXiv 2506.00204). CodeGemma's own splitter is not published. Every choice is a hash of what it is about.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from codegemma.data import syntax
from codegemma.data.documents import Document
from codegemma.prompts import Label, Layout, fim_training
from codegemma.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tree_sitter

Kind = Literal["node", "siblings", "lines", "rest of line", "characters", "whole"]
KINDS: dict[Kind, float] = {"node": 0.35, "siblings": 0.20, "lines": 0.15, "rest of line": 0.20, "characters": 0.10}
PARTS: frozenset[Label] = frozenset({"prefix", "suffix", "middle", "terminator"})
DEEPEST = 64                 # ancestors of a place that take part in the draw of a node


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
    loss: frozenset[Label] = PARTS

    def __post_init__(self) -> None:
        for name, rate in (("fim-rate", self.fim_rate), ("spm-rate", self.spm_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must lie from 0 to 1, got {rate}: CodeGemma's are 0.8 to 0.9 and 0.5")
        if self.length < 64:
            raise ValueError(f"length must be at least 64 tokens, got {self.length}: CodeGemma reads 8192")


@dataclass(frozen=True)
class Example:
    """A document, or a piece of one, as it stands in a row: text[offset:offset + size] of its file."""

    document: Document
    ids_T: np.ndarray                     # int32
    loss_T: np.ndarray                    # bool
    layout: Layout
    offset: int
    size: int
    split: Split
    order: int = 0                        # place of the document in the packed order of its partition


# -------------------------------------------------------------------------------------------------- splits
def split(text: str, language: str, draw: Draw) -> Split:
    """A split of a text of at least one character."""
    share, kind = draw.uniform(), "characters"
    for name, weight in KINDS.items():
        if share < weight:
            kind = name
            break
        share -= weight
    if kind in ("node", "siblings"):
        tree = syntax.parse(text, language)
        found = (_node if kind == "node" else _siblings)(tree, draw) if tree else None
        if found:
            return _before_break(text, *_characters(text, *found), kind)  # type: ignore[arg-type]
        kind = "lines"
    if kind == "lines" and text.strip():
        return _lines(text, draw)
    if kind == "rest of line" and text.strip():
        return _rest_of_line(text, draw)
    start, end = sorted((draw.below(len(text) + 1), draw.below(len(text) + 1)))
    return Split(start, end, "characters")


def _node(tree: tree_sitter.Tree, draw: Draw) -> tuple[int, int] | None:
    """A named node, drawn in proportion to its size, without a walk over the tree.

    A place drawn evenly is kept with probability depth / DEEPEST, then one of the nodes around it is taken evenly: so a
    node's chance is the number of places inside it, times a constant.
    """
    size = tree.root_node.end_byte
    for _ in range(4 * DEEPEST):
        at = draw.below(size) if size else 0
        node = tree.root_node.named_descendant_for_byte_range(at, at)
        around: list[tree_sitter.Node] = []
        while node is not None and node.parent is not None and len(around) < DEEPEST:
            if not node.is_error and node.end_byte > node.start_byte and node.start_byte <= at < node.end_byte:
                around.append(node)
            node = node.parent
        if around and draw.uniform() * DEEPEST < len(around):
            chosen = around[draw.below(len(around))]
            return chosen.start_byte, chosen.end_byte
    return None


def _siblings(tree: tree_sitter.Tree, draw: Draw) -> tuple[int, int] | None:
    """A run of siblings: the children, of the smallest node around a random span, that match the span best."""
    size = tree.root_node.end_byte
    first, last = sorted((draw.below(size + 1), draw.below(size + 1)))
    node = tree.root_node.named_descendant_for_byte_range(first, last)
    children = [child for child in node.named_children if child.end_byte > child.start_byte] if node else []
    if not children:
        return (node.start_byte, node.end_byte) if node and node.parent and node.end_byte > node.start_byte else None
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


def _lines(text: str, draw: Draw) -> Split:
    """Whole lines, one of them more often than many (the count is log-uniform); the indentation belongs to the
    prefix."""
    spans = _line_spans(text)
    count = max(1, min(len(spans), int(math.exp(draw.uniform() * math.log(len(spans) + 1)))))
    first = draw.below(len(spans) - count + 1)
    start, end = spans[first][0], spans[first + count - 1][1]
    return Split(start + len(text[start:end]) - len(text[start:end].lstrip(" \t")), end, "lines")


def _rest_of_line(text: str, draw: Draw) -> Split:
    """From where somebody would stop typing (the start, or behind a word or sign) to the end of the line."""
    spans = _line_spans(text)
    start, end = spans[draw.below(len(spans))]
    line = text[start:end]
    places = [match.start() for match in re.finditer(r"\S", line) if match.start() == 0 or not
              (line[match.start() - 1].isalnum() and line[match.start()].isalnum())]
    return Split(start + places[draw.below(len(places))], end, "rest of line")


# ------------------------------------------------------------------------------------------------ examples
def fim(documents: Iterable[Document], tokenizer: Tokenizer, recipe: Recipe | None = None) -> Iterator[Example]:
    """Each document as examples of at most `length` - 1 tokens (a row begins with <bos>); only code is split for
    FIM."""
    recipe = recipe or Recipe()
    for document in documents:
        yield from _examples(document, 0, document.text, tokenizer, recipe)


def _examples(document: Document, offset: int, text: str, tokenizer: Tokenizer, recipe: Recipe) -> Iterator[Example]:
    """The text as one example if it fits, else cut at line breaks first, so that each piece nearly fills a row: prefix,
    suffix and middle always stand in one row, and the share of FIM examples is the share that was asked for."""
    example = _example(document, offset, text, tokenizer, recipe)
    size = len(example.ids_T)
    if size < recipe.length:
        yield example
        return
    if len(text) < 2:
        raise ValueError(f"{document.name}: its path alone fills a row of {recipe.length} tokens: raise length")
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
    layout: Layout = "prefix"
    if document.kind == "code" and text and draw.uniform() < recipe.fim_rate:
        layout = "spm" if draw.uniform() < recipe.spm_rate else "psm"
    place = split(text, document.language, draw) if layout != "prefix" else Split(0, len(text), "whole")
    prompt = fim_training(tokenizer, text[:place.start], text[place.start:place.end], text[place.end:],
                          document.path if document.kind == "code" else None, layout,
                          "file_separator" if document.kind == "code" else "eos")
    learned = [np.full(len(ids), label in recipe.loss) for label, ids in prompt.segments]
    return Example(document, np.array(prompt.ids, np.int32), np.concatenate(learned), layout, offset, len(text), place)
