"""The package as a wheel with its base requirements alone: no extra, no compiler, an empty home."""

import json
import re
import shutil
import subprocess
import sys
import venv
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny_gguf

from codegemma import extras, load
from codegemma.cli.main import VERBS
from codegemma.data.build import build
from codegemma.data.recipe import BuildRecipe

ROOT = Path(__file__).parent.parent


def closure(names):
    """The distributions that are needed, without extras, by those of these names."""
    found, waiting = {}, list(names)
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        if distribution.name not in found:
            found[distribution.name] = distribution
            for requirement in distribution.requires or ():
                if "extra" not in requirement and "python_version <" not in requirement:
                    name = re.match(r"[\w.-]+", requirement)[0]
                    with suppress(metadata.PackageNotFoundError):  # for another system
                        metadata.distribution(name)
                        waiting.append(name)
    return found.values()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The program `codegemma` in an environment that has this package's wheel and its base requirements."""
    folder = tmp_path_factory.mktemp("base")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run([*pip, *wheel], check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (file,) = folder.glob("*.whl")
    install = ["--python", python, "install", "--no-index", "--no-deps", file]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for distribution in closure(["numpy", "sentencepiece", "typer", "rich"]):
        for name in {path.parts[0] for path in distribution.files if path.parts[0] != ".."}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    if sandbox := shutil.which("bwrap"):
        (folder / "venv" / "bin" / "bwrap").symlink_to(sandbox)
    return folder / "venv" / "bin" / "codegemma"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_tiny_gguf(folder / "tiny.gguf", tiny_config("gemma-mqa"))
    (folder / "code").mkdir()
    for n in range(9):
        text = "".join(f"def f{n}_{i}(a, b):\n    return a + {i} * b\n\n\n" for i in range(30))
        (folder / "code" / f"m{n}.py").write_text(text)
    tokenizer = load(folder / "tiny.gguf").tokenizer
    assert build([str(folder / "code")], folder / "rows", tokenizer, BuildRecipe(length=256)).rows
    (folder / "hole.py").write_text("def add(a, b):\n    return <CURSOR>\n")
    return folder


def run(base, work, *arguments, home):
    environment = {"HOME": str(home), "PATH": str(base.parent), "NO_COLOR": "1"}
    return subprocess.run(
        [base, *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        input="hi\n",
        timeout=120,
    )


MODEL = ("-m", "tiny.gguf")
CASES = [  # a command line, and the extra that it needs; "" if it works without
    (["complete", "hole.py", *MODEL, "-n", "4"], ""),
    (["complete", "hole.py"], "default-model"),
    (["generate", "-p", "x", *MODEL, "-n", "4"], ""),
    (["chat", *MODEL, "-n", "4"], ""),
    (["models"], ""),
    (["bench", *MODEL, "--prompt-tokens", "8", "--decode-tokens", "2", "--repeats", "1"], ""),
    (["convert", "tiny.gguf", "again.gguf"], ""),
    (["convert", "tiny.gguf", "keras", "--to", "keras"], "formats"),
    (["convert", "tiny.gguf", "tiny.nemo"], "formats"),
    (["verify", "tiny.gguf", "tiny.gguf"], ""),
    (["inspect", "tiny.gguf"], ""),
    (["export", "llamacpp", "tiny.gguf", "exported"], ""),
    (["export", "nemo", "tiny.gguf", "nemo"], "formats"),
    (["card", "tiny.gguf"], ""),
    (["pull", "2b", "--accept-terms"], "hub"),
    (["pull", "http://127.0.0.1:9/a", "--source", "url", "--accept-terms"], "hub"),
    (["train", "rows"], "train"),
    (["tune", "code", *MODEL], "train"),
    (["serve", *MODEL, "--port", "0"], "serve"),
    (["lsp", *MODEL], "serve"),
    (["setup", "neovim"], ""),
    (["stats"], ""),
    (["data", "build", "code", "--out", "new", "--tokenizer", "tiny.gguf"], "data"),
    (["data", "show", "rows"], "data"),
    (["data", "report", "rows"], "data"),
    (["eval", "card", *MODEL], "eval"),
    (["eval", "boolq", *MODEL], "eval"),
    (["eval", "list"], ""),
]
OTHER_VERBS = {"install", "eval compare", "eval doctor"}  # they need files, or a sandbox


def test_every_verb_is_tried():
    named = {" ".join(line[:2]) if line[0] in ("data", "eval") else line[0] for line, _ in CASES}
    assert {*named, "eval run"} - {"eval boolq"} == VERBS.keys() - OTHER_VERBS


@pytest.mark.parametrize(("arguments", "extra"), CASES, ids=[" ".join(line[:4]) for line, _ in CASES])
def test_a_verb_works_or_names_its_extra(base, work, tmp_path, arguments, extra):
    result = run(base, work, *arguments, home=tmp_path)
    if not extra:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    remedy = re.search(r'-m pip install "([^"]+\.whl)\[([\w-]+)\]"$', result.stderr.strip())
    assert remedy and Path(remedy[1]).exists() and remedy[2] == extra, result.stderr
    assert (result.stdout, result.stderr.count("\n"), result.stderr[:7]) == ("", 1, "error: ")
    assert not (work / "new").exists() or not any((work / "new").iterdir())  # another try shall not meet it


# ------------------------------------------------------------------ how this copy was installed (PEP 610)
def copy(monkeypatch, direct_url, installer="pip", requires=()):
    """A copy of the package whose installation left this direct_url.json (None: none) behind."""

    class Distribution:
        def __init__(self):
            self.requires = list(requires)

        def read_text(self, name):
            return {"INSTALLER": installer, "direct_url.json": direct_url and json.dumps(direct_url)}[name]

    monkeypatch.setattr(extras.metadata, "distribution", lambda name: Distribution())


def test_remedies_come_from_where_this_copy_came_from(monkeypatch, tmp_path):
    def command(direct_url, **more):
        copy(monkeypatch, direct_url, **more)
        return extras.install_command("serve").partition("install ")[2]

    folder = tmp_path / "my code"
    folder.mkdir()
    assert command(None) == '"codegemma[serve]"'
    assert command({"url": folder.as_uri(), "dir_info": {}}) == f'"{folder}[serve]"'
    editable = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    assert command(editable) == f'-e "{folder}[serve]"'
    git = {"url": "https://host/repo.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert command(git) == '"codegemma[serve] @ git+https://host/repo.git@abc"'
    assert (
        command(git | {"subdirectory": "py"})
        == '"codegemma[serve] @ git+https://host/repo.git@abc#subdirectory=py"'
    )
    archive = {"url": "https://host/codegemma-1.whl", "archive_info": {}}
    assert command(archive) == '"codegemma[serve] @ https://host/codegemma-1.whl"'
    requires = [
        "numpy>=2",
        "fastapi<1; extra == 'serve'",
        "codegemma[data]; extra == 'serve'",
        'pyarrow; extra == "data"',
        "jax; extra == 'train'",
    ]
    gone = {"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}}
    assert command(gone, requires=requires) == '"fastapi<1" "pyarrow"'


def test_remedies_use_the_installer_of_this_python(monkeypatch, tmp_path):
    copy(monkeypatch, None, "uv")
    assert extras.installer() == f"uv pip install --python {sys.executable}"
    copy(monkeypatch, None)
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text("")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", str(pip.parent))
    assert extras.installer() == f"{sys.executable} -m pip install"
    monkeypatch.setattr(extras.sys, "executable", str(pip.with_name("python")))
    assert extras.installer() == "pip install"


def test_a_checkout_that_was_never_installed_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "distribution", missing)
    assert extras.install_command("data", "eval").endswith(f'install "{ROOT}[data,eval]"')
