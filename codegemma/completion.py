"""Editor context -> a prompt within a budget -> a trimmed suggestion.

Users call `complete` with the text around the cursor and fold its Steps. The laws: the ids of a prompt are those of a
fresh encoding of the text it shows; what is nearest to the cursor is kept longest; window edges move in coarse steps,
so that typing finds everything but the last pieces in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from codegemma import prompts
from codegemma.engine import Engine, Request, Step, Stop
from codegemma.native import Cancel
from codegemma.prompts import File, Layout, Parts
from codegemma.sampling import Sampling
from codegemma.tokenizer import Tokenizer

Trim = Literal["none", "line", "block"]
Mode = Literal["auto", "psm", "spm", "prefix"]

WINDOWS = (16_384, 8_192, 4_096, 2_048, 1_024, 512, 256, 128)  # tokens around the cursor that are tried, largest first
CLOSERS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Hole:
    """What the editor knows: text before and after the cursor, this file's path, and other files."""

    prefix: str
    suffix: str = ""
    path: str | None = None
    context: Sequence[File] = ()


def layout_for(mode: Mode, fim_trained: bool, spm_trained: bool) -> Layout:
    """What `auto` means: PSM for checkpoints trained to fill in the middle, SPM where an adapter's card says that it was
    trained so, else a continuation of the prefix."""
    if mode != "auto":
        return mode
    return "prefix" if not fim_trained else "spm" if spm_trained else "psm"


