"""Groups a repository's files: those linked by imports (graph.py), then the rest; tests beside their code.

A test that the graph leaves over is matched by its name (test_foo.py, FooTest.java, foo.spec.ts, foo_test.go,
Foo.Tests.cs), the nearest folder winning. The CodeGemma report's example is TestFoo.java beside Foo.java.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import PurePosixPath

from codegemma.data import graph, syntax
from codegemma.data.documents import Document

TEST_FOLDERS = frozenset(
    {"test", "tests", "__tests__", "spec", "specs", "testing", "unittest", "unittests", "androidTest"}
)
NEUTRAL_FOLDERS = TEST_FOLDERS | {"src", "main", "lib"}  # a test and its implementation may differ in these
NAMES: dict[str, list[str]] = {  # language -> patterns of the names of its tests
    language: [pattern for kind in kinds for pattern in syntax.LANGUAGES["test_names"][kind]]
    for language, kinds in syntax.LANGUAGES["tests"].items()
}


def tested_names(path: str, language: str) -> list[str]:
    """The names, without ending, of the files that this one may test.

    Where only its folder says that it is a test (tests/foo.py), that is its own name.
    """
    stem, folders = _stem(path), PurePosixPath(path).parts[:-1]
    names = [match[1] for pattern in NAMES.get(language, []) if (match := re.fullmatch(pattern, stem))]
    return names or ([stem] if TEST_FOLDERS & set(folders) and language in NAMES else [])


def _stem(path: str) -> str:
    return PurePosixPath(path).name.rpartition(".")[0] or PurePosixPath(path).name


def implementations(languages: Mapping[str, str]) -> dict[str, str]:
    """test -> the file that it tests, given the language of each path."""
    tests = {path: names for path, lang in sorted(languages.items()) if (names := tested_names(path, lang))}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in sorted(languages.keys() - tests.keys()):
        by_stem[_stem(path)].append(path)
    implementation_of = {}
    for test, names in tests.items():
        language = languages[test]
        options = [
            path
            for name in names
            for path in by_stem.get(name, ())
            if languages[path] == language or language in ("tsx", "jsx", "cpp", "typescript")
        ]
        if options:
            implementation_of[test] = min(options, key=lambda path: (*_distance(test, path), path))
    return implementation_of


def _distance(test: str, path: str) -> tuple[int, int]:
    """How many folders lie between two files, neutral ones not counted; then the difference in depth."""
    folders = [PurePosixPath(file).parts[:-1] for file in (test, path)]
    counted = [[part for part in parts if part not in NEUTRAL_FOLDERS] for parts in folders]
    apart = sum(map(len, counted)) - 2 * len(commonprefix(counted))
    return apart, abs(len(folders[0]) - len(folders[1]))


def group_files(
    documents: Sequence[Document],
) -> tuple[list[tuple[str, list[Document]]], list[graph.Edge]]:
    """(rule, files) of each group of a repository whose documents are sorted by path; and the graph's edges.

    Each connected component of the graph is a group ("graph"). All files that no import links form one more
    group ("beside tests"). A test outside the graph comes directly after its implementation, in whichever
    group that is.
    """
    if not documents or documents[0].kind != "code":
        return [("alone", [document]) for document in documents], []
    components, edges = graph.order(documents[0].repository, documents)
    tests = implementations({document.path: document.language for document in documents})
    in_graph = {node for component in components for node in component}
    tests_of: dict[str, list[Document]] = defaultdict(list)
    rest: list[Document] = []
    for node, document in enumerate(documents):
        if node not in in_graph:
            target = tests.get(document.path)
            (tests_of[target] if target else rest).append(document)
    groups = [("graph", [documents[node] for node in component]) for component in components]
    groups += [("beside tests", rest)] if rest else []
    with_tests = [
        (rule, [each for file in files for each in (file, *tests_of[file.path])]) for rule, files in groups
    ]
    return with_tests, edges
