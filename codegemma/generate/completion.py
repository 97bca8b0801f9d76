"""The answer to an Infill as an editor shows it: how much of it is kept, and how sure the model is of it.

An answer ends with the cursor's line or block and repeats nothing of the suffix. Lines are the same only if
their indentation is too. A closing line, such as "}", is dropped only where the suffix closes the same block:
the syntax tree decides where the language has a grammar, else indentation, with the brackets and words that
open a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from codegemma.config import Trim
from codegemma.data.documents import language_of
from codegemma.data.syntax import error_share, parse
from codegemma.generate.engine import Completion
from codegemma.generate.request import Infill, Request
from codegemma.generate.running import Step
from codegemma.prompts import Layout
from codegemma.safety.commands import is_destructive

OPENERS = {")": "(", "]": "[", "}": "{"}
BLOCK_OPENERS = (":", "{", "(", "[", "=>", ",")
QUOTES = ('"', "'", "`", '"""', "'''")
TAB = 4  # width in columns, for comparing lines with tabs to others
MAX_CODE = 50_000  # characters before and after the cursor in which open blocks are looked for
MAX_LINE = 200  # characters of a line in which words that open a block are looked for

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_LINE_START = re.compile(r"\n([^\S\n]*)")
_CONTINUES_BLOCK = re.compile(
    r"\s*(else|elif|elsif|elseif|except|finally|catch|rescue|ensure|case|when|default)\b", re.I
)

# Literals and comments, as far as these can be found without a grammar.
_LITERAL_START = re.compile(r"\"\"\"|\'\'\'|[\"'`]|/\*|(?<!\S)(?://|#)")
_LITERAL_ENDS = {'"""': '"""', "'''": "'''", "/*": "*/", "//": "\n", "#": "\n"}
_QUOTED = {
    '"': re.compile(r'[^"\\\n]*(?:\\.[^"\\\n]*)*'),
    "'": re.compile(r"[^'\\\n]*(?:\\.[^'\\\n]*)*"),
    "`": re.compile(r"[^`\\]*(?:\\.[^`\\]*)*", re.S),
}

# Words and tags that close and open blocks in the languages that have them, among them Ruby, Lua, shells,
# Elixir, Julia, SQL, Pascal, Fortran, Visual Basic, CMake, templates and HTML.
_CLOSING_LINE = re.compile(
    r"(?:\{%-?\s*)?(?:end(?:\s+\w+){0,2}|fi|done|esac|wend|endef|end[_-]?(?:if|for|foreach|while|do|case|switch"
    r"|select|function|macro|block|module|class|task|package|program|procedure|sub)(?:\s*\([^()]*\))?)"
    r"(?:\s*-?%\})?[;,.)\]}]*|</[\w.:-]*>[;,)]*",
    re.I,
)
_OPENS_AT_START = re.compile(
    r"\s*(?:\{%-?\s*)?(?:(?:local|private|public|protected|static|shared|async|export|create|or|replace|pure"
    r"|recursive|abstract|mutable|global|virtual|@\w+)\s+)*"
    r"(?:if|unless|while|until|for|foreach|case|switch|select|do|def\w*|class|module|function|macro|sub|procedure"
    r"|subroutine|begin|try|repeat|struct|let|quote|loop|block|program|package|interface|task|with|define)\b"
    r"|\s*<[a-z]",
    re.I,
)
_OPENS_AT_END = re.compile(
    r"(?:\b(?:do(?:\s*\|[^|]*\|)?|then|begin|try|repeat|record|function\s*\w*\([^()]*\)|fn\b[^>]*->)"
    r"|=\s*(?:if|unless|case|while)\b[^=]*)\s*\Z",
    re.I,
)
_CLOSES_AT_END = re.compile(r"(?:\b(?:end|fi|done|esac)\b[;,.)\]}]*|/>|</[\w.:-]*>)\s*\Z", re.I)


