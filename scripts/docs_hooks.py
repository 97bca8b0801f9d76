"""What mkdocs adds to docs/: the README as the first page, and Mermaid, so that no page asks another site for it."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
MERMAID = ROOT / "build" / "mermaid" / "package" / "dist" / "mermaid.min.js"  # by `make docs`, from npm


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "index.md", content=home_page((ROOT / "README.md").read_text())))
    files.append(File.generated(config, "mermaid.min.js", abs_src_path=str(MERMAID)))
    return files


def home_page(readme: str) -> str:
    """The README with its links into docs/ made relative to it; links to other files of the repository become text."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", readme)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|[\w-]+\.(?:md|svg)(?:#|\)))[^)]*\)", r"\1", text)
