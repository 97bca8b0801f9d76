"""Under which licence a file stands: SPDX tag, manifest, licence text; and whether an allow-list admits it."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path, PurePosixPath

TAG = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+() -]+?)\s*(?:\*/|-->|$)", re.M)
MANIFESTS = {
    "pyproject.toml": r'^license\s*=\s*(?:\{\s*text\s*=\s*)?["\']([^"\']+)["\']',
    "setup.cfg": r"^license\s*=\s*(.+)$",
    "package.json": r'"license"\s*:\s*"([^"]+)"',
    "Cargo.toml": r'^license\s*=\s*"([^"]+)"',
    "METADATA": r"^License-Expression:\s*(.+)$",
    "PKG-INFO": r"^License-Expression:\s*(.+)$",
    "pom.xml": r"<license>\s*<name>([^<]+)</name>",
}
FIELDS = {"METADATA": r"^License:\s*(\S.*)$", "PKG-INFO": r"^License:\s*(\S.*)$"}
FILES = re.compile(r"^(un)?licen[sc]e|^copying|-licen[sc]e", re.I)


@cache
def rules() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((Path(__file__).parent / "rules" / "licences.toml").read_text("utf-8"))


def speaks(path: str) -> bool:
    """Whether a file's name says that it states the licence of others."""
    name = PurePosixPath(path).name
    is_text = PurePosixPath(path).suffix.lower() in ("", ".txt", ".md", ".rst")
    return name in MANIFESTS or (is_text and bool(FILES.search(name)))


def of_file(path: str, data: bytes) -> tuple[str, tuple[str, str]]:
    """(folder that it speaks for, (its weight, SPDX expression)) of a licence file or manifest; empty where unknown."""
    text, posix = data.decode("utf-8", "replace"), PurePosixPath(path)
    folders = [
        part for part in posix.parts[:-1] if not part.endswith(".dist-info") and part.lower() != "licenses"
    ]
    patterns = [("1", MANIFESTS.get(posix.name)), ("3", FIELDS.get(posix.name))]
    for weight, pattern in patterns:
        if pattern and (match := re.search(pattern, text, re.M)) and (licence := normal(match[1].strip())):
            return "/".join(folders), (weight, licence)
    by_text = "" if posix.name in MANIFESTS else match_text(text)
    return "/".join(folders), ("2", by_text) if by_text else ()  # type: ignore[return-value]


def join(votes: list[tuple[str, str]]) -> str:
    """The expression of a folder: its manifest's, else all its licence texts together, else a metadata field's."""
    best = min(weight for weight, _ in votes)
    return " AND ".join(sorted({licence for weight, licence in votes if weight == best}))


def of_text(text: str, path: str, by_folder: dict[str, str]) -> str:
    """A file's own SPDX tag, else the licence of the nearest folder above it that states one, else ""."""
    if "SPDX-License-Identifier" in (head := text[:4000]) and (tag := TAG.search(head)):
        return tag[1].strip()
    for folder in [str(parent) for parent in PurePosixPath(path).parents]:
        if licence := by_folder.get("" if folder == "." else folder):
            return licence
    return ""


def match_text(text: str) -> str:
    """SPDX id of a licence text: the first rule all of whose phrases stand in it, white space and case ignored."""
    words = " ".join(re.findall(r"[\w.]+", text.lower()))
    return next(
        (name for name, phrases in rules()["texts"].items() if all(phrase in words for phrase in phrases)), ""
    )


def normal(licence: str) -> str:
    """An SPDX expression as it is; a common spelling ("Apache 2.0") as its SPDX id; other free text as ""."""
    if licence.startswith("SPDX") or len(licence) > 100:
        return ""
    spelled = rules()["spellings"]
    key = re.sub(r"[^a-z0-9.+]+", " ", licence.lower()).strip()
    named = next((name for name, spellings in spelled.items() if key in spellings or licence == name), "")
    expression = re.fullmatch(r"[\w.+-]+(?:\s+(?:OR|AND|WITH)\s+[\w.+-]+)+|[A-Z][\w+]*(?:-[\w.+]+)+", licence)
    return named or (licence if expression else "")


def allowed(expression: str, permitted: frozenset[str] | None) -> bool:
    """Whether some alternative of an SPDX expression has only permitted licences; None permits all."""
    if permitted is None:
        return True
    flat = re.sub(r"\s+WITH\s+\S+", "", expression.replace("(", " ").replace(")", " ").replace("/", " OR "))
    if "(" in expression and " AND " in expression:  # nested: be strict rather than clever
        flat = flat.replace(" OR ", " AND ")
    return any(
        alternative.strip() and all(name.strip() in permitted for name in re.split(r"\s+AND\s+", alternative))
        for alternative in re.split(r"\s+OR\s+", flat)
    )


def permissive() -> frozenset[str]:
    return frozenset(rules()["permissive"]["ids"])
