"""The files that .gitattributes declare generated or vendored, as GitHub's linguist reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from codegemma.data.gitignore import Rule, file_lines, parse_rules

ATTRIBUTES_FILE = ".gitattributes"
REASONS = {"linguist-generated": "generated", "linguist-vendored": "vendored"}
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')


@dataclass(frozen=True)
class AttributeLine:
    """A line of an attributes file: what it says of the paths that it names, relative to `folder`."""

    folder: str  # "" or "a/b/"
    rule: Rule
    values: Mapping[str, bool | None]  # None: as if nothing were said


def attribute_lines(folder: str, data: bytes) -> list[AttributeLine]:
    """The lines of an attributes file in `folder` that speak of generated or vendored files."""
    lines, macros = [], dict[str, Sequence[str]]()
    for line in file_lines(data):
        quoted = QUOTED.match(line.strip())
        pattern, rest = quoted.groups() if quoted else (line.split(None, 1) + ["", ""])[:2]
        words = [word for each in rest.split() for word in (each, *macros.get(each, ()))]
        if pattern.startswith("[attr]"):
            macros[pattern.removeprefix("[attr]")] = words
        values = dict(filter(None, map(_value, words)))
        if values and not pattern.startswith(("#", "!", "[attr]")):
            pattern = re.sub(r"\\(.)", r"\1", pattern) if quoted else pattern
            lines += [AttributeLine(folder, rule, values) for rule in parse_rules([pattern])]
    return lines


def _value(word: str) -> tuple[str, bool | None] | None:
    """`name`, `-name`, `!name` or `name=value`; None for attributes of other programs."""
    name, _, value = word.lstrip("-!").partition("=")
    if name not in REASONS:
        return None
    return name, None if word.startswith("!") else not word.startswith("-") and value != "false"


def declared_reason(path: str, lines: Iterable[AttributeLine]) -> str:
    """Why a file is not its repository's own code: "generated", "vendored" or "". The last line counts."""
    values: dict[str, bool | None] = {}
    for line in lines:
        if path.startswith(line.folder) and line.rule.names(path.removeprefix(line.folder)):
            values |= line.values
    return next((reason for name, reason in REASONS.items() if values.get(name)), "")
