"""Unit tests beside what they test: the order of the files that the dependency graph leaves over.

By name first (test_foo.py, FooTest.java, foo.spec.ts, foo_test.go, Foo.Tests.cs; the report's own example is
TestFoo.java beside Foo.java), the nearest folder winning; among equals the file that the test imports.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

TEST_FOLDERS = frozenset(
    {"test", "tests", "__tests__", "spec", "specs", "testing", "unittest", "unittests", "androidTest"}
)
# One pattern per way of naming; the group is the name of what is tested.
CAMEL = (r"Tests?(?=[A-Z])(\w+)", r"(\w+?)(?:Tests?|TestCase|Specs?|IT)")
SNAKE = (r"tests?_(\w+)", r"(\w+)_(?:unit)?tests?", r"(\w+)_spec")
DOTTED = (r"([\w.-]+)[.-](?:tests?|spec|specs)", r"tests?[.-]([\w.-]+)")
NAMES = {
    "python": SNAKE,
    "go": (r"(\w+)_test",),
    "rust": SNAKE,
    "java": CAMEL,
    "kotlin": CAMEL,
    "scala": CAMEL,
    "csharp": (*CAMEL, r"([\w.]+)\.Tests?"),
    "javascript": (*DOTTED, *SNAKE),
    "jsx": DOTTED,
    "typescript": (*DOTTED, *SNAKE),
    "tsx": DOTTED,
    "c": (*SNAKE, *CAMEL, *DOTTED),
    "cpp": (*SNAKE, *CAMEL, *DOTTED),
    "ruby": SNAKE,
    "php": CAMEL,
    "swift": CAMEL,
}


def tested(path: str, language: str) -> list[str]:
    """The names (without ending) of what a file tests by its own name; its own name where only its folder says
    "test"."""
    stem, folders = _stem(path), PurePosixPath(path).parts[:-1]
    names = [match[1] for pattern in NAMES.get(language, ()) if (match := re.fullmatch(pattern, stem))]
    return names or ([stem] if TEST_FOLDERS & set(folders) and language in NAMES else [])


def _stem(path: str) -> str:
    return PurePosixPath(path).name.rpartition(".")[0] or PurePosixPath(path).name


def implementations(
    files: Mapping[str, str], imported: Mapping[str, Collection[str]] | None = None
) -> dict[str, str]:
    """test -> what it tests, for files given as path -> language."""
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path, language in sorted(files.items()):
        if not tested(path, language):
            by_stem[_stem(path)].append(path)
    found = {}
    for path, language in sorted(files.items()):
        named = [
            other
            for name in tested(path, language)
            for other in by_stem.get(name, ())
            if files[other] == language or language in ("tsx", "jsx", "cpp", "typescript")
        ]
        targets = (imported or {}).get(path, ())
        options = named or (
            [target for target in sorted(targets) if not tested(target, files.get(target, ""))]
            if tested(path, language)
            else []
        )
        if options:
            found[path] = min(
                options, key=lambda other: (other not in targets, *_distance(path, other), other)
            )
    return found


def _distance(test: str, other: str) -> tuple[int, int]:
    """How far two files stand apart once test folders and the like (src/test/java beside src/main/java) are left
    out."""
    neutral = TEST_FOLDERS | {"src", "main", "lib"}
    here = [part for part in PurePosixPath(test).parts[:-1] if part not in neutral]
    there = [part for part in PurePosixPath(other).parts[:-1] if part not in neutral]
    shared = next(
        (i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there))
    )
    return len(here) + len(there) - 2 * shared, abs(
        len(PurePosixPath(test).parts) - len(PurePosixPath(other).parts)
    )


def beside(paths: Sequence[str], tests: Mapping[str, str]) -> list[str]:
    """`paths` in their order, each test moved to directly behind what it tests, if that is among them."""
    there = set(paths)
    moved: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if tests.get(path) in there:
            moved[tests[path]].append(path)
    return [each for path in paths if tests.get(path) not in there for each in (path, *moved[path])]
