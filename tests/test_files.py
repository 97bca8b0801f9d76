"""Writing files: complete or not at all, never over what is not ours, with errors that name path and remedy;
leftovers of killed processes are swept, files that are being written are not."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from codegemma import files
from codegemma.generate.cache import PrefixCache

MARK = b"ours 1\n"


def write(path, data=MARK, mark=MARK):
    with files.atomic_write(path, mark) as out:
        out.write(data)


def as_a_user(code, *arguments):
    """Runs Python code, which may use `files` and Path, as an ordinary user: for root as another."""
    start = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from codegemma import files
if os.getuid() == 0:  # not before: the interpreter may lie in root's home directory
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
"""
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# Never over what is not ours.


def test_a_call_with_another_stamp_keeps_what_is_being_written_and_removes_what_is_not(tmp_path):
    path = tmp_path / "result"
    with files.resumable_write(path, "first") as out:
        with (
            pytest.raises(ValueError, match="result: is being written by another process: wait"),
            files.resumable_write(path, "second"),
        ):
            pass
        out.write(b"complete")
    assert path.read_bytes() == b"complete"
    with pytest.raises(KeyboardInterrupt), files.resumable_write(path, "first"):
        raise KeyboardInterrupt
    assert len(os.listdir(tmp_path)) == 2
    with files.resumable_write(path, "second") as out:
        out.write(b"second")
    assert os.listdir(tmp_path) == ["result"] and path.read_bytes() == b"second"


def test_a_file_of_anybody_else_is_kept(tmp_path):
    path = tmp_path / "notes.txt"
    for text in (b"my notes\n", b"o", b"ours 2\n", b"\0", MARK[:-1]):
        path.write_bytes(text)
        with pytest.raises(
            ValueError, match=r"notes\.txt was not written by codegemma, and is kept: name an"
        ):
            write(path)
        assert path.read_bytes() == text
    for text in (b"", MARK, MARK + b"of an older run"):
        path.write_bytes(text)
        write(path, MARK + b"new")
        assert path.read_bytes() == MARK + b"new"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_links_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    link.symlink_to(target)  # dangling
    write(link)
    assert link.is_symlink() and target.read_bytes() == MARK
    target.write_bytes(b"the user's")
    with pytest.raises(ValueError, match="kept"):
        write(link)
    assert target.read_bytes() == b"the user's" and link.is_symlink()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop") as caught:
        write(loop)
    assert "circle" in files.explain(caught.value) and loop.is_symlink()


@pytest.mark.parametrize("mark", [MARK, None])
def test_what_is_no_regular_file_is_kept(tmp_path, mark):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    for name, words in (("pipe", "no regular file"), ("folder", "a folder"), ("null", "no regular file")):
        with pytest.raises(ValueError, match=f"{words}, and is not written over: name a file"):
            write(tmp_path / name, mark=mark)
        with pytest.raises(ValueError, match=words), files.resumable_write(tmp_path / name, "stamp"):
            pass
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_replaced_file_keeps_its_mode(tmp_path):
    write(tmp_path / "private")
    (tmp_path / "private").chmod(0o600)
    write(tmp_path / "private")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_the_prompt_cache_is_saved_over_saved_caches_alone(tmp_path):
    path, cache = tmp_path / "cache", PrefixCache("key", 64, 1 << 20)
    cache.save(path)
    cache.save(path)
    path.write_bytes(path.read_bytes().replace(b"cache 2", b"cache 1"))  # of an older version
    cache.save(path)
    path.write_text("def f():\n")
    with pytest.raises(ValueError, match="kept"):
        cache.save(path)
    with pytest.warns(UserWarning, match="was not written by codegemma"):
        assert cache.load(path) is False
    assert path.read_text() == "def f():\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(UserWarning, match="no regular file"):  # and it does not wait for a writer
        assert cache.load(tmp_path / "pipe") is False


def test_a_folder_of_anybody_else_is_not_cleared(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / ".code.77.part").mkdir()
    files.expect_only(tmp_path, ["code", "ready"], "an interrupted run")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is not of an interrupted run"):
        files.expect_only(tmp_path, ["code", "ready"], "an interrupted run")


# Errors.


@pytest.mark.parametrize(
    ("number", "name", "words"),
    [
        (errno.ENOSPC, "x/out.gguf", "x/out.gguf: No space left on device: free some space there"),
        (errno.EACCES, b"bytes.txt", "bytes.txt: Permission denied: name a file or folder that you may use"),
        (errno.EROFS, None, "Read-only file system: name a folder that can be written"),
        (errno.EXDEV, "a", "a: Invalid cross-device link"),
        (errno.ENAMETOOLONG, "a" * 300, "choose a shorter name"),
    ],
)
def test_an_error_says_path_and_remedy(number, name, words):
    assert words in files.explain(OSError(number, os.strerror(number), name))
    assert files.explain(OSError("in words alone")) == "in words alone"


