"""The code cells of a Jupyter notebook as one script."""

from __future__ import annotations

import json
import re
from typing import Any

from codegemma.data import syntax
from codegemma.data.documents import FILE_RULES

MAGIC = re.compile(r"^(\s*)((?:[\w, ]+=\s*)?[%!].*|\?{1,2}[\w.]+|[\w.]+\?{1,2})$", re.M)
# Magics of a whole cell that leave it Python; any other makes it another language, or the text of a file.
PYTHON_CELL_MAGICS = ("%%time", "%%timeit", "%%capture", "%%prun", "%%python", "%%python3")


def script_of(notebook: str) -> tuple[str, str]:
    """(script, language) of a notebook in Jupyter's format 3 or 4.

    Cells are divided by a blank line. Commands to IPython (`%matplotlib inline`, `!pip`) become comments, and
    cells in other languages are left out. Raises ValueError("no notebook").
    """
    try:
        document = json.loads(notebook)
        metadata = document.get("metadata") or {}
        sheets = document.get("worksheets", [document])
        cells = [cell for sheet in sheets for cell in sheet["cells"] if cell["cell_type"] == "code"]
        sources = [_joined(cell["source"] if "source" in cell else cell["input"]) for cell in cells]
        stated = [(metadata.get("language_info") or {}).get("name")]
        stated += [
            (metadata.get("kernelspec") or {}).get("language"),
            *(cell.get("language") for cell in cells),
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("no notebook") from None
    name = next((name.lower() for name in stated if isinstance(name, str) and name), "python")
    language = "python" if name == "ipython" else FILE_RULES["languages"].get(name, name)
    if language == "python":
        sources = [_without_magics(source) for source in sources]
    parts = [source.strip("\n") for source in sources if source.strip()]
    return "\n\n".join(parts) + "\n" * bool(parts), language


def _joined(source: Any) -> str:
    """A cell's text, which is stored whole or as a list of lines."""
    return source if isinstance(source, str) else "".join(source)


def _without_magics(source: str) -> str:
    tree = syntax.parse(source, "python")
    if tree is not None and not tree.root_node.has_error:
        return source  # a line that begins with % stands in a string
    if (first := source.lstrip()).startswith("%%") and not first.startswith(PYTHON_CELL_MAGICS):
        return ""
    return MAGIC.sub(r"\1# \2", source)