class Trimmer:
    """Trims the Steps of an answer one by one; only the answers to an Infill are changed.

    `layout` is the prompt's. After a "prefix" prompt, an answer is cut where it repeats the suffix even with
    trim "none", since the model has not seen the suffix.
    """

    def __init__(self, request: Request, layout: Layout | None) -> None:
        infill = request.prompt if isinstance(request.prompt, Infill) else None
        self.infill = infill.normalized() if infill else None
        self._newline = infill.newline if infill else "\n"
        self._cuts = infill is not None and (infill.trim != "none" or layout == "prefix")
        self._text = ""
        self._shown = 0  # how many characters were returned

    def push(self, step: Step) -> Step:
        """The step with the text that is now certain to be kept. Its `stop` is "end" if the rest is cut."""
        if self.infill is None:
            return step
        infill, final, done = self.infill, step.stop is not None, False
        self._text += step.text
        kept = _normalize(self._text, final)
        if self._cuts:
            kept, done = _cut(kept, infill, final)
        if infill.min_indent:
            kept, dedented = cut_dedented(kept, infill.min_indent, final or done)
            done = done or dedented
        text, self._shown = kept[self._shown :], len(kept)
        return replace(
            step, text=text.replace("\n", self._newline), stop=step.stop or ("end" if done else None)
        )


def trimmed(completion: Completion, request: Request, layout: Layout | None) -> Completion:
    """The answer with trimmed Steps. Generation stops as soon as all that follows would be cut."""
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


def is_worth_showing(text: str, confidence: float, infill: Infill, min_confidence: float) -> bool:
    """Whether to show a trimmed answer to somebody who did not ask for it.

    False where the model is less sure than `min_confidence` (see `Step.confidence`), where the answer repeats
    lines again and again, and where it is a shell command that deletes or overwrites.
    """
    if not text.strip() or confidence < min_confidence or is_loop(text):
        return False
    line = infill.prefix[infill.prefix.rfind("\n") + 1 :]  # the command may begin before the cursor
    return not is_destructive(line + text, language_of_infill(infill))


def is_loop(text: str) -> bool:
    """Whether the text ends with the same line, or the same two or three lines, three times in a row."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return any(
        len(lines) >= 3 * size and lines[-size:] == lines[-2 * size : -size] == lines[-3 * size : -2 * size]
        for size in (1, 2, 3)
    )


def cut_dedented(text: str, min_indent: int, final: bool) -> tuple[str, bool]:
    """The text before the first line that is indented by fewer than `min_indent` blanks, and whether there is
    such a line; the first line and blank lines do not count. Until the text is `final`, whitespace at its end
    is held back if such a line may follow."""
    held: int | None = None  # where the whitespace begins that may precede such a line
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

    `final`: the answer is complete. It ends with the cursor's line (trim "line") or block ("block"), or
    before a line that repeats the first line of the suffix. Where the answer ends with the characters that
    the rest of the cursor's line begins with, such as a closing bracket, they are dropped by the rules of
    `_drop_overlap`. A newline stays at the end if the suffix needs a line of its own. Lines end as the
    infill's do.
    """
    kept, done = _cut(_normalize(text, final), infill.normalized(), final)
    return kept.replace("\n", infill.newline), done


def chosen_trim(infill: Infill) -> Trim:
    """The infill's trim. "auto" means "line" where a word follows the cursor on its line, else "block"."""
    if infill.trim != "auto":
        return infill.trim
    return "line" if re.match(r"[^\n]*\w", infill.suffix) else "block"


def _normalize(text: str, final: bool) -> str:
    """The text with "\\n" as its line ends. Until it is `final`, a "\\r" at its end is held back."""
    return (text if final else text.removesuffix("\r")).replace("\r\n", "\n")


