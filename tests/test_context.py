"""Other files in a prompt: ignore files as git itself reads them, refused names, imports, limits."""

import random
import string
import subprocess
import sys
import threading

import pytest

from codegemma.editor import context
from codegemma.editor.buffers import Buffer
from codegemma.editor.context import TRAINED, ContextFiles, FilePolicy
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
    files = [file for file in sorted(files) if not any(other.startswith(f"{file}/") for other in files)]
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
    ignored_by_git = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin", "-z"],
        cwd=tmp_path / "repo",
        capture_output=True,
        input="\0".join(files),
        text=True,
    ).stdout.split("\0")
    guard = FilePolicy()
    ours = {file for file in files if guard.refusal(tmp_path / "repo" / file) == "git ignores it"}
    assert ours == set(ignored_by_git) - {""} and files


def test_ignore_files_are_read_again_when_they_change(tmp_path):
    (tmp_path / ".git").mkdir()
    file, rules, guard = tmp_path / "a.py", tmp_path / ".gitignore", FilePolicy()
    assert guard.refusal(file) == ""
    rules.write_text("a.py\n")
    assert guard.refusal(file) == "git ignores it"
    rules.unlink()
    assert guard.refusal(file) == ""


def test_a_secret_name_is_refused_also_behind_a_link_and_source_code_is_not(tmp_path):
    policy = FilePolicy()
    for name in (".env", "credentials", "server.key"):
        (tmp_path / name).write_text("x")
        (tmp_path / f"{name}.txt").symlink_to(tmp_path / name)
        for path in (tmp_path / name, tmp_path / f"{name}.txt"):
            assert policy.refusal(path) == "files of this name hold credentials"
    assert policy.refusal(tmp_path / "credentials.go") == policy.refusal(tmp_path / "secrets.py") == ""
    assert policy.refusal(tmp_path / "translation.key", "java") == ""
    assert policy.refusal(tmp_path / "translation.key", "plaintext") != ""


def test_imports_stand_nearest_then_what_was_used_last(tmp_path):
    (tmp_path / ".git").mkdir()
    for name, text in (("pkg/one.py", "one = 1\n"), ("pkg/two.py", "two = 2\n"), ("pkg/__init__.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    document = Buffer("from .two import two\nfrom .one import one, uno\n", path=tmp_path / "pkg/main.py")
    others = [
        Buffer("old\n", path=tmp_path / "old.py"),
        Buffer("scratch\n", path=None),
        Buffer("two = 'edited'\n", path=tmp_path / "pkg/two.py"),
    ]
    context_files = ContextFiles(FilePolicy())
    walked = [
        File("old.py", "old\n"),
        File("", "scratch\n"),
        File("pkg/two.py", "two = 'edited'\n"),
    ]
    assert context_files.collect(document, others) == walked  # without leave to walk the folder
    assert context_files.collect(document, others, may_walk=True) == [
        *walked,
        File("pkg/one.py", "one = 1\n"),
    ]
    assert [file.path for file in context_files.collect(document, others)] == [
        "old.py",
        "",
        "pkg/two.py",
        "pkg/one.py",
    ]
    (tmp_path / "pkg/one.py").write_text("one = 11\n")
    assert context_files.collect(document, [])[-1].text == "one = 11\n"
    assert [file.path for file in context_files.collect(document, [], imports=False)] == []


def test_what_is_left_out_is_logged_once_and_all_stays_in_bounds(tmp_path):
    (tmp_path / ".git").mkdir()
    logged = []
    context_files = ContextFiles(FilePolicy(), logged.append)
    lines = [f"{letter} = '{letter * 80}'\n" for letter in string.ascii_letters]
    large = [Buffer("".join(lines) * 5, path=tmp_path / f"{number}.py") for number in range(6)]
    secret = Buffer(f"key = '{AWS}'\n" + "x = 1\n" * 3000, path=tmp_path / "config.py")
    for _ in range(2):
        files = context_files.collect(
            Buffer("", path=tmp_path / "a.py"),
            [*large, secret, Buffer("A=1\n", path=tmp_path / ".env")],
            imports=False,
        )
    assert (
        sum(len(file.text) for file in files) <= TRAINED.together
        and len(files) == TRAINED.together // TRAINED.each
    )
    assert all(file.text.endswith("\n") and len(file.text) <= TRAINED.each for file in files)
    assert [file.path for file in files] == ["4.py", "5.py", "config.py"]  # the last used
    assert AWS[4:] not in files[-1].text and files[-1].text.startswith("key = 'AKIAEXAMPLE")
    assert sorted(text.split("/")[-1] for text in logged) == [
        ".env is left out of prompts: files of this name hold credentials",
        "config.py holds a secret: prompts have a fake value in its place",
    ]


def test_a_secret_that_the_end_of_the_window_cuts_is_replaced(tmp_path):
    (tmp_path / ".git").mkdir()
    key = (
        "-----BEGIN PRIVATE KEY-----\n" + ("MIIEvQIBADANBgkqhkiG9w0B\n" * 60) + "-----END PRIVATE KEY-----\n"
    )
    text = "x = 1\n" * ((TRAINED.each - 500) // 6) + f'KEY = """{key}"""\n' + "y = 2\n" * 200
    (file,) = ContextFiles(FilePolicy()).collect(
        Buffer("", path=tmp_path / "a.py"), [Buffer(text, path=tmp_path / "b.py")], imports=False
    )
    assert "MIIE" not in file.text and "EXAMPLE" in file.text


def test_without_grammars_open_documents_are_read_and_that_is_logged(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "lib.py").write_text("lib = 1\n")
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    logged = []
    context_files = ContextFiles(FilePolicy(), logged.append)
    files = context_files.collect(
        Buffer("import lib\n", path=tmp_path / "a.py"),
        [Buffer("b = 1\n", path=tmp_path / "b.py")],
        may_walk=True,
    )
    assert [file.path for file in files] == ["b.py"] and "tree_sitter is not installed" in logged[0]


def test_a_keystroke_does_not_wait_for_the_walk_of_a_repository(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    walking, go_on = threading.Event(), threading.Event()

    def slow(root, document):
        walking.set()
        assert go_on.wait(60)
        raise ImportError(name="nothing")

    monkeypatch.setattr(context, "_ImportIndex", slow)
    context_files = ContextFiles(FilePolicy())
    document = Buffer("import lib\n", path=tmp_path / "a.py")
    thread = threading.Thread(target=context_files.collect, args=(document, [], True, True))
    thread.start()
    assert walking.wait(60) and context_files.collect(document, [Buffer("b\n", path=None)]) == [
        File("", "b\n")
    ]
    go_on.set()
    thread.join(60)
