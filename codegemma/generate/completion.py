"""Editor context -> a prompt within a budget -> a trimmed suggestion.

Users call `complete` with the text around the cursor and fold its Steps. The laws: the ids of a prompt are those of a
fresh encoding of the text it shows; what is nearest to the cursor is kept longest; window edges move in coarse steps,
so that typing finds everything but the last pieces in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from codegemma import prompts
from codegemma.config import Mode, Trim
from codegemma.generate.engine import Completion, Engine, Request, Step, Stop
from codegemma.generate.sampling import Sampling
from codegemma.native import Cancel
from codegemma.prompts import File, Layout, Parts
from codegemma.tokenizer import Tokenizer

WINDOWS = (
    16_384,
    8_192,
    4_096,
    2_048,
    1_024,
    512,
    256,
    128,
)  # tokens around the cursor that are tried, largest first
CLOSERS = {")": "(", "]": "[", "}": "{"}
QUOTES = ('"', "'", "`", '"""', "'''")


@dataclass(frozen=True)
class Hole:
    """What the editor knows: text before and after the cursor, this file's path, and other files."""

    prefix: str
    suffix: str = ""
    path: str | None = None
    context: Sequence[File] = ()


def layout_for(mode: Mode, fim_trained: bool, spm_trained: bool) -> Layout:
    """What `auto` means: PSM for checkpoints trained to fill in the middle, SPM where an adapter's card says that it
    was trained so, else a continuation of the prefix."""
    if mode != "auto":
        return mode
    return "prefix" if not fim_trained else "spm" if spm_trained else "psm"


