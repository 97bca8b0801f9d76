"""The built page was built from the present sources, is complete, and loads nothing from other servers."""

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES, BUILT = ROOT / "web", ROOT / "codegemma/serve/web"
MANIFEST = json.loads((BUILT / "manifest.json").read_text())


def sums(folder: Path, files: list[Path]) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_page_is_built_from_its_sources():
    files = [*(SOURCES / "src").iterdir(), SOURCES / "build.mjs", SOURCES / "package-lock.json"]
    assert sums(SOURCES, files) == MANIFEST["sources"], "the page is older than its sources: make web"


def test_the_page_is_complete():
    files = [file for file in BUILT.iterdir() if file.name != "manifest.json"]
    assert sums(BUILT, files) == MANIFEST["built"], "the built page was changed by hand, or in part: make web"
    assert sum(file.stat().st_size for file in files) < 6e6


def test_the_page_loads_from_its_own_origin_alone():
    html = (BUILT / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert {"app.js", "app.css", "icon.svg"} <= set(links)
    assert all(link.startswith("#") or link == "terms" or (BUILT / link).is_file() for link in links)
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", html), "nothing inline"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    rules = {name: set(values) for name, *values in (rule.split() for rule in policy.split(";"))}
    assert rules["default-src"] == {"'none'"} and rules["script-src"] == rules["connect-src"] == {"'self'"}


def test_nothing_evaluates_text():
    for script in BUILT.glob("*.js"):
        assert not re.search(r"\bnew Function\(|(?<![\w.$])eval\(", script.read_text()), script.name
