"""The house's one law of structure: imports point one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "codegemma"
ROOMS = [
    "config",
    "tokenizer",
    "prompts",
    "weights",
    "formats",
    "hub",
    "native",
    "quantize",
    "model",
    "lora",
    "sampling",
    "cache",
    "engine",
    "completion",
    "chat",
    "local",
    "convert",
    "sandbox",
    "tutor",
    "data",
    "evals",
    "train",
    "serve",
    "terminal",
    "verbs",
    "cli",
]


def room(module: str) -> str | None:
    """The room of `codegemma.<room>...`; sandbox_guest belongs to sandbox. None: the package itself, or another's."""
    names = module.split(".")
    if names[0] != "codegemma" or len(names) == 1:
        return None
    return next((one for one in ROOMS if names[1] == one or names[1].startswith(f"{one}_")), names[1])


def imported(source: str) -> set[str]:
    """Every room that a module imports from, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {room(name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {room(f"{node.module}.{name.name}") for name in node.names}
    return {one for one in found if one} - PUBLIC


PUBLIC = {
    "__version__",
    "load",
    "Completion",
    "File",
    "Message",
    "Model",
    "Sampling",
}  # `from codegemma import load`: from local


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    own = room(".".join(("codegemma", *file.relative_to(PACKAGE).with_suffix("").parts)))
    assert own in ROOMS, f"{own} has no place in the order: give it one in DESIGN and here"
    wrong = [one for one in imported(file.read_text()) if one not in ROOMS[: ROOMS.index(own) + 1]]
    assert not wrong, f"{own} may not import from {wrong}: they stand below it, or nowhere"


def test_an_import_that_points_down_is_seen():
    assert imported("def f():\n    from codegemma import cli\n    import codegemma.serve.app") == {
        "cli",
        "serve",
    }
