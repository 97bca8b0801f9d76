"""What may stand in a prompt beside the cursor's file: the other open documents and what the file imports.

The law: a file that git ignores or whose name speaks of credentials never enters a prompt, nor does another file with a
secret in it; in the cursor's own file a secret is replaced by the fake value that data.clean gives it.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from codegemma.editor.buffers import plain
from codegemma.prompts import File

if TYPE_CHECKING:
    from codegemma.data.clean import Finding

MOST_FILES = 20_000  # of a repository, that imports may point at
MOST_CHARACTERS = 24_000  # of all other files together
MOST_OF_A_FILE = 8_000  # its start: imports, declarations
FRESH = 60.0  # seconds that a list of files holds
PERSONAL = frozenset(("e-mail", "author", "ipv4", "ipv6", "phone"))  # kinds of finding that are no secrets

SECRET_NAME = re.compile(
    r"\.env(rc|\..*)?|.*\.(env|pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|tfvars|tfstate)|id_(rsa|dsa|ecdsa|ed25519)(\..*)?"
    r"|\.(netrc|npmrc|pypirc|pgpass|htpasswd|git-credentials|dockercfg)|_netrc|credentials(\..*)?|secrets?\.\w+"
    r"|service[-_]account.*\.json|kubeconfig|known_hosts|authorized_keys",
    re.I,
)


@dataclass(frozen=True)
class Open:
    """An open document as it stands. `path` is None for one without a file."""

    path: Path | None
    text: str


class Guard:
    """Tells which files may be read into a prompt. `folders` are the editor's; a repository's top is found by its .git."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self.folders = [folder.absolute() for folder in folders]
        self._specs: dict[Path, tuple[int, Sequence[Any]]] = {}

    def refuses(self, path: Path) -> str:
        """Why a file must not enter a prompt; "" where it may."""
        path = path.absolute()
        if any(SECRET_NAME.fullmatch(name) for name in {path.name, path.resolve().name}):
            return "its name speaks of credentials"
        if ".git" in path.parts:
            return "it belongs to git"
        return "git ignores it" if self._ignored(path) else ""

    def root(self, path: Path) -> Path:
        """The repository that a file is in; else the editor's folder, else the file's own."""
        for folder in path.absolute().parents:
            if (folder / ".git").exists():
                return folder
        return next(
            (folder for folder in self.folders if folder in path.absolute().parents), path.absolute().parent
        )

    def _ignored(self, path: Path) -> bool:
        """As git decides: the deepest rule that speaks of a file, or of a folder above it, counts."""
        root = self.root(path)
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        rules = [
            (root, self._spec(file))
            for file in (config / "git" / "ignore", root / ".git" / "info" / "exclude")
        ]
        names = path.relative_to(root).parts
        for depth in range(len(names)):
            folder = root.joinpath(*names[:depth])
            rules.append((folder, self._spec(folder / ".gitignore")))
            verdict = None
            for base, spec in rules:
                inside = (folder / names[depth]).relative_to(base).as_posix() + "/" * (depth + 1 < len(names))
                verdict = next((rule.include for rule in reversed(spec) if _speaks_of(rule, inside)), verdict)
            if verdict:
                return True
        return False

    def _spec(self, file: Path) -> Sequence[Any]:
        """The rules of an ignore file, read again when it changes."""
        from pathspec import GitIgnoreSpec

        try:
            changed = file.stat().st_mtime_ns
            if self._specs.get(file, (0, ()))[0] != changed:
                found = GitIgnoreSpec.from_lines(file.read_text("utf-8", "replace").splitlines())
                self._specs[file] = changed, [rule for rule in found.patterns if rule.include is not None]
        except OSError:
            self._specs.pop(file, None)
        return self._specs.get(file, (0, ()))[1]


def _speaks_of(rule: Any, path: str) -> bool:
    """Whether a rule names this very path ("/" behind a folder). pathspec's own check takes what is below a folder too,
    where git lets `!folder/` bring back the folder alone."""
    if not rule.regex.pattern.startswith("^"):  # all, or all folders
        return rule.regex.pattern == "." or path.endswith("/")
    if "ps_d" in rule.regex.groupindex:
        return bool(rule.regex.fullmatch(path))
    found = rule.regex.match(path)  # folder/**
    return bool(found) and found.end() < len(path)


def secrets(text: str) -> list[Finding]:
    """Credentials in a text, in order; personal data is none."""
    from codegemma.data.clean import default_redactor

    return [found for found in default_redactor().find(text) if found.kind not in PERSONAL]


@lru_cache(64)
def holds_secret(text: str) -> bool:
    return bool(secrets(text))


