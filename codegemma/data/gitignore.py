"""The files that git ignores, decided as git does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

Rules = tuple[str, Sequence[Any]]  # the folder that holds an ignore file ("" or "a/b/"), and the file's rules


def ignore_rules(file: Path) -> Sequence[Any]:
    """The rules of an ignore file; none where it is missing."""
    try:
        return _parse(file, file.stat().st_mtime_ns)
    except OSError:
        return ()


@lru_cache(1024)
def _parse(file: Path, changed: int) -> Sequence[Any]:
    """`changed`, the time of the file's last change, makes it be read again."""
    from pathspec import GitIgnoreSpec

    spec = GitIgnoreSpec.from_lines(file.read_text("utf-8", "replace").splitlines())
    return [rule for rule in spec.patterns if rule.include is not None]


def is_ignored(path: str, ignore_files: Iterable[Rules]) -> bool:
    """Whether the last rule that names a path ignores it. Paths are relative to the repository's root.

    A folder ends with "/"; what is inside an ignored folder is ignored, and not to be asked about.
    """
    verdict = False
    for folder, rules in ignore_files:
        matching = (rule.include for rule in reversed(rules) if _names_path(rule, path.removeprefix(folder)))
        verdict = next(matching, verdict)
    return verdict


def _names_path(rule: Any, path: str) -> bool:
    """Whether an ignore rule names this very path.

    pathspec's own check includes what is below a folder, but git's `!folder/` brings back the folder alone.
    """
    if not rule.regex.pattern.startswith("^"):  # all, or all folders
        return rule.regex.pattern == "." or path.endswith("/")
    if "ps_d" in rule.regex.groupindex:
        return bool(rule.regex.fullmatch(path))
    match = rule.regex.match(path)  # folder/**
    return bool(match) and match.end() < len(path)
