"""Finds the files of a repository that an import refers to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from pathlib import PurePosixPath
from posixpath import normpath

from codegemma.data.imports import FAMILIES

MAX_TARGETS = 8  # files that one import of a package or namespace may refer to
INDEX_FILES = {"python": "__init__", "js": "index", "rust": "mod"}  # imported by the name of their folder
JS_ENDING = re.compile(r"\.[cm]?[jt]sx?$")


def module_name(path: str, family: str) -> str:
    """The name by which a file is imported: its path without the ending, or the folder of an index file."""
    if family == "c":
        return path
    if family == "go":
        return str(PurePosixPath(path).parent)
    stem = re.sub(r"(\.d)?\.\w+$", "", path)
    return stem.removesuffix(f"/{INDEX_FILES[family]}") if family in INDEX_FILES else stem


class Resolver:
    """The index of one repository's files by the ends of their paths. Files are indices into `paths`.

    `declared` gives the packages and namespaces that files declare, as (file, name).
    """

    def __init__(
        self,
        repository: str,
        paths: Sequence[str],
        languages: Sequence[str],
        declared: Iterable[tuple[int, str]] = (),
    ):
        self.paths, self.families = paths, [FAMILIES.get(language, "") for language in languages]
        self.name = re.sub(r"[-.\d]*$", "", repository.rsplit("/", 1)[-1]).replace("-", "_").lower()
        self.modules: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.suffixes: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.namespaces: dict[str, list[int]] = defaultdict(list)
        for file, (path, family) in enumerate(zip(paths, self.families, strict=True)):
            if family:
                parts = module_name(path, family).split("/")
                self.modules[family, "/".join(parts)].append(file)
                for start in range(len(parts)):
                    self.suffixes[family, "/".join(parts[start:])].append(file)
        for file, name in declared:
            self.namespaces[name].append(file)

    def __call__(self, importer: int, name: str) -> list[int]:
        """The files that `name` refers to in file `importer`; none if it is of another repository."""
        family, folder = self.families[importer], PurePosixPath(self.paths[importer]).parent
        if family == "rust":
            return self._rust(importer, name)
        if name.startswith("."):
            return self._nearest(importer, self._at_path(family, str(folder / name)))
        if family == "c":
            return self._c(importer, name)
        if family == "js":
            is_local = name.startswith(("@/", "~/")) or name.count("/") > name.startswith("@")
            path = name.lstrip("@~").lstrip("/")
            path = module_name(path, "js") if JS_ENDING.search(name) else path
            return self._nearest(importer, self.suffixes.get(("js", path), [])) if is_local else []
        if family == "go":
            return self._by_tail("go", name, MAX_TARGETS) if "." in name.split("/")[0] else []
        if family == "csharp":
            return self._nearest(importer, self.namespaces.get(name, []), MAX_TARGETS)
        return self._absolute(importer, family, name)

    def _c(self, importer: int, name: str) -> list[int]:
        """#include "x" looks beside the importer first; <x> without "/" is taken for the standard library."""
        is_angled, name = name.startswith("<"), name.removeprefix("<")
        beside = PurePosixPath(self.paths[importer]).parent / name
        files = [] if is_angled else self._at_path("c", str(beside))
        if not files and ("/" in name or not is_angled):
            files = self.suffixes.get(("c", _flat(name)), [])
        return self._nearest(importer, files)

    def _absolute(self, importer: int, family: str, name: str) -> list[int]:
        """Python and the JVM: an import is the end of a path, perhaps after the repository's name."""
        if family == "jvm" and name.endswith("/*"):
            return self._nearest(importer, self.namespaces.get(name[:-2], []), MAX_TARGETS)
        files = self.suffixes.get((family, name), [])
        if "/" not in name:  # a short name means a file at a root, not any file of that name
            parents = map(str, PurePosixPath(self.paths[importer]).parents)
            roots = {"", ".", "src", "lib", "python", *parents}
            names = {file: module_name(self.paths[file], family) for file in files}
            files = [file for file in files if _flat(names[file][: -len(name)]) in roots]
        elif family == "jvm" and not files:  # a static member, or a function of a Kotlin package
            outer = name.rsplit("/", 1)[0]
            files = self.suffixes.get((family, outer), []) if "/" in outer else []
        return self._nearest(importer, files) or self._by_tail(family, name, 1)

    def _by_tail(self, family: str, name: str, limit: int) -> list[int]:
        """The files whose full name is the longest possible end of an import.

        An end of one part counts only where the part before it is the repository's name.
        """
        parts, is_go = name.split("/"), family == "go"
        for start in range(0 if is_go else 1, len(parts)):
            owner = parts[start - 1].lower() if start else self.name
            files = self.modules.get((family, "/".join(parts[start:])))
            if files and (is_go or len(parts) - start >= 2 or owner == self.name):
                return files[:limit]
        is_root = is_go and parts[-1].lower() == self.name
        return self.modules.get((family, "."), [])[:limit] if is_root else []

    def _at_path(self, family: str, path: str) -> list[int]:
        """The files at a path within the repository; the path may be without its ending."""
        flat = _flat(path)
        stem = module_name(flat, "js") if family == "js" and JS_ENDING.search(flat) else flat
        files = self.modules.get((family, flat)) or self.modules.get((family, stem))
        if not files and not stem and family in ("python", "js"):
            files = self.modules.get((family, INDEX_FILES[family]))
        return files or []

    def _rust(self, importer: int, name: str) -> list[int]:
        path = PurePosixPath(self.paths[importer])
        module = path.parent if path.stem in ("mod", "lib", "main") else path.parent / path.stem
        first, *rest = name.split("/")
        base = {"mod": module, "self": module, "super": module.parent}.get(first)
        while rest and rest[0] == "super" and base is not None:
            base, rest = base.parent, rest[1:]
        for end in range(len(rest), 0, -1):
            tail = "/".join(rest[:end])
            if base is not None and (files := self._at_path("rust", str(base / tail))):
                return files[:1]
            if first == "crate" and (files := self.suffixes.get(("rust", f"src/{tail}"), [])):
                return self._nearest(importer, files)
        return []

    def _nearest(self, importer: int, files: Sequence[int], limit: int = 1) -> list[int]:
        """The files nearest to the importer: most leading folders in common, then the shortest path."""
        folders = self.paths[importer].split("/")[:-1]

        def rank(file: int) -> tuple[int, int, str]:
            path = self.paths[file]
            return -len(commonprefix([folders, path.split("/")[:-1]])), len(path), path

        if len(files) <= 1:
            return list(files)
        return sorted((file for file in files if file != importer), key=rank)[:limit]


def _flat(path: str) -> str:
    """A path without "." and inner ".."; "" for the root. One that leaves the repository begins with ".."."""
    flat = normpath(path.lstrip("/"))
    return "" if flat == "." else flat