def window(tokenizer: Tokenizer, parts: Parts, size: int) -> Parts:
    """Parts in about `size` tokens: three quarters for the prefix's end and one for the suffix's start, each lending
    the other what it does not need, then whole context files, the last first. Edges move in steps of an eighth, so
    that they stay put while one types."""
    step, prefix, suffix = max(16, size // 8), parts.prefix, parts.suffix
    if len(prefix) + len(suffix) > size:
        suffix_most = max(size // 4, size - len(prefix))
        prefix_most = max(size - min(len(suffix), suffix_most), 1)
        taken = -(-min(len(prefix), prefix_most) // step) * step
        prefix = prompts.tail(tokenizer, prefix, prefix_most, step)
        suffix = prompts.head(tokenizer, suffix, max(size - taken, 0))
    room, kept = size - len(prefix) - len(suffix), []
    for ids in reversed(parts.context):
        if len(ids) > room:
            break
        kept.append(ids)
        room -= len(ids)
    return replace(parts, prefix=prefix, suffix=suffix, context=tuple(reversed(kept)))


def prompt_within(
    engine: Engine,
    hole: Hole,
    layout: Layout,
    most: int,
    affordable: int | None = None,
    adapter: str | None = None,
) -> list[int]:
    """The largest prompt of at most `most` tokens, of which at most `affordable` are not in the cache (None: all)."""
    assert engine.tokenizer is not None
    suffix = hole.suffix if layout != "prefix" else ""
    parts = prompts.encode_parts(engine.tokenizer, hole.prefix, suffix, hole.path, hole.context)
    fixed = len(parts.path) + 4  # path line, <bos>, sentinels
    ids: list[int] = []
    total = len(parts.prefix) + len(parts.suffix) + sum(map(len, parts.context))
    sizes = [min(total, most - fixed), *(size for size in WINDOWS if size < min(total, most - fixed))]
    for size in sizes:
        ids = prompts.assemble(engine.tokenizer, window(engine.tokenizer, parts, max(size, 1)), layout).ids
        if affordable is None or len(ids) - engine.cached(ids, adapter) <= affordable:
            break
    return ids


def complete(
    engine: Engine,
    hole: Hole,
    layout: Layout = "psm",
    trim: Trim = "none",
    max_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    time_budget: float | None = None,
    cancel: Cancel | None = None,
    speculate: bool = True,
    top: int = 0,
    adapter: str | None = None,
) -> Completion:
    """Steps of the suggestion, trimmed. `time_budget` (seconds, until the first token) sizes the prompt by the speed
    that the engine has shown so far. Raises ValueError on bad input, at once."""
    if engine.tokenizer is None:
        raise ValueError(
            "this model came without a tokenizer, so text cannot be completed: pass ids to generate(), or "
            "add tokenizer.model to its directory"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if trim not in ("none", "line", "block"):
        raise ValueError(f'trim must be "none", "line" or "block", got {trim!r}')
    if time_budget is not None and not time_budget > 0:
        raise ValueError(f"the time budget must be above 0 seconds, got {time_budget}")
    most = engine.context - min(max_tokens, engine.context // 2)
    affordable = None if time_budget is None else max(16, int(time_budget * engine.prefill_rate))
    ids = prompt_within(engine, hole, layout, most, affordable, adapter)
    request = Request(
        ids, max_tokens, sampling, prompts.fim_stops(engine.tokenizer), stop, top, speculate, adapter
    )
    steps = engine.generate(request, cancel)
    if trim == "none" and layout != "prefix":
        return steps
    return Completion(trimmed(steps, hole.prefix, hole.suffix, trim), steps.running)


def trimmed(steps: Iterable[Step], prefix: str, suffix: str, trim: Trim) -> Iterator[Step]:
    """The same Steps, showing only what `cut` keeps. A line is shown once it is known to stay."""
    text, shown = "", 0
    for step in steps:
        text += step.text
        kept, done = cut(text, prefix, suffix, trim, final=step.stop is not None)
        stop: Stop | None = step.stop or ("end" if done else None)
        yield replace(step, text=kept[shown:], stop=stop)
        if stop is not None:
            if hasattr(steps, "close"):
                steps.close()
            return
        shown = len(kept)


def cut(text: str, prefix: str, suffix: str, trim: Trim, final: bool = True) -> tuple[str, bool]:
    """What of a suggestion is known to be kept, and whether nothing after it can be.

    Ends of lines are judged in order, once what follows says enough (all is there when `final`). "line" keeps the rest
    of the line; "block" ends where the cursor's block does. A line that repeats the suffix's first line, a tail that
    the suffix goes on with, and closing brackets that the suffix already has are dropped. A newline at the cut stays
    where the suffix starts a line of its own.
    """
    lines, count = _LINE.findall(text), text.count("\n")
    here, rest = prefix.rpartition("\n")[2], suffix.split("\n", 1)[0].rstrip()
    following = [line.strip() for line in suffix.split("\n") if line.strip()][:2]
    leaves = _block_end(here, lines[0]) if trim == "block" and count else None
    for at in range(count + 1):
        whole = "".join(lines[:at]).rstrip()
        kept = _without_overlap(whole, prefix, suffix)
        after = lines[at:] if final else lines[at:count]
        ends: bool | None = at > 0 and trim == "line" and bool((here + whole).strip())
        ends = ends or (
            at == 1 and bool(rest) and whole == kept + rest
        )  # the cursor's line has its end twice
        if not ends and (at or not here.strip()):
            ends = _repeats(after, following, final)
        if ends is False and at and leaves:
            ends = leaves(after, final)
        if ends is None or not (ends or final or at < count):
            return kept, False
        if ends:
            own_line = whole and whole == kept and _starts_line(here, rest, trim)
            return kept + "\n" * bool(own_line), True
    return _without_overlap(text, prefix, suffix), False


def _block_end(here: str, first: str) -> Callable[[list[str], bool], bool | None]:
    """Tells whether lines no longer belong to the cursor's block; None: not yet known. It is the block that the
    cursor's line (`here`, completed by `first`) opens, or the one that the line stands in."""
    indent = _indent(here + first)
    opens = bool(here.strip()) and (here + first).rstrip().endswith((":", "{", "(", "[", "=>", ","))

    def ends(lines: list[str], final: bool) -> bool | None:
        next_line = next((line for line in lines if line.strip()), None)
        if next_line is None:
            return False if final else None
        level = _indent(next_line)
        if next_line is not lines[0]:  # behind blank lines
            return level <= indent and (opens or not indent)
        return level < indent or (
            opens and level == indent and next_line.lstrip()[0] not in "})]" and not _ELSE.match(next_line)
        )

    return ends


_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_ELSE = re.compile(r"\s*(else|elif|except|finally|catch|case|default)\b")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _starts_line(here: str, rest: str, trim: Trim) -> bool:
    """True where `rest` is no rest of the cursor's line, so that text before it must end with a newline."""
    if not rest or not here.strip():
        return bool(rest)
    return trim != "line" and not rest[0].isspace() and rest[0] not in ")]}>,;:.\"'`"


def _repeats(lines: list[str], following: list[str], final: bool) -> bool | None:
    """The suffix begins again: a long line says enough, of a short one the next must agree. None: not yet known."""
    again = [line.strip() for line in lines if line.strip()][:2]
    if not following or not again:
        return False if following == [] or final else None
    if not lines[0].strip() or again[0] != following[0]:
        return False
    if len(again[0]) > 3 or len(following) < 2:
        return True
    if len(again) < 2:
        return True if final else None
    return again[1] == following[1]


def _without_overlap(text: str, prefix: str, suffix: str) -> str:
    """Drops the tail that the suffix's line repeats: words always, brackets and quotes where they are one too many."""
    rest = suffix.split("\n", 1)[0].rstrip()
    here = prefix.rpartition("\n")[2]
    for size in range(min(len(rest), len(text)), 0, -1):
        tail = rest[:size]
        if text.endswith(tail) and tail.strip():
            words = re.search(r"\w", tail) and (size == len(rest) or size > 3)
            if words or _surplus(tail, here + text + rest, prefix + text + suffix):
                return text[:-size]
    return text


def _surplus(tail: str, line: str, code: str) -> bool:
    """True where `line` and all of `code`, which hold `tail` twice, close more than they open: the line alone would not
    know of openers above it, and all of the code alone would be misled by a bracket in a comment."""
    closers = [(closer, CLOSERS[closer]) for closer in tail if closer in CLOSERS]
    if closers:
        return any(
            all(text.count(closer) > text.count(opener) for text in (line, code))
            for closer, opener in closers
        )
    mark = tail.strip()
    return mark in (";", ",", ":") or (mark in QUOTES and line.count(mark) % 2 == 1)
