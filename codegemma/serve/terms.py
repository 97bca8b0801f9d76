"""The Gemma Terms of Use, which whoever hosts a model must hand on to its users (section 3.1), with the restrictions
on use (3.2)."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from codegemma.hub.catalogue import NOTICE

LINKS = "https://ai.google.dev/gemma/terms", "https://ai.google.dev/gemma/prohibited_use_policy"
BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "br", "tr", "div", "ol", "ul"}


def text(model: Path) -> str:
    """The notice, what binds users of this server, and the full text where a copy lies beside the model."""
    copies = [folder / "GEMMA_TERMS.html" for folder in (model, model.parent)]
    copy = next((file for file in copies if file.is_file()), None)
    head = (
        f"{NOTICE}\nWhoever uses this server uses Gemma: the Gemma Terms of Use bind you, the restrictions on use of section "
        f"3.2 included. You must not use Gemma for what the Gemma Prohibited Use Policy lists, nor in violation of laws.\n"
        f"Terms: {LINKS[0]}\nProhibited uses: {LINKS[1]}\n"
    )
    if copy is None:
        return head
    reader = _Article()
    reader.feed(copy.read_text("utf-8", "replace"))
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    return head + "\n" + "\n\n".join(line for line in lines if line) + "\n"


class _Article(HTMLParser):
    """The text of a page's article, without its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = self.muted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "div" and (self.depth or "devsite-article-body" in (dict(attributes).get("class") or "")):
            self.depth += 1
        self.muted += tag in ("script", "style")
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "div" and self.depth > 0
        self.muted -= tag in ("script", "style") and self.muted > 0

    def handle_data(self, data: str) -> None:
        if self.depth and not self.muted:
            self.parts.append(data.replace("\n", " "))
