"""Where training text comes from: checkouts, archives, Parquet, plain text -> documents with their provenance.

Nothing is lost silently: what is not a document comes out as an `Outcome` that says why.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from codegemma.data import licences


@dataclass(frozen=True)
class Document:
    """One text and where it comes from. `kind` is "code", or the name of another part of the mix ("text", "math")."""

    repository: str
    path: str
    text: str
    language: str = ""
    licence: str = ""  # SPDX expression; "" where none was found
    source: str = ""
    commit: str = ""
    encoding: str = "utf-8"
    kind: str = "code"
    imports: tuple[str, ...] | None = None  # of the top lines, once something has parsed them

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.path}"

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()

    @property
    def key(self) -> int:
        """63 bits that place the document: all files of a repository together, each plain text on its own."""
        owner = self.repository if self.kind == "code" else self.name
        return (
            int.from_bytes(
                hashlib.blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
            )
            >> 1
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one input: kept, dropped for a reason, or the duplicate of a named one."""

    repository: str
    path: str
    outcome: Literal["kept", "dropped", "duplicate"]
    reason: str = ""
    detail: str = ""  # the licence found, the benchmark task, the document it repeats, ...
    language: str = ""
    licence: str = ""
    size: int = 0  # bytes

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.path}"


def dropped(document: Document, reason: str, detail: str = "", duplicate: bool = False) -> Outcome:
    return Outcome(
        document.repository,
        document.path,
        "duplicate" if duplicate else "dropped",
        reason,
        detail,
        document.language,
        document.licence,
        len(document.text.encode("utf-8", "surrogatepass")),
    )


@dataclass(frozen=True)
class Limits:
    """What an archive may hold before it counts as a bomb, and a file before it is not read."""

    file_bytes: int = 1_000_000
    members: int = 200_000
    total_bytes: int = 4_000_000_000
    ratio: int = 200  # unpacked to packed size, once more than 32 MB are unpacked


@dataclass(frozen=True)
class Source:
    """One thing to read. `redistributed` sources (archives, Parquet) need a licence; a checkout is the user's own."""

    path: Path
    form: Literal["folder", "tar", "zip", "parquet", "lines", "text"]
    kind: str = "code"

    @property
    def name(self) -> str:
        return self.path.name or "root"

    @property
    def redistributed(self) -> bool:
        return self.form in ("tar", "zip", "parquet")


class ArchiveBomb(Exception):
    """An archive that unpacks to more than the limits allow; the rest of it is left unread."""


