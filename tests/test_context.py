"""What may enter a prompt: ignore files as git itself reads them, names and texts that hold secrets, imports, bounds."""

import random
import string
import subprocess
import sys
import threading

import pytest

from codegemma.editor import context
from codegemma.editor.context import (
    MOST_CHARACTERS,
    MOST_OF_A_FILE,
    Guard,
    Neighbours,
    Open,
    redacted,
    secrets,
)
from codegemma.prompts import File

AWS = "AKIAQYLPMN5HNM4CJX2B"
PATTERNS = [
    "*.log",
    "build/",
    "/top",
    "!keep.log",
    "a/**/c",
    "**/b",
    "a/*.py",
    "!a/",
    "b",
    "\\!odd",
    "# note",
    "",
    "c.*",
    "!b/c.py",
    "/a/b/",
    "a/**",
    "!a/b/**",
    "*",
    "!*/",
    "d[0-9].py",
    "!d1.py",
]
NAMES = ["a", "b", "c", "build", "top", "keep.log", "x.log", "c.py", "d1.py", "!odd"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))


def tree(root, seed):
    """A repository of random folders, files and ignore files."""
    rng = random.Random(seed)
    subprocess.run(["git", "init", "-q", root], check=True)
    files = {"/".join(rng.choices(NAMES, k=rng.randint(1, 4))) for _ in range(30)}
    files = [one for one in sorted(files) if not any(other.startswith(f"{one}/") for other in files)]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    for folder in sorted({root, *((root / file).parent for file in files)}):
        if rng.random() < 0.5:
            (folder / ".gitignore").write_text("\n".join(rng.choices(PATTERNS, k=3)) + "\n")
    (root / ".git" / "info" / "exclude").write_text(rng.choice(PATTERNS) + "\n")
    return files


@pytest.mark.parametrize("seed", range(8))
def test_files_are_ignored_where_git_ignores_them(tmp_path, seed):
    if seed % 2:
        ignore = tmp_path / "home" / "config" / "git" / "ignore"
        ignore.parent.mkdir(parents=True)
        ignore.write_text("x.log\n")
    files = tree(tmp_path / "repo", seed)
    said = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin", "-z"],
        cwd=tmp_path / "repo",
        capture_output=True,
        input="\0".join(files),
        text=True,
    ).stdout.split("\0")
    guard = Guard()
    ours = {file for file in files if guard.refuses(tmp_path / "repo" / file) == "git ignores it"}
    assert ours == set(said) - {""} and files


def test_ignore_files_are_read_again_when_they_change(tmp_path):
    (tmp_path / ".git").mkdir()
    file, rules, guard = tmp_path / "a.py", tmp_path / ".gitignore", Guard()
    assert guard.refuses(file) == ""
    rules.write_text("a.py\n")
    assert guard.refuses(file) == "git ignores it"
    rules.unlink()
    assert guard.refuses(file) == ""


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        "prod.env",
        "id_rsa",
        "id_ed25519.pub",
        "server.PEM",
        "a.key",
        ".npmrc",
        ".netrc",
        ".envrc",
        "credentials",
        "secrets.yaml",
        "terraform.tfvars",
        "service-account-1.json",
        "kubeconfig",
    ],
)
def test_names_that_speak_of_credentials_are_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    (tmp_path / "innocent.txt").symlink_to(tmp_path / name)
    assert (
        Guard().refuses(tmp_path / name)
        == Guard().refuses(tmp_path / "innocent.txt")
        == "its name speaks of credentials"
    )


@pytest.mark.parametrize(
    "name", ["environment.py", "env.py", "keys.py", "secret_santa.py", "id_rsa_test/a.py", "monkey.py"]
)
def test_others_are_not(tmp_path, name):
    assert Guard().refuses(tmp_path / name) == ""