def test_the_remedy_for_our_own_folders_is_their_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for folder, variable in (("cache", "XDG_CACHE_HOME"), ("state", "XDG_STATE_HOME")):
        error = OSError(errno.ENOSPC, "No space", str(tmp_path / folder / "codegemma" / "file"))
        remedy = f"set {variable} to a folder with room that you may write"
        assert files.explain(error).endswith(remedy)
        error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / folder))  # to be made first
        assert files.explain(error).endswith(remedy)
        error = FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / folder / "codegemma"))  # /proc
        assert files.explain(error).endswith(remedy)
        error = NotADirectoryError(
            errno.ENOTDIR, "Not a directory", str(tmp_path / folder / "codegemma" / "a")
        )
        assert files.explain(error).endswith(remedy)
        error = FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / folder / "codegemma" / "file"))
        assert files.explain(error).endswith("check the path")
        assert remedy not in files.explain(OSError(errno.EACCES, "Permission denied"))


def test_a_full_disk_is_named(tmp_path):
    """/dev/full is as full as a disk can be; a write to it says neither which file nor what to do."""
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    path = tmp_path / "result"
    with pytest.raises(OSError, match="result") as caught, files.atomic_write(path):
        full.write(b"x")
    assert files.explain(caught.value).startswith(f"{path}: No space left on device: free some space there")
    with pytest.raises(OSError, match="result"), files.resumable_write(path, "stamp"):
        full.write(b"x")
    with pytest.raises(OSError, match="folder") as caught, files.atomic_directory(tmp_path / "folder"):
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists() and not (tmp_path / "folder").exists()
    with pytest.raises(FileNotFoundError, match="source"), files.atomic_write(path):
        open(tmp_path / "source").close()  # an error that has a name keeps it
    full.close()


def test_a_folder_of_another_user_is_named(tmp_path):
    if os.getuid() == 0:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o001 == 0 and str(folder).startswith("/tmp/"):
                folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o755 if os.getuid() == 0 else 0o555)
    code = """
try:
    with files.atomic_write(Path(sys.argv[1])): pass
except OSError as error: print(files.explain(error))
"""
    run = as_a_user(code, tmp_path / "theirs" / "out")
    assert run.stdout.startswith(f"{tmp_path}/theirs/out: Permission denied: name a file or folder"), run
    assert ".part" not in run.stdout


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match="no home directory: set HOME, or XDG_CACHE_HOME"):
        files.cache_dir()
    assert "No space" in files.explain(OSError(errno.ENOSPC, "No space", "/x"))


def test_text_files_of_other_bytes_are_named(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes("\ufeffkey\n".encode())
    assert files.read_text(path) == "key\n"
    path.write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"keys is not UTF-8 text \(byte 2 is 0xff\): convert it first"):
        files.read_text(path)


# Leftovers.

WRITER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from codegemma import files
with files.{writer}(Path(sys.argv[1])) as out:
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("writer", ["atomic_write", "atomic_directory"])
def test_any_later_run_sweeps_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch, writer):
    code = WRITER.format(root=str(Path(__file__).parent.parent), writer=writer)
    children = []
    for name in ("killed", "alive"):
        command = [sys.executable, "-c", code, tmp_path / name]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert children[-1].stdout.readline() == "begun\n"
    killed, alive = children
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        kept = [".notes.part", ".mine.at-0123456789abcdef.part", ".a.b.part", "x.1.part"]
        for name in kept:
            (tmp_path / name).touch()
        assert any(name.startswith(".killed.") for name in os.listdir(tmp_path))
        monkeypatch.setattr(files, "_WRITTEN", set())
        write(tmp_path / "another target")
        left = os.listdir(tmp_path)
        assert not any(name.startswith(".killed.") for name in left), left
        assert any(name.startswith(".alive.") for name in left) and set(kept) <= set(left)
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()


def test_a_leftover_whose_writers_number_lives_again_here(tmp_path, monkeypatch):
    """In a container each run has the same process id: the lock tells, not the number."""
    left = tmp_path / f".model.gguf.{os.getpid()}-7.part"
    left.write_bytes(bytes(99))
    with files.atomic_write(tmp_path / "out") as out:
        files.remove_leftovers(tmp_path)
        assert not left.exists() and len(os.listdir(tmp_path)) == 1
        out.write(b"complete")
    assert (tmp_path / "out").read_bytes() == b"complete"


def test_writers_and_sweepers_at_once(tmp_path):
    """Every write succeeds, whatever is swept meanwhile."""
    stop, failures = threading.Event(), []

    def sweep():
        while not stop.is_set():
            files.remove_leftovers(tmp_path)

    def work(name):
        try:
            for number in range(60):
                write(tmp_path / name, MARK + str(number).encode())
                with files.atomic_directory(tmp_path / f"{name}{number}") as folder:
                    (folder / "file").touch()
        except Exception as error:
            failures.append(error)

    sweeper = threading.Thread(target=sweep)
    workers = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    sweeper.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    sweeper.join()
    assert not failures and {(tmp_path / name).read_bytes() for name in "abcd"} == {MARK + b"59"}
    assert len(os.listdir(tmp_path)) == 4 + 4 * 60 and len([*tmp_path.glob("*/file")]) == 4 * 60
