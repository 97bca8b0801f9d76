"""Sources of training text: checkouts, archives, Parquet tables, JSON lines and plain text.

Every input is accounted for: what does not become a document becomes an `Outcome` with the reason.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from codegemma.data import licences
from codegemma.data.archives import ArchiveBomb, FileEntry, ReadLimits, path_refusal, tar_entries, zip_entries
from codegemma.data.documents import FILE_RULES, Document, Outcome, language_of
from codegemma.data.encodings import decode, normal_lines
from codegemma.data.git import git_folders, git_settings, git_state
from codegemma.data.gitignore import IgnoreRules, folder_rules
from codegemma.data.linguist import ATTRIBUTES_FILE, AttributeLine, attribute_lines, declared_reason
from codegemma.data.notebooks import script_of

FORMS: dict[str, str] = FILE_RULES["forms"]
VENDORED = frozenset(FILE_RULES["vendored"])
ARCHIVE_ENDING = r"(\.tar)?\.(gz|tgz|bz2|xz|zip|whl|tar)$"
UNREADABLE = (
    *(OSError, EOFError, ValueError, NotImplementedError, RuntimeError, KeyError, ArchiveBomb),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


@dataclass(frozen=True)
class Source:
    """A folder or file to read. `redistributed` ones (archives, Parquet) need a licence by default."""

    path: Path
    form: Literal["folder", "tar", "zip", "parquet", "lines", "text"]
    kind: str = "code"

    @property
    def name(self) -> str:
        return self.path.name or "root"

    @property
    def redistributed(self) -> bool:
        return self.form in ("tar", "zip", "parquet")


def expand(text: str) -> list[Source]:
    """The sources that `[KIND=]PATH` names.

    A folder that is no checkout stands for the checkouts, archives and tables in it, if there are any; every
    other path is one source. Raises ValueError where the path does not exist, is a file of another form, or
    a folder without files.
    """
    kind, path_text = text.split("=", 1) if re.match(r"\w+=", text) else ("code", text)
    path = Path(path_text).expanduser().resolve()
    if not path.exists():
        raise ValueError(
            f"source {path_text} does not exist: give a checkout, a folder of checkouts, a tar, zip, "
            "wheel or sdist, a Parquet or a JSON-lines file"
        )
    if not path.is_dir():
        if form := _form(path, kind):
            return [Source(path, form, kind)]
        raise ValueError(
            f"source {path_text} is no archive, Parquet or JSON-lines file by its name: give one that "
            f"ends in {', '.join(FORMS)}, or a folder"
        )
    inside = (folder for folder, _, names in os.walk(path) if names)
    if all(".git" in Path(folder).relative_to(path).parts for folder in inside):
        raise ValueError(f"source {path_text} holds no files: give a checkout, or a folder of checkouts")
    sources = [] if _is_checkout(path) else [*_inside(path, kind)]
    return sources or [Source(path, "folder", kind)]


def _inside(folder: Path, kind: str) -> Iterator[Source]:
    """The checkouts in a folder, then its archives and tables."""
    children = sorted(folder.iterdir())
    for child in children:
        if child.is_dir() and not child.is_symlink() and _is_checkout(child):
            yield Source(child, "folder", kind)
    for child in children:
        form = _form(child, kind) if child.is_file() else None
        if form and (form != "text" or kind != "code"):
            yield Source(child, form, kind)


def _is_checkout(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILE_RULES["project_files"])


def _form(path: Path, kind: str) -> Any:
    default = None if kind == "code" else "text"
    return next((form for ending, form in FORMS.items() if path.name.lower().endswith(ending)), default)


def read(source: Source, limits: ReadLimits | None = None) -> Iterator[Document | Outcome]:
    """Every document of a source, and an Outcome for each input that does not become one.

    Never raises because of the source's content: where the rest of it cannot be read, one Outcome says so.
    """
    readers = {"parquet": _read_parquet, "lines": _read_lines, "text": _read_text}
    try:
        yield from readers.get(source.form, _read_repository)(source, limits or ReadLimits())
    except UNREADABLE as error:
        detail = str(error) if isinstance(error, ArchiveBomb) else type(error).__name__
        yield Outcome(source.name, "", "dropped", "unreadable", detail)


# ---------------------------------------------------------------------------------------------- repositories
def _read_repository(source: Source, limits: ReadLimits) -> Iterator[Document | Outcome]:
    """The files of a checkout or an archive, in two passes: the first reads licences and attributes."""

    def entries() -> Iterator[FileEntry]:
        if is_folder:
            return walk(source.path)
        return (zip_entries if source.form == "zip" else tar_entries)(source.path, limits)

    is_folder = source.form == "folder"
    remote, commit = git_state(source.path) if is_folder else ("", "")
    name = source.name if is_folder else re.sub(ARCHIVE_ENDING, "", source.name)
    template = Document(remote or name, "", "", source=source.name, commit=commit, kind=source.kind)
    statements: dict[str, list[tuple[int, str]]] = {}
    attributes: list[AttributeLine] = []
    top_folders: set[str] = set()
    for entry in entries():
        top_folders.add(entry.path.split("/")[0] if "/" in entry.path else "")
        if entry.reason or entry.size > limits.file_bytes:
            continue
        if licences.is_statement(entry.path):
            folder, statement = licences.stated_in(entry.path, _load(entry))
            if statement:
                statements.setdefault(folder, []).append(statement)
        elif entry.path.rpartition("/")[2] == ATTRIBUTES_FILE:
            attributes += attribute_lines(entry.path.removesuffix(ATTRIBUTES_FILE), _load(entry))
    # An archive often holds one folder, such as `thing-1.0`: it is removed from paths.
    is_wrapped = not is_folder and len(top_folders) == 1 and "" not in top_folders
    top = top_folders.pop() if is_wrapped else ""
    by_folder = {
        folder.removeprefix(top).lstrip("/"): licences.join(stated) for folder, stated in statements.items()
    }
    attributes.sort(key=lambda line: line.folder.count("/"))  # the last line counts: the deepest file's
    if is_folder:
        attributes = _own_attributes(source.path, attributes)
    for entry in entries():
        path = entry.path.removeprefix(f"{top}/") if top else entry.path
        entry = replace(entry, reason=entry.reason or declared_reason(entry.path, attributes))
        yield _read_entry(replace(template, path=path), entry, by_folder, limits)


def _load(entry: FileEntry) -> bytes:
    """The bytes of a licence or attributes file; none where it cannot be read."""
    try:
        return entry.load()
    except OSError:
        return b""


def _own_attributes(root: Path, lines: list[AttributeLine]) -> list[AttributeLine]:
    """`lines` with those of the user's own file before them, and the repository's info/attributes after."""
    folders = git_folders(root)
    files = [
        git_settings(root).attributes_file,
        *([folders.common_dir / "info/attributes"] if folders else []),
    ]
    read = [attribute_lines("", file.read_bytes()) if file.is_file() else [] for file in files]
    return [*read[0], *lines, *(read[1] if folders else [])]


def _read_entry(
    template: Document, entry: FileEntry, by_folder: dict[str, str], limits: ReadLimits
) -> Document | Outcome:
    repository, path = template.repository, template.path
    if _one_line(path) != path:
        reason = "path is not one line of text"
        return Outcome(repository, _one_line(path), "dropped", reason, size=entry.size)
    if entry.reason or entry.size > limits.file_bytes:
        return Outcome(repository, path, "dropped", entry.reason or "too large", size=entry.size)
    try:
        text, encoding = decode(entry.load())
        return _finish(replace(template, text=text, encoding=encoding), by_folder)
    except (ValueError, OSError) as error:
        reason = str(error) if isinstance(error, ValueError) else "unreadable"
        return Outcome(repository, path, "dropped", reason, type(error).__name__, size=entry.size)


def _finish(document: Document, by_folder: dict[str, str]) -> Document:
    """The document with its language and licence, \\n at each line's end, and a notebook as a script.

    Raises ValueError for a file named .ipynb that is no notebook.
    """
    text, path, language = document.text, document.path, document.language
    if document.kind == "code" and path.endswith(".ipynb"):
        text, language = script_of(text)
    text = normal_lines(text)
    return replace(
        document,
        text=text,
        language=language or language_of(path, text),
        licence=document.licence or licences.of_document(text, path, by_folder),
    )


def _one_line(path: str) -> str:
    """The path, with what cannot stand in one line of UTF-8 escaped."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