def _cut(text: str, infill: Infill, final: bool) -> tuple[str, bool]:
    """As `cut`, for an infill whose lines end in "\\n"."""
    cursor_line, rest = _cursor_line(infill)
    trim = chosen_trim(infill)
    lines, newlines = _LINE.findall(text), text.count("\n")
    suffix_lines = _suffix_lines(infill)
    first_line = cursor_line + lines[0] if newlines else ""
    block_indent = _columns(first_line)
    opens_block = bool(cursor_line.strip()) and first_line.rstrip().endswith(BLOCK_OPENERS)

    def ends_after(count: int, head: str, kept: str) -> bool | None:
        """Whether the answer ends after its first `count` lines; None: more of it is needed to tell.

        `head` is their text; `kept` is `head` without an end with which the rest of the cursor's line begins.
        """
        nonlocal opens_block, block_indent
        if trim == "line" and count and (cursor_line + head).strip():
            return True
        if count == 1 and rest and head == kept + rest:  # the answer repeats the rest of the cursor's line
            return True
        following = lines[count:] if final else lines[count:newlines]
        if count or not cursor_line.strip():
            if not count and following:
                following = [cursor_line + following[0], *following[1:]]
            repeats = _repeats_suffix(following, suffix_lines, head, infill, final)
            if repeats is not False:
                return repeats
        if trim != "block" or not count:
            return False
        leaves = _leaves_block(following, block_indent, opens_block, final)
        line = following[0].rstrip() if following else ""
        if (
            leaves
            and _Line(line.strip(), 0).closes
            and _is_needed(line, _columns(line), suffix_lines, head, infill)
        ):
            # The line that closes the block belongs to the answer. The indentation is set to at least 1, so
            # that a next line in column 0 is outside the block.
            opens_block, block_indent = False, max(_columns(line), 1)
            return False
        return leaves

    if _in_word(infill):  # only the rest of the word fits between its halves
        kept, ended = _drop_overlap(text.partition("\n")[0].rstrip(), infill), final or newlines > 0
        return (kept if ended and re.fullmatch(r"\w*", kept) else ""), ended
    for count in range(newlines + 1):
        head = "".join(lines[:count]).rstrip()
        kept = _drop_overlap(head, infill)
        ends = ends_after(count, head, kept)
        if ends:
            needs_newline = head and head == kept and _starts_line(cursor_line, rest, trim)
            return kept + ("\n" if needs_newline else ""), True
        if ends is None or (count == newlines and not final):
            return kept, False
    kept = _drop_overlap(text, infill)
    if trim != "none" and infill.suffix.startswith("\n"):  # which ends the answer's last line
        kept = kept.rstrip("\n")
    return kept, False


def _in_word(infill: Infill) -> bool:
    """Whether the cursor stands inside a word."""
    return bool(re.search(r"\w\Z", infill.prefix) and re.match(r"\w", infill.suffix))


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
    level = _columns(next_line)
    if next_line is not lines[0]:  # after blank lines
        return level <= indent and (opens_block or not indent)
    if not opens_block or level != indent:
        return level < indent
    return next_line.lstrip()[0] not in "})]" and not _CONTINUES_BLOCK.match(next_line)


def _starts_line(cursor_line: str, rest: str, trim: Trim) -> bool:
    """Whether `rest`, the suffix's first line, needs a line of its own after the answer."""
    if not rest or not cursor_line.strip():
        return bool(rest)
    return trim != "line" and not rest[0].isspace() and rest[0] not in ")]}>,;:.\"'`"


@dataclass(frozen=True)
class _Line:
    """A line to compare: its text without blanks around it, and its indentation in columns; None: unknown."""

    text: str
    indent: int | None

    @property
    def closes(self) -> bool:
        """Whether it does nothing but end a block."""
        return self.closes_by_word or bool(
            self.text and self.text[0] in OPENERS and not re.search(r"\w", self.text)
        )

    @property
    def closes_by_word(self) -> bool:
        """Whether it does nothing but end a block that a word or a tag opens."""
        return bool(_CLOSING_LINE.fullmatch(self.text))

    def repeats(self, other: _Line) -> bool:
        """Whether the texts are equal, and the indentations too if both are known."""
        return self.text == other.text and (
            None in (self.indent, other.indent) or self.indent == other.indent
        )


def _columns(line: str) -> int:
    blanks = line[: len(line) - len(line.lstrip(" \t"))]
    return len(blanks.expandtabs(TAB))


def _suffix_lines(infill: Infill) -> list[_Line]:
    """The suffix's lines that are not blank, beginning with the rest of the cursor's line.

    The indentation of that rest is known only where nothing but blanks precedes the cursor. It counts as
    unknown for a closing line after blanks too, since an editor may have moved it.
    """
    cursor_line = infill.prefix.rpartition("\n")[2]
    rest, *others = infill.suffix[:MAX_CODE].split("\n")
    first = _Line(rest.strip(), None if cursor_line.strip() else _columns(cursor_line + rest))
    if first.closes and cursor_line:
        first = replace(first, indent=None)
    return [line for line in (first, *(_Line(line.strip(), _columns(line)) for line in others)) if line.text]


