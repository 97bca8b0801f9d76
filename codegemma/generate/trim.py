"""Trims an Infill's answer: it ends with the line or block and does not repeat the suffix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from codegemma.config import Trim
from codegemma.generate.engine import Completion
from codegemma.generate.request import Infill, Request
from codegemma.generate.running import Step
from codegemma.prompts import Layout

OPENERS = {")": "(", "]": "[", "}": "{"}
BLOCK_OPENERS = (":", "{", "(", "[", "=>", ",")
QUOTES = ('"', "'", "`", '"""', "'''")

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_LINE_START = re.compile(r"\n([^\S\n]*)")
_CONTINUES_BLOCK = re.compile(r"\s*(else|elif|except|finally|catch|case|default)\b")


class Trimmer:
    """Trims the Steps of an answer one by one; only the answers to an Infill are changed.

    `layout` is that of the prompt: after a "prefix" prompt, the model does not know where the suffix starts.
    """

    def __init__(self, request: Request, layout: Layout | None) -> None:
        infill = request.prompt if isinstance(request.prompt, Infill) else None
        self._cuts = infill is not None and (infill.trim != "none" or layout == "prefix")
        self.infill = infill if self._cuts or (infill and infill.min_indent) else None  # None: no trimming
        self._text = ""
        self._shown = 0  # how many characters were returned

    def push(self, step: Step) -> Step:
        """The step with the text that is now certain to be kept; `stop` is "end" where the rest is cut."""
        if self.infill is None:
            return step
        infill, final, done = self.infill, step.stop is not None, False
        self._text += step.text
        kept = self._text
        if self._cuts:
            kept, done = cut(kept, infill, final)
        if infill.min_indent:
            kept, dedented = cut_dedented(kept, infill.min_indent, final or done)
            done = done or dedented
        text, self._shown = kept[self._shown :], len(kept)
        return replace(step, text=text, stop=step.stop or ("end" if done else None))


def trimmed(completion: Completion, request: Request, layout: Layout | None) -> Completion:
    """The trimmed Steps of an answer. Generation stops at the step whose rest is cut."""
    trimmer = Trimmer(request, layout)
    if trimmer.infill is None:
        return completion

    def steps() -> Iterator[Step]:
        with closing(completion):
            for step in completion:
                step = trimmer.push(step)
                yield step
                if step.stop is not None:
                    return

    return Completion(steps(), completion.running)


def cut_dedented(text: str, min_indent: int, final: bool) -> tuple[str, bool]:
    """The text before the first line that is indented by fewer than `min_indent` blanks, and whether there is
    one; line 1 and blank lines do not count. Until `final`, whitespace that may precede one is held back."""
    held: int | None = None  # where the less indented and blank lines before this one begin
    for start in _LINE_START.finditer(text):
        if len(start[1]) >= min_indent:
            held = None
            continue
        held = start.start() if held is None else held
        following = text[start.end() : start.end() + 1]
        if following not in ("", "\n"):
            return text[:held], True
    return (text, False) if held is None or final else (text[:held], False)


def cut(text: str, infill: Infill, final: bool = True) -> tuple[str, bool]:
    """The part of an answer that is certain to be kept, and whether the answer ends after it.

    `final`: the answer is complete. An answer ends with the cursor's line (trim "line") or block ("block"),
    or before a line that repeats the suffix's first. If its end repeats the rest of the cursor's line, or
    closes a bracket that the suffix closes, that is dropped. It keeps a last newline if the suffix needs it.
    """
    cursor_line, rest = _cursor_line(infill)
    lines, newlines = _LINE.findall(text), text.count("\n")
    suffix_lines = [line.strip() for line in infill.suffix.split("\n") if line.strip()][:2]
    first_line = cursor_line + lines[0] if newlines else ""
    block_indent = _indent(first_line)
    opens_block = bool(cursor_line.strip()) and first_line.rstrip().endswith(BLOCK_OPENERS)

    def ends_after(count: int, head: str, kept: str) -> bool | None:
        """Whether the answer ends after `count` lines; None: more of the answer is needed to tell."""
        if infill.trim == "line" and count and (cursor_line + head).strip():
            return True
        if count == 1 and rest and head == kept + rest:  # the answer repeats the rest of the cursor's line
            return True
        following = lines[count:] if final else lines[count:newlines]
        if count or not cursor_line.strip():
            repeats = _repeats_suffix(following, suffix_lines, final)
            if repeats is not False:
                return repeats
        leaves = infill.trim == "block" and count
        return _leaves_block(following, block_indent, opens_block, final) if leaves else False

    for count in range(newlines + 1):
        head = "".join(lines[:count]).rstrip()
        kept = _drop_overlap(head, infill)
        ends = ends_after(count, head, kept)
        if ends:
            needs_newline = head and head == kept and _starts_line(cursor_line, rest, infill.trim)
            return kept + ("\n" if needs_newline else ""), True
        if ends is None or (count == newlines and not final):
            return kept, False
    return _drop_overlap(text, infill), False