def redacted(prefix: str, suffix: str) -> tuple[str, str]:
    """Both with every secret replaced, also one that the cursor stands in."""
    sides, at, cursor = ["", ""], 0, len(prefix)
    text = prefix + suffix

    def add(start: int, piece: str) -> None:
        left = max(0, min(len(piece), cursor - start))
        sides[0] += piece[:left]
        sides[1] += piece[left:]

    for found in secrets(text):
        add(at, text[at : found.start])
        if found.end <= cursor:
            sides[0] += found.fake
        else:
            add(found.start, found.fake)
        at = found.end
    add(at, text[at:])
    return sides[0], sides[1]


class Neighbours:
    """The files that a completion may draw on. `log` hears, once each, what is left out and why. For several threads."""

    def __init__(self, guard: Guard, log: Callable[[str], None] = lambda text: None) -> None:
        self.guard, self.log = guard, log
        self._told: set[str] = set()
        self._lists: dict[Path, _List] = {}
        self._texts: dict[Path, tuple[tuple[int, int], str]] = {}
        self._lock = Lock()  # a grammar's parser serves one thread

    def files(
        self, document: Open, others: Iterable[Open], imports: bool = True, hurry: bool = True
    ) -> list[File]:
        """The other open documents, then the files that `document` imports, what is nearest last, as far as they fit.

        In a `hurry` no repository is walked: imports are followed once a call that had time has listed its files.
        """
        texts = {other.path or Path(f"untitled-{at}"): other.text for at, other in enumerate(others)}
        wanted = self._imported(document, hurry) if imports and document.path else []
        chosen: list[File] = []
        room = MOST_CHARACTERS
        for path in reversed([*(path for path in texts if path not in wanted), *wanted]):
            text = plain(texts[path] if path in texts else self._read(path))
            start = _start(text)
            if path == document.path or not start.strip() or len(start) > room or not self._may(path, text):
                continue
            room -= len(start)
            chosen.append(File(self.shown(path), start))
        return chosen[::-1]

    def shown(self, path: Path) -> str:
        """A path as the model is told it."""
        name = path.relative_to(self.guard.root(path)).as_posix() if path.is_absolute() else path.name
        return re.sub(r"[\r\n]", " ", name)

    def tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.log(text)

    def _may(self, path: Path, text: str) -> bool:
        reason = self.guard.refuses(path) if path.is_absolute() else ""
        if not reason and holds_secret(text):
            reason = "it holds a secret"
        if reason:
            self.tell(f"{path} is left out of prompts: {reason}")
        return not reason

    def _imported(self, document: Open, hurry: bool) -> list[Path]:
        """The files of the repository that a document imports; those of which it takes most names come last."""
        assert document.path is not None
        if not self._lock.acquire(timeout=0.02 if hurry else -1):
            return []
        try:
            return self._resolved(document.path, document.text, hurry)
        except ImportError as error:
            self.tell(
                f"imports are not followed, only open documents are read: {error.name} is not installed "
                '(pip install "codegemma[data]")'
            )
            return []
        finally:
            self._lock.release()

    def _resolved(self, path: Path, text: str, hurry: bool) -> list[Path]:
        from codegemma.data import graph

        root = self.guard.root(path)
        own = path.relative_to(root).as_posix()
        known = self._lists.get(root)
        if not hurry and (known is None or own not in known.places or time.monotonic() - known.made > FRESH):
            known = self._lists[root] = _List(root, own)
        if known is None or own not in known.places:
            return []
        counts: Counter[int] = Counter()
        for spec in graph.imports(plain(text), known.languages[own]):
            name, _, count = spec.rpartition(" ")
            for target in known.resolve(known.places[own], name) if name else ():
                counts[target] += int(count)
        del counts[known.places[own]]
        return [root / known.resolve.paths[at] for at in sorted(counts, key=lambda at: counts[at])]

    def _read(self, path: Path) -> str:
        """A file's start, read again when it changes."""
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
            if self._texts.get(path, ((), ""))[0] != stamp:
                with open(path, "rb") as source:
                    self._texts[path] = stamp, source.read(4 * MOST_OF_A_FILE).decode("utf-8", "ignore")
        except OSError:
            return ""
        return self._texts[path][1]


class _List:
    """Where the imports of a repository may point: its files that git does not ignore, and the document itself."""

    def __init__(self, root: Path, own: str) -> None:
        from codegemma.data import graph
        from codegemma.data.documents import _walk, language_of

        paths = sorted({own, *(entry.path for entry in islice(_walk(root), MOST_FILES) if not entry.reason)})
        self.languages = {path: language_of(path) for path in paths}
        self.resolve = graph.Resolver(root.name, paths, list(self.languages.values()))
        self.places = {path: at for at, path in enumerate(paths)}
        self.made = time.monotonic()


def _start(text: str) -> str:
    """Whole lines from the start, at most MOST_OF_A_FILE characters."""
    return text if len(text) <= MOST_OF_A_FILE else text[: text.rfind("\n", 0, MOST_OF_A_FILE) + 1]
