"""Files that mkdocs adds to those of docs/: the pages at the top of the repository, and Mermaid's script."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
MERMAID = ROOT / "build" / "mermaid" / "package" / "dist" / "mermaid.min.js"  # by `make docs`, from npm
BESIDE_README = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files; mkdocs calls this by its name."""
    files.append(File.generated(config, "index.md", content=from_docs((ROOT / "README.md").read_text())))
    for name in BESIDE_README:
        files.append(File.generated(config, name, content=from_docs((ROOT / name).read_text())))
    files.append(File.generated(config, "mermaid.min.js", abs_src_path=str(MERMAID)))
    return files


def from_docs(text: str) -> str:
    """A page with its links made relative to docs/; links to files outside docs/ become text."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|[\w-]+\.(?:md|svg)(?:#|\)))[^)]*\)", r"\1", text)