# ------------------------------------------------------------------------------------------------ sources
FORMS = {
    ".parquet": "parquet",
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".json.gz": "lines",
    ".ndjson": "lines",
    ".whl": "zip",
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
PROJECT_FILES = (
    ".git",
    "pyproject.toml",
    "setup.py",
    "package.json",
    "go.mod",
    "Cargo.toml",
    "pom.xml",
    "build.gradle",
    "CMakeLists.txt",
    "Makefile",
    "PKG-INFO",
)


def expand(text: str) -> list[Source]:
    """`[KIND=]PATH` -> its sources: the path itself, or each checkout and archive in a folder of them.

    Raises ValueError where nothing readable is there.
    """
    kind, _, path_text = text.rpartition("=") if re.match(r"\w+=", text) else ("code", "", text)
    path = Path(path_text).expanduser().resolve()
    if not path.exists():
        raise ValueError(
            f"source {path_text} does not exist: give a checkout, a folder of checkouts, a tar, zip, "
            "wheel or sdist, a Parquet or a JSON-lines file"
        )
    if path.is_dir():
        children = sorted(path.iterdir())
        inner = [
            Source(child, "folder", kind)
            for child in children
            if child.is_dir()
            and not child.is_symlink()
            and any((child / mark).exists() for mark in PROJECT_FILES)
        ]
        inner += [
            Source(child, form, kind)
            for child in children
            if child.is_file() and (form := _form(child, kind)) and (form != "text" or kind != "code")
        ]
        is_project = any((path / mark).exists() for mark in PROJECT_FILES)
        return inner if inner and not is_project else [Source(path, "folder", kind)]
    form = _form(path, kind)
    if form is None:
        raise ValueError(
            f"source {path_text} is no archive, Parquet or JSON-lines file by its name: give one that "
            f"ends in {', '.join(FORMS)}, or a folder"
        )
    return [Source(path, form, kind)]


def _form(path: Path, kind: str) -> Any:
    name = path.name.lower()
    return next(
        (form for ending, form in FORMS.items() if name.endswith(ending)), None if kind == "code" else "text"
    )


def read(source: Source, limits: Limits | None = None) -> Iterator[Document | Outcome]:
    """Every document of a source, and an Outcome for each input that is none. Never raises for what is in the
    source."""
    reader = {
        "folder": _folder,
        "tar": _archive,
        "zip": _archive,
        "parquet": _parquet,
        "lines": _lines,
        "text": _lines,
    }[source.form]
    try:
        yield from reader(source, limits or Limits())
    except (
        OSError,
        EOFError,
        ValueError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        KeyError,
        ArchiveBomb,
    ) as error:
        detail = str(error) if isinstance(error, ArchiveBomb) else type(error).__name__
        yield Outcome(source.name, "", "dropped", "unreadable", detail)


# ------------------------------------------------------------------------------------------- one file's bytes
def decode(data: bytes) -> tuple[str, str]:
    """Bytes -> text and encoding. Latin-1 is the last resort for text that is not UTF-8. Raises ValueError: binary."""
    if data.startswith(b"\xef\xbb\xbf"):
        data, encoding = data[3:], "utf-8 with BOM"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16"), "utf-16 with BOM"
    else:
        encoding = "utf-8"
    if b"\0" in data:
        raise ValueError("binary")
    try:
        return data.decode("utf-8"), encoding
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if len(re.findall(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]", text)) > len(text) / 100:
        raise ValueError("binary")
    return text, "latin-1 (not UTF-8)"


TAGS = {"ts": "typescript", "c++": "cpp", "c#": "csharp", "pyi": "python"}
CODE = frozenset(
    [
        "python",
        "java",
        "kotlin",
        "javascript",
        "jsx",
        "typescript",
        "tsx",
        "go",
        "c",
        "cpp",
        "csharp",
        "rust",
        "ruby",
        "php",
        "scala",
        "swift",
        "shell",
        "bash",
        "zsh",
        "perl",
        "lua",
        "r",
        "julia",
        "haskell",
        "ocaml",
        "clojure",
        "elixir",
        "erlang",
        "dart",
        "groovy",
        "sql",
        "cuda",
        "cython",
        "fortran",
        "zig",
        "nim",
        "d",
        "vue",
        "svelte",
        "objective-c",
        "objective-c++",
        "powershell",
        "fish",
        "makefile",
        "cmake",
        "dockerfile",
        "html",
        "css",
        "scss",
        "sass",
        "less",
        "verilog",
        "vhdl",
        "solidity",
        "proto",
        "thrift",
        "elm",
        "purescript",
        "fennel",
        "crystal",
        "coffee",
        "f#",
        "vb",
        "tcl",
        "awk",
        "jinja",
        "terraform",
    ]
)  # noqa: SIM905


def language_of(path: str, text: str = "") -> str:
    """The language of a file by extension, name or shebang, in lower case; "" where it is not known."""
    from identify import identify

    tags = identify.tags_from_filename(PurePosixPath(path).name)
    if not tags and text.startswith("#!"):
        command = identify.parse_shebang(io.BytesIO(text[:200].encode("utf-8", "surrogatepass")))
        tags = identify.tags_from_interpreter(command[0]) if command else set()
    if "header" in tags and "c" in tags:
        return (
            "cpp"
            if re.search(r"^\s*(class|namespace|template|using|public:|private:)\b", text, re.M)
            or not path.endswith(".h")
            else "c"
        )
    names = {TAGS.get(tag, tag) for tag in tags}
    known = sorted(names & CODE)
    return (
        known[0]
        if known
        else next(iter(sorted(names - {"text", "binary", "executable", "non-executable"})), "")
    )


@dataclass(frozen=True)
class _Entry:
    """A file of a repository before it is read: `load` gives its bytes, `reason` says why it must not be."""

    path: str
    size: int
    load: Callable[[], bytes]
    reason: str = ""


def _documents(
    source: Source,
    entries: Callable[[], Iterator[_Entry]],
    limits: Limits,
    commit: str = "",
    repository: str = "",
) -> Iterator[Document | Outcome]:
    """The files of one repository. Two passes: the licence files first, since they speak for all the others."""
    found: dict[str, list[tuple[str, str]]] = {}
    folders: set[str] = set()
    for entry in entries():
        folders.add(entry.path.split("/")[0] if "/" in entry.path else "")
        if not entry.reason and licences.speaks(entry.path) and entry.size <= limits.file_bytes:
            folder, rank_and_licence = licences.of_file(entry.path, entry.load())
            if rank_and_licence:
                found.setdefault(folder, []).append(rank_and_licence)
    top = f"{folders.pop()}/" if source.form != "folder" and len(folders) == 1 and "" not in folders else ""
    by_folder = {
        folder.removeprefix(top.rstrip("/")).lstrip("/"): licences.join(votes)
        for folder, votes in found.items()
    }
    for entry in entries():
        path = entry.path.removeprefix(top)
        if (shown := _one_line(path)) != path:
            yield Outcome(repository, shown, "dropped", "path is not one line of text", size=entry.size)
            continue
        if entry.reason or entry.size > limits.file_bytes:
            yield Outcome(repository, path, "dropped", entry.reason or "too large", size=entry.size)
            continue
        try:
            text, encoding = decode(entry.load())
        except (ValueError, OSError) as error:
            reason = "binary" if isinstance(error, ValueError) else "unreadable"
            yield Outcome(repository, path, "dropped", reason, type(error).__name__, size=entry.size)
            continue
        yield Document(
            repository,
            path,
            text,
            language_of(path, text),
            licences.of_text(text, path, by_folder),
            source.name,
            commit,
            encoding,
            source.kind,
        )


def _one_line(path: str) -> str:
    """A path as it can be written in one line of UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


# --------------------------------------------------------------------------------------------------- folders
VENDORED = frozenset(
    [
        "node_modules",
        "bower_components",
        "vendor",
        "vendored",
        "_vendor",
        "third_party",
        "third-party",
        "thirdparty",
        ".venv",
        "venv",
        ".tox",
        ".nox",
        ".eggs",
        "__pycache__",
        "site-packages",
        "Pods",
        "Carthage",
        ".git",
        ".hg",
        ".svn",
        ".idea",
        ".mypy_cache",
        ".pytest_cache",
    ]
)  # noqa: SIM905


def _folder(source: Source, limits: Limits) -> Iterator[Document | Outcome]:
    remote, commit = git_state(source.path)
    yield from _documents(source, lambda: walk(source.path), limits, commit, remote or source.name)


def walk(root: Path) -> Iterator[_Entry]:
    """Files in path order. Links are not followed, so nothing outside the root and no loop is read."""
    from pathspec import GitIgnoreSpec

    def visit(folder: Path, inside: str, rules: list[tuple[str, Any]]) -> Iterator[_Entry]:
        for name, base in ((".gitignore", inside), (".git/info/exclude", inside)):
            if (folder / name).is_file():
                lines = (folder / name).read_text("utf-8", "replace").splitlines()
                rules = [*rules, (base, GitIgnoreSpec.from_lines(lines))]
        try:
            items = sorted(os.scandir(folder), key=lambda item: item.name)
        except OSError:
            yield _Entry(inside.rstrip("/"), 0, bytes, "unreadable")
            return
        for item in items:
            path = inside + item.name
            if item.is_symlink():
                yield _Entry(path, 0, bytes, "symbolic link")
            elif item.is_dir(follow_symlinks=False):
                if item.name in VENDORED or ignored(path + "/", rules):
                    if item.name != ".git":
                        yield _Entry(
                            path + "/", 0, bytes, "vendored" if item.name in VENDORED else "ignored by git"
                        )
                else:
                    yield from visit(Path(item.path), path + "/", rules)
            elif not item.is_file(follow_symlinks=False):
                yield _Entry(path, 0, bytes, "not a regular file")
            else:
                yield _Entry(
                    path,
                    item.stat().st_size,
                    Path(item.path).read_bytes,
                    "ignored by git" if ignored(path, rules) else "",
                )

    def ignored(path: str, rules: list[tuple[str, Any]]) -> bool:
        verdict = None
        for base, spec in rules:
            answer = spec.check_file(path.removeprefix(base)).include
            verdict = verdict if answer is None else answer
        return bool(verdict)

    yield from visit(root, "", [])


def git_state(root: Path) -> tuple[str, str]:
    """(repository as host/owner/name, commit) of a checkout, read from its files: no program of git is run on it."""
    folder = root / ".git"
    try:
        if folder.is_file():
            folder = root / folder.read_text().partition("gitdir:")[2].strip()
        head = (folder / "HEAD").read_text().strip()
        config = (folder / "config").read_text() if (folder / "config").exists() else ""
        url = re.search(r'\[remote "origin"\][^\[]*?url\s*=\s*(\S+)', config)
        remote = (
            re.sub(r"^(\w+://)?([^@/]*@)?", "", url[1]).replace(":", "/").removesuffix(".git") if url else ""
        )
        if not head.startswith("ref: "):
            return remote, head
        ref = head[5:]
        if (folder / ref).is_file():
            return remote, (folder / ref).read_text().strip()
        packed = (folder / "packed-refs").read_text() if (folder / "packed-refs").exists() else ""
        line = re.search(rf"^([0-9a-f]{{40,64}}) {re.escape(ref)}$", packed, re.M)
        return remote, line[1] if line else ""
    except (OSError, UnicodeDecodeError):
        return "", ""


# -------------------------------------------------------------------------------------------------- archives
def _archive(source: Source, limits: Limits) -> Iterator[Document | Outcome]:
    name = re.sub(r"(\.tar)?\.(gz|tgz|bz2|xz|zip|whl|tar)$", "", source.name)
    entries = _zip_entries if source.form == "zip" else _tar_entries
    yield from _documents(source, lambda: entries(source.path, limits), limits, repository=name)


def _unsafe_path(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    if path.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", path):
        return "path leaves its root"
    return "vendored" if any(part in VENDORED for part in parts[:-1]) else ""


def _guard(members: int, unpacked: int, packed: int, limits: Limits) -> None:
    if members > limits.members:
        raise ArchiveBomb(f"more than {limits.members:,} members")
    if unpacked > limits.total_bytes or (unpacked > 32_000_000 and unpacked > limits.ratio * packed):
        raise ArchiveBomb(
            f"unpacks to more than {limits.ratio} times its size or {limits.total_bytes:,} bytes"
        )


def _zip_entries(path: Path, limits: Limits) -> Iterator[_Entry]:
    packed, unpacked = path.stat().st_size, 0
    with zipfile.ZipFile(path) as archive:
        infos = sorted(
            (info for info in archive.infolist() if not info.is_dir()), key=lambda info: info.filename
        )
        for count, info in enumerate(infos, 1):
            unpacked += info.file_size
            _guard(count, unpacked, packed, limits)
            link = "symbolic link" if (info.external_attr >> 16) & 0o170000 == 0o120000 else ""
            locked = "unreadable" if info.flag_bits & 1 else ""

            def load(info: zipfile.ZipInfo = info) -> bytes:
                with archive.open(info) as file:  # the header may lie about the size
                    try:
                        return file.read(limits.file_bytes + 1)
                    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                        raise OSError(str(error)) from error

            yield _Entry(info.filename, info.file_size, load, _unsafe_path(info.filename) or link or locked)


class _Metered(io.RawIOBase):
    """A decompressed stream that stops at the limits, whatever the headers inside it claim."""

    def __init__(self, path: Path, limits: Limits):
        with path.open("rb") as start:
            head = start.read(6)
        opened: Any = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(head[:2], open)
        self.file: IO[bytes] = opened(path, "rb")
        self.limits, self.packed, self.unpacked = limits, path.stat().st_size, 0

    def read(self, size: int = -1) -> bytes:
        _guard(0, self.unpacked + max(0, size - 32_000_000), self.packed, self.limits)
        data = self.file.read(min(size, self.limits.total_bytes) if size >= 0 else self.limits.total_bytes)
        self.unpacked += len(data)
        _guard(0, self.unpacked, self.packed, self.limits)
        return data

    def close(self) -> None:
        self.file.close()


def _tar_entries(path: Path, limits: Limits) -> Iterator[_Entry]:
    stream = _Metered(path, limits)
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=1) as archive:
            declared = 0
            for count, member in enumerate(archive, 1):
                declared += member.size  # checked before tarfile skips over it, block by block
                _guard(count, declared, stream.packed, limits)
                if member.isdir():
                    continue
                special = "symbolic link" if member.issym() or member.islnk() else "not a regular file"

                def load(member: tarfile.TarInfo = member) -> bytes:
                    file = archive.extractfile(member)
                    return file.read() if file else b""

                name = re.sub(r"^(\./)+", "", member.name)
                yield _Entry(
                    name, member.size, load, _unsafe_path(name) or ("" if member.isreg() else special)
                )
    finally:
        stream.close()


# ------------------------------------------------------------------------------------------ Parquet and lines
COLUMNS = {
    "text": ("content", "text", "code"),
    "path": ("path", "max_stars_repo_path", "file_path"),
    "repository": ("repository", "repo_name", "max_stars_repo_name", "repo"),
    "licence": ("licence", "license", "licenses", "max_stars_repo_licenses", "detected_licenses"),
    "commit": ("commit", "max_stars_repo_head_hexsha", "revision_id"),
}


def _parquet(source: Source, limits: Limits) -> Iterator[Document | Outcome]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.path) as file:
        there = set(file.schema_arrow.names)
        columns = {
            field: name
            for field, names in COLUMNS.items()
            if (name := next((n for n in names if n in there), None))
        }
        missing = {"text"} if source.kind != "code" else {"text", "path", "repository"}
        if lacking := missing - columns.keys():
            yield Outcome(
                source.name, "", "dropped", "unreadable", f"no column for {', '.join(sorted(lacking))}"
            )
            return
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=sorted(set(columns.values()))):
            for row in batch.to_pylist():
                yield _record(source, {field: row[name] for field, name in columns.items()}, number, limits)
                number += 1


def _lines(source: Source, limits: Limits) -> Iterator[Document | Outcome]:
    if source.form == "text":
        yield _record(source, {"text": source.path.read_bytes(), "path": source.name}, 0, limits)
        return
    opened: Any = gzip.open if source.path.suffix == ".gz" else open
    with opened(source.path, "rb") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                yield Outcome(
                    source.name, str(number), "dropped", "unreadable", "not a JSON object", size=len(line)
                )
                continue
            if row is None:
                continue
            row = row if isinstance(row, dict) else {}
            yield _record(
                source,
                {
                    field: row[name]
                    for field, names in COLUMNS.items()
                    if (name := next((n for n in names if n in row), None))
                },
                number,
                limits,
            )


def _record(source: Source, row: dict[str, Any], number: int, limits: Limits) -> Document | Outcome:
    """One row of a table: code with its repository and path, or a plain text named by its place."""
    repository, path = _one_line(str(row.get("repository") or source.name)), str(row.get("path") or number)
    text, encoding = row.get("text"), "utf-8"
    if isinstance(text, bytes):
        try:
            text, encoding = decode(text)
        except ValueError:
            return Outcome(repository, path, "dropped", "binary", size=len(row["text"]))
    if not isinstance(text, str):
        return Outcome(repository, path, "dropped", "unreadable", "no text")
    reason = (
        "too large"
        if len(text) > limits.file_bytes
        else "binary"
        if "\0" in text
        else "unreadable"
        if re.search("[\ud800-\udfff]", text)
        else "path is not one line of text"
        if _one_line(path) != path
        else _unsafe_path(path)
    )
    if reason:
        return Outcome(repository, _one_line(path), "dropped", reason, size=len(text))
    given = row.get("licence") or []
    names = [given] if isinstance(given, str) else [name for name in given if isinstance(name, str)]
    document = Document(
        repository,
        path,
        text,
        language_of(path, text) if source.kind == "code" else "text",
        " OR ".join(sorted(names)),
        source.name,
        str(row.get("commit") or ""),
        encoding,
        source.kind,
    )
    return replace(document, licence=document.licence or licences.of_text(text, path, {}))
