"""Two processes that write to one new name at once: the first to finish is kept whole, the other says so.

The second writer runs inside the first one's work, so that the order is the same each time; the command line
is tried with two real processes as well.
"""

import errno
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny_gguf, write_tiny_hf

from codegemma import files
from codegemma.convert.convert import convert
from codegemma.convert.export import export
from codegemma.convert.verify import verify
from codegemma.editor import setup
from codegemma.hub import pull as hub_pull

ROOT = Path(__file__).parent.parent
TAKEN = r"exists now: choose another name, or pass --overwrite"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def models(tmp_path):
    """Two models of one shape and one name with different weights."""
    config, folders = tiny_config("gemma-mqa"), [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    return [write_tiny_gguf(folder / "m.gguf", config, "BF16", seed=len(folder.name)) for folder in folders]


def once(action):
    """A function of any arguments that calls `action` the first time."""
    actions = [action]
    return lambda *_, **__: actions.pop()() if actions else None


# ----------------------------------------------------------------------------------------- the mechanism
WRITERS = {
    "atomic": lambda path, replace: files.atomic_write(path, replace=replace),
    "resumable": lambda path, replace: files.resumable_write(path, "stamp", replace),
}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_that_is_taken_by_the_end_is_kept(tmp_path, monkeypatch, writer, links):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as exFAT does

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "new"
    with WRITERS[writer](path, False) as out:
        out.write(b"alone")
    assert path.read_bytes() == b"alone" and os.listdir(tmp_path) == ["new"]
    path.unlink()
    with pytest.raises(FileExistsError) as caught, WRITERS[writer](path, False) as out:
        out.write(b"second")
        path.write_bytes(b"first")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["new"]
    assert files.explain(caught.value) == f"{path}: File exists: name another, or remove that one"
    with WRITERS[writer](path, True) as out:
        out.write(b"third")
    assert path.read_bytes() == b"third" and os.listdir(tmp_path) == ["new"]


def test_what_became_somebody_elses_meanwhile_is_kept(tmp_path):
    path = tmp_path / "cache"
    message = "was not written by codegemma, and is kept"
    with pytest.raises(ValueError, match=message), files.atomic_write(path, b"ours") as out:
        out.write(b"ours")
        path.write_text("my notes")
    assert path.read_text() == "my notes" and os.listdir(tmp_path) == ["cache"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_whose_name_is_taken_by_the_end_is_kept(tmp_path, kind):
    path = tmp_path / "new"
    with pytest.raises(FileExistsError, match="new"), files.atomic_directory(path) as folder:
        (folder / "a").write_text("second")
        if kind == "file":
            path.write_text("first")
        else:
            path.mkdir()
            (path / "a").write_text("first")
    assert (path if kind == "file" else path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["new"]
    with files.atomic_directory(path, replace=True) as folder:
        (folder / "b").write_text("third")
    assert [file.name for file in path.iterdir()] == ["b"] and os.listdir(tmp_path) == ["new"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    rename = os.rename

    def fail_once(source, target):
        if ".part" in str(source) and str(target).endswith("model"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="model"), files.atomic_directory(tmp_path / "model", replace=True):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_folder_has_one_writer_and_is_free_when_that_one_is_killed(tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from codegemma.files import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])): print('begun', flush=True); time.sleep(600)\n"
    )
    folder = tmp_path / "a" / "rows"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "begun\n"
        message = "rows: is being written by another process: wait for it"
        with pytest.raises(ValueError, match=message), files.sole_writer(folder):
            pass
        assert folder.is_dir()
        other.kill()
        other.wait()
    with files.sole_writer(folder):
        pass
    with pytest.raises(ZeroDivisionError), files.sole_writer(tmp_path / "b"):
        raise ZeroDivisionError
    assert folder.is_dir() and not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------- convert
FORMATS = [
    ("new.gguf", {}),
    ("new.gguf", {"quantize_to": "q8_0"}),
    ("new.nemo", {}),
    ("new", {"to": "safetensors"}),
    ("new", {"to": "keras"}),
    ("new", {"to": "gemma_pytorch"}),
]


@pytest.mark.parametrize(("name", "options"), FORMATS, ids=[f"{name} {options}" for name, options in FORMATS])
def test_the_conversion_that_finishes_second_says_that_the_target_exists(models, tmp_path, name, options):
    target = tmp_path / name
    first = once(lambda: convert(models[0], target, **{**options, "quantize_to": None}))
    with pytest.raises(ValueError, match=f"{name} {TAKEN}|{name} exists: choose another name, or pass"):
        convert(models[1], target, **options, progress=first)
    proof = verify(models[0], target, threads=1)
    assert not proof.faults and proof.kl < 1e-9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "first", name, "second"]


def test_an_empty_folder_that_is_filled_meanwhile_is_not_replaced(models, tmp_path):
    target = tmp_path / "new"
    target.mkdir()
    with pytest.raises(ValueError, match="new"):
        notes = once(lambda: (target / "notes").write_text("mine"))
        convert(models[0], target, "safetensors", overwrite=True, progress=notes)
    assert (target / "notes").read_text() == "mine" and len([*target.iterdir()]) == 1