def _repeats_suffix(
    lines: list[str], suffix_lines: list[_Line], head: str, infill: Infill, final: bool
) -> bool | None:
    """Whether `lines`, which follow `head` in the answer, begin as the suffix does. None: not yet known.

    They must begin with the same line, or with the same two if the first has at most 3 characters. A closing
    line is no repetition if the code needs both the answer's and the suffix's.
    """
    answer = [_Line(line.strip(), _columns(line)) for line in lines if line.strip()][:2]
    if not suffix_lines or not answer:
        return False if not suffix_lines or final else None
    first = suffix_lines[0]
    if not lines[0].strip() or not answer[0].repeats(first):
        return False
    if first.closes:
        needed = _is_needed(lines[0], answer[0].indent or 0, suffix_lines, head, infill)
        if needed or first.indent is not None:
            return not needed
    if len(first.text) > 3 or len(suffix_lines) < 2:
        return True
    if len(answer) < 2:
        return True if final else None
    return answer[1].repeats(suffix_lines[1])


def _is_needed(line: str, indent: int, suffix_lines: list[_Line], head: str, infill: Infill) -> bool:
    """Whether the code needs a closing line of the answer beside those that the suffix begins with.

    `line` is that closing line, `indent` its indentation in columns, and `head` the answer before it.
    """
    language = language_of_infill(infill)
    suffix = infill.suffix if infill.suffix.startswith("\n") else "\n" + infill.suffix
    errors_without = _errors(infill.prefix + head + suffix, language)
    errors_with = _errors(f"{infill.prefix}{head}\n{line.rstrip()}{suffix}", language)
    if errors_without is not None and errors_with is not None and errors_without != errors_with:
        return errors_with < errors_without
    before = infill.prefix[-MAX_CODE:] + head
    by_word = _Line(line.strip(), indent).closes_by_word
    opened = (_open_by_word if by_word else _open_by_bracket)(before)
    if suffix_lines and suffix_lines[0].closes and suffix_lines[0].indent is None:
        # Which block the suffix's first line closes is unknown, but not how many blocks the suffix closes.
        if indent not in opened or len(suffix) > MAX_CODE:
            return False
        if by_word:
            return len(opened) > 1 + _closed_by_word(suffix_lines[1:])
        return bool(_open_by_bracket(before + suffix))
    return opened.count(indent) > _closed_at(indent, suffix_lines, by_word)


def _closed_at(indent: int, lines: list[_Line], by_word: bool) -> int:
    """How many blocks indented by `indent` the suffix's lines close.

    The count ends at the first line that is indented less, or as much and does more than close a block. Such
    a line counts too if it first ends a block, as "} else {" does.
    """
    closed = 0
    for line in lines:
        if line.indent is None or line.indent > indent:
            continue
        continues = _CONTINUES_BLOCK.match(line.text) if by_word else line.text[0] in OPENERS
        closed += line.indent == indent and bool(line.closes or continues)
        if line.indent < indent or not line.closes:
            break
    return closed


def _closed_by_word(lines: list[_Line]) -> int:
    """How many blocks that begin before the suffix's lines are closed there."""
    closed, lowest = 0, 10**9
    for line in lines:
        if line.indent is not None and line.indent < lowest and not _CONTINUES_BLOCK.match(line.text):
            closed, lowest = closed + line.closes, line.indent
    return closed


def language_of_infill(infill: Infill) -> str:
    """The language that an infill names, or else that of its path; "" if neither tells."""
    return infill.language or _language(infill.path or "")


@cache
def _language(path: str) -> str:
    try:
        return language_of(path)
    except ImportError:  # without the extra "data" there are no grammars either
        return ""


@lru_cache(maxsize=32)  # each Step of an answer asks about the same texts again
def _errors(text: str, language: str) -> float | None:
    """The share of a text that its language's grammar cannot parse; None where there is no grammar."""
    try:
        tree = parse(text, language)
    except ImportError:
        return None
    return None if tree is None else error_share(tree)


