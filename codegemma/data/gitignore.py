"""The files that git ignores, decided as git does.

The rules come from the file that core.excludesFile names, the repository's info/exclude (which its worktrees
share) and the `.gitignore` of each folder down to the file; the last rule that names a path counts. A
submodule, or another repository inside, has rules of its own. Whether a file is tracked makes no difference.
"""

from __future__ import annotations

import os
import re
import stat
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from codegemma.data.git import git_folders, git_settings

SLASH, BACKSLASH = b"/"[0], b"\\"[0]
WILDCARD = re.compile(rb"[*?\[\\]")
LITERAL_END = re.compile(rb"[^*?\[\]\\/]*\Z")
# `**` crosses folders where it is a whole part of the path: at a part's start, and before "/" or the end.
STARS = re.compile(rb"\*+")
WHOLE_PART = re.compile(rb"(?:\A|(?<=/))\*\*+(?=\Z|\\?/)")
# What stands in `[...]`: a named class, a character, or a range of them.
ITEM = re.compile(rb"\[:(?P<name>[^\]]*):\]|(?P<first>\\.|[^\\])(?:-(?P<last>\\.|[^\]\\]))?", re.S)
NAMED_CLASSES = {
    **{"alpha": string.ascii_letters, "digit": string.digits, "alnum": string.ascii_letters + string.digits},
    **{"lower": string.ascii_lowercase, "upper": string.ascii_uppercase, "xdigit": string.hexdigits},
    **{"punct": string.punctuation, "space": " \t\n\r", "blank": " \t"},
    **{"print": "".join(map(chr, range(32, 127))), "graph": "".join(map(chr, range(33, 127)))},
    "cntrl": "".join(map(chr, (*range(32), 127))),
}


class Glob:
    """What git's `?`, `*`, `**`, `[...]` and `\\` match, on bytes.

    All ways to match are followed at once, so no pattern is slow: bit i of `states` says that the first i
    steps of the pattern match the text so far, and a step takes one byte.

    Raises ValueError for a pattern that can match nothing: one with an open `[` or a lone `\\` at its end.
    """

    def __init__(self, pattern: bytes, ignore_case: bool) -> None:
        self.steps = [0] * 256  # for each byte: the states whose next step takes it
        self.stars = 0  # the states at a star: they stay on a byte other than "/"
        self.double_stars = 0  # those of them at a "**" that is a whole part: they stay on "/" too
        self.optional = 0  # the states whose step, that of `**/`, can be left out
        index = size = 0
        while index < len(pattern):
            state = 1 << size
            if stars := STARS.match(pattern, index):
                index, is_whole = stars.end(), WHOLE_PART.match(pattern, index)
                if is_whole and pattern[index : index + 1] == b"/":
                    index += 1
                    if self.optional & state >> 1:  # `**/**/` is `**/`
                        continue
                    self.optional |= state
                    self.steps[SLASH] |= state
                    size += 1
                self.stars |= state
                self.double_stars |= state if is_whole else 0
                continue
            choices, index = _step(pattern, index, ignore_case)
            for byte in choices:
                self.steps[byte] |= state
            size += 1
        self.end = 1 << size

    def matches(self, text: bytes) -> bool:
        """Whether it matches the whole text."""
        states = 1 | (self.optional & 1) << 1
        for byte in text:
            moved = (states & self.steps[byte]) << 1
            stayed = states & (self.double_stars if byte == SLASH else self.stars)
            states = moved | (moved & self.optional) << 1 | stayed
            if not states:
                return False
        return bool(states & self.end)


def _step(pattern: bytes, index: int, ignore_case: bool) -> tuple[Iterable[int], int]:
    """The bytes that a step of a pattern takes, and where the next step begins."""
    byte = pattern[index]
    if byte == b"["[0]:
        return _byte_set(pattern, index + 1, ignore_case)
    if byte == b"?"[0]:
        return set(range(256)) - {SLASH}, index + 1
    if byte != BACKSLASH:
        return pattern[index : index + 1].lower() if ignore_case else (byte,), index + 1
    if index + 1 == len(pattern):
        raise ValueError("pattern ends in a lone backslash")
    return (pattern[index + 1],), index + 2


def _byte_set(pattern: bytes, index: int, ignore_case: bool) -> tuple[set[int], int]:
    r"""The bytes that `[...]` takes, and where the next step begins. `index` is after the `[`.

    With `ignore_case` the text is in lower case, and so are ranges and named classes, but, as in git, neither
    a single character of the set nor one after a `\`.
    """
    is_negated = pattern[index : index + 1] in (b"!", b"^")
    index = start = index + is_negated
    chosen: set[int] = set()
    while index == start or pattern[index : index + 1] != b"]":  # `]` at the start stands for itself
        item = ITEM.match(pattern, index)
        name = item["name"].decode("latin-1") if item and item["name"] is not None else None
        if item is None or name is not None and name not in NAMED_CLASSES:
            raise ValueError("pattern with an open `[` or an unknown class")
        group = NAMED_CLASSES[name].encode() if name is not None else b""
        if item["first"]:
            chosen.add(item["first"][-1])  # in a range from high to low, such as `[z-a]`, too
        if item["last"]:
            group = bytes(range(item["first"][-1], item["last"][-1] + 1))
        chosen.update(group, group.lower() if ignore_case else b"")
        index = item.end()
    return ((set(range(256)) - chosen) if is_negated else chosen) - {SLASH}, index + 1


