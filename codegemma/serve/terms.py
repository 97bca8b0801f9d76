"""The Gemma Terms of Use, which the host of a model must pass on to its users (section 3.1) together with the
restrictions on use (section 3.2)."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from codegemma.hub import NOTICE

TERMS_URL = "https://ai.google.dev/gemma/terms"
PROHIBITED_USES_URL = "https://ai.google.dev/gemma/prohibited_use_policy"
BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "br", "tr", "div", "ol", "ul"}


def terms_text(model: Path) -> str:
    """The notice, the duties of the server's users, and the full terms if a copy is beside the model."""
    head = (
        f"{NOTICE}\nWhoever uses this server uses Gemma: the Gemma Terms of Use bind you, the restrictions "
        "on use of section 3.2 included. You must not use Gemma for what the Gemma Prohibited Use Policy "
        f"lists, nor in violation of laws.\nTerms: {TERMS_URL}\nProhibited uses: {PROHIBITED_USES_URL}\n"
    )
    copies = [folder / "GEMMA_TERMS.html" for folder in (model, model.parent)]
    copy = next((file for file in copies if file.is_file()), None)
    if copy is None:
        return head
    reader = _ArticleReader()
    reader.feed(copy.read_text("utf-8", "replace"))
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    return head + "\n" + "\n\n".join(line for line in lines if line) + "\n"


class _ArticleReader(HTMLParser):
    """Collects the text of a page's article, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.div_depth = self.hidden_depth = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        is_article = "devsite-article-body" in (dict(attributes).get("class") or "")
        if tag == "div" and (self.div_depth or is_article):
            self.div_depth += 1
        self.hidden_depth += tag in ("script", "style")
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.div_depth -= tag == "div" and self.div_depth > 0
        self.hidden_depth -= tag in ("script", "style") and self.hidden_depth > 0

    def handle_data(self, data: str) -> None:
        if self.div_depth and not self.hidden_depth:
            self.parts.append(data.replace("\n", " "))