def window(tokenizer: Tokenizer, parts: Parts, size: int) -> Parts:
    """Parts in about `size` tokens: three quarters for the prefix's end and one for the suffix's start, each lending the
    other what it does not need, then whole context files, the last first. Edges move in steps of a quarter window."""
    step = max(16, size // 8)
    suffix_most = max(size // 4, size - len(parts.prefix))
    prefix_most = max(size - min(len(parts.suffix), suffix_most), 1)
    prefix = prompts.tail(tokenizer, parts.prefix, prefix_most, step)
    suffix = prompts.head(tokenizer, parts.suffix, max(size - min(len(parts.prefix), prefix_most), 0))
    room, kept = size - len(prefix) - len(suffix), []
    for ids in reversed(parts.context):
        if len(ids) > room:
            break
        kept.append(ids)
        room -= len(ids)
    return replace(parts, prefix=prefix, suffix=suffix, context=tuple(reversed(kept)))


def prompt_within(engine: Engine, hole: Hole, layout: Layout, most: int, affordable: int | None = None) -> list[int]:
    """The largest prompt of at most `most` tokens of which at most `affordable` are not in the cache (None: no bound)."""
    assert engine.tokenizer is not None
    parts = prompts.encode_parts(engine.tokenizer, hole.prefix, hole.suffix if layout != "prefix" else "", hole.path, hole.context)
    fixed = len(parts.path) + 4          # path line, <bos>, sentinels
    ids: list[int] = []
    total = len(parts.prefix) + len(parts.suffix) + sum(map(len, parts.context))
    sizes = [min(total, most - fixed), *(size for size in WINDOWS if size < min(total, most - fixed))]
    for size in sizes:
        ids = prompts.assemble(engine.tokenizer, window(engine.tokenizer, parts, max(size, 1)), layout).ids
        if affordable is None or len(ids) - engine.cache.find(ids[:-1])[1] <= affordable:
            break
    return ids


def complete(engine: Engine, hole: Hole, layout: Layout = "psm", trim: Trim = "none", max_tokens: int = 128,
             sampling: Sampling = Sampling(), stop: Sequence[str] = (), time_budget: float | None = None,
             cancel: Cancel | None = None, speculate: bool = True, top: int = 0) -> Iterator[Step]:
    """Steps of the suggestion, trimmed. `time_budget` (seconds, until the first token) sizes the prompt by the speed that
    the engine has shown so far. Raises ValueError on bad input, at once."""
    if engine.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so text cannot be completed: pass ids to generate(), or add "
                         "tokenizer.model to its directory")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if trim not in ("none", "line", "block"):
        raise ValueError(f'trim must be "none", "line" or "block", got {trim!r}')
    if time_budget is not None and not time_budget > 0:
        raise ValueError(f"the time budget must be above 0 seconds, got {time_budget}")
    most = engine.context - min(max_tokens, engine.context // 2)
    affordable = None if time_budget is None else max(16, int(time_budget * engine.prefill_rate))
    ids = prompt_within(engine, hole, layout, most, affordable)
    request = Request(ids, max_tokens, sampling, prompts.fim_stops(engine.tokenizer), stop, top, speculate)
    steps = engine.generate(request, cancel)
    if trim == "none" and layout != "prefix":
        return steps
    return trimmed(steps, hole.prefix, hole.suffix, trim)


def trimmed(steps: Iterable[Step], prefix: str, suffix: str, trim: Trim) -> Iterator[Step]:
    """The same Steps, showing only what `cut` keeps. A line is shown once the next has begun."""
    text, shown = "", 0
    for step in steps:
        text += step.text
        kept, done = cut(text, prefix, suffix, trim, final=step.stop is not None)
        if step.stop is not None or done:
            stop: Stop | None = step.stop if step.stop is not None else "end"
            yield replace(step, text=kept[shown:], stop=stop)
            if isinstance(steps, Iterator) and hasattr(steps, "close"):
                steps.close()
            return
        body = kept.rstrip()             # blank lines and the last line may yet be dropped
        safe = body[:max(body.rfind("\n"), 0)].rstrip()
        yield replace(step, text=safe[shown:])
        shown = max(shown, len(safe))


def cut(text: str, prefix: str, suffix: str, trim: Trim, final: bool = True) -> tuple[str, bool]:
    """What is kept of a suggestion, and whether nothing after it can be kept.

    Lines are judged when they are whole (all are when `final`). "line" keeps the rest of the line; "block" ends where the
    cursor's block does. A line that repeats the suffix's first line, a tail that the suffix goes on with, and closing
    brackets that the suffix already has are dropped. A newline at the cut stays where the suffix starts a line of its own.
    """
    lines = text.splitlines(keepends=True)
    whole = len(lines) if final else sum(line.endswith("\n") for line in lines)
    here = prefix.rpartition("\n")[2]
    leaves = _block_end(here + lines[0] if lines else here) if trim == "block" else None
    following = [line.strip() for line in suffix.splitlines() if line.strip()]
    for at in range(whole):
        ends = at > 0 and (_repeats(lines[at:whole], following) or (leaves is not None and leaves(lines[at:whole])))
        if trim == "line" and (here + lines[at]).strip():
            at, ends = at + 1, True
        if ends:
            kept = "".join(lines[:at]).rstrip() + "\n" * _starts_line(suffix)
            return _without_overlap(kept, here, suffix), True
    return _without_overlap(text, here, suffix) if final else text, False


def _block_end(first: str) -> Callable[[list[str]], bool]:
    """Tells whether lines no longer belong to the block of the cursor's line, `first` as completed."""
    indent = _indent(first)
    opens = first.rstrip().endswith((":", "{", "(", "[", "=>", ","))

    def ends(lines: list[str]) -> bool:
        if lines[0].strip():
            level = _indent(lines[0])
            return level < indent or (opens and level == indent and lines[0].lstrip()[0] not in "})]" and not _ELSE.match(lines[0]))
        later = next((line for line in lines if line.strip()), None)
        return later is not None and _indent(later) <= indent and (opens or not indent)

    return ends


_ELSE = re.compile(r"\s*(else|elif|except|finally|catch|case|default)\b")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _starts_line(suffix: str) -> bool:
    """True where the suffix is no rest of the cursor's line, so that text before it must end with a newline."""
    return bool(suffix) and not suffix[0].isspace() and suffix[0] not in ")]}>,;:.\"'`"


def _repeats(lines: list[str], following: list[str]) -> bool:
    """The suffix begins again: a long line says enough, of a short one the next must agree."""
    again = [line.strip() for line in lines if line.strip()][:2]
    if not following or not lines[0].strip() or again[0] != following[0]:
        return False
    return len(again[0]) > 3 or len(again) < 2 or len(following) < 2 or again[1] == following[1]


def _without_overlap(text: str, here: str, suffix: str) -> str:
    """Drops the tail that the suffix's line repeats: words always, brackets and quotes where they are one too many."""
    rest = suffix.split("\n", 1)[0].rstrip()
    for size in range(min(len(rest), len(text)), 0, -1):
        tail = rest[:size]
        if text.endswith(tail) and tail.strip():
            words = re.search(r"\w", tail) and (size == len(rest) or size > 3)
            if words or _surplus(here + text + rest, tail):
                return text[:-size]
    return text


def _surplus(line: str, tail: str) -> bool:
    """True where `tail` has closing brackets and `line`, which holds it twice, closes more than it opens."""
    depth: dict[str, int] = {}
    for character in line:
        if character in CLOSERS:
            depth[character] = depth.get(character, 0) - 1
        for closer, opener in CLOSERS.items():
            if character == opener:
                depth[closer] = depth.get(closer, 0) + 1
    if any(character in CLOSERS for character in tail):
        return any(depth.get(character, 0) < 0 for character in tail if character in CLOSERS)
    return tail.strip() in (";", ",", ":", '"', "'", '"""') and line.rstrip().endswith(tail * 2)