@pytest.mark.parametrize("cursor", range(0, 60, 3))
def test_a_secret_is_replaced_wherever_the_cursor_stands(cursor):
    text = f"a = 1\nkey = '{AWS}'\nmail = 'jo@corp.org'\nend = 2\n"
    before, after = redacted(text[:cursor], text[cursor:])
    assert AWS[4:] not in before + after and not secrets(before + after) and "jo@corp.org" in before + after
    assert (
        len(before) == cursor
        and (before + after).startswith("a = 1\nkey = '")
        and (before + after).endswith("end = 2\n")
    )


def test_imports_stand_nearest_then_what_was_used_last(tmp_path):
    (tmp_path / ".git").mkdir()
    for name, text in (("pkg/one.py", "one = 1\n"), ("pkg/two.py", "two = 2\n"), ("pkg/__init__.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    document = Open(tmp_path / "pkg/main.py", "from .two import two\nfrom .one import one, uno\n")
    others = [
        Open(tmp_path / "old.py", "old\n"),
        Open(None, "scratch\n"),
        Open(tmp_path / "pkg/two.py", "two = 'edited'\n"),
    ]
    near = Neighbours(Guard())
    walked = [
        File("old.py", "old\n"),
        File("untitled-1", "scratch\n"),
        File("pkg/two.py", "two = 'edited'\n"),
    ]
    assert near.files(document, others) == walked  # in a hurry: the folder was not looked at
    assert near.files(document, others, hurry=False) == [*walked, File("pkg/one.py", "one = 1\n")]
    assert [file.path for file in near.files(document, others)] == [
        "old.py",
        "untitled-1",
        "pkg/two.py",
        "pkg/one.py",
    ]
    (tmp_path / "pkg/one.py").write_text("one = 11\n")
    assert near.files(document, [])[-1].text == "one = 11\n"
    assert [file.path for file in near.files(document, [], imports=False)] == []


def test_what_is_left_out_is_told_once_and_all_stays_in_bounds(tmp_path):
    (tmp_path / ".git").mkdir()
    told = []
    near = Neighbours(Guard(), told.append)
    lines = [f"{letter} = '{letter * 80}'\n" for letter in string.ascii_letters]
    large = [Open(tmp_path / f"{at}.py", "".join(lines) * 5) for at in range(6)]
    secret = Open(tmp_path / "config.py", "x = 1\n" * 3000 + f"key = '{AWS}'\n")
    for _ in range(2):
        files = near.files(
            Open(tmp_path / "a.py", ""), [*large, secret, Open(tmp_path / ".env", "A=1\n")], imports=False
        )
    assert (
        sum(len(file.text) for file in files) <= MOST_CHARACTERS
        and len(files) == MOST_CHARACTERS // MOST_OF_A_FILE
    )
    assert all(file.text.endswith("\n") and len(file.text) <= MOST_OF_A_FILE for file in files)
    assert [file.path for file in files] == ["3.py", "4.py", "5.py"]  # the last used
    assert sorted(text.split("/")[-1] for text in told) == [
        ".env is left out of prompts: its name speaks of credentials",
        "config.py is left out of prompts: it holds a secret",
    ]


def test_without_grammars_open_documents_are_read_and_that_is_told(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "lib.py").write_text("lib = 1\n")
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    told = []
    near = Neighbours(Guard(), told.append)
    files = near.files(
        Open(tmp_path / "a.py", "import lib\n"), [Open(tmp_path / "b.py", "b = 1\n")], hurry=False
    )
    assert [file.path for file in files] == ["b.py"] and "tree_sitter is not installed" in told[0]


def test_a_keystroke_does_not_wait_for_the_walk_of_a_repository(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    walking, go_on = threading.Event(), threading.Event()

    def slow(root, own):
        walking.set()
        assert go_on.wait(60)
        raise ImportError(name="nothing")

    monkeypatch.setattr(context, "_List", slow)
    near = Neighbours(Guard())
    document = Open(tmp_path / "a.py", "import lib\n")
    thread = threading.Thread(target=near.files, args=(document, [], True, False))
    thread.start()
    assert walking.wait(60) and near.files(document, [Open(None, "b\n")]) == [File("untitled-0", "b\n")]
    go_on.set()
    thread.join(60)