def _cursor_line(infill: Infill) -> tuple[str, str]:
    """The cursor's line before and after the cursor."""
    return infill.prefix.rpartition("\n")[2], infill.suffix.split("\n", 1)[0].rstrip()


def _leaves_block(lines: list[str], indent: int, opens_block: bool, final: bool) -> bool | None:
    """Whether the next of `lines` is outside the cursor's block; None: not yet known.

    The cursor's line, indented by `indent`, stands in the block or, with `opens_block`, opens it.
    """
    next_line = next((line for line in lines if line.strip()), None)
    if next_line is None:
        return False if final else None
    level = _indent(next_line)
    if next_line is not lines[0]:  # after blank lines
        return level <= indent and (opens_block or not indent)
    if not opens_block or level != indent:
        return level < indent
    return next_line.lstrip()[0] not in "})]" and not _CONTINUES_BLOCK.match(next_line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _starts_line(cursor_line: str, rest: str, trim: Trim) -> bool:
    """Whether `rest`, the suffix's first line, does not continue the cursor's line but needs its own."""
    if not rest or not cursor_line.strip():
        return bool(rest)
    return trim != "line" and not rest[0].isspace() and rest[0] not in ")]}>,;:.\"'`"


def _repeats_suffix(lines: list[str], suffix_lines: list[str], final: bool) -> bool | None:
    """Whether `lines` begin as the suffix does: with the same line, or with the same two lines if the first
    has at most 3 characters. None: not yet known."""
    answer = [line.strip() for line in lines if line.strip()][:2]
    if not suffix_lines or not answer:
        return False if not suffix_lines or final else None
    if not lines[0].strip() or answer[0] != suffix_lines[0]:
        return False
    if len(answer[0]) > 3 or len(suffix_lines) < 2:
        return True
    if len(answer) < 2:
        return True if final else None
    return answer[1] == suffix_lines[1]


def _drop_overlap(text: str, infill: Infill) -> str:
    """Drops the longest end that the rest of the cursor's line repeats: one with words always, punctuation
    only where it closes too much."""
    cursor_line, rest = _cursor_line(infill)
    for size in range(min(len(rest), len(text)), 0, -1):
        overlap = rest[:size]
        if text.endswith(overlap) and overlap.strip():
            has_words = re.search(r"\w", overlap) and (size == len(rest) or size > 3)
            code = infill.prefix, text, infill.suffix
            if has_words or _closes_too_much(overlap, cursor_line + text + rest, "".join(code)):
                return text[:-size]
    return text


def _closes_too_much(overlap: str, line: str, code: str) -> bool:
    """Whether both `line` and all of `code`, which have `overlap` twice, close more than they open. The line
    alone misses the brackets that opened above it; the code alone counts those in comments."""
    closers = [closer for closer in overlap if closer in OPENERS]
    if not closers:
        mark = overlap.strip()
        return mark in (";", ",", ":") or (mark in QUOTES and line.count(mark) % 2 == 1)
    return any(
        all(text.count(closer) > text.count(OPENERS[closer]) for text in (line, code)) for closer in closers
    )
