"""Turns any Request into one of token ids: chooses the layout, and what fits the context and time budget.

Three laws hold. Encoding the text of a shortened prompt again gives the prompt's ids. The text nearest to the
cursor is kept longest. The window's edges move in coarse steps, so that a keystroke changes only the prompt's
last ids, and the others are in the cache.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from codegemma import prompts
from codegemma.config import Mode
from codegemma.generate.cursor import at_cursor
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.prompts import Layout, Parts
from codegemma.tokenizer import Tokenizer

WINDOWS = (16_384, 8_192, 4_096, 2_048, 1_024, 512, 256, 128)  # sizes to try, in tokens around the cursor
MIN_UNCACHED = 16  # tokens that every time budget allows


class PromptEngine(Protocol):
    """The part of an `Engine` that `resolve` needs to encode a prompt and choose its size.

    `prefill_rate` is in tokens a second.
    """

    prefill_rate: float

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def context(self) -> int: ...
    def cached(self, ids: Sequence[int], adapter: str = "none") -> int: ...


def resolve(
    engine: PromptEngine, request: Request, fim_orders: Collection[str], reads_files: bool = True
) -> Request:
    """The request with token ids as its prompt, all its stop ids, and the layout of an Infill.

    `fim_orders`: the layouts ("psm", "spm") that the model with its adapter was trained in. `reads_files`:
    whether it was trained on documents with other files in front. Raises ValueError on text if there is no
    tokenizer, on a chat that does not end with the user's turn, and on a path of several lines.
    """
    prompt, tokenizer, budget = request.prompt, engine.tokenizer, prompt_budget(engine, request)
    begin, typed, left_out = "", 0, 0
    source = prompt.prompt if isinstance(prompt, TextPrompt) else prompt
    layout, stop_ids = None, prompts.fim_stops(tokenizer) if tokenizer else frozenset[int]()
    if not isinstance(source, Infill | Chat | str):
        ids = list(source)
    elif tokenizer is None:
        remedy = "send token ids, or add tokenizer.model to its directory"
        raise ValueError(f"this model came without a tokenizer, so text cannot be read: {remedy}")
    elif isinstance(source, Infill):
        layout = layout_for(source.mode, fim_orders)
        infill, begin, typed = at_cursor(tokenizer, source, reads_files)
        ids, left_out = infill_ids(engine, infill, layout, budget, request.adapter)
    elif isinstance(source, Chat):
        chat = prompts.chat(tokenizer, source.messages)
        ids, stop_ids = chat.ids, chat.stops
    else:
        is_raw = isinstance(prompt, TextPrompt) and prompt.raw
        ids = (prompts.raw if is_raw else prompts.plain)(tokenizer, source).ids
    if isinstance(prompt, TextPrompt) and prompt.truncate:
        ids = truncate_left(ids, budget.max_tokens)
    stop_ids = stop_ids.union(request.stop_ids)
    request = replace(request, begin=begin, typed=typed, layout=layout, left_out=left_out)
    return replace(request, prompt=ids, stop_ids=stop_ids)


def layout_for(mode: Mode, fim_orders: Collection[str]) -> Layout:
    """The layout of a mode. "auto" is "spm" where the model was trained in it, else "psm" where it was
    trained in that, else "prefix"."""
    if mode != "auto":
        return mode
    return "spm" if "spm" in fim_orders else "psm" if fim_orders else "prefix"


@dataclass(frozen=True)
class PromptBudget:
    """How many tokens a prompt may have, and how many of them may be absent from the cache."""

    max_tokens: int
    max_uncached: int


def prompt_budget(engine: PromptEngine, request: Request) -> PromptBudget:
    """The budget of a request's prompt: the context minus the answer's `max_tokens`, but at least half of it.

    Its uncached tokens must be read within `prompt_seconds`, unless the request only fills the cache
    (max_tokens 0).
    """
    max_tokens = engine.context - min(request.max_tokens, engine.context // 2)
    if request.prompt_seconds is None or not request.max_tokens:
        return PromptBudget(max_tokens, max_tokens)
    affordable = int(min(request.prompt_seconds * engine.prefill_rate, max_tokens))
    return PromptBudget(max_tokens, max(MIN_UNCACHED, affordable))


def infill_ids(
    engine: PromptEngine, infill: Infill, layout: Layout, budget: PromptBudget, adapter: str = "none"
) -> tuple[list[int], int]:
    """The prompt with the largest window of an Infill that the budget allows, given what is cached, and how
    many tokens of the Infill's text it leaves out."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    suffix = infill.suffix if layout != "prefix" else ""
    parts = prompts.encode_parts(tokenizer, infill.prefix, suffix, infill.path, infill.files)
    total = parts.size
    largest = min(total, budget.max_tokens - len(parts.path) - 4)  # <bos> and three sentinels
    ids, shown = list[int](), parts
    for size in (largest, *(size for size in WINDOWS if size < largest)):
        shown = window(tokenizer, parts, max(size, 1))
        ids = prompts.assemble(tokenizer, shown, layout).ids
        if len(ids) - engine.cached(ids, adapter) <= budget.max_uncached:
            break
    return ids, total - shown.size


def window(tokenizer: Tokenizer, parts: Parts, size: int) -> Parts:
    """Shortens a prompt's parts to about `size` tokens.

    The end of the prefix gets three quarters and the start of the suffix a quarter, and each also what the
    other leaves. Whole context files fill the remaining room, the last one first. The edges move in steps of
    `size` / 8, so that most keystrokes move none.
    """
    step, prefix, suffix = max(16, size // 8), parts.prefix, parts.suffix
    if len(prefix) + len(suffix) > size:
        max_suffix = max(size // 4, size - len(prefix))
        max_prefix = max(size - min(len(suffix), max_suffix), 1)
        prefix_room = -(-min(len(prefix), max_prefix) // step) * step
        prefix = prompts.tail(tokenizer, prefix, max_prefix, step)
        suffix = prompts.head(tokenizer, suffix, max(size - prefix_room, 0))
    room, files = size - len(prefix) - len(suffix), []
    for ids in reversed(parts.context):
        if len(ids) > room:
            break
        files.append(ids)
        room -= len(ids)
    return replace(parts, prefix=prefix, suffix=suffix, context=tuple(reversed(files)))


def truncate_left(ids: list[int], max_tokens: int) -> list[int]:
    """The first id (<bos>) and as many of the last ids as make `max_tokens` in all."""
    return ids if len(ids) <= max_tokens else [ids[0], *ids[len(ids) - max_tokens + 1 :]]
