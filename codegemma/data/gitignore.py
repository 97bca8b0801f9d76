"""The files that git ignores, decided as git does.

The rules come from the file that core.excludesFile names, the repository's info/exclude (which its worktrees
share) and the `.gitignore` of each folder down to the file; the last rule that names a path counts. A
submodule, or another repository inside, has rules of its own. Whether a file is tracked makes no difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from codegemma.data.git import git_folders, git_settings


@dataclass(frozen=True)
class Rule:
    """A line of an ignore file, or the pattern of a line of .gitattributes."""

    pattern: re.Pattern[str]
    ignores: bool

    def names(self, path: str) -> bool:
        """Whether it names this very path; a folder ends with "/".

        pathspec's own check includes what is below a folder, but git's `!folder/` brings back the folder
        alone.
        """
        if not self.pattern.pattern.startswith(
            "^"
        ):  # pathspec does not anchor `*` and `**` (its regex is `.`), and `*/`
            return self.pattern.pattern == "." or path.endswith("/")
        if "ps_d" in self.pattern.groupindex:  # pathspec's group for the "/" after the name of a folder
            return bool(self.pattern.fullmatch(path))
        match = self.pattern.match(path)  # `folder/**` names what is below the folder, not the folder
        return match is not None and match.end() < len(path)


def parse_rules(lines: Sequence[str], ignore_case: bool = False) -> list[Rule]:
    """The rules of lines in .gitignore's form, without comments and empty lines."""
    from pathspec import GitIgnoreSpec

    flags = re.IGNORECASE if ignore_case else 0
    return [
        Rule(re.compile(each.regex.pattern, each.regex.flags | flags), each.include)
        for each in GitIgnoreSpec.from_lines(lines).patterns
        if each.regex is not None and each.include is not None
    ]


def read_rules(file: Path, ignore_case: bool = False) -> Sequence[Rule]:
    """The rules of an ignore file; none where it is missing."""
    try:
        return _read_rules(file, file.stat().st_mtime_ns, ignore_case)
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
        rules = read_rules(folder / ".gitignore", self.ignore_case)
        return IgnoreRules(
            folder, path, [*self.rules, (path, rules)] if rules else self.rules, self.ignore_case
        )


def repository_rules(root: Path) -> IgnoreRules:
    """The rules of a repository's root, or of a folder as if it were one."""
    settings, folders = git_settings(root), git_folders(root)
    files = [settings.ignore_file, *([folders.common_dir / "info" / "exclude"] if folders else [])]
    files.append(root / ".gitignore")
    rules = [("", read_rules(file, settings.ignore_case)) for file in files]
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
