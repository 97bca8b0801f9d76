"""Documents -> fill-in-the-middle training examples.

An example is a file, or a piece of one that fills a row. Or it is a window: a short context around a hole,
many for each file, from which a model learns the layouts at less cost. Every choice is a Draw from the
recipe's seed and epoch, the file and the offset.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from codegemma.data.documents import Document
from codegemma.data.draw import Draw
from codegemma.data.splits import WINDOW_KINDS, Split, draw_lines, function_around, line_spans, split
from codegemma.prompts import Label, Layout, fim_training, head, tail
from codegemma.tokenizer import Tokenizer

PARTS: frozenset[Label] = frozenset({"prefix", "suffix", "middle", "terminator"})
FUNCTION_SHARE = 0.25  # of the windows show only the function around the hole
MAX_DRAWS = 16  # attempts to draw a hole that fits its window
MAX_CHARACTERS_PER_TOKEN = 5


@dataclass(frozen=True)
class FimRecipe:
    """How examples are made. `loss` names the parts that the model learns to predict.

    Raises ValueError for a value out of its range.
    """

    fim_rate: float = 0.8
    spm_rate: float = 0.5
    length: int = 8192
    seed: int = 0
    epoch: int = 0
    loss: Collection[Label] = PARTS
    window: tuple[int, int] | None = None  # least and most tokens, drawn evenly; None: whole files
    stride: int = 4000  # characters of code for one window
    suffix_limit: int | None = None  # each window draws a limit for its suffix, 1 to this many tokens
    path_rate: float = 1.0  # share of the windows that begin with their path

    def __post_init__(self) -> None:
        rates = {"fim-rate": self.fim_rate, "spm-rate": self.spm_rate, "path-rate": self.path_rate}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(
                    f"{name} must lie from 0 to 1, got {rate}: CodeGemma's are 0.8 to 0.9, 0.5 and 1"
                )
        if self.length < 64:
            raise ValueError(f"length must be at least 64 tokens, got {self.length}: CodeGemma reads 8192")
        if self.window and not 32 <= self.window[0] <= self.window[1] < self.length:
            raise ValueError(
                f"window must be MIN:MAX tokens, from 32 to below the row's {self.length}, got "
                f"{self.window[0]}:{self.window[1]}"
            )
        if self.stride < 1 or (self.suffix_limit is not None and self.suffix_limit < 1):
            raise ValueError(
                f"stride and suffix-limit must be at least 1, got {self.stride} and {self.suffix_limit}"
            )


@dataclass(frozen=True)
class Example:
    """A document or a piece of it, text[offset:offset + size], as tokens."""

    document: Document
    ids_T: np.ndarray  # int32
    loss_T: np.ndarray  # bool
    layout: Layout
    offset: int
    size: int
    split: Split
    order: int = 0  # index of the document in the packed order of its partition (see stages.py)


def fim(
    documents: Iterable[Document], tokenizer: Tokenizer, recipe: FimRecipe | None = None
) -> Iterator[Example]:
    """Each document as examples of at most `length` - 1 tokens, since each segment begins with <bos>.

    Only code is split, and only code is shown in windows. Raises ValueError for a path that fills a row.
    """
    recipe = recipe or FimRecipe()
    for document in documents:
        maker = _ExampleMaker(document, tokenizer, recipe)
        if recipe.window and document.kind == "code":
            yield from maker.windows(recipe.window)
        else:
            yield from maker.pieces(0, document.text)


def cut_at_lines(text: str, size: int) -> list[str]:
    """The text in pieces of at most `size` characters, cut after a line break if the second half has one."""
    cut = []
    while len(text) > size:
        end = text.rfind("\n", size // 2, max(1, size)) + 1 or max(1, size)
        cut.append(text[:end])
        text = text[end:]
    return [*cut, text]


@dataclass(frozen=True)
class _ExampleMaker:
    """Makes the examples of one document."""

    document: Document
    tokenizer: Tokenizer
    recipe: FimRecipe

    def example(self, offset: int, size: int, hole: Split, path: str | None, layout: Layout) -> Example:
        """document.text[offset:offset + size], split at `hole`, whose offsets count from `offset`."""
        document = self.document
        text = document.text[offset : offset + size]
        parts = text[: hole.start], text[hole.start : hole.end], text[hole.end :]
        end: Literal["file_separator", "eos"] = "file_separator" if document.kind == "code" else "eos"
        prompt = fim_training(self.tokenizer, *parts, path, layout, end)
        loss = [np.full(len(ids), label in self.recipe.loss) for label, ids in prompt.spans]
        learned = np.concatenate(loss)
        if self.recipe.window and layout == "prefix" and offset + size < len(document.text):
            learned[-1] = False  # a window that ends before its file does has no end to learn
        return Example(document, np.array(prompt.ids, np.int32), learned, layout, offset, size, hole)

    def layout(self, draw: Draw) -> Layout:
        if draw.uniform() >= self.recipe.fim_rate:
            return "prefix"
        return "spm" if draw.uniform() < self.recipe.spm_rate else "psm"

    def draw(self, *key: object) -> Draw:
        return Draw(self.recipe.seed, self.document.repository, self.document.path, *key, self.recipe.epoch)

    def pieces(self, offset: int, text: str) -> Iterator[Example]:
        """The text at `offset` as one example if it fits a row, else cut at line breaks into pieces that fit.

        So prefix, suffix and middle are always in one row, and the share of FIM examples is the recipe's.
        """
        example, length = self.piece(offset, text), self.recipe.length
        tokens = len(example.ids_T)
        if tokens < length:
            yield example
            return
        if len(text) < 2:
            name = self.document.name
            raise ValueError(f"{name}: its path alone fills a row of {length} tokens: raise length")
        for piece in cut_at_lines(text, min(len(text) - 1, int(len(text) * 0.95 * length / tokens))):
            yield from self.pieces(offset, piece)
            offset += len(piece)

    def piece(self, offset: int, text: str) -> Example:
        document, draw = self.document, self.draw(offset, len(text))
        layout = self.layout(draw) if document.kind == "code" and text else "prefix"
        hole = Split(0, len(text), "whole")
        if layout != "prefix":
            hole = split(text, document.language, draw)
        path = document.path if document.kind == "code" else None
        return self.example(offset, len(text), hole, path, layout)

    # ------------------------------------------------------------------------------------------- windows
    def windows(self, tokens: tuple[int, int]) -> Iterator[Example]:
        """For each piece of text that is not blank, a window with the probability size / `stride`."""
        offset, stride = 0, self.recipe.stride
        for piece in cut_at_lines(self.document.text, stride):
            draw = self.draw("window", offset, len(piece))
            if piece.strip() and draw.uniform() * stride < len(piece):
                example = self.window(range(offset, offset + len(piece)), draw, tokens)
                if example is not None:
                    yield example
            offset += len(piece)

    def window(self, within: range, draw: Draw, tokens: tuple[int, int]) -> Example | None:
        """A window whose hole begins in text[within]; None where no hole fits the tokens drawn for it."""
        layout, text = self.layout(draw), self.document.text
        size = tokens[0] + draw.below(tokens[1] - tokens[0] + 1)
        path = self.document.path if draw.uniform() < self.recipe.path_rate else None
        path_tokens = len(self.tokenizer.encode(f"{path}\n")) if path else 0
        if path_tokens >= size // 4:
            path, path_tokens = None, 0
        room = size - path_tokens - (4 if layout != "prefix" else 1)  # sentinels, terminator
        if layout == "prefix":
            start = within.start + draw_lines(line_spans(text[within.start : within.stop]), draw, 1)[0]
            ids = self.tokenizer.encode(text[start : start + MAX_CHARACTERS_PER_TOKEN * room])
            shown = len(self.tokenizer.decode(head(self.tokenizer, ids, room)))
            return self.example(start, shown, Split(0, shown, "whole"), path, layout)
        for _ in range(MAX_DRAWS):
            hole = split(text, self.document.language, draw, WINDOW_KINDS, within, 2 * room)
            middle = text[hole.start : hole.end]
            if middle.strip() and len(middle) < MAX_CHARACTERS_PER_TOKEN * room:
                middle_tokens = len(self.tokenizer.encode(middle))
                if middle_tokens <= room // 2:
                    start, end = self.edges(hole, room - middle_tokens, draw)
                    hole = Split(hole.start - start, hole.end - start, hole.kind)
                    return self.example(start, end - start, hole, path, layout)
        return None

    def edges(self, hole: Split, room: int, draw: Draw) -> tuple[int, int]:
        """(start, end) of the text around a hole that fills `room` tokens.

        A tenth to six tenths are for the suffix, the rest for the prefix; what one does not need goes to the
        other. `head` and `tail` cut the text as they cut a prompt.
        """
        text, tokenizer = self.document.text, self.tokenizer
        shown = range(len(text))
        if hole.kind == "function end" or draw.uniform() < FUNCTION_SHARE:
            shown = function_around(text, self.document.language, hole.start, hole.end)
        reach = MAX_CHARACTERS_PER_TOKEN * room
        prefix = tokenizer.encode(text[max(shown.start, hole.start - reach) : hole.start])
        suffix = tokenizer.encode(text[hole.end : min(shown.stop, hole.end + reach)])
        limit = self.recipe.suffix_limit
        limit = room if limit is None else 1 + draw.below(limit)
        share = int(room * (0.1 + 0.5 * draw.uniform()))
        suffix = head(tokenizer, suffix, min(limit, max(share, room - len(prefix))))
        prefix = tail(tokenizer, prefix, room - len(suffix))
        return hole.start - len(tokenizer.decode(prefix)), hole.end + len(tokenizer.decode(suffix))