def walk(folder: Path, prefix: str = "", rules: IgnoreRules | None = None) -> Iterator[FileEntry]:
    """The files of a checkout in the order of their paths; `reason` is set on those that must not be read.

    Links are not followed, so nothing outside the folder is read. For subfolders the function calls itself
    with their path in the checkout (`prefix`) and their rules.
    """
    rules = rules or folder_rules(folder)
    try:
        items = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError:
        yield FileEntry(prefix.rstrip("/"), reason="unreadable")
        return
    for item in items:
        path = prefix + item.name
        if item.name == ".git":
            continue
        if item.is_symlink():
            yield FileEntry(path, reason="symbolic link")
        elif item.is_dir(follow_symlinks=False):
            is_vendored = item.name in VENDORED
            if not is_vendored and not rules.ignores(item.name + "/"):
                yield from walk(Path(item.path), path + "/", rules.inside(item.name))
            else:
                yield FileEntry(path + "/", reason="vendored" if is_vendored else "ignored by git")
        elif not item.is_file(follow_symlinks=False):
            yield FileEntry(path, reason="not a regular file")
        else:
            reason = "ignored by git" if rules.ignores(item.name) else ""
            yield FileEntry(path, item.stat().st_size, Path(item.path).read_bytes, reason)


# ---------------------------------------------------------------------------------------------------- tables
def _columns(present: Collection[str]) -> dict[str, str]:
    """For each field of a document, the first of a table's columns that may hold it, if any."""
    columns = FILE_RULES["columns"].items()
    first = {field: next((name for name in names if name in present), "") for field, names in columns}
    return {field: name for field, name in first.items() if name}


