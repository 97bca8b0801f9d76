"""What git ignores, through every source of its rules and as git itself answers; repository and commit."""

import os
import pwd
import random
import signal
import subprocess

import pytest

from codegemma.data.documents import Document, Outcome
from codegemma.data.git import git_state
from codegemma.data.gitignore import is_ignored
from codegemma.data.linguist import attribute_lines, declared_reason
from codegemma.data.sources import Source, read, walk
from codegemma.editor.context import FilePolicy


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def git(folder, *arguments):
    options = ("-c", "user.name=n", "-c", "user.email=n@example.com", "-c", "protocol.file.allow=always")
    process = subprocess.run(
        ["git", *options, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return process.stdout.strip()


def repository(path, files=("keep.py",)):
    path.mkdir(parents=True)
    git(path, "init", "-q", "-b", "main")
    write(path, *files)
    git(path, "add", "-A")
    git(path, "commit", "-qm", "first")
    return path


def write(root, *names, text="x = 1\n"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def append(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(f"{line}\n" for line in lines)


def ignored_by_git(root, names):
    process = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin", "-z"],
        cwd=root,
        input="\0".join(names),
        capture_output=True,
        text=True,
    )
    return set(process.stdout.split("\0")) - {""}


def check(root, names):
    """The language server and the data pipeline decide like git; returns the names that git ignores."""
    ignored = ignored_by_git(root, names)
    policy = FilePolicy()
    assert {name for name in names if is_ignored(root, root / name)} == ignored
    assert {name for name in names if policy.refusal(root / name) == "git ignores it"} == ignored
    entries = {entry.path: entry.reason for entry in walk(root)}
    assert {name for name in names if entries.get(name) == ""} == set(names) - ignored
    return ignored


def test_a_worktree_has_the_rules_the_repository_and_the_commit_of_its_repository(tmp_path):
    top = repository(tmp_path / "top")
    git(top, "remote", "add", "origin", "https://me:secret@example.com/o/r.git")
    append(top / ".git/info/exclude", "private_*.py")
    git(top, "worktree", "add", "-q", "../tree", "-b", "b")
    write(tmp_path / "tree", "second.py", "private_a.py")
    git(tmp_path / "tree", "add", "second.py")
    git(tmp_path / "tree", "commit", "-qm", "second")
    tree = tmp_path / "tree"
    assert check(tree, ["keep.py", "second.py", "private_a.py"]) == {"private_a.py"}
    assert git_state(tree) == ("example.com/o/r", git(tree, "rev-parse", "HEAD"))
    assert git_state(top) == ("example.com/o/r", git(top, "rev-parse", "HEAD"))
    git(top, "pack-refs", "--all")
    assert git_state(tree)[1] == git(tree, "rev-parse", "HEAD") != git_state(top)[1]
    git(tree, "checkout", "-q", "--detach")
    assert git_state(tree)[1] == git(tree, "rev-parse", "HEAD")
    assert not any(entry.path == ".git" for entry in walk(tree))


def test_submodules_have_their_own_rules_also_when_nested_and_read_from_above(tmp_path):
    repository(tmp_path / "inner", ["i.py"])
    middle = repository(tmp_path / "middle", ["m.py"])
    git(middle, "submodule", "add", "-q", str(tmp_path / "inner"), "deep")
    git(middle, "commit", "-qam", "sub")
    top = repository(tmp_path / "top")
    git(top, "submodule", "add", "-q", str(middle), "dep")
    git(top, "submodule", "update", "-q", "--init", "--recursive")
    append(top / ".gitignore", "above_*.py")
    append(top / ".git/modules/dep/info/exclude", "private_*.py")
    append(top / ".git/modules/dep/modules/deep/info/exclude", "hidden_*.py")
    names = ["above_1.py", "private_1.py", "hidden_1.py"]
    for folder in (top, top / "dep", top / "dep/deep"):
        write(folder, *names)
    assert check(top, names) == {"above_1.py"}
    assert check(top / "dep", names) == {"private_1.py"}
    assert check(top / "dep/deep", names) == {"hidden_1.py"}
    read = {entry.path for entry in walk(top) if not entry.reason}
    assert {"dep/above_1.py", "dep/deep/private_1.py", "hidden_1.py", "dep/deep/i.py"} <= read
    assert not read & {"dep/private_1.py", "dep/deep/hidden_1.py", "above_1.py", "dep/.git"}
    assert git_state(top / "dep/deep")[1] == git(top / "dep/deep", "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("url", "repository_name"),
    [
        ("git@example.org:me/proj.git", "example.org/me/proj"),
        ("ssh://git@example.org/me/proj", "example.org/me/proj"),
        ("git+ssh://me:secret@example.org/me/proj.git", "example.org/me/proj"),
        ("/home/me/private/proj", ""),
        ("../proj", ""),
        ("file:///home/me/proj", ""),
    ],
)
def test_a_remote_names_the_repository_and_no_secret(tmp_path, url, repository_name):
    top = repository(tmp_path / "top")
    git(top, "remote", "add", "origin", url)
    git(top, "config", "remote.origin.pushurl", "https://other.example.com/x")
    assert git_state(top) == (repository_name, git(top, "rev-parse", "HEAD"))


def settings_of_the_repository(top, home):
    git(top, "config", "core.excludesFile", str(top.parent / "ignore"))
    return top.parent / "ignore"


def settings_of_the_user(top, home):
    append(home / ".gitconfig", "[core]", "\texcludesfile = ~/my-ignore")
    return home / "my-ignore"


def settings_in_the_config_folder(top, home):
    append(home / "config/git/config", "[core]", '\texcludesFile = "~/with # sign" ; quoted')
    return home / "with # sign"


def settings_in_an_included_file(top, home):
    append(home / ".gitconfig", f'[includeIf "gitdir:{top.parent}/"]', "\tpath = work.inc")
    append(home / "work.inc", "[core]", "\texcludesfile = ~/work-ignore")
    return home / "work-ignore"


def settings_of_a_worktree(top, home):
    git(top, "config", "extensions.worktreeConfig", "true")
    git(top, "config", "--worktree", "core.excludesFile", "../tree-ignore")
    return top.parent / "tree-ignore"


def no_settings(top, home):
    return home / "config/git/ignore"


@pytest.mark.parametrize(
    "source",
    [
        settings_of_the_repository,
        settings_of_the_user,
        settings_in_the_config_folder,
        settings_in_an_included_file,
        settings_of_a_worktree,
        no_settings,
    ],
)
def test_the_users_own_ignore_file_counts_wherever_it_is_named(tmp_path, home, source):
    top = repository(tmp_path / "top")
    append(source(top, home), "global_*.py", "out/")
    append(top / ".gitignore", "!global_kept.py")
    write(top, "global_c.py", "a/global_d.py", "global_kept.py", "a/out/x.py")
    names = ["keep.py", "global_c.py", "a/global_d.py", "global_kept.py", "a/out/x.py"]
    assert check(top, names) == {"global_c.py", "a/global_d.py", "a/out/x.py"}


@pytest.mark.parametrize("setting", ["", "~/ignore"])
def test_a_user_without_a_home_reads_checkouts_too(tmp_path, monkeypatch, setting):
    top = repository(tmp_path / "top", ("keep.py", "build/a.py"))
    (top / ".gitignore").write_text("build/\n")
    if setting:
        git(top, "config", "core.excludesFile", setting)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no entry"])
    results = [*read(Source(top, "folder"))]
    assert [each.path for each in results if isinstance(each, Document)] == [".gitignore", "keep.py"]
    assert [each.reason for each in results if isinstance(each, Outcome)] == ["ignored by git"]


def test_a_folder_of_a_repository_is_read_by_the_rules_above_it(tmp_path):
    top = repository(tmp_path / "top")
    append(top / ".git/info/exclude", "private_*.py", "/src/odd/")
    append(top / ".gitignore", "*.gen.py", "/corpus/")
    write(top, "src/private_a.py", "src/b.gen.py", "src/c.py", "src/odd/d.py", "corpus/e.py")
    assert [entry.path for entry in walk(top / "src") if not entry.reason] == ["c.py"]
    assert [entry.path for entry in walk(top / "corpus") if not entry.reason] == ["e.py"]  # asked for by name


def test_the_environment_of_a_hook_and_odd_files_change_nothing(tmp_path, home, monkeypatch):
    top, other = repository(tmp_path / "top"), repository(tmp_path / "other")
    git(other, "config", "core.excludesFile", str(tmp_path / "wrong"))
    append(tmp_path / "wrong", "*")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert not is_ignored(top, top / "keep.py")
    monkeypatch.delenv("GIT_DIR")
    (top / ".gitignore").write_bytes(b"\xef\xbb\xbffirst.py\r\nsecond.py\r\n\x0cnot_a_line\r\ncaf\xe9.py\n")
    odd = os.fsdecode(b"caf\xe9.py")
    write(top, "first.py", "second.py", "not_a_line", odd)
    assert check(top, ["first.py", "second.py", "not_a_line", "keep.py"]) == {"first.py", "second.py"}
    assert is_ignored(top, top / odd)
    git(top, "config", "core.ignoreCase", "true")
    write(top, "FIRST.PY")
    assert check(top, ["FIRST.PY"]) == {"FIRST.PY"}
    monkeypatch.setenv("PATH", "")  # without git the rules of the files count, the settings are the defaults
    append(home / "config/git/ignore", "keep.py")
    git_state(top)
    assert is_ignored(top, top / "keep.py") and is_ignored(top, top / "second.py")


def test_a_link_to_an_ignored_file_is_ignored_and_a_broken_git_file_is_no_error(tmp_path):
    top = repository(tmp_path / "top")
    append(top / ".gitignore", "local.txt")
    write(top, "local.txt")
    (top / "link.py").symlink_to("local.txt")
    assert FilePolicy().refusal(top / "link.py") == "git ignores it"
    write(tmp_path / "broken", "a.py")
    for content in (b"gitdir: /nowhere/at/all\n", b"", b"\xff\0gitdir"):
        (tmp_path / "broken/.git").write_bytes(content)
        assert git_state(tmp_path / "broken") == ("", "")
        assert not is_ignored(tmp_path / "broken", tmp_path / "broken/a.py")
    (top / ".git/HEAD").write_text("ref: refs/heads/../../../local.txt\n")
    assert git_state(top)[1] == ""


@pytest.mark.parametrize("seed", range(6))
def test_random_rules_in_every_source(tmp_path, home, seed):
    rng = random.Random(seed)
    names = ["a", "b", "c.py", "build", "x.log", "d1.py"]
    patterns = [
        "*.log",
        "build/",
        "/a",
        "!x.log",
        "a/**/b",
        "c.*",
        "!c.py",
        "b/",
        "/a/b",
        "d[0-9].py",
        "*",
        "!*/",
    ]
    top = repository(tmp_path / "top", ["first"])
    git(top, "worktree", "add", "-q", "../tree", "-b", "b")
    tree = tmp_path / "tree"
    files = {"/".join(rng.choices(names, k=rng.randint(1, 4))) for _ in range(30)}
    files = [name for name in sorted(files) if not any(other.startswith(f"{name}/") for other in files)]
    write(tree, *files)
    git(top, "config", "core.excludesFile", str(tmp_path / "global"))
    sources = (tmp_path / "global", top / ".git/info/exclude", tree / ".gitignore")
    for source in sources:
        append(source, *rng.choices(patterns, k=rng.randint(0, 3)))

    ignored = ignored_by_git(tree, files)
    assert {name for name in files if is_ignored(tree, tree / name)} == ignored
    walked = {entry.path for entry in walk(tree) if not entry.reason}
    assert walked & set(files) == set(files) - ignored


@pytest.fixture
def ten_seconds():
    """The test fails after ten seconds, also in the midst of a regular expression."""

    def stop(*_):
        raise TimeoutError("ten seconds are over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*a" * 10 + "*b", {2}),
        ("**/" + "*a*/" * 30 + "b", {3}),
        ("a**" * 20 + "[b]", {2}),
        ("*?" * 40, {0, 2}),
    ],
)
def test_no_pattern_is_slow(tmp_path, ten_seconds, pattern, matches):
    """git itself needs years for some of these, so the results are worked out by hand."""
    names = ["a" * 60, "aa/" * 60 + "aa", "a" * 60 + "b", "aa/" * 40 + "b"]
    write(tmp_path, *names)
    append(tmp_path / ".gitignore", pattern)
    lines = attribute_lines("", f"{pattern} linguist-generated\n".encode())
    assert {index for index in range(4) if is_ignored(tmp_path, tmp_path / names[index])} == matches
    assert {index for index in range(4) if declared_reason(names[index], lines)} == matches


@pytest.mark.parametrize("line", ["bin\\", "!", "[z-a].txt", "[a", "[[:letter:]]", "a[\\", "/", "***!["])
def test_a_line_that_git_cannot_use_leaves_the_others_in_force(tmp_path, line):
    top = repository(tmp_path / "top")
    append(top / ".gitignore", "*.secret", line, "!kept.secret")
    names = ["keep.py", "a.secret", "kept.secret", "bin/a", "a.txt", "b/c.secret"]
    write(top, *names)
    assert check(top, names) == {"a.secret", "b/c.secret"}


@pytest.mark.parametrize("name", ["a.secret", "folder/b.secret"])
def test_an_ignore_file_that_is_a_link_counts_only_where_git_reads_it(tmp_path, home, name):
    top = repository(tmp_path / "top")
    write(top, name, "global.py")
    append(tmp_path / "rules", "*.secret")
    (top / name).with_name(".gitignore").symlink_to(tmp_path / "rules")
    assert check(top, [name, "keep.py"]) == set()
    append(tmp_path / "global", "global.py")
    append(home / "config/git/none")
    (home / "config/git/ignore").symlink_to(tmp_path / "global")
    assert check(top, [name, "keep.py", "global.py"]) == {"global.py"}


CLASSES = ["alpha", "digit", "alnum", "lower", "upper", "xdigit", "punct", "space", "blank", "print", "graph"]
PIECES = [
    *[
        "a",
        "b",
        "B",
        "ab",
        ".py",
        "*",
        "?",
        "**",
        "***",
        "/",
        "/",
        "/**/",
        "**/",
        "/**",
        "*a",
        "a*",
        " ",
        "#",
        "!",
    ],
    *[
        "[ab]",
        "[!a]",
        "[^a]",
        "[]a]",
        "[a-c]",
        "[A-C]",
        "[!]a]",
        "[a-]",
        "[--0]",
        "[a\\]b]",
        "[a\\-c]",
        "[z-a]",
    ],
    *[
        "[a",
        "[",
        "]",
        "\\",
        "\\*",
        "\\a",
        "\\ ",
        "\\/",
        "\\B",
        "\u00e9",
        "[\u00e9]",
        "[[:cntrl:]]",
        "[[:x:]]",
    ],
    *[f"[[:{name}:]]" for name in CLASSES],
    *["[[:]", "[[:a]", "[[:alpha:]-c]", "[![:alpha:][:digit:]]", "[a-c-e]", "[[-a]", "[A]", "[!A]", "[\\A]"],
]
FILES = [
    *[
        "a",
        "b",
        "B",
        "ab",
        "ba",
        "aba",
        "a.py",
        "b.py",
        "a/b",
        "a/b.py",
        "a/b/a",
        "b/a/ab.py",
        "ab/a.py",
        "a b.py",
    ],
    *[
        "a*",
        "\u00e9",
        "\u00e9/a",
        "a/\u00e9.py",
        "a]",
        "]a",
        "-",
        "a-",
        "c",
        "C",
        "*",
        "a.py/b",
        "[a",
        "#a",
        "!a",
        "a ",
    ],
    *["b/a ", "\\", "a\\b", "0", ":", "_", "\t", "a\x0b", "\x7f", "~", "z", "Z", "A"],
]


@pytest.mark.parametrize("ignore_case", [False, True])
@pytest.mark.filterwarnings("error")
def test_random_patterns_match_as_in_git(tmp_path, ignore_case):
    rng = random.Random(5)
    top = tmp_path / "top"
    top.mkdir()
    git(top, "init", "-q")
    git(top, "config", "core.ignoreCase", str(ignore_case).lower())
    for number in range(250):
        lines = ["".join(rng.choices(PIECES, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 2))]
        lines += ["!" + "".join(rng.choices(PIECES, k=rng.randint(1, 3)))] * (rng.random() < 0.3)
        append(top / str(number) / ".gitignore", *(PIECES[number : number + 1] or lines))
    names = [f"{number}/{name}" for number in range(250) for name in FILES]
    ignored = ignored_by_git(top, names)
    decided = {name for name in names if is_ignored(top, top / name)}
    folders = {name.partition("/")[0] for name in decided ^ ignored}
    wrong = {folder: (top / folder / ".gitignore").read_text() for folder in folders}
    assert not wrong, sorted(decided ^ ignored)
    assert 500 < len(ignored) < len(names) - 500
