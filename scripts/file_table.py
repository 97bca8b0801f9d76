"""Writes the table of files in docs/architecture.md: the first paragraph of each module's docstring."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "codegemma"
PAGE = ROOT / "docs" / "architecture.md"


def rooms(text: str) -> list[str]:
    """The rooms in the order of the page's first table."""
    return re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE)


def file_table(text: str) -> str:
    """A section for each room, with a row for each of its files. Empty files are left out."""
    sections = []
    for room in rooms(text):
        lines = [f"### {room}", "", "| file | what it answers |", "|---|---|"]
        for file in [PACKAGE / f"{room}.py", *sorted(PACKAGE.glob(f"{room}/**/*.py"))]:
            if file.exists() and (source := file.read_text(encoding="utf-8")):
                paragraph = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
                lines.append(f"| `{file.relative_to(PACKAGE)}` | {' '.join(paragraph.split())} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def document(text: str) -> str:
    """The page `text` with the table as it should be."""
    before, rest = text.split("<!-- files -->", 1)
    after = rest.split("<!-- /files -->", 1)[1]
    return f"{before}<!-- files -->\n\n{file_table(text)}\n\n<!-- /files -->{after}"


if __name__ == "__main__":
    PAGE.write_text(document(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
