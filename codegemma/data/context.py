"""Which other files may stand in front of a document's windows.

They are those that the language server would send: the files beside it in the packed order, as if they were
open in the editor, the tests of the document or what it tests, and the files that it imports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from codegemma.data.folder import StoredDocument
from codegemma.data.tests_beside import implementations
from codegemma.prompts import File

Edges = Mapping[tuple[str, str], float]  # (importing path, imported path) -> importance


def related_files(
    stored: Sequence[StoredDocument], edges_of: Mapping[str, Edges]
) -> dict[str, tuple[File, ...]]:
    """Document.name -> its related files, the most relevant last.

    `stored` are the code documents of a partition in packed order, `edges_of` the imports of each repository.
    """
    repositories: dict[str, list[StoredDocument]] = defaultdict(list)
    for each in stored:
        repositories[each.document.repository].append(each)
    related: dict[str, tuple[File, ...]] = {}
    for repository, documents in repositories.items():
        files = {each.document.path: File(each.document.path, each.document.text) for each in documents}
        paths: dict[str, list[str]] = defaultdict(list)
        for source, target in _pairs(documents, edges_of.get(repository, {})):
            paths[source].append(target)
        for each in documents:
            last_first = list(dict.fromkeys(reversed(paths[each.document.path])))
            related[each.document.name] = tuple(files[path] for path in reversed(last_first))
    return related


def _pairs(stored: Sequence[StoredDocument], edges: Edges) -> Iterator[tuple[str, str]]:
    """(path, related path), more relevant pairs later: neighbours in a group, tests and what they test,
    imports."""
    for before, after in zip(stored, stored[1:], strict=False):
        if before.group == after.group:
            yield after.document.path, before.document.path
            yield before.document.path, after.document.path
    tests = implementations({each.document.path: each.document.language for each in stored})
    for test, implementation in sorted(tests.items()):
        yield implementation, test
        yield test, implementation
    yield from sorted(edges, key=lambda pair: (edges[pair], pair))