def test_of_two_processes_that_convert_to_one_name_one_succeeds(models, tmp_path):
    """As users start them, with other types, so that neither waits for the other's unfinished file."""
    command = [sys.executable, "-m", "codegemma.cli", "convert"]
    lines = [[models[0], "new.gguf"], [models[1], "new.gguf", "--dtype", "f32"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    processes = [subprocess.Popen([*command, *line], **pipes) for line in lines]
    outputs = [process.communicate(timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2]
    error = outputs[codes.index(2)][1]
    assert error.splitlines()[-1].startswith("error: new.gguf exists") and "Traceback" not in error
    winner = codes.index(0)
    assert not verify(models[winner], tmp_path / "new.gguf", threads=1).faults
    assert not verify(models[1 - winner], models[winner], threads=1).kl < 1e-9  # the check can fail


@pytest.mark.parametrize("program", ["ollama", "llamacpp", "lmstudio", "transformers", "nemo"])
def test_the_export_that_finishes_second_keeps_the_first(models, tmp_path, program):
    first = once(lambda: export(program, models[0], tmp_path / "out"))
    with pytest.raises(ValueError, match="exists"):
        export(program, models[1], tmp_path / "out", progress=first)
    export(program, models[0], tmp_path / "alone")
    both = [{file.relative_to(f): file.read_bytes() for file in f.rglob("*") if file.is_file()}
            for f in (tmp_path / "out", tmp_path / "alone")]  # fmt: skip
    assert both[0] == both[1]


def test_an_export_keeps_a_file_that_appears_meanwhile(models, tmp_path):
    mine = once(
        lambda: (tmp_path / "out").mkdir(exist_ok=True) or (tmp_path / "out" / "Modelfile").write_text("mine")
    )
    with pytest.raises(ValueError, match="Modelfile exists, and is kept: choose another folder"):
        export("ollama", models[0], tmp_path / "out", progress=mine)
    assert (tmp_path / "out" / "Modelfile").read_text() == "mine"


# ----------------------------------------------------------------------------------------------- the hub
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("same", [True, False])
def test_of_two_copies_into_the_cache_the_first_is_kept(models, tmp_path, monkeypatch, kind, same):
    """The second finds an equal copy there, and refuses another model of the name."""
    paths = []
    for number in (0, 0 if same else 1):
        path = tmp_path / f"{len(paths)}" / "model"
        path.parent.mkdir()
        if kind == "folder":
            path.mkdir()
        (path / "model.gguf" if kind == "folder" else path).write_bytes(models[number].read_bytes())
        paths.append(path)
    copy, others = hub_pull._copy, [paths[0]]

    def copy_after_another_has(source, out):
        if others:
            hub_pull.pull(str(others.pop()), "path", ask=lambda _: True)
        copy(source, out)

    monkeypatch.setattr(hub_pull, "_copy", copy_after_another_has)
    if same:
        target = hub_pull.pull(str(paths[1]), "path", ask=lambda _: True)
    else:
        with pytest.raises(ValueError, match="holds another model of this name"):
            hub_pull.pull(str(paths[1]), "path", ask=lambda _: True)
        target = files.cache_dir() / "models" / "local" / "model"
    file = target / "model.gguf" if kind == "folder" else target
    assert file.read_bytes() == models[0].read_bytes() and len([*target.parent.iterdir()]) == 1


def test_a_pack_that_is_installed_twice_at_once_is_installed(tmp_path, monkeypatch):
    model = write_tiny_hf(tmp_path / "model", tiny_config("gemma-mqa"))
    pack = hub_pull.pack(model, tmp_path / "my.pack")
    extract, others = hub_pull._extract, [pack]

    def extract_after_another_has(*arguments):
        if others:
            hub_pull.install(others.pop())
        extract(*arguments)

    monkeypatch.setattr(hub_pull, "_extract", extract_after_another_has)
    path = hub_pull.install(pack)
    assert (
        not others and (path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    )


class Downloads(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(404 if "none" in self.path else 200)
        self.send_header("Content-Length", "5000000")
        self.end_headers()
        if "none" not in self.path:
            self.wfile.write(bytes(5_000_000))


def test_two_downloads_of_one_file_do_not_write_into_each_others(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Downloads)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        url, file, refusals = f"http://127.0.0.1:{server.server_port}/m.gguf", tmp_path / "m.gguf", []

        def second():
            with pytest.raises(ValueError, match=r"m\.gguf: is being written by another process") as caught:
                hub_pull.fetch(url, file)
            refusals.append(caught.value)

        hub_pull.fetch(url, file, progress=once(second))
        assert len(refusals) == 1 and file.read_bytes() == bytes(5_000_000)
        with pytest.raises(ValueError, match="404"):
            hub_pull.fetch(url.replace("m.gguf", "none"), tmp_path / "none")
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["m.gguf"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---------------------------------------------------------------------------------------------- editors
def test_a_backup_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    file = tmp_path / "settings"
    file.write_text("the user's")
    write = files.atomic_write

    def write_after_another(path, **options):
        if path.name.endswith(".before-codegemma"):
            path.write_text("an older one")
        return write(path, **options)

    monkeypatch.setattr(setup, "atomic_write", write_after_another)
    assert setup._back_up(file).name == "settings.before-codegemma-2"
    assert (tmp_path / "settings.before-codegemma").read_text() == "an older one"
    assert (tmp_path / "settings.before-codegemma-2").read_text() == "the user's"
