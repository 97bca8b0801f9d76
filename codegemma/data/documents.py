"""A text and its origin (`Document`), and what became of each input (`Outcome`): kept, or dropped and why."""

from __future__ import annotations

import hashlib
import io
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

RULES = Path(__file__).parent / "rules"
FILE_RULES: dict[str, Any] = tomllib.loads((RULES / "files.toml").read_text("utf-8"))
CODE_LANGUAGES = frozenset(FILE_RULES["code_languages"])


@dataclass(frozen=True)
class Document:
    """A text and its origin. `kind` is "code", or another part of the mix ("text", "math")."""

    repository: str
    path: str
    text: str
    language: str = ""
    licence: str = ""  # SPDX expression; "" where none was found
    source: str = ""
    commit: str = ""
    encoding: str = "utf-8"
    kind: str = "code"
    imports: tuple[str, ...] | None = None  # in the top lines; None before the text has been parsed

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.path}"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()

    @property
    def key(self) -> int:
        """A sort key of 63 bits: a hash of the repository for code, of the name for other kinds."""
        owner = self.repository if self.kind == "code" else self.name
        digest = hashlib.blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def outcome(self, outcome: Decision, reason: str = "", detail: str = "") -> Outcome:
        """The ledger's entry for this document."""
        size = len(self.text.encode("utf-8", "surrogatepass"))
        return Outcome(self.repository, self.path, outcome, reason, detail, self.language, self.licence, size)


Decision = Literal["kept", "dropped", "duplicate"]


@dataclass(frozen=True)
class Outcome:
    """What became of an input: kept, dropped for a reason, or dropped as the duplicate of another."""

    repository: str
    path: str
    outcome: Decision
    reason: str = ""
    detail: str = ""  # the licence, the benchmark task, the document that it repeats, ...
    language: str = ""
    licence: str = ""
    size: int = 0  # bytes


def language_of(path: str, text: str = "") -> str:
    """The language of a file by extension, name or shebang, in lower case; "" where it is unknown."""
    from identify import identify

    tags = identify.tags_from_filename(PurePosixPath(path).name)
    if not tags and text.startswith("#!"):
        command = identify.parse_shebang(io.BytesIO(text[:200].encode("utf-8", "surrogatepass")))
        tags = identify.tags_from_interpreter(command[0]) if command else set()
    if "header" in tags and "c" in tags:
        cpp = re.search(r"^\s*(class|namespace|template|using|public:|private:)\b", text, re.M)
        return "cpp" if cpp or not path.endswith(".h") else "c"
    names = {FILE_RULES["languages"].get(tag, tag) for tag in tags}
    others = names - {"text", "binary", "executable", "non-executable"}
    return min(names & CODE_LANGUAGES, default="") or min(others, default="")
