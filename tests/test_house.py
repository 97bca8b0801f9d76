"""The laws of structure: imports point up the list of rooms, in no circle, and take no room's private
names."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "codegemma"
ROOMS = (  # a module imports from its own room and from those above it (DESIGN.md, "The house")
    "config",
    "extras",
    "files",
    "tokenizer",
    "prompts",
    "sandbox",
    "checkpoints",
    "hub",
    "native",
    "data",
    "convert",
    "jax",
    "adapters",
    "safety",
    "generate",
    "evals",
    "train",
    "tutor",
    "serve",
    "editor",
    "cli",
)
ROOT = "codegemma"  # the package's __init__, which alone reaches down


def module_name(file: Path) -> str:
    """`codegemma/hub/pull.py` -> `codegemma.hub.pull`; an `__init__` has the name of its package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(source: str) -> list[tuple[str, str | None]]:
    """Every (module, name) of this package that a source imports, at its top or inside a function.

    The name is None where the whole module is imported.
    """
    pairs: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, None) for alias in node.names if alias.name.split(".")[0] == ROOT]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if (node.module or "").split(".")[0] == ROOT:
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    pairs.append((module, None) if module in FILES else (str(node.module), alias.name))
    return pairs


def graph() -> dict[str, set[str]]:
    """Each module's imports inside the package. A module also runs the `__init__` of every package above what
    it imports."""
    edges: dict[str, set[str]] = {}
    for module, file in FILES.items():
        if module == ROOT:
            continue
        targets = {target for target, _ in imports(file.read_text())}
        edges[module] = {target for target in targets if target not in (ROOT, module)}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The first circle found, as the modules along it; [] where there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for target in sorted(edges.get(module, ())):
            if around := visit(target, [*path, module]):
                return around
        finished.add(module)
        return []

    return next((around for module in sorted(edges) if (around := visit(module, []))), [])


@pytest.mark.parametrize("module", [module for module in FILES if module != ROOT])
def test_imports_point_up_the_list_of_rooms(module):
    assert room(module) in ROOMS, f"{room(module)} has no place in the list: give it one in DESIGN and here"
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    for target, _ in imports(FILES[module].read_text()):
        if target != ROOT:
            assert room(target) in allowed, f"{module} imports {target}, which stands below it"


@pytest.mark.parametrize("module", [module for module in FILES if module != ROOT])
def test_no_private_name_crosses_rooms(module):
    for target, name in imports(FILES[module].read_text()):
        private = [part for part in (*target.split("."), name or "") if part.startswith("_")]
        private = [part for part in private if part != "__version__"]
        if target != ROOT and room(target) != room(module):
            assert not private, (
                f"{module} takes {private[0]} from {target}: give it a public name, or move it"
            )


def test_imports_form_no_circle():
    assert circle(graph()) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_an_import_inside_a_function_is_seen():
    lines = ("from codegemma.cli import main", "from codegemma import hub", "import codegemma.serve.app")
    source = "def f():\n    " + "\n    ".join(lines)
    assert {module for module, _ in imports(source)} == {
        "codegemma.cli.main",
        "codegemma.hub",
        "codegemma.serve.app",
    }


def test_a_class_name_stands_once():
    classes = Counter(
        node.name
        for file in FILES.values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []
