"""The files of a repository, each after those it imports, in the order that the CodeGemma report describes.

An import in the top lines of a file matches another file if one's path ends with the other's (resolve.py).
The least important edges are removed until no cycle is left. The topological order continues with the file
nearest to those already placed, or of equally near ones the first by name. The report does not give the
number of top lines (ours is imports.TOP_LINES) or the importance of an edge, which is here

    importance(u imports v) = names that u imports from v + (1 if u and v are in one folder, else 0)
                              - log2(number of files that import v)
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from codegemma.data.documents import Document
from codegemma.data.imports import imports_of_text
from codegemma.data.resolve import Resolver


@dataclass(frozen=True)
class Edge:
    """File `source` imports `names` names from file `target`; files are indices into the sorted paths."""

    source: int
    target: int
    names: int
    importance: float = 0.0


def edges(repository: str, documents: Sequence[Document]) -> list[Edge]:
    """Which of the documents, sorted by path, import which, with the importance of each edge."""
    lists = [
        imports_of_text(document.text, document.language) if document.imports is None else document.imports
        for document in documents
    ]
    declared = [(file, name[1:]) for file, names in enumerate(lists) for name in names if name[:1] == "="]
    paths, languages = (
        [document.path for document in documents],
        [document.language for document in documents],
    )
    resolve = Resolver(repository, paths, languages, declared)
    names: dict[tuple[int, int], int] = defaultdict(int)
    for source, imports in enumerate(lists):
        for entry in imports:
            name, _, count = entry.rpartition(" ")
            for target in resolve(source, name) if entry[:1] != "=" else ():
                if target != source:
                    names[source, target] += int(count)
    importers = Counter(target for _, target in names)
    folders = [path.rpartition("/")[0] for path in paths]
    result = []
    for (source, target), imported in sorted(names.items()):
        importance = imported + (folders[source] == folders[target]) - math.log2(importers[target])
        result.append(Edge(source, target, imported, importance))
    return result


# ---------------------------------------------------------------------------------------------- linear order
def acyclic(count: int, candidates: Sequence[Edge]) -> list[Edge]:
    """The edges, except each that closes a cycle with more important ones; ties by (source, target).

    By the incremental topological order of Pearce and Kelly (2006), a check visits only the files placed
    between the two ends of an edge.
    """
    place = _first_places(count, candidates)  # place[target] < place[source] for all edges kept
    importers: list[list[int]] = [[] for _ in range(count)]
    imported: list[list[int]] = [[] for _ in range(count)]
    kept = []
    for edge in sorted(candidates, key=lambda e: (-e.importance, e.source, e.target)):
        source, target = edge.source, edge.target
        if place[source] <= place[target]:  # move the target before the source, unless that closes a cycle
            span = range(place[source], place[target] + 1)
            above = _reachable(source, importers, place, span, target)
            if target in above:
                continue
            below = _reachable(target, imported, place, span)
            moved = sorted(below, key=place.__getitem__) + sorted(above, key=place.__getitem__)
            for node, slot in zip(moved, sorted(place[node] for node in moved), strict=True):
                place[node] = slot
        importers[target].append(source)
        imported[source].append(target)
        kept.append(edge)
    return kept


def _reachable(
    start: int, neighbours: list[list[int]], place: list[int], span: range, goal: int = -1
) -> set[int]:
    """The nodes placed in `span` that can be reached from `start`; the search ends at `goal`."""
    reached, stack = {start}, [start]
    while stack and goal not in reached:
        fresh = [node for node in neighbours[stack.pop()] if place[node] in span and node not in reached]
        reached.update(fresh)
        stack += fresh
    return reached


def _first_places(count: int, candidates: Sequence[Edge]) -> list[int]:
    """Places by depth-first search: imports first, except in a cycle, so that few files must move."""
    targets: list[list[int]] = [[] for _ in range(count)]
    for edge in candidates:
        targets[edge.source].append(edge.target)
    place: dict[int, int] = {}
    visited: set[int] = set()
    stack = list(range(count))[::-1]
    while stack:
        node = stack[-1]
        if node not in visited:  # its imports first
            visited.add(node)
            stack += [target for target in targets[node] if target not in visited]
        else:
            place.setdefault(stack.pop(), len(place))
    return [place[node] for node in range(count)]


def linear(count: int, kept: Sequence[Edge]) -> list[list[int]]:
    """The connected components of the graph, in each a file after what it imports.

    Of the files that may be next, the nearest to the placed files is taken; of several, the first by name.
    Distance is the number of edges in either direction. Instead of the report's all-pairs distances, only the
    distance to the set of placed files is kept: each placement lowers it by a breadth-first search.
    """
    near: list[list[int]] = [[] for _ in range(count)]
    importers: list[list[int]] = [[] for _ in range(count)]
    missing = [0] * count  # imports that are not placed yet
    for edge in kept:
        near[edge.source].append(edge.target)
        near[edge.target].append(edge.source)
        importers[edge.target].append(edge.source)
        missing[edge.source] += 1
    distance = [count + 1] * count
    ready = [(count + 1, node) for node in range(count) if not missing[node]]
    heapq.heapify(ready)
    placed = [False] * count
    components: list[list[int]] = []
    while ready:
        far, node = heapq.heappop(ready)
        if placed[node] or far != distance[node]:
            continue
        placed[node] = True
        if far > count:  # nothing placed is connected with it
            components.append([])
        components[-1].append(node)
        for importer in importers[node]:
            missing[importer] -= 1
            if not missing[importer]:
                heapq.heappush(ready, (distance[importer], importer))
        for other in _lower_distances(node, near, distance):
            if not placed[other] and not missing[other]:
                heapq.heappush(ready, (distance[other], other))
    return components


def _lower_distances(start: int, near: list[list[int]], distance: list[int]) -> list[int]:
    """Sets the distance of a file to 0 and lowers those around it; returns the files lowered."""
    distance[start], queue = 0, [start]
    for node in queue:  # which grows meanwhile
        for other in near[node]:
            if distance[other] > distance[node] + 1:
                distance[other] = distance[node] + 1
                queue.append(other)
    return queue[1:]


def order(repository: str, documents: Sequence[Document]) -> tuple[list[list[int]], list[Edge]]:
    """The connected components of more than one file, each in packed order, and the edges kept.

    `documents` are sorted by path.
    """
    kept = acyclic(len(documents), edges(repository, documents))
    return [component for component in linear(len(documents), kept) if len(component) > 1], kept
