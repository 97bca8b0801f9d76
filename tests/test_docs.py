"""The commands in README and docs run, or are marked as not run; their options exist; Python examples run.

A block of commands is marked by an HTML comment above it: `<!-- not run: why -->`.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import PACKAGE, ROOMS

from codegemma.files import cache_dir

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guide", "editors", "server", "data", "training")),
    *(ROOT / "docs" / f"{name}.md" for name in ("evaluation", "formats", "architecture")),
]
BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^>]+ -->\n\n?)?"
    r"(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```$|(?P<indented>(?:^ {4}\S[^\n]*\n?)+))",
    re.MULTILINE | re.DOTALL,
)
PROGRAMS = ("codegemma", "cat", "git", "pip", "make", "curl")
CURSOR_FILE = "import models\n" + "\n".join(f"def f{i}(a, b):\n    return a + {i} * b\n" for i in range(20))


def blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """(text, whether to run it) of each code block in a language, which is "" for indented blocks."""
    result = []
    for match in BLOCK.finditer(page.read_text()):
        text = match["fenced"] if match["indented"] is None else re.sub("(?m)^ {4}", "", match["indented"])
        if (match["language"] or "") == language:
            result.append((text, match["mark"] is None))
    return result


def commands(page: Path) -> list[tuple[str, bool]]:
    """(command, whether to run it) of each line of a block that begins with one of PROGRAMS."""
    lines = []
    for text, runs in [*blocks(page, ""), *blocks(page, "sh")]:
        for line in text.replace("\\\n", " ").splitlines():
            command = line.strip()
            if command.split(" ")[0] in PROGRAMS:
                lines.append((command, runs))
    return lines


ALL = [(page.name, command, runs) for page in PAGES for command, runs in commands(page)]
RUN = [pytest.param(command, id=f"{page}: {command[:60]}") for page, command, runs in ALL if runs]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with the files that the examples name, a home, and the model of this machine."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "work"
    app = home / "src" / "app"
    app.mkdir(parents=True)
    folder.mkdir()
    for path in (folder / "app.py", app / "main.py"):
        path.write_text(CURSOR_FILE)
    (folder / "models.py").write_text("class Model:\n    name: str\n")
    (folder / "hole.py").write_text("def add(a, b):\n    return <CURSOR>\n")
    (home / "src" / "library").mkdir()
    (home / "src" / "library" / "names.py").write_text(CURSOR_FILE.replace("f1", "g1"))
    (folder / "examples").symlink_to(ROOT / "examples")
    cache = home / ".cache" / "codegemma"
    cache.mkdir(parents=True)
    for name in ("models", "tokenizers"):
        (cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(cache_dir() / name)
    return folder


def run(work: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOME": str(work.parent),
        "XDG_CACHE_HOME": str(work.parent / ".cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(
        command,
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


SHOWN = [
    pytest.param(command, shown.rstrip(), id=command[:60])
    for page in PAGES
    for text, _ in blocks(page, "console")
    for command, shown in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", text, re.M)
]


@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_an_example_prints_what_it_shows(work, command, shown):
    """As the page shows it, in the checkout."""
    result = run(work, ["bash", "-c", f"cd {shlex.quote(str(ROOT))} && {command}"])
    assert (result.returncode, result.stdout.rstrip()) == (0, shown), result.stderr[-2000:]


def test_the_readme_shows_examples():
    assert [example.values[0].split()[1] for example in SHOWN[:2]] == ["complete", "generate"]


def test_python_of_the_readme_prints_what_it_says(work):
    (code, _), *_ = blocks(ROOT / "README.md", "python")
    result = run(work, [sys.executable, "-W", "ignore", "-c", code])
    said = re.findall(r"  # (.*)", code)[-2:]
    assert [line.strip() for line in result.stdout.splitlines()] == said


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_docs_runs(work, command):
    result = run(work, ["bash", "-c", command])
    assert result.returncode == 0, result.stderr[-2000:]


def sections() -> dict[str, str]:
    """The help of each verb, by its command ("codegemma data build"), from docs/cli.md."""
    text = (ROOT / "docs" / "cli.md").read_text()
    return {match[1]: match[2] for match in re.finditer(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S)}


@pytest.mark.parametrize(("page", "command"), [(page, command) for page, command, _ in ALL])
def test_the_options_of_a_command_exist(page, command):
    """Also of those that are not run."""
    helps = sections()
    for part in re.split(r"[|;](?= +codegemma)", command):
        words = shlex.split(part.replace("[", " ").replace("]", " "), comments=True)
        if not words or words[0] != "codegemma":
            continue
        if words[1] == "eval" and f"codegemma eval {words[2]}" not in helps:
            words.insert(2, "run")  # a benchmark's name in place of a verb
        verb = next(" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in helps)
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", helps[verb]), (
                    f"{verb} has no {word}"
                )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(work, page):
    """The examples of a page, one after the other, in one process."""
    code = "\n".join(text for text, runs in blocks(page, "python") if runs)
    if not code:
        pytest.skip("this page has no Python")
    result = run(work, [sys.executable, "-W", "ignore", "-c", code])
    assert result.returncode == 0, result.stderr[-2000:]


def test_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "codegemma"
    files = [str(file.relative_to(package)) for file in sorted(package.rglob("*.py"))]
    assert [file for file in files if f"`{file}`" not in text and not file.endswith("__init__.py")] == []


def test_architecture_repeats_the_first_paragraph_of_each_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts" / "file_table.py"))
    assert script["document"](page) == page, "run `make docs`"
    built = [room for room in ROOMS if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()]
    assert script["rooms"](page) == built, "the page lists the rooms in another order than test_house.ROOMS"


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "docs" / "results.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