@dataclass(frozen=True)
class Rule:
    """A line of an ignore file, or the pattern of a line of .gitattributes.

    `start` is the text before the first wildcard, and `rest` matches what follows. `end` is the text with
    which any match must end: a quick test before `rest` is tried.
    """

    start: bytes
    rest: Glob
    end: bytes
    ignores: bool
    folders_only: bool
    by_name: bool  # without a "/" it looks at the last part of a path alone
    ignore_case: bool

    def names(self, path: str) -> bool:
        """Whether it names this very path, and not only a folder around it; a folder ends with "/"."""
        if self.folders_only and not path.endswith("/"):
            return False
        text = _bytes(path.removesuffix("/"))
        text = text.rpartition(b"/")[2] if self.by_name else text
        text = text.lower() if self.ignore_case else text
        is_likely = text.startswith(self.start) and text.endswith(self.end)
        return is_likely and self.rest.matches(text[len(self.start) :])


def _bytes(text: str) -> bytes:
    """The bytes of a file's name or line as decoded by `os.fsdecode`."""
    return text.encode("utf-8", "surrogateescape")


def parse_rules(lines: Sequence[str], ignore_case: bool = False) -> list[Rule]:
    """The rules that lines in .gitignore's form state; comments, and lines that match nothing, give none."""
    rules = (_rule(_bytes(line), ignore_case) for line in lines if not line.startswith("#"))
    return [rule for rule in rules if rule]


def _rule(line: bytes, ignore_case: bool) -> Rule | None:
    line = line.partition(b"\0")[0]  # git reads no further
    pattern = line.rstrip(b" ")
    if (len(pattern) - len(pattern.rstrip(b"\\"))) % 2 and pattern != line:
        pattern += b" "  # the first of the spaces at the end is escaped
    ignores, folders_only = not pattern.startswith(b"!"), pattern.endswith(b"/")
    pattern = pattern.removeprefix(b"!").removesuffix(b"/")
    by_name = b"/" not in pattern
    pattern = pattern.removeprefix(b"/")
    wildcard = WILDCARD.search(pattern)
    start, rest = (pattern[: wildcard.start()], pattern[wildcard.start() :]) if wildcard else (pattern, b"")
    try:
        glob = Glob(rest, ignore_case)
    except ValueError:
        return None
    end = LITERAL_END.search(rest)
    texts = [start, end[0] if end else b""]
    start, tail = [text.lower() for text in texts] if ignore_case else texts
    return Rule(start, glob, tail, ignores, folders_only, by_name, ignore_case) if pattern else None


def read_rules(file: Path, ignore_case: bool = False, follow_symlinks: bool = True) -> Sequence[Rule]:
    """The rules of an ignore file; none where it is missing, or no regular file."""
    try:
        status = file.stat(follow_symlinks=follow_symlinks)
        return _read_rules(file, status.st_mtime_ns, ignore_case) if stat.S_ISREG(status.st_mode) else ()
    except OSError:
        return ()


@lru_cache(1024)
def _read_rules(file: Path, changed: int, ignore_case: bool) -> Sequence[Rule]:
    """`changed`, the time of the file's last change, is only a part of the cache's key."""
    return parse_rules(file_lines(file.read_bytes()), ignore_case)


def file_lines(data: bytes) -> list[str]:
    """The lines of a .gitignore, .gitattributes or similar file, decoded as the names of files are."""
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    return [line.removesuffix("\r") for line in text.split("\n")]


@dataclass(frozen=True)
class IgnoreRules:
    """The rules that hold in a folder: those of the repository, and of each folder down to it.

    `path` is the folder within its repository, "" or "a/b/". Rules stand with the folder that they are
    relative to.
    """

    folder: Path
    path: str
    rules: Sequence[tuple[str, Sequence[Rule]]]
    ignore_case: bool

    def ignores(self, name: str) -> bool:
        """Whether an item of the folder is ignored; a folder ends with "/".

        Do not ask about items of an ignored folder: they are ignored too.
        """
        verdict = False
        for above, rules in self.rules:
            path = (self.path + name).removeprefix(above)
            verdict = next((rule.ignores for rule in reversed(rules) if rule.names(path)), verdict)
        return verdict

    def inside(self, name: str) -> IgnoreRules:
        """The rules of a folder in this one."""
        folder, path = self.folder / name, f"{self.path}{name}/"
        if (folder / ".git").exists():
            return repository_rules(folder)
        rules = read_rules(folder / ".gitignore", self.ignore_case, follow_symlinks=False)
        return IgnoreRules(
            folder, path, [*self.rules, (path, rules)] if rules else self.rules, self.ignore_case
        )


def repository_rules(root: Path) -> IgnoreRules:
    """The rules of a repository's root, or of a folder as if it were one."""
    settings, folders = git_settings(root), git_folders(root)
    files = [settings.ignore_file, *([folders.common_dir / "info" / "exclude"] if folders else [])]
    rules = [("", read_rules(file, settings.ignore_case)) for file in files]
    rules.append(("", read_rules(root / ".gitignore", settings.ignore_case, follow_symlinks=False)))
    return IgnoreRules(root, "", rules, settings.ignore_case)


def folder_rules(folder: Path) -> IgnoreRules:
    """The rules of a folder, with those of the repository around it, if any.

    That the folder itself is ignored does not count: who names it wants it read.
    """
    root = next((each for each in (folder, *folder.parents) if (each / ".git").exists()), folder)
    rules = repository_rules(root)
    for name in folder.relative_to(root).parts:
        rules = rules.inside(name)
    return rules


def is_ignored(root: Path, path: Path) -> bool:
    """Whether git ignores a file of the repository at `root`, or a folder that it is in."""
    rules = repository_rules(root)
    *folders, name = path.relative_to(root).parts
    for folder in folders:
        if rules.ignores(f"{folder}/"):
            return True
        rules = rules.inside(folder)
    return rules.ignores(name)