@lru_cache(maxsize=32)
def _open_by_bracket(text: str) -> list[int]:
    """For each line that opens brackets which are not closed, its indentation in columns.

    Brackets in literals and comments do not count, as far as these can be found without a grammar.
    """
    opened: list[tuple[str, int]] = []
    lines = _without_literals(text).split("\n")
    for number, line in enumerate(lines):
        for letter in re.findall(r"[()\[\]{}]", line):
            if letter not in OPENERS:
                opened.append((letter, number))
            elif opened and opened[-1][0] == OPENERS[letter]:
                opened.pop()
    return [_columns(lines[number]) for number in sorted({number for _, number in opened})]


def _without_literals(text: str) -> str:
    """The text without literals and comments, but with all newlines.

    A literal or comment that does not end counts as code.

    No part of the text is read twice for the end of the same kind of literal.
    """
    pieces: list[str] = []
    copied = position = 0
    # For each mark: up to this offset, its end was searched in vain.
    searched_to = dict.fromkeys([*_LITERAL_ENDS, *_QUOTED], 0)
    while start := _LITERAL_START.search(text, position):
        mark, position = start[0], start.end()
        if start.start() >= searched_to[mark]:
            end = _literal_end(text, mark, position)
            if end > 0:
                pieces += text[copied : start.start()], "\n" * text.count("\n", position, end)
                copied = position = end
                continue
            searched_to[mark] = -end
        position = min(position, start.start() + 2)  # of three quotes, the third may begin a literal
    return "".join([*pieces, text[copied:]])


def _literal_end(text: str, mark: str, offset: int) -> int:
    """The end of the literal or comment whose opening `mark` stands directly before `offset`.

    If it has no end, the negative of the offset up to which the search went.
    """
    if mark in _QUOTED:
        match = _QUOTED[mark].match(text, offset)
        assert match  # the pattern matches any text
        return match.end() + 1 if text.startswith(mark, match.end()) else -match.end()
    end = text.find(_LITERAL_ENDS[mark], offset)
    if mark in ("//", "#"):  # the newline is not a part of it
        return end if end >= 0 else len(text)
    return end + len(mark) if end >= 0 else -len(text)


@lru_cache(maxsize=32)
def _open_by_word(text: str) -> list[int]:
    """For each block that a word or a tag opens and that is not closed, the indentation in columns.

    A block ends before the next line that is not indented deeper, unless this continues it, as "else" does.
    """
    opened: list[int] = []
    for line in text.split("\n"):
        code, indent, end = line.strip(), _columns(line), line[-MAX_LINE:]
        if not code or code.startswith(("#", "--", "//")):
            continue
        case = code.endswith(")") and "(" not in code  # of a shell
        continues = case or code in (">", "]", ")") or _CONTINUES_BLOCK.match(line)
        while opened and (opened[-1] > indent or opened[-1] == indent and not continues):
            opened.pop()
        opens = _OPENS_AT_START.match(line[:MAX_LINE]) or _OPENS_AT_END.search(end)
        closes = _CLOSING_LINE.fullmatch(code) or _CLOSES_AT_END.search(end)
        # A line such as "case" may continue a block and look like an opener: it counts once.
        if opens and not closes and opened[-1:] != [indent]:
            opened.append(indent)
    return opened


def _drop_overlap(text: str, infill: Infill) -> str:
    """The text without its longest end that is to be dropped. Only an end with which the rest of the cursor's
    line begins can be one.

    An end with words is dropped if it is the whole rest or has more than 3 characters; any other end only if
    it would be one too many where both the answer and the suffix kept it (`_closes_too_much`).
    """
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
    """Whether `overlap` is one too many in `line` and in all of `code`, which both have it twice.

    With brackets, both must close more than they open: the line alone misses brackets that were opened above
    it, and the code alone counts those in comments. A single ";", "," or ":" always is one too many, a quote
    where the line has an odd number of them.
    """
    closers = [closer for closer in overlap if closer in OPENERS]
    if not closers:
        mark = overlap.strip()
        return mark in (";", ",", ":") or (mark in QUOTES and line.count(mark) % 2 == 1)
    return any(
        all(text.count(closer) > text.count(OPENERS[closer]) for text in (line, code)) for closer in closers
    )
