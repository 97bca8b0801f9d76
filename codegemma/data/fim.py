"""Documents -> fill-in-the-middle training examples.

An example is a file, or a piece of one that fills a row. Or it is a window: a short context around a hole,
many for each file, from which a model learns the layouts at less cost; other files may stand in front of it,
as in a prompt of the language server. Every choice is a Draw from the recipe's seed and epoch, the file and
the offset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from codegemma.data.documents import Document
from codegemma.data.draw import Draw
from codegemma.data.holes import MAY_BE_BLANK, draw_hole
from codegemma.data.splits import (
    KINDS,
    WINDOW_KINDS,
    Kind,
    Split,
    draw_kind,
    draw_lines,
    function_around,
    line_spans,
    split,
)
from codegemma.prompts import (
    MAX_FILE_CHARACTERS,
    File,
    Label,
    Layout,
    encode_parts,
    file_head,
    fim_training,
    head,
    tail,
)
from codegemma.tokenizer import Tokenizer

PARTS: frozenset[Label] = frozenset({"prefix", "suffix", "middle", "terminator"})
FUNCTION_SHARE = 0.25  # of the windows show only the function around the hole
MAX_DRAWS = 16  # attempts to draw a hole that fits its window
MAX_CHARACTERS_PER_TOKEN = 5
MIN_CONTEXT_TOKENS = 48  # least room that is drawn for the files in front of a window
MAX_CONTEXT_FILES = 3  # in front of a window


def check_shares(name: str, shares: Sequence[tuple[str, float]]) -> None:
    """Raises ValueError unless there are no shares, or they are above 0, named once, and add up to 1."""
    if not shares:
        return
    values = [share for _, share in shares]
    if not (all(share > 0 for share in values) and abs(sum(values) - 1) <= 1e-6):
        raise ValueError(f"{name}: shares must be above 0 and add up to 1, got {dict(shares)}")
    if twice := [key for key, count in Counter(key for key, _ in shares).items() if count > 1]:
        raise ValueError(f"{name}: {', '.join(twice)} stands twice: give each one share")


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
    kinds: tuple[tuple[Kind, float], ...] = ()  # each kind's share of the holes; empty: those of splits.py
    context_rate: float = 0.0  # share of the windows with other files in front of them
    context_tokens: int = 640  # at most, of these files and the document's own path

    def __post_init__(self) -> None:
        for name in ("fim_rate", "spm_rate", "path_rate", "context_rate"):
            if not 0 <= (rate := getattr(self, name)) <= 1:
                raise ValueError(
                    f"{name.replace('_', '-')} must lie from 0 to 1, got {rate}: CodeGemma's fim-rate is 0.8 "
                    "to 0.9 and its spm-rate 0.5"
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
        self._check_kinds()
        self._check_context()

    def _check_kinds(self) -> None:
        known = [kind for kind in get_args(Kind) if kind != "whole"]
        if unknown := [kind for kind, _ in self.kinds if kind not in known]:
            raise ValueError(f"kinds: {', '.join(unknown)} not known; known are {', '.join(known)}")
        check_shares("kinds", self.kinds)

    def _check_context(self) -> None:
        if not self.context_rate:
            return
        if not self.window:
            raise ValueError(
                f"context-rate {self.context_rate:g} needs a window, such as 64:256: whole files stand "
                "behind those that they import anyway"
            )
        room = self.length - 1 - self.window[1]
        if not MIN_CONTEXT_TOKENS <= self.context_tokens <= room:
            raise ValueError(
                f"context-tokens must lie from {MIN_CONTEXT_TOKENS} to the {room} that a row of "
                f"{self.length} tokens leaves beside the largest window, got {self.context_tokens}"
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
    context: tuple[str, ...] = ()  # paths of the files in front


def fim(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    recipe: FimRecipe | None = None,
    related: Mapping[str, Sequence[File]] | None = None,
) -> Iterator[Example]:
    """Each document as examples of at most `length` - 1 tokens, since each segment begins with <bos>.

    Only code is split, and only code is shown in windows. `related` gives, by Document.name, the files that
    may stand in front of a document's windows, the most relevant last. Raises ValueError for a path that
    fills a row.
    """
    recipe = recipe or FimRecipe()
    for document in documents:
        maker = _ExampleMaker(document, tokenizer, recipe, (related or {}).get(document.name, ()))
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
    """Makes the examples of one document. `files` may stand in front of it, the most relevant last."""

    document: Document
    tokenizer: Tokenizer
    recipe: FimRecipe
    files: Sequence[File]

    def example(
        self,
        offset: int,
        size: int,
        hole: Split,
        path: str | None,
        layout: Layout,
        context: Sequence[File] = (),
    ) -> Example:
        """document.text[offset:offset + size], split at `hole`, whose offsets count from `offset`."""
        document = self.document
        text = document.text[offset : offset + size]
        parts = text[: hole.start], text[hole.start : hole.end], text[hole.end :]
        end: Literal["file_separator", "eos"] = "file_separator" if document.kind == "code" else "eos"
        prompt = fim_training(self.tokenizer, *parts, path, layout, end, context)
        loss = [np.full(len(ids), label in self.recipe.loss) for label, ids in prompt.spans]
        learned = np.concatenate(loss)
        if self.recipe.window and layout == "prefix" and offset + size < len(document.text):
            learned[-1] = False  # a window that ends before its file does has no end to learn
        ids_T, paths = np.array(prompt.ids, np.int32), tuple(file.path for file in context)
        return Example(document, ids_T, learned, layout, offset, size, hole, context=paths)

    def layout(self, draw: Draw) -> Layout:
        if draw.uniform() >= self.recipe.fim_rate:
            return "prefix"
        return "spm" if draw.uniform() < self.recipe.spm_rate else "psm"

    def kind(self, draw: Draw) -> Kind | None:
        """The kind of the next hole. None: the recipe names none, and `split` draws it."""
        return draw_kind(draw, dict(self.recipe.kinds)) if self.recipe.kinds else None

    def hole(
        self, kind: Kind | None, text: str, draw: Draw, within: range | None = None, limit: int | None = None
    ) -> Split:
        language = self.document.language
        if kind:
            return draw_hole(text, language, draw, kind, within, limit)
        return split(text, language, draw, WINDOW_KINDS if self.recipe.window else KINDS, within, limit)

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
            hole = self.hole(self.kind(draw), text, draw)
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
        """A window whose hole begins in text[within] or near it; None where no hole fits its tokens.

        Where files stand in front of it, it begins with its path, as in the language server's prompts.
        """
        layout, text = self.layout(draw), self.document.text
        size = tokens[0] + draw.below(tokens[1] - tokens[0] + 1)
        context = self.context(within.start)
        path = self.document.path if draw.uniform() < self.recipe.path_rate or context else None
        path_tokens = len(self.tokenizer.encode(f"{path}\n")) if path and not context else 0
        if path_tokens >= size // 4:
            path, path_tokens = None, 0
        room = size - path_tokens - (4 if layout != "prefix" else 1)  # sentinels, terminator
        if layout == "prefix":
            start = within.start + draw_lines(line_spans(text[within.start : within.stop]), draw, 1)[0]
            ids = self.tokenizer.encode(text[start : start + MAX_CHARACTERS_PER_TOKEN * room])
            shown = len(self.tokenizer.decode(head(self.tokenizer, ids, room)))
            return self.example(start, shown, Split(0, shown, "whole"), path, layout, context)
        kind = self.kind(draw)
        for _ in range(MAX_DRAWS):
            hole = self.hole(kind, text, draw, within, 2 * room)
            middle = text[hole.start : hole.end]
            is_allowed = middle.strip() or hole.kind in MAY_BE_BLANK
            if is_allowed and len(middle) < MAX_CHARACTERS_PER_TOKEN * room:
                middle_tokens = len(self.tokenizer.encode(middle))
                if middle_tokens <= room // 2:
                    start, end = self.edges(hole, room - middle_tokens, draw)
                    hole = Split(hole.start - start, hole.end - start, hole.kind)
                    return self.example(start, end - start, hole, path, layout, context)
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

    # --------------------------------------------------------------------------------- files in front
    def context(self, offset: int) -> tuple[File, ...]:
        """The files in front of the window at `offset`: the last of `files`, one to MAX_CONTEXT_FILES.

        Each is there from its start, whole or as many lines as there is room for. The room is a drawn number
        of tokens; with those of the document's own path, it is at most the recipe's `context_tokens`.
        """
        draw = self.draw("context", offset)
        if not self.files or draw.uniform() >= self.recipe.context_rate:
            return ()
        max_tokens = self.recipe.context_tokens - len(self.tokenizer.encode(f"{self.document.path}\n"))
        if max_tokens < 1:
            return ()
        room = min(MIN_CONTEXT_TOKENS, max_tokens) + draw.below(max(0, max_tokens - MIN_CONTEXT_TOKENS) + 1)
        count = 1 + draw.below(min(len(self.files), MAX_CONTEXT_FILES))
        shown: list[File] = []
        for remaining, file in zip(range(count, 0, -1), reversed(self.files), strict=False):
            file, tokens = self.head_of(file, room // remaining)
            if tokens:
                shown.append(file)
                room -= tokens
        return tuple(reversed(shown))

    def head_of(self, file: File, room: int) -> tuple[File, int]:
        """(the start of a file, how many tokens it takes with its path and separator), at most `room`.

        0 tokens: no line of the file fits.
        """
        limit = min(MAX_FILE_CHARACTERS, MAX_CHARACTERS_PER_TOKEN * room)
        while (text := file_head(file.text, limit)).strip():
            cut = File(file.path, text)
            tokens = len(encode_parts(self.tokenizer, "", context=[cut]).context[0])
            if tokens <= room:
                return cut, tokens
            limit = min(len(text) - 1, int(len(text) * room / tokens))
        return file, 0
