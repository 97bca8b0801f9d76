"""The licence of a file, from its SPDX tag, a manifest or a licence text; and whether it is permitted."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from codegemma.data.documents import RULES

TAG = re.compile(
    r"^\W*(?:copyright\b[^\n]*?\W)?SPDX-License-Identifier:\s*([A-Za-z0-9.+() -]+?)"
    r"\s*(?:\*/|-->|\*\)|-\}|\]\]|$)",
    re.M | re.I,
)
# A file's header: comments and blank lines before the first line of code.
LINE_COMMENT = re.compile(
    r"\s*(?:#|//|--(?!\[\[)|;|%|'(?!')|!|\.\.|\\|rem\b|@?echo off|dnl\b|<\?(?:php|xml)\b|<!doctype"
    r"|['\"]use strict|$)",
    re.I,
)
BLOCK_COMMENT = re.compile(r"\s*(/\*|<!--|\(\*|\{-|--\[\[|<#|=begin|=pod|#=(?!=))", re.I)
BLOCK_ENDS = {"/*": "*/", "<!--": "-->", "(*": "*)", "{-": "-}", "--[[": "]]", "<#": "#>", "#=": "=#"}
MANIFESTS = {
    "pyproject.toml": r'^license\s*=\s*(?:\{\s*text\s*=\s*)?["\']([^"\']+)["\']',
    "setup.cfg": r"^license\s*=\s*(.+)$",
    "package.json": r'"license"\s*:\s*"([^"]+)"',
    "Cargo.toml": r'^license\s*=\s*"([^"]+)"',
    "METADATA": r"^License-Expression:\s*(.+)$",
    "PKG-INFO": r"^License-Expression:\s*(.+)$",
    "pom.xml": r"<license>\s*<name>([^<]+)</name>",
}
OLD_FIELDS = {"METADATA": r"^License:\s*(\S.*)$", "PKG-INFO": r"^License:\s*(\S.*)$"}
LICENCE_FILES = re.compile(r"^(un)?licen[sc]e|^copying|-licen[sc]e", re.I)
# Where a folder's licence is stated; the lowest number wins.
BY_MANIFEST, BY_TEXT, BY_OLD_FIELD = 1, 2, 3


@cache
def rules() -> dict[str, Any]:
    """The contents of rules/licences.toml."""
    return tomllib.loads((RULES / "licences.toml").read_text("utf-8"))


def is_statement(path: str) -> bool:
    """Whether a file, by its name, may state the licence of other files."""
    name = PurePosixPath(path).name
    is_text = PurePosixPath(path).suffix.lower() in ("", ".txt", ".md", ".rst")
    return name in MANIFESTS or (is_text and bool(LICENCE_FILES.search(name)))


def stated_in(path: str, data: bytes) -> tuple[str, tuple[int, str] | None]:
    """(folder that a licence file or manifest is for, (rank, SPDX expression) or None if it names none)."""
    text, posix = data.decode("utf-8", "replace"), PurePosixPath(path)
    parts = [part for part in posix.parts[:-1] if not part.endswith(".dist-info")]
    folder = "/".join(part for part in parts if part.lower() != "licenses")
    for rank, patterns in ((BY_MANIFEST, MANIFESTS), (BY_OLD_FIELD, OLD_FIELDS)):
        match = re.search(patterns[posix.name], text, re.M) if posix.name in patterns else None
        if match and (licence := normal(match[1].strip())):
            return folder, (rank, licence)
    by_text = "" if posix.name in MANIFESTS else match_text(text)
    return folder, (BY_TEXT, by_text) if by_text else None


def join(statements: list[tuple[int, str]]) -> str:
    """A folder's licence: of its manifest, else of all its licence texts, else of an old metadata field."""
    best = min(rank for rank, _ in statements)
    return " AND ".join(sorted({licence for rank, licence in statements if rank == best}))


def of_document(text: str, path: str, by_folder: dict[str, str]) -> str:
    """The licence of a file: its header's SPDX tags, joined by AND; else what the nearest folder states;
    else "".
    """
    if "SPDX-License-Identifier" in text[:4000] and (tags := TAG.findall(header(text[:4000]))):
        return " AND ".join(sorted({tag.strip() for tag in tags}))
    folders = ["" if str(parent) == "." else str(parent) for parent in PurePosixPath(path).parents]
    return next((by_folder[folder] for folder in folders if by_folder.get(folder)), "")


def header(text: str) -> str:
    """The comments with which a text begins; a docstring does not count."""
    lines, end = [], ""
    for line in text.split("\n"):
        block = None if end else BLOCK_COMMENT.match(line)
        if block:
            end = BLOCK_ENDS.get(block[1].lower(), "=cut" if block[1] == "=pod" else "=end")
            line_after = line[block.end() :]
        elif end or LINE_COMMENT.match(line):
            line_after = line
        else:
            break
        lines.append(line)
        if end and end in line_after:
            end = ""
    return "\n".join(lines)


def match_text(text: str) -> str:
    """The SPDX id of a licence text: the first rule whose phrases it has, in any case and spacing."""
    words = " ".join(re.findall(r"[\w.]+", text.lower()))
    matches = (rule["id"] for rule in rules()["texts"] if all(phrase in words for phrase in rule["phrases"]))
    return next(matches, "")


def normal(licence: str) -> str:
    """The SPDX id of a common spelling ("Apache 2.0"); an SPDX expression unchanged; "" for other text."""
    if licence.startswith("SPDX") or len(licence) > 100:
        return ""
    key = re.sub(r"[^a-z0-9.+]+", " ", licence.lower()).strip()
    for name, spellings in rules()["spellings"].items():
        if key in spellings or licence == name:
            return name
    expression = re.fullmatch(r"[\w.+-]+(?:\s+(?:OR|AND|WITH)\s+[\w.+-]+)+|[A-Z][\w+]*(?:-[\w.+]+)+", licence)
    return licence if expression else ""


def allowed(expression: str, permitted: frozenset[str] | None) -> bool:
    """Whether some alternative of an SPDX expression has only permitted licences; None permits all."""
    if permitted is None:
        return True
    flat = re.sub(r"\s+WITH\s+\S+", "", expression.replace("(", " ").replace(")", " ").replace("/", " OR "))
    if "(" in expression and " AND " in expression:  # nesting is not parsed: require all, which permits less
        flat = flat.replace(" OR ", " AND ")
    alternatives = [re.split(r"\s+AND\s+", part) for part in re.split(r"\s+OR\s+", flat) if part.strip()]
    return any(all(name.strip() in permitted for name in names) for names in alternatives)


def permissive() -> frozenset[str]:
    """The SPDX ids of permissive licences."""
    return frozenset(rules()["permissive"]["ids"])
