"""The imports in the top lines of a file.

An entry is "a/b 2" for two names from a.b, "./a 1" if relative, "<a.h 1" for a C header in angle brackets, or
"=a/b" for a package that the file declares. The number weighs the edge (graph.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from codegemma.data import syntax

if TYPE_CHECKING:
    import tree_sitter

TOP_LINES = 200
FAMILIES: dict[str, str] = syntax.LANGUAGES["families"]


def imports_of_text(text: str, language: str) -> tuple[str, ...]:
    """The imports in the top lines of a text; none where no grammar knows the language."""
    top = "\n".join(text.split("\n", TOP_LINES)[:TOP_LINES])
    tree = syntax.parse(top, language) if language in FAMILIES else None
    return imports_of_tree(tree, language) if tree else ()


def imports_of_tree(tree: tree_sitter.Tree, language: str) -> tuple[str, ...]:
    """`imports_of_text` for a text that is parsed already."""
    import tree_sitter

    if language not in FAMILIES or language not in syntax.GRAMMARS:
        return ()
    cursor = tree_sitter.QueryCursor(_query(language))
    cursor.set_point_range((0, 0), (TOP_LINES, 0))
    nodes = cursor.captures(tree.root_node).get("i", [])
    imports: list[str] = []
    for node in sorted(nodes, key=lambda node: node.start_byte):
        if node.start_point[0] < TOP_LINES:
            statement = (node.text or b"").decode("utf-8", "replace")
            imports += READERS[FAMILIES[language]](statement)
    return tuple(dict.fromkeys(imports))


@cache
def _query(language: str) -> tree_sitter.Query:
    import tree_sitter

    grammar = syntax.parser(language).language
    assert grammar is not None
    queries = syntax.LANGUAGES["queries"]
    return tree_sitter.Query(grammar, queries.get(language) or queries[FAMILIES[language]])


# ------------------------------------------------------------------------------- statement -> what it imports
def _python(statement: str) -> list[str]:
    flat = " ".join(re.sub(r"#.*", "", statement).replace("\\\n", " ").split())
    if match := re.match(r"from (\.*) ?([\w.]*) import (.*)", flat):
        dots, module, rest = match.groups()
        names = [name.split(" ")[0] for name in re.split(r"[(),]\s*", rest) if name.strip()]
        base = ("./" if len(dots) == 1 else "../" * (len(dots) - 1)) + module.replace(".", "/")
        return [f"{base} {len(names)}", *[f"{base.rstrip('/')}/{name} 1" for name in names if name != "*"]]
    modules = flat.removeprefix("import ").split(",")
    return [f"{module.strip().split(' ')[0].replace('.', '/')} 1" for module in modules]


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
        # As two names: a module belongs to its parent more than to a file that uses one name of it.
        return [f"mod/{match[1]} 2"]
    argument = re.sub(r"//.*|\s", "", re.sub(r".*?\buse\s+", "", statement, count=1, flags=re.S).rstrip(";"))
    paths = _rust_paths(re.sub(r"as\w+(?=[,}]|$)", "", argument))
    return [f"{path.replace('::', '/')} 1" for path in paths if path]


def _rust_paths(text: str, depth: int = 0) -> list[str]:
    """`a::{b, c::{d}}` -> a::b, a::c::d."""
    head, brace, rest = text.partition("{")
    if not brace or depth > 8:
        return [text.rstrip(":*{},")]
    parts, level, start = [], 0, 0
    for offset, character in enumerate(rest):
        level += (character == "{") - (character == "}")
        if (character == "," and level == 0) or level < 0:
            parts.append(rest[start:offset])
            start = offset + 1
        if level < 0:
            break
    return [head + path for part in parts if part for path in _rust_paths(part, depth + 1)]


READERS: dict[str, Callable[[str], list[str]]] = {
    "python": _python,
    "jvm": _jvm,
    "js": _js,
    "go": _go,
    "c": _c,
    "csharp": _csharp,
    "rust": _rust,
}
