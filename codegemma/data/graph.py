"""Files of a repository in the order of their dependencies, as the CodeGemma report words it.

Imports of the top lines are matched with the longest path suffix in the repository; unimportant edges are removed until
no cycle is left; a topological order takes next the file at the least distance from those already placed, and of equals
the first by name. N (`TOP_LINES`) and the importance of an edge are not published; ours stand here:

    importance(u imports v) = names imported + 1 where u and v share a folder - log2(files that import v)
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from codegemma.data import syntax
from codegemma.data.documents import Document

if TYPE_CHECKING:
    import tree_sitter

TOP_LINES = 200
MOST_TARGETS = 8  # files that one import of a whole package or namespace may point at

FAMILY = {
    "python": "python",
    "java": "jvm",
    "kotlin": "jvm",
    "javascript": "js",
    "jsx": "js",
    "typescript": "js",
    "tsx": "js",
    "go": "go",
    "c": "c",
    "cpp": "c",
    "cuda": "c",
    "csharp": "csharp",
    "rust": "rust",
}
QUERIES = {
    "python": "[(import_statement) (import_from_statement)] @i",
    "java": "[(import_declaration) (package_declaration)] @i",
    "kotlin": "[(import) (package_header)] @i",
    "js": "[(import_statement) (export_statement source: (_)) (call_expression function: [(import) (identifier)]"
    " arguments: (arguments . (string) .))] @i",
    "go": "(import_spec) @i",
    "c": "(preproc_include) @i",
    "csharp": "[(using_directive) (namespace_declaration name: (_) @n) "
    "(file_scoped_namespace_declaration name: (_) @n)] @i",
    "rust": "[(use_declaration) (mod_item !body)] @i",
}


# ------------------------------------------------------------------------------------------------- imports
def imports(text: str, language: str, lines: int = TOP_LINES) -> tuple[str, ...]:
    """What the top lines of a text import: "a/b 2" for two names from a.b, "./a 1" relative, "=a/b" a declared name."""
    top = "\n".join(text.split("\n", lines)[:lines])
    tree = syntax.parse(top, language) if language in FAMILY else None
    return imports_of(tree, language, lines) if tree else ()


def imports_of(tree: tree_sitter.Tree, language: str, lines: int = TOP_LINES) -> tuple[str, ...]:
    """`imports` of a text that is parsed already."""
    import tree_sitter

    if language not in FAMILY or language not in syntax.GRAMMARS:
        return ()
    cursor = tree_sitter.QueryCursor(_query(language))
    cursor.set_point_range((0, 0), (lines, 0))
    found: list[str] = []
    for node in sorted(cursor.captures(tree.root_node).get("i", []), key=lambda node: node.start_byte):
        statement = (node.text or b"").decode("utf-8", "replace")
        if node.start_point[0] < lines:
            found += _READERS[FAMILY[language]](statement)
    return tuple(dict.fromkeys(found))


@cache
def _query(language: str) -> tree_sitter.Query:
    import tree_sitter

    grammar = syntax.parser(language).language
    assert grammar is not None
    return tree_sitter.Query(grammar, QUERIES.get(language) or QUERIES[FAMILY[language]])


def _python(statement: str) -> list[str]:
    flat = " ".join(re.sub(r"#.*", "", statement).replace("\\\n", " ").split())
    if match := re.match(r"from (\.*) ?([\w.]*) import (.*)", flat):
        dots, module, rest = match.groups()
        names = [name.split(" ")[0] for name in re.split(r"[(),]\s*", rest) if name.strip()]
        base = ("./" if len(dots) == 1 else "../" * (len(dots) - 1)) + module.replace(".", "/")
        return [f"{base} {len(names)}", *[f"{base.rstrip('/')}/{name} 1" for name in names if name != "*"]]
    return [
        f"{name.strip().split(' ')[0].replace('.', '/')} 1"
        for name in flat.removeprefix("import ").split(",")
    ]


def _jvm(statement: str) -> list[str]:
    keyword, _, rest = statement.strip().rstrip(";").partition(" ")
    name = re.sub(r"^static\s+|\s+as\s.*|\s", "", rest).replace(".", "/")
    return [f"={name}" if keyword == "package" else f"{name} 1"]


def _js(statement: str) -> list[str]:
    target = re.search(r"""(?:from|import|require)\s*\(?\s*["']([^"']+)["']""", statement)
    names = re.search(r"\{([^}]*)\}", statement)
    count = len([name for name in names[1].split(",") if name.strip()]) if names else 1
    return [f"{target[1].split('?')[0].replace(' ', '%20')} {max(1, count)}"] if target else []


def _go(statement: str) -> list[str]:
    return [f"{match[1]} 1" for match in re.finditer(r'["`]([^"`\s]+)["`]', statement)]


def _c(statement: str) -> list[str]:
    match = re.search(r'([<"])([^">]+)[">]', statement)
    return [f"{'<' if match[1] == '<' else ''}{match[2].strip().replace(' ', '%20')} 1"] if match else []


def _csharp(statement: str) -> list[str]:
    if match := re.match(r"namespace\s+([\w.]+)", statement):
        return [f"={match[1].replace('.', '/')}"]
    match = re.match(r"(?:global\s+)?using\s+(?:static\s+)?(?:\w+\s*=\s*)?([\w.]+)\s*;", statement)
    return [f"{match[1].replace('.', '/')} 1"] if match else []


def _rust(statement: str) -> list[str]:
    if match := re.search(r"\bmod\s+(\w+)\s*;", statement):
        return [f"mod/{match[1]} 2"]
    argument = re.sub(r"//.*|\s", "", re.sub(r".*?\buse\s+", "", statement, count=1, flags=re.S).rstrip(";"))
    return [
        f"{name.replace('::', '/')} 1"
        for name in _rust_tree(re.sub(r"as\w+(?=[,}]|$)", "", argument))
        if name
    ]


def _rust_tree(text: str, depth: int = 0) -> list[str]:
    """`a::{b, c::{d}}` -> a::b, a::c::d."""
    head, brace, rest = text.partition("{")
    if not brace or depth > 8:
        return [text.rstrip(":*{},")]
    parts, level, start = [], 0, 0
    for at, letter in enumerate(rest):
        level += (letter == "{") - (letter == "}")
        if (letter == "," and level == 0) or level < 0:
            parts.append(rest[start:at])
            start = at + 1
        if level < 0:
            break
    return [head + name for part in parts if part for name in _rust_tree(part, depth + 1)]


_READERS: dict[str, Callable[[str], list[str]]] = {
    "python": _python,
    "jvm": _jvm,
    "js": _js,
    "go": _go,
    "c": _c,
    "csharp": _csharp,
    "rust": _rust,
}


# ---------------------------------------------------------------------------------------------- resolution
@dataclass(frozen=True)
class Edge:
    """File `source` imports file `target` (places in the sorted list of paths)."""

    source: int
    target: int
    names: int
    importance: float = 0.0


def _module(path: str, family: str) -> str:
    """What an import calls a file: its path without the ending; for a package or an index file, its folder."""
    if family == "c":
        return path
    stem = re.sub(r"(\.d)?\.\w+$", "", path)
    last = {"python": "__init__", "js": "index", "rust": "mod"}.get(family)
    if family == "go":
        return str(PurePosixPath(path).parent)
    return stem.removesuffix(f"/{last}") if last else stem


class Resolver:
    """The suffix index of one repository: import -> files."""

    def __init__(
        self,
        repository: str,
        paths: Sequence[str],
        languages: Sequence[str],
        declared: Iterable[tuple[int, str]] = (),
    ):
        self.paths, self.family = paths, [FAMILY.get(language, "") for language in languages]
        self.name = re.sub(r"[-.\d]*$", "", repository.rsplit("/", 1)[-1]).replace("-", "_").lower()
        self.whole: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.suffixes: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.namespaces: dict[str, list[int]] = defaultdict(list)
        for at, (path, family) in enumerate(zip(paths, self.family, strict=True)):
            if family:
                parts = _module(path, family).split("/")
                self.whole[family, "/".join(parts)].append(at)
                for start in range(len(parts)):
                    self.suffixes[family, "/".join(parts[start:])].append(at)
        for at, name in declared:
            self.namespaces[name].append(at)

    def __call__(self, importer: int, name: str) -> list[int]:
        """The files that `name`, an import of file `importer`, stands for; empty where it is none of the repository."""
        family, folder = self.family[importer], PurePosixPath(self.paths[importer]).parent
        if family == "rust":
            return self._rust(importer, name)
        if name.startswith("."):
            return self._nearest(importer, self._relative(family, str(folder / name)))
        if family == "c":
            angled, name = name.startswith("<"), name.removeprefix("<")
            own = [] if angled else self._relative("c", str(folder / name))
            suffix = [] if angled and "/" not in name else self.suffixes.get(("c", _flat(name)), [])
            return self._nearest(importer, own or suffix)
        if family == "js":
            local = name.startswith(("@/", "~/")) or (name.count("/") > (1 if name.startswith("@") else 0))
            stem = (
                _module(name.lstrip("@~").lstrip("/"), "js")
                if re.search(r"\.[cm]?[jt]sx?$", name)
                else name.lstrip("@~").lstrip("/")
            )
            return self._nearest(importer, self.suffixes.get(("js", stem), [])) if local else []
        if family == "go":
            return self._tail("go", name.split("/"), most=MOST_TARGETS) if "." in name.split("/")[0] else []
        if family == "csharp":
            return self._nearest(importer, self.namespaces.get(name, []), MOST_TARGETS)
        return self._absolute(importer, family, name)

    def _absolute(self, importer: int, family: str, name: str) -> list[int]:
        """Python and the JVM: the import is the end of a path, or (an own package's name in front) a path its end."""
        if family == "jvm" and name.endswith("/*"):
            return self._nearest(importer, self.namespaces.get(name[:-2], []), MOST_TARGETS)
        found = self.suffixes.get((family, name), [])
        if "/" not in name:
            roots = {"", "src", "lib", "python"} | {
                str(p) for p in PurePosixPath(self.paths[importer]).parents
            }
            found = [
                at for at in found if _flat(_module(self.paths[at], family)[: -len(name)]) in roots | {"."}
            ]
        if (
            family == "jvm" and not found and "/" in name
        ):  # a static member, or a function of a Kotlin package
            outer = name.rsplit("/", 1)[0]
            found = self.suffixes.get((family, outer), []) if "/" in outer else []
        return self._nearest(importer, found) or self._tail(family, name.split("/"), 1)

    def _tail(self, family: str, parts: list[str], most: int) -> list[int]:
        """The longest tail of an import that is a whole path, where what is cut off is the repository or long
        enough."""
        for start in range(1 if family != "go" else 0, len(parts)):
            owner = parts[start - 1].lower() if start else self.name
            if (len(parts) - start >= 2 or owner == self.name or family == "go") and (
                found := self.whole.get((family, "/".join(parts[start:])))
            ):
                return found[:most]
        root = parts[-1].lower() == self.name
        return self.whole.get((family, "."), [])[:most] if family == "go" and root else []

    def _relative(self, family: str, path: str) -> list[int]:
        flat = _flat(path)
        if flat is None:
            return []
        stem = _module(flat, "js") if family == "js" and re.search(r"\.[cm]?[jt]sx?$", flat) else flat
        index = {"python": "__init__", "js": "index"}.get(family)
        return (
            self.whole.get((family, flat))
            or self.whole.get((family, stem))
            or (self.whole.get((family, index), []) if index and stem in ("", ".") else [])
        )

    def _rust(self, importer: int, name: str) -> list[int]:
        path = PurePosixPath(self.paths[importer])
        own = path.parent if path.stem in ("mod", "lib", "main") else path.parent / path.stem
        first, *rest = name.split("/")
        base = {"mod": own, "self": own, "super": own.parent}.get(first)
        while rest and rest[0] == "super" and base is not None:
            base, rest = base.parent, rest[1:]
        for end in range(len(rest), 0, -1):
            tail = "/".join(rest[:end])
            if base is not None and (found := self._relative("rust", str(base / tail))):
                return found[:1]
            if first == "crate" and (found := self.suffixes.get(("rust", f"src/{tail}"), [])):
                return self._nearest(importer, found)
        return []

    def _nearest(self, importer: int, found: Sequence[int], most: int = 1) -> list[int]:
        """Of several: those that share the most leading folders with the importer, then the shortest, then by name."""
        own = self.paths[importer].split("/")[:-1]

        def rank(at: int) -> tuple[int, int, str]:
            there = self.paths[at].split("/")[:-1]
            shared = next(
                (i for i, (a, b) in enumerate(zip(own, there, strict=False)) if a != b),
                min(len(own), len(there)),
            )
            return -shared, len(self.paths[at]), self.paths[at]

        return (
            sorted((at for at in found if at != importer), key=rank)[:most] if len(found) > 1 else list(found)
        )


def _flat(path: str) -> str:
    """A path without "." and ".."; one that leaves the repository matches nothing."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return "\0"
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def edges(repository: str, documents: Sequence[Document]) -> list[Edge]:
    """Who imports whom among documents sorted by path, with the importance of each edge."""
    lists = [imports(doc.text, doc.language) if doc.imports is None else doc.imports for doc in documents]
    declared = [(at, name[1:]) for at, names in enumerate(lists) for name in names if name.startswith("=")]
    resolve = Resolver(
        repository, [doc.path for doc in documents], [doc.language for doc in documents], declared
    )
    names: dict[tuple[int, int], int] = defaultdict(int)
    for source, wanted in enumerate(lists):
        for spec in wanted:
            if not spec.startswith("="):
                name, _, count = spec.rpartition(" ")
                for target in resolve(source, name):
                    if target != source:
                        names[source, target] += int(count)
    fan_in: dict[int, int] = defaultdict(int)
    for _, target in names:
        fan_in[target] += 1
    folder = [doc.path.rpartition("/")[0] for doc in documents]
    return [
        Edge(s, t, n, n + (folder[s] == folder[t]) - math.log2(fan_in[t]))
        for (s, t), n in sorted(names.items())
    ]


# ------------------------------------------------------------------------------------------- linear order
def acyclic(count: int, found: Sequence[Edge]) -> list[Edge]:
    """The edges left when each one that closes a cycle with more important ones is removed.

    Ties by (source, target). Incremental topological order of Pearce and Kelly (2006), so that a check looks only at
    the files between the two ends.
    """
    place = _first_places(count, found)  # place[target] < place[source] for all edges kept
    up: list[list[int]] = [[] for _ in range(count)]
    down: list[list[int]] = [[] for _ in range(count)]
    kept = []
    for edge in sorted(found, key=lambda e: (-e.importance, e.source, e.target)):
        source, target = edge.source, edge.target
        low, high = place[source], place[target]
        if low <= high:  # target stands after source: move it, unless a cycle forbids
            above, stack = {source}, [source]
            while stack and target not in above:
                fresh = [node for node in up[stack.pop()] if place[node] <= high and node not in above]
                above.update(fresh)
                stack += fresh
            if target in above:
                continue
            below, stack = {target}, [target]
            while stack:
                fresh = [node for node in down[stack.pop()] if place[node] >= low and node not in below]
                below.update(fresh)
                stack += fresh
            moved = sorted(below, key=place.__getitem__) + sorted(above, key=place.__getitem__)
            for node, slot in zip(moved, sorted(map(place.__getitem__, moved)), strict=True):
                place[node] = slot
        up[target].append(source)
        down[source].append(target)
        kept.append(edge)
    return kept


def _first_places(count: int, found: Sequence[Edge]) -> list[int]:
    """Where a depth-first search leaves each file: imports first wherever no cycle forbids, so few files must move."""
    targets: list[list[int]] = [[] for _ in range(count)]
    for edge in found:
        targets[edge.source].append(edge.target)
    place, seen, left = [0] * count, [False] * count, 0
    for start in range(count):
        stack = [(start, iter(targets[start]))] if not seen[start] else []
        seen[start] = True
        while stack:
            node, rest = stack[-1]
            fresh = next((other for other in rest if not seen[other]), None)
            if fresh is None:
                place[node], left = left, left + 1
                stack.pop()
            else:
                seen[fresh] = True
                stack.append((fresh, iter(targets[fresh])))
    return place


def linear(count: int, kept: Sequence[Edge]) -> list[int]:
    """Files after what they import; of those that may come next the one nearest to the files placed, then the first.

    Distance is the number of edges, whichever way they point. The report's all-pairs distances are needed only to the
    set of placed files, so each placement lowers them by a breadth-first search that stops where nothing gets nearer.
    """
    near: list[list[int]] = [[] for _ in range(count)]
    waits, users = [0] * count, [[] for _ in range(count)]  # type: list[int], list[list[int]]
    for edge in kept:
        near[edge.source].append(edge.target)
        near[edge.target].append(edge.source)
        users[edge.target].append(edge.source)
        waits[edge.source] += 1
    distance = [count + 1] * count
    ready = [(count + 1, node) for node in range(count) if not waits[node]]
    heapq.heapify(ready)
    placed, order = [False] * count, []
    while ready:
        far, node = heapq.heappop(ready)
        if placed[node] or far != distance[node]:
            continue
        placed[node] = True
        order.append(node)
        for user in users[node]:
            waits[user] -= 1
        distance[node], front = 0, [node]
        for user in users[node]:
            if not waits[user]:
                heapq.heappush(ready, (distance[user], user))
        step = 0
        while front:
            step += 1
            front = [other for at in front for other in near[at] if _lower(distance, other, step)]
            for other in front:
                if not placed[other] and not waits[other]:
                    heapq.heappush(ready, (step, other))
    return order


def _lower(distance: list[int], node: int, step: int) -> bool:
    if distance[node] <= step:
        return False
    distance[node] = step
    return True


def components(count: int, kept: Sequence[Edge], order: Sequence[int]) -> list[list[int]]:
    """The order cut into its connected parts of two files and more; `linear` keeps each part together."""
    root = list(range(count))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for edge in kept:
        root[find(edge.source)] = find(edge.target)
    parts: dict[int, list[int]] = {}
    for node in order:
        parts.setdefault(find(node), []).append(node)
    return [part for part in parts.values() if len(part) > 1]


def order(repository: str, documents: Sequence[Document]) -> tuple[list[list[int]], list[Edge]]:
    """(connected files, each part in its packed order; edges kept) of documents sorted by path."""
    kept = acyclic(len(documents), edges(repository, documents))
    return components(len(documents), kept, linear(len(documents), kept)), kept
