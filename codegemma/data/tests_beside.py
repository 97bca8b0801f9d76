"""Unit tests beside what they test: the order of the files that the dependency graph leaves over.

By name first (test_foo.py, FooTest.java, foo.spec.ts, foo_test.go, Foo.Tests.cs; the report's own example is
TestFoo.java beside Foo.java), the nearest folder winning.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from codegemma.data import syntax
from codegemma.data.resolve import shared_parts

TEST_FOLDERS = frozenset(
    {"test", "tests", "__tests__", "spec", "specs", "testing", "unittest", "unittests", "androidTest"}
)
NAMES: dict[str, list[str]] = {  # the patterns of each language
    language: [pattern for kind in kinds for pattern in syntax.LANGUAGES["test_names"][kind]]
    for language, kinds in syntax.LANGUAGES["tests"].items()
}


def tested(path: str, language: str) -> list[str]:
    """The names, without ending, of what a file tests; its own name where only its folder says "test"."""
    stem, folders = _stem(path), PurePosixPath(path).parts[:-1]
    names = [match[1] for pattern in NAMES.get(language, []) if (match := re.fullmatch(pattern, stem))]
    return names or ([stem] if TEST_FOLDERS & set(folders) and language in NAMES else [])


def _stem(path: str) -> str:
    return PurePosixPath(path).name.rpartition(".")[0] or PurePosixPath(path).name


def implementations(files: Mapping[str, str]) -> dict[str, str]:
    """test -> what it tests, for files given as path -> language."""
    tests = {path: names for path, language in sorted(files.items()) if (names := tested(path, language))}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in sorted(files.keys() - tests.keys()):
        by_stem[_stem(path)].append(path)
    implementation_of = {}
    for path, names in tests.items():
        options = [
            other
            for name in names
            for other in by_stem.get(name, ())
            if files[other] == files[path] or files[path] in ("tsx", "jsx", "cpp", "typescript")
        ]
        if options:
            implementation_of[path] = min((*_distance(path, other), other) for other in options)[-1]
    return implementation_of


def _distance(test: str, other: str) -> tuple[int, int]:
    """How far two files stand apart: without test folders, src and main; then by depth."""
    neutral = TEST_FOLDERS | {"src", "main", "lib"}
    folders = [PurePosixPath(path).parts[:-1] for path in (test, other)]
    here, there = ([part for part in parts if part not in neutral] for parts in folders)
    apart = len(here) + len(there) - 2 * shared_parts(here, there)
    return apart, abs(len(folders[0]) - len(folders[1]))


def beside(paths: Sequence[str], tests: Mapping[str, str]) -> list[str]:
    """`paths` in their order, each test moved to directly behind what it tests, if that is among them."""
    present = set(paths)
    moved: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if tests.get(path) in present:
            moved[tests[path]].append(path)
    fixed = [path for path in paths if tests.get(path) not in present]
    return [each for path in fixed for each in (path, *moved[path])]
