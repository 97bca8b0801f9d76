"""What is kept of an Infill's answer: up to the end of the line or block, without what the suffix has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

from codegemma.config import Trim
from codegemma.generate.engine import Completion
from codegemma.generate.request import Infill, Request
from codegemma.generate.running import Step
from codegemma.prompts import Layout

OPENERS = {")": "(", "]": "[", "}": "{"}
QUOTES = ('"', "'", "`", '"""', "'''")

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_LINE_START = re.compile(r"\n([^\S\n]*)")
_CONTINUES_BLOCK = re.compile(r"\s*(else|elif|except|finally|catch|case|default)\b")


class Trimmer:
    """Turns the Steps of an answer into those that a user sees, one by one; other answers than Infills pass
    unchanged.

    `layout` is the one of the request's prompt: an answer to a "prefix" prompt may run on into the suffix.
    """

    def __init__(self, request: Request, layout: Layout | None) -> None:
        infill = request.prompt if isinstance(request.prompt, Infill) else None
        cuts = infill is not None and (infill.trim != "none" or layout == "prefix")
        self.infill = infill if cuts or (infill and infill.min_indent) else None
        self._cuts = cuts
        self._text = ""
        self._shown = 0  # characters of the kept text

    def push(self, step: Step) -> Step:
        """The step with the text that is now known to be kept; `stop` is "end" where nothing more can be."""
        if self.infill is None:
            return step
        infill, final, done = self.infill, step.stop is not None, False
        self._text += step.text
        kept = self._text
        if self._cuts:
            kept, done = cut(kept, infill.prefix, infill.suffix, infill.trim, final)
        if infill.min_indent:
            kept, dedented = cut_dedented(kept, infill.min_indent, final or done)
            done = done or dedented
        text, self._shown = kept[self._shown :], len(kept)
        return replace(step, text=text, stop=step.stop or ("end" if done else None))


def trimmed(completion: Completion, request: Request, layout: Layout | None) -> Completion:
    """The Steps of a request's answer as a user sees them; the work stops where the rest is trimmed away."""
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
    """`text` before its first line, other than blank lines and line 1, with fewer than `min_indent` blanks in
    front.

    Also says whether there is such a line. Until `final`, whitespace that may stand before one is left out.
    """
    held: int | None = None  # where the short and blank lines before this one begin
    for start in _LINE_START.finditer(text):
        if len(start[1]) >= min_indent:
            held = None
            continue
        held = start.start() if held is None else held
        following = text[start.end() : start.end() + 1]
        if following not in ("", "\n"):
            return text[:held], True
    return (text, False) if held is None or final else (text[:held], False)


def cut(text: str, prefix: str, suffix: str, trim: Trim, final: bool = True) -> tuple[str, bool]:
    """How much of an answer is known to be kept, and whether nothing after it can be; `final`: the answer is
    complete.

    "line" keeps the rest of the cursor's line; "block" ends where the cursor's block does. A line that
    repeats the suffix's first line ends it, and what the suffix continues with is dropped from the end, as
    are closing brackets that the suffix already has. A newline stays at the end where the suffix starts a
    line of its own.
    """
    lines, newlines = _LINE.findall(text), text.count("\n")
    cursor_line, rest = prefix.rpartition("\n")[2], suffix.split("\n", 1)[0].rstrip()
    suffix_lines = [line.strip() for line in suffix.split("\n") if line.strip()][:2]
    leaves_block = _block_end(cursor_line, lines[0]) if trim == "block" and newlines else None
    for count in range(newlines + 1):  # does it end after so many lines?
        head = "".join(lines[:count]).rstrip()
        kept = _drop_overlap(head, prefix, suffix)
        after = lines[count:] if final else lines[count:newlines]
        ends: bool | None = count > 0 and trim == "line" and bool((cursor_line + head).strip())
        if count == 1 and rest and head == kept + rest:  # the end of the cursor's line stands there twice
            ends = True
        if not ends and (count or not cursor_line.strip()):
            ends = _repeats_suffix(after, suffix_lines, final)
        if ends is False and count and leaves_block:
            ends = leaves_block(after, final)
        if ends is None or not (ends or final or count < newlines):
            return kept, False
        if ends:
            own_line = head and head == kept and _starts_own_line(cursor_line, rest, trim)
            return kept + ("\n" if own_line else ""), True
    return _drop_overlap(text, prefix, suffix), False


def _block_end(cursor_line: str, first: str) -> Callable[[list[str], bool], bool | None]:
    """A function that says whether lines are outside of the cursor's block; None: not yet known. The block is
    the one that the cursor's line, completed by `first`, opens, or else the one that the line stands in."""
    indent = _indent(cursor_line + first)
    opens = bool(cursor_line.strip()) and (cursor_line + first).rstrip().endswith(
        (":", "{", "(", "[", "=>", ",")
    )

    def ends(lines: list[str], final: bool) -> bool | None:
        next_line = next((line for line in lines if line.strip()), None)
        if next_line is None:
            return False if final else None
        level = _indent(next_line)
        if next_line is not lines[0]:  # after blank lines
            return level <= indent and (opens or not indent)
        if not opens or level != indent:
            return level < indent
        return next_line.lstrip()[0] not in "})]" and not _CONTINUES_BLOCK.match(next_line)

    return ends


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _starts_own_line(cursor_line: str, rest: str, trim: Trim) -> bool:
    """Whether `rest` does not belong to the cursor's line, so that text before it must end with a newline."""
    if not rest or not cursor_line.strip():
        return bool(rest)
    return trim != "line" and not rest[0].isspace() and rest[0] not in ")]}>,;:.\"'`"


def _repeats_suffix(lines: list[str], suffix_lines: list[str], final: bool) -> bool | None:
    """Whether the suffix's first lines begin here: of a line of up to 3 characters, the next must agree too.
    None: not yet known."""
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


def _drop_overlap(text: str, prefix: str, suffix: str) -> str:
    """Drops the end that the suffix's line repeats: words always, brackets where there is one too many."""
    rest = suffix.split("\n", 1)[0].rstrip()
    cursor_line = prefix.rpartition("\n")[2]
    for size in range(min(len(rest), len(text)), 0, -1):
        tail = rest[:size]
        if text.endswith(tail) and tail.strip():
            has_words = re.search(r"\w", tail) and (size == len(rest) or size > 3)
            if has_words or _closes_too_much(tail, cursor_line + text + rest, prefix + text + suffix):
                return text[:-size]
    return text


def _closes_too_much(tail: str, line: str, code: str) -> bool:
    """Whether both `line` and all of `code`, which hold `tail` twice, close more than they open. The line
    alone does not show openers above it; all of the code alone would be misled by a bracket in a comment."""
    closers = [closer for closer in tail if closer in OPENERS]
    if not closers:
        mark = tail.strip()
        return mark in (";", ",", ":") or (mark in QUOTES and line.count(mark) % 2 == 1)
    return any(
        all(text.count(closer) > text.count(OPENERS[closer]) for text in (line, code)) for closer in closers
    )
