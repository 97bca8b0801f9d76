"""Context from other files: the open documents, and what the cursor's file imports.

Files that git ignores and files with a secret name (safety/secrets.py) never enter a prompt. In all others,
secrets are replaced by fake values.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock

from codegemma.data.gitignore import is_ignored
from codegemma.editor.buffers import Buffer, normalize
from codegemma.extras import install_command
from codegemma.prompts import MAX_FILE_CHARACTERS, File, file_head
from codegemma.safety import secrets

MAX_REPOSITORY_FILES = 20_000  # that an import may lead to
MAX_READ_CHARACTERS = 4 * MAX_FILE_CHARACTERS  # searched for secrets, so that none is cut in half and missed
HOLDS_CREDENTIALS = "files of this name hold credentials"  # why a file stays out of prompts
GIT_IGNORES = "git ignores it"
FILE_LIST_SECONDS = 60.0  # how long a list of a repository's files is used


@dataclass(frozen=True)
class ContextLimits:
    """Characters of other files in a prompt: of all together, and of each, from its start."""

    together: int
    each: int


TRAINED = ContextLimits(24_000, MAX_FILE_CHARACTERS)  # of models that were trained with files in front
COMMENTS = ContextLimits(4_000, 2_000)  # of others, which are shown files as comments (docs/results.md)


class FilePolicy:
    """Decides which files may be read into a prompt. `folders` are the editor's workspace folders."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self.folders = [folder.absolute() for folder in folders]

    def refusal(self, path: Path, language: str = "", ignored_too: bool = False) -> str:
        """Why a file must not enter a prompt; "" if it may. `language`: as the editor names it.

        `ignored_too`: whether a file that git ignores may.
        """
        path = path.absolute()
        names = {path, path.resolve()}
        if any(secrets.is_secret_name(str(name), language) for name in names):
            return HOLDS_CREDENTIALS
        if any(".git" in name.parts for name in names):
            return "it belongs to git"
        is_allowed = ignored_too or not any(is_ignored(self.root(name), name) for name in names)
        return "" if is_allowed else GIT_IGNORES

    def root(self, path: Path) -> Path:
        """The folder of a file's repository; else its workspace folder, else the folder that it is in."""
        parents = path.absolute().parents
        repositories = (folder for folder in parents if (folder / ".git").exists())
        workspaces = (folder for folder in self.folders if folder in parents)
        return next(repositories, None) or next(workspaces, parents[0])


class ContextFiles:
    """Collects the other files that go into a prompt. Safe to call from several threads.

    `log` is called with each file that is left out or changed, and why, once each.
    """

    def __init__(self, policy: FilePolicy, log: Callable[[str], None] = lambda text: None) -> None:
        self.policy, self.log = policy, log
        self._logged: set[str] = set()
        self._indexes: dict[Path, _ImportIndex] = {}  # by the repository's root
        self._lock = Lock()  # a grammar's parser serves one thread

    def collect(
        self,
        buffer: Buffer,
        others: Sequence[Buffer],
        imports: bool = True,
        may_walk: bool = False,
        limits: ContextLimits = TRAINED,
    ) -> list[File]:
        """The open documents and the files that `buffer` imports, as many as fit, the most relevant last.

        Imports are followed once the files of the repository are listed. A call with `may_walk` lists them,
        which can take seconds.
        """
        opened = {other.path: other for other in others if other.path}
        imported = self._imported(buffer, may_walk) if imports and buffer.path else []
        candidates: list[Buffer | Path] = [other for other in others if other.path not in imported]
        candidates += [opened.get(path, path) for path in imported]
        files: list[File] = []
        room = limits.together
        for each in reversed(candidates):
            path, language = (each, "") if isinstance(each, Path) else (each.path, each.language)
            text = normalize(_read(each) if isinstance(each, Path) else each.slice(0, MAX_READ_CHARACTERS))
            head = file_head(secrets.redact(text), limits.each)
            if not head.strip() or len(head) > room or (path and path == buffer.path):
                continue
            if path and (reason := self.policy.refusal(path, language)):
                self.log_once(f"{path} is left out of prompts: {reason}")
                continue
            if head != file_head(text, limits.each):
                self.log_once(
                    f"{path or 'a new document'} holds a secret: prompts have a fake value in its place"
                )
            room -= len(head)
            files.append(File(self.prompt_path(path) if path else "", head))
        return files[::-1]

    def prompt_path(self, path: Path) -> str:
        """A path as it stands in a prompt: relative to the repository, on one line."""
        return re.sub(r"[\r\n]", " ", path.relative_to(self.policy.root(path)).as_posix())

    def log_once(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            self.log(text)

    def _imported(self, buffer: Buffer, may_walk: bool) -> list[Path]:
        """The files that a document imports. Those from which it imports most names come last."""
        assert buffer.path
        if not self._lock.acquire(timeout=-1 if may_walk else 0.02):  # seconds: a keystroke waits for no walk
            return []
        try:
            root = self.policy.root(buffer.path)
            index = self._indexes.get(root)
            if may_walk and (index is None or index.is_stale(buffer.path)):
                index = self._indexes[root] = _ImportIndex(root, buffer.path)
            return index.imported(buffer) if index else []
        except ImportError as error:
            self.log_once(
                f"imports are not followed, only open documents are read: {error.name} is not installed "
                f"({install_command('data')})"
            )
            return []
        finally:
            self._lock.release()


class _ImportIndex:
    """The files that imports may lead to: those that git does not ignore, and `document` itself."""

    def __init__(self, root: Path, document: Path) -> None:
        from codegemma.data.documents import language_of
        from codegemma.data.resolve import Resolver
        from codegemma.data.sources import walk

        entries = islice(walk(root), MAX_REPOSITORY_FILES)
        document_path = document.relative_to(root).as_posix()
        paths = sorted({document_path, *(entry.path for entry in entries if not entry.reason)})
        self.languages = [language_of(path) for path in paths]
        self.resolver = Resolver(root.name, paths, self.languages)
        self.paths = [root / path for path in paths]
        self.numbers = {path: number for number, path in enumerate(self.paths)}
        self.created = time.monotonic()

    def is_stale(self, document: Path) -> bool:
        return document not in self.numbers or time.monotonic() - self.created > FILE_LIST_SECONDS

    def imported(self, buffer: Buffer) -> list[Path]:
        from codegemma.data.imports import imports_of_text

        if buffer.path not in self.numbers:
            return []
        number = self.numbers[buffer.path]
        counts: Counter[int] = Counter()
        top = normalize(buffer.slice(0, MAX_READ_CHARACTERS))
        for spec in imports_of_text(top, self.languages[number]):
            name, _, count = spec.rpartition(" ")
            for target in self.resolver(number, name) if name else ():
                counts[target] += int(count)
        del counts[number]
        return [self.paths[target] for target in sorted(counts, key=counts.__getitem__)]


def _read(path: Path) -> str:
    """The start of a file; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_READ_CHARACTERS).decode("utf-8", "ignore")
    except OSError:
        return ""
