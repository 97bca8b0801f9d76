"""The grammar of each language, and syntax trees of texts."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tree_sitter

LANGUAGES = tomllib.loads((Path(__file__).parent / "rules" / "languages.toml").read_text("utf-8"))
GRAMMARS: dict[str, str] = LANGUAGES["grammars"]

PROSE = re.compile(r"comment|string|text|char|heredoc|preproc_arg")  # types of nodes that hold no code
INTERPOLATION = re.compile(r"interpolation|substitution")  # code in a string

# A parse takes time and memory in proportion to the text; some grammars abort on huge generated files.
MAX_BYTES = 1_000_000


@cache
def parser(language: str) -> tree_sitter.Parser:
    """The parser of a language of GRAMMARS; one per process. It must not run in two threads at once."""
    import tree_sitter

    module, _, function = GRAMMARS[language].partition(":")
    grammar = importlib.import_module(f"tree_sitter_{module}")
    return tree_sitter.Parser(tree_sitter.Language(getattr(grammar, function or "language")()))


@lru_cache(maxsize=1)  # many splits of one text in a row
def parse(text: str, language: str) -> tree_sitter.Tree | None:
    """The syntax tree of a text, with offsets in UTF-8 bytes; None without a grammar, or above MAX_BYTES."""
    data = text.encode("utf-8", "surrogatepass")
    return parser(language).parse(data) if language in GRAMMARS and len(data) <= MAX_BYTES else None


def byte_offsets(text: str, offsets: Sequence[int]) -> list[int]:
    """Offsets of characters, in ascending order, as offsets of UTF-8 bytes, which trees have."""
    sizes, start, size = [], 0, 0
    for offset in offsets:
        size += len(text[start:offset].encode("utf-8", "surrogatepass"))
        start = offset
        sizes.append(size)
    return sizes


def is_code(tree: tree_sitter.Tree, offset: int) -> bool:
    """Whether a byte belongs to code: not to a comment, a string, other text, or what does not parse."""
    node = tree.root_node.descendant_for_byte_range(offset, offset + 1)
    while node is not None:
        if INTERPOLATION.search(node.type):
            return True
        if node.is_error or PROSE.search(node.type):
            return False
        node = node.parent
    return True


def error_share(tree: tree_sitter.Tree) -> float:
    """The share of the text's bytes that `error_bytes` counts."""
    return min(1.0, error_bytes(tree) / max(1, tree.root_node.end_byte))


def error_bytes(tree: tree_sitter.Tree) -> int:
    """How many bytes lie in ERROR nodes. A MISSING node, which has no text, counts as a byte."""
    errors, stack = 0, [tree.root_node]
    while stack:
        node = stack.pop()
        if node.is_error:
            errors += node.end_byte - node.start_byte
        elif node.is_missing:
            errors += 1
        elif node.has_error:
            stack.extend(node.children)
    return errors