def _read_parquet(source: Source, limits: ReadLimits) -> Iterator[Document | Outcome]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.path) as file:
        columns = _columns(file.schema_arrow.names)
        needed = {"text", "path", "repository"} if source.kind == "code" else {"text"}
        if missing := sorted(needed - columns.keys()):
            yield Outcome(source.name, "", "dropped", "unreadable", f"no column for {', '.join(missing)}")
            return
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=sorted(set(columns.values()))):
            for row in batch.to_pylist():
                yield _read_row(source, {field: row[name] for field, name in columns.items()}, number, limits)
                number += 1


def _read_text(source: Source, limits: ReadLimits) -> Iterator[Document | Outcome]:
    yield _read_row(source, {"text": source.path.read_bytes(), "path": source.name}, 0, limits)


def _read_lines(source: Source, limits: ReadLimits) -> Iterator[Document | Outcome]:
    open_file: Any = gzip.open if source.path.suffix == ".gz" else open
    with open_file(source.path, "rb") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                detail = "not a JSON object"
                yield Outcome(source.name, str(number), "dropped", "unreadable", detail, size=len(line))
                continue
            if row is not None:
                row = row if isinstance(row, dict) else {}
                fields = {field: row[name] for field, name in _columns(row).items()}
                yield _read_row(source, fields, number, limits)


def _read_row(source: Source, row: dict[str, Any], number: int, limits: ReadLimits) -> Document | Outcome:
    """One row of a table: code with its repository and path, or a plain text named by its number."""
    repository, path = _one_line(str(row.get("repository") or source.name)), str(row.get("path") or number)
    text, encoding = row.get("text"), "utf-8"
    if isinstance(text, bytes):
        try:
            text, encoding = decode(text)
        except ValueError as error:
            return Outcome(repository, _one_line(path), "dropped", str(error), size=len(row["text"]))
    if not isinstance(text, str):
        return Outcome(repository, path, "dropped", "unreadable", "no text")
    reasons = {
        "too large": len(text) > limits.file_bytes,
        "binary": "\0" in text,
        "unreadable": bool(re.search("[\ud800-\udfff]", text)),
        "path is not one line of text": _one_line(path) != path,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), "") or path_refusal(path):
        return Outcome(repository, _one_line(path), "dropped", reason, size=len(text))
    value = row.get("licence") or []
    names = [value] if isinstance(value, str) else [name for name in value if isinstance(name, str)]
    language, licence = "text" if source.kind != "code" else "", " OR ".join(sorted(names))
    document = Document(repository, path, text, language, licence, source.name, kind=source.kind)
    try:
        return _finish(replace(document, commit=str(row.get("commit") or ""), encoding=encoding), {})
    except ValueError as error:
        return document.outcome("dropped", str(error))
