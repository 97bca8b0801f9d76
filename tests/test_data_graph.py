"""The dependency graph against slow twins, grimp and the compiler."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import needs_compiler

pytest.importorskip("tree_sitter")

from codegemma.data import graph, tests_beside
from codegemma.data.documents import Document, language_of
from codegemma.data.graph import Edge
from codegemma.data.sources import Source, read


def naive_acyclic(edges):
    """Keep an edge unless the more important ones already lead back: reachability anew for each edge."""
    kept = []
    for edge in sorted(edges, key=lambda e: (-e.importance, e.source, e.target)):
        reached, stack = {edge.target}, [edge.target]
        while stack:
            node = stack.pop()
            for other in kept:
                if other.source == node and other.target not in reached:
                    reached.add(other.target)
                    stack.append(other.target)
        if edge.source not in reached:
            kept.append(edge)
    return kept


def naive_linear(count, kept):
    """As the report says: all-pairs shortest paths, then the unparented file nearest to the placed ones."""
    inf = 10**6
    far = [[0 if i == j else inf for j in range(count)] for i in range(count)]
    for e in kept:
        far[e.source][e.target] = far[e.target][e.source] = 1
    for k in range(count):
        for i in range(count):
            for j in range(count):
                far[i][j] = min(far[i][j], far[i][k] + far[k][j])
    order: list[int] = []
    while len(order) < count:
        free = [
            v
            for v in range(count)
            if v not in order and all(e.target in order for e in kept if e.source == v)
        ]
        order.append(min(free, key=lambda v: (min((far[v][u] for u in order), default=inf), v)))
    return order


def naive_parts(count, kept):
    """The connected parts, by giving both ends of each edge the same part until nothing changes."""
    part_of = list(range(count))
    for _ in range(count):
        for edge in kept:
            part_of[edge.source] = part_of[edge.target] = min(part_of[edge.source], part_of[edge.target])
    return sorted([node for node in range(count) if part_of[node] == part] for part in set(part_of))


@st.composite
def random_graphs(draw):
    count = draw(st.integers(1, 16))
    pairs = draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=40))
    return count, [Edge(a, b, 1, draw(st.integers(0, 4))) for a, b in sorted(pairs)]


@settings(max_examples=150, deadline=None)
@given(random_graphs())
def test_order_equals_the_all_pairs_version(graph_of):
    count, edges = graph_of
    kept = graph.acyclic(count, edges)
    assert sorted(kept, key=repr) == sorted(naive_acyclic(edges), key=repr)
    parts = graph.linear(count, kept)
    order = [node for part in parts for node in part]
    assert order == naive_linear(count, kept)
    assert all(order.index(e.target) < order.index(e.source) for e in kept)
    assert sorted(map(sorted, parts)) == naive_parts(count, kept)


def test_ten_thousand_files_in_seconds():
    draw = random.Random(1)
    documents = []
    for at in range(10_000):
        names = [
            draw.randrange(at) if at and draw.random() < 0.97 else draw.randrange(10_000) for _ in range(5)
        ]
        lines = "".join(f"from pkg{n % 100}.m{n} import a, b\n" for n in names)
        documents.append(Document("r", f"pkg{at % 100}/m{at}.py", lines, "python"))
    documents.sort(key=lambda doc: doc.path)
    start = time.process_time()
    parts, kept = graph.order("r", documents)
    assert time.process_time() - start < 20
    assert sum(map(len, parts)) > 9_900 and len(kept) > 25_000


def documents_of(files):
    return [
        Document("acme/widget", path, text, language_of(path, text)) for path, text in sorted(files.items())
    ]


CASES = {
    "python": (
        {
            "widget/__init__.py": "",
            "widget/a.py": "from .b import x\nfrom . import c\n",
            "widget/b.py": "",
            "widget/c.py": "import os, json\n",
            "tests/test_a.py": "import widget.a\nfrom widget import c, b\n",
        },
        {
            ("widget/a.py", "widget/b.py"),
            ("widget/a.py", "widget/c.py"),
            ("widget/a.py", "widget/__init__.py"),
            ("tests/test_a.py", "widget/a.py"),
            ("tests/test_a.py", "widget/b.py"),
            ("tests/test_a.py", "widget/c.py"),
            ("tests/test_a.py", "widget/__init__.py"),
        },
    ),
    "java": (
        {
            "src/main/java/p/A.java": "package p;\nimport p.q.B;\nimport static p.q.C.make;\nimport p.r.*;\n"
            "class A "
            "{}\n",
            "src/main/java/p/q/B.java": "package p.q;\nimport java.util.List;\nclass B {}\n",
            "src/main/java/p/q/C.java": "package p.q;\nclass C {}\n",
            "src/main/java/p/r/D.java": "package p.r;\nclass D {}\n",
        },
        {("src/main/java/p/A.java", f"src/main/java/p/{x}.java") for x in ("q/B", "q/C", "r/D")},
    ),
    "kotlin": (
        {"p/A.kt": "package p\nimport p.q.B\nclass A\n", "p/q/B.kt": "package p.q\nclass B\n"},
        {("p/A.kt", "p/q/B.kt")},
    ),
    "javascript": (
        {
            "src/a.js": "import {b} from './b';\nconst c = require('../lib/c.js');\n"
            "import React from 'react';\n",
            "src/b.mjs": "export {d} from './d';\n",
            "src/d/index.js": "",
            "lib/c.js": "",
            "lib/react.js": "",
        },
        {("src/a.js", "src/b.mjs"), ("src/a.js", "lib/c.js"), ("src/b.mjs", "src/d/index.js")},
    ),
    "typescript": (
        {
            "src/a.ts": "import type {B} from '@/types/b';\nimport {v} from './view';\n",
            "src/types/b.d.ts": "",
            "src/view.tsx": "import {a} from './a.js';\n",
        },
        {("src/a.ts", "src/types/b.d.ts"), ("src/a.ts", "src/view.tsx"), ("src/view.tsx", "src/a.ts")},
    ),
    "go": (
        {
            "main.go": 'package main\nimport (\n\t"fmt"\n\tx "github.com/acme/widget/pkg/x"\n)\n',
            "pkg/x/one.go": "package x\n",
            "pkg/x/two.go": "package x\n",
        },
        {("main.go", "pkg/x/one.go"), ("main.go", "pkg/x/two.go")},
    ),
    "c": (
        {
            "src/a.c": '#include "a.h"\n#include <stdio.h>\n#include <widget/b.h>\n',
            "src/a.h": '#include "../include/widget/b.h"\n',
            "include/widget/b.h": "",
            "include/stdio.h": "",
        },
        {("src/a.c", "src/a.h"), ("src/a.c", "include/widget/b.h"), ("src/a.h", "include/widget/b.h")},
    ),
    "csharp": (
        {
            "A.cs": "using System;\nusing Acme.Core;\nnamespace Acme.App { class A {} }\n",
            "Core/B.cs": "namespace Acme.Core;\nclass B {}\n",
        },
        {("A.cs", "Core/B.cs")},
    ),
    "rust": (
        {
            "src/lib.rs": "mod a;\npub mod b;\nuse crate::b::c::{D, E};\n",
            "src/a.rs": "use super::b::X;\n",
            "src/b/mod.rs": "mod c;\n",
            "src/b/c.rs": "use crate::a::{Y};\n",
        },
        {
            ("src/lib.rs", "src/a.rs"),
            ("src/lib.rs", "src/b/mod.rs"),
            ("src/lib.rs", "src/b/c.rs"),
            ("src/a.rs", "src/b/mod.rs"),
            ("src/b/mod.rs", "src/b/c.rs"),
            ("src/b/c.rs", "src/a.rs"),
        },
    ),
}


@pytest.mark.parametrize("language", CASES)
def test_imports_of_each_language(language):
    files, expected = CASES[language]
    documents = documents_of(files)
    imports = {
        (documents[e.source].path, documents[e.target].path) for e in graph.edges("acme/widget", documents)
    }
    assert imports == expected


def test_order_does_not_depend_on_the_order_of_the_input():
    documents = documents_of(CASES["python"][0])
    expected = graph.order("acme/widget", documents)
    for seed in range(5):
        mixed = documents[:]
        random.Random(seed).shuffle(mixed)
        assert graph.order("acme/widget", sorted(mixed, key=lambda d: d.path)) == expected


def test_python_edges_agree_with_grimp(monkeypatch):
    grimp = pytest.importorskip("grimp")
    import hypothesis as package

    root = Path(package.__file__).parent
    documents = sorted(
        (
            d
            for d in read(Source(root.parent / "hypothesis", "folder"))
            if isinstance(d, Document) and d.path.endswith(".py")
        ),
        key=lambda d: d.path,
    )
    names = {
        ("hypothesis." + d.path[:-3].replace("/", ".")).removesuffix(".__init__"): d.path for d in documents
    }
    ours = {
        (documents[e.source].path, documents[e.target].path) for e in graph.edges("hypothesis", documents)
    }
    built = grimp.build_graph("hypothesis", cache_dir=None)
    theirs = {
        (names[a], names[b])
        for a in built.modules
        for b in built.find_modules_directly_imported_by(a)
        if a in names and b in names
    }
    # grimp resolves `from pkg import name` to pkg or pkg.name, and we draw both edges: compare both,
    # without the packages' own __init__ files
    missing = theirs - ours
    extra = {edge for edge in ours - theirs if not edge[1].endswith("__init__.py")}
    assert len(theirs) > 200
    assert len(missing) <= 0.15 * len(theirs), sorted(missing)[:20]  # imports below the top lines
    assert len(extra) <= 0.02 * len(ours), sorted(extra)[:20]


@needs_compiler("g++")
def test_c_edges_agree_with_the_compiler(tmp_path):
    files = {
        "src/main.cc": '#include "util/list.h"\n#include "core.h"\nint main() {}\n',
        "src/core.h": '#include <vector>\n#include "util/map.h"\n',
        "src/util/list.h": '#include "map.h"\n',
        "src/util/map.h": "#pragma once\n#include <string.h>\n",
        "src/util/string.h": "",
        "other/map.h": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    output = subprocess.run(
        ["g++", "-MM", "src/main.cc"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    theirs = set(output.replace("\\\n", " ").split()[2:])
    documents = documents_of(files)
    edges = [(documents[e.source].path, documents[e.target].path) for e in graph.edges("r", documents)]
    reached, stack = set(), ["src/main.cc"]
    while stack:
        here = stack.pop()
        for source, target in edges:
            if source == here and target not in reached:
                reached.add(target)
                stack.append(target)
    assert reached == theirs == {"src/core.h", "src/util/list.h", "src/util/map.h"}


@pytest.mark.parametrize(
    ("language", "test", "implementation"),
    [
        ("java", "src/test/java/p/TestFoo.java", "src/main/java/p/Foo.java"),
        ("java", "t/FooTest.java", "m/Foo.java"),
        ("java", "t/FooTests.java", "m/Foo.java"),
        ("java", "FooIT.java", "Foo.java"),
        ("kotlin", "FooTest.kt", "Foo.kt"),
        ("csharp", "x/Foo.Tests.cs", "x/Foo.cs"),
        ("csharp", "FooTests.cs", "Foo.cs"),
        ("python", "tests/test_foo.py", "pkg/foo.py"),
        ("python", "pkg/foo_test.py", "pkg/foo.py"),
        ("go", "a/foo_test.go", "a/foo.go"),
        ("rust", "tests/foo.rs", "src/foo.rs"),
        ("javascript", "foo.test.js", "foo.js"),
        ("javascript", "__tests__/foo.js", "foo.js"),
        ("typescript", "foo.spec.ts", "foo.ts"),
        ("tsx", "foo.test.tsx", "foo.ts"),
        ("cpp", "foo_test.cc", "foo.cc"),
        ("cpp", "FooTest.cpp", "Foo.cpp"),
        ("c", "tests/test_foo.c", "src/foo.c"),
        ("ruby", "spec/foo_spec.rb", "lib/foo.rb"),
    ],
)
def test_names_of_tests(language, test, implementation):
    decoys = {"zz/Unrelated.x": language, "contest.x": language}
    files = {
        test: language,
        implementation: "typescript" if implementation.endswith(".ts") else language,
        **decoys,
    }
    assert tests_beside.implementations(files) == {test: implementation}


def test_nearest_implementation():
    files = dict.fromkeys(
        ["a/foo.py", "b/foo.py", "tests/b/test_foo.py", "tests/test_foo.py", "tests/test_all.py"], "python"
    )
    implementations = tests_beside.implementations(files)
    assert implementations == {"tests/b/test_foo.py": "b/foo.py", "tests/test_foo.py": "a/foo.py"}
    documents = [Document("r", path, "", "python") for path in sorted(files)]
    [(rule, group)], _ = tests_beside.group_files(documents)
    order = ["a/foo.py", "tests/test_foo.py", "b/foo.py", "tests/b/test_foo.py", "tests/test_all.py"]
    assert rule == "beside tests" and [document.path for document in group] == order
