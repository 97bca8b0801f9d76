"""Where models come from: names, caches in their real layouts, and the pieces of the packaged default."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny_gguf, write_tiny_hf

import codegemma
from codegemma import files, hub
from codegemma.checkpoints import open_checkpoint
from codegemma.config import PRESETS
from codegemma.hub import pull as hub_pull
from codegemma.hub import stores


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Empty caches, and no package of the default model."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "DEFAULT_FILE", replace(hub.DEFAULT_FILE, package="no_such_package"))
    return tmp_path


PIECE = 1 << 16  # bytes of all pieces but the last


@pytest.fixture
def packaged(home, monkeypatch):
    """A package in pieces on the import path, in the layout of the real one."""
    joined = write_tiny_gguf(home / "joined.gguf", tiny_config("gemma-mqa")).read_bytes()
    starts = range(0, len(joined), PIECE)
    names = tuple(f"m.gguf.part{number:02}" for number in range(len(starts)))
    for number, (name, start) in enumerate(zip(names, starts, strict=True), 1):
        data = home / "site" / f"tiny_model_part{number}" / "data"
        data.mkdir(parents=True)
        (data / name).write_bytes(joined[start : start + PIECE])
    terms = home / "site" / "tiny_model" / "data"
    terms.mkdir(parents=True)
    (terms / "GEMMA_TERMS.html").write_text("terms")
    monkeypatch.syspath_prepend(home / "site")
    packaged = hub.Packaged("tiny_model", names, "m.gguf", len(joined), hashlib.sha256(joined).hexdigest())
    monkeypatch.setattr(hub, "DEFAULT_FILE", packaged)
    return packaged


def _snapshot(repository, revision="abc123"):
    home = hub.hub_cache_dir() / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2b", "2b"),
        ("codegemma-2b", "2b"),
        ("google/codegemma-2b", "2b"),
        ("CodeGemma-1.1-7B-it", "1.1-7b-it"),
        ("google/gemma-3-270m", "gemma-3-270m"),
        ("gemma-3-270m", "gemma-3-270m"),
        ("3b", None),
        ("other/codegemma-2b", None),
    ],
)
def test_names_and_aliases(name, expected):
    assert hub.preset(name) == (PRESETS[expected] if expected else None)
    assert all(hub.preset(preset.hub) is preset for preset in PRESETS.values())


def test_a_path_is_itself_and_a_presets_name_comes_before_a_path(home, monkeypatch):
    path = write_tiny_gguf(home / "m.gguf", tiny_config("gemma-mqa"))
    assert hub.resolve(path) == hub.resolve(str(path)) == path
    monkeypatch.chdir(home)
    (home / "2b").mkdir()
    assert hub.resolve("./2b").samefile(home / "2b")
    with pytest.raises(ValueError, match="CodeGemma 2B is not on this machine.*codegemma pull 2b"):
        hub.resolve("2b")


def test_our_cache_and_the_hugging_face_cache_are_searched():
    snapshot = write_tiny_hf(_snapshot("google/codegemma-7b-it"), tiny_config("gemma-mha"))
    assert hub.resolve("7b-it") == snapshot
    info = {info.preset.name: info for info in hub.models()}["7b-it"]
    assert info.path == snapshot and info.size == (snapshot / "model.safetensors").stat().st_size
    cached = hub.cache_dir() / "models" / "7b-it" / "any.gguf"
    write_tiny_gguf(cached, tiny_config("gemma-mha"))
    assert hub.resolve("codegemma-7b-it") == cached
    file = _snapshot("google/codegemma-2b-GGUF") / "codegemma-2b.gguf"
    write_tiny_gguf(file, tiny_config("gemma-mqa"))
    assert hub.resolve("2b") == file
    other = write_tiny_hf(_snapshot("someone/tuned"), tiny_config("gemma-mqa"))
    assert hub.resolve("someone/tuned") == other


def test_an_incomplete_download_is_not_a_model():
    snapshot = _snapshot("google/codegemma-2b")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert all(info.path is None for info in hub.models())
    with pytest.raises(ValueError, match="not on this machine"):
        hub.resolve("2b")


def test_the_hubs_own_variables_move_its_cache(home, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(home / "a"))
    assert hub.hub_cache_dir() == home / "a" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "b"))
    assert hub.hub_cache_dir() == home / "b"


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(ValueError, match="no model 'nosuch'.*1.1-7b-it, gemma-3-270m"):
        hub.resolve("nosuch")


def _join(home):
    """The joined file where earlier versions put it, and its path."""
    path = hub.cache_dir() / "models" / hub.DEFAULT / "m.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((home / "joined.gguf").read_bytes())
    return path


def test_the_default_model_is_linked_once_checked_and_mapped_in_place(packaged, home):
    assert [info.packaged for info in hub.models()] == [False] * 5 + [True]
    assert not (hub.cache_dir() / "models").exists()
    path = hub.resolve()
    assert len(packaged.pieces) > 2 and path.name == "m.gguf.part00" and path.is_symlink()
    assert stores.disk_bytes(path.parent) < 10_000  # nothing is copied
    checkpoint, joined = open_checkpoint(path), open_checkpoint(home / "joined.gguf")
    assert checkpoint.path == path and checkpoint.identity == joined.identity
    for name, tensor in joined.tensors.items():
        mapped = checkpoint.tensors[name].data
        assert mapped.tobytes() == tensor.data.tobytes() and not mapped.flags.owndata
        assert not mapped.flags.writeable
    assert hub.name_of(path) == "gemma-3-270m"
    assert "ai.google.dev/gemma/terms" in (path.parent / "NOTICE").read_text()
    assert (path.parent / "GEMMA_TERMS.html").read_text() == "terms"
    assert hub.resolve("gemma-3-270m") == hub.resolve("gemma-3-270m:Q4_K_M") == path
    assert open_checkpoint(path.parent).path == open_checkpoint(path.with_name("m.gguf.part02")).path == path
    assert hub.models()[-1].path == path and hub.models()[-1].size == packaged.size


def test_pieces_of_odd_sizes_are_read_into_memory(packaged, home):
    joined = (home / "joined.gguf").read_bytes()
    for number, part in enumerate((joined[:70_001], joined[70_001:])):
        (home / f"x.gguf.part{number}").write_bytes(part)
    checkpoint = open_checkpoint(home / "x.gguf.part0")
    assert checkpoint.identity == open_checkpoint(home / "joined.gguf").identity
    files.drop_mapped_pages()
    assert checkpoint.identity == open_checkpoint(home / "x.gguf.part1").identity
    (home / "x.gguf.part1").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.gguf\.part1: the file is empty"):
        open_checkpoint(home / "x.gguf.part0")
    (home / "x.gguf.part1").rename(home / "x.gguf.part2")
    with pytest.raises(ValueError, match=r"x\.gguf\.part1 is not beside it: download it too"):
        open_checkpoint(home / "x.gguf.part0")
    (home / "x.gguf.part2").unlink()
    with pytest.raises(ValueError, match=r"tensor .* needs .* bytes of file, of 70,001"):
        open_checkpoint(home / "x.gguf.part0")


def test_a_model_in_pieces_completes_and_is_packed_whole(packaged, home):
    path = hub.resolve()
    ids = [2, 300, 301, 302]
    expected = codegemma.load(home / "joined.gguf", threads=1).logits(ids)
    assert codegemma.load(threads=2).logits(ids).tobytes() == expected.tobytes()
    pack = hub_pull.pack(path, home / "m.pack", "elsewhere")
    assert open_checkpoint(hub_pull.install(pack)).identity == open_checkpoint(path).identity


def test_later_starts_do_not_read_the_file(packaged, monkeypatch):
    path = hub.resolve()
    monkeypatch.setattr(hub, "_size_and_sha256", lambda *_: pytest.fail("read again"))
    assert hub.resolve() == path


def test_links_that_lead_nowhere_are_made_anew(packaged, home, monkeypatch):
    """This happens where the package's environment is removed, and another environment has the package."""
    path = hub.resolve()
    (home / "site").rename(home / "other")
    assert hub.models()[-1].path is None
    with pytest.raises(ValueError, match=r"is not installed, or is damaged in .*: .*\[default-model\]"):
        hub.resolve()
    monkeypatch.syspath_prepend(home / "other")
    assert hub.resolve() == path and open_checkpoint(path).tensors


def test_where_no_link_can_be_made_the_pieces_are_copied(packaged, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    path = hub.resolve()
    assert not path.is_symlink() and open_checkpoint(path).tensors


def test_a_file_that_an_earlier_version_joined_is_used(packaged, home):
    path = _join(home)
    assert hub.models()[-1].path is None
    assert hub.resolve() == path == hub.models()[-1].path
    path.write_bytes(b"x" * packaged.size)
    os.utime(path, (1, 1))
    assert hub.models()[-1].path is None
    assert hub.resolve().name == "m.gguf.part00"


def test_a_joined_file_needs_no_package(packaged, home, monkeypatch):
    path = _join(home)
    monkeypatch.setattr(hub, "DEFAULT_FILE", replace(packaged, package="no_such_package"))
    assert hub.resolve() == path
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"is not installed, or is damaged in .*: .*\[default-model\]"):
        hub.resolve()


def test_a_package_that_makes_another_file_is_refused_and_leaves_nothing(packaged, home):
    (home / "site" / "tiny_model_part2" / "data" / "m.gguf.part01").write_bytes(b"evil")
    with pytest.raises(ValueError, match="sha256 .* were expected: .* --force-reinstall tiny-model"):
        hub.resolve()
    assert [file.name for file in (hub.cache_dir() / "models" / hub.DEFAULT).iterdir()] == [".lock"]


@pytest.mark.parametrize("lost", [1, 3])
def test_a_missing_piece_is_a_missing_package(packaged, home, lost):
    (home / "site" / f"tiny_model_part{lost}" / "data" / packaged.pieces[lost - 1]).unlink()
    with pytest.raises(ValueError, match=r"\[default-model\]"):
        hub.resolve()


def test_processes_at_once_link_one_file(packaged, home):
    code = (
        "from codegemma import hub; "
        f"hub.DEFAULT_FILE = hub.Packaged({packaged.package!r}, {packaged.pieces!r}, "
        f"{packaged.name!r}, "
        f"{packaged.size}, {packaged.sha256!r}); print(hub.resolve().lstat().st_ino)"
    )
    path = os.pathsep.join([str(home / "site"), os.getcwd()])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    assert len({run.communicate(timeout=300)[0] for run in runs}) == 1 and all(
        run.returncode == 0 for run in runs
    )


def test_the_real_default_package_if_installed(tmp_path, monkeypatch):
    monkeypatch.undo()
    if not hub._piece_files(hub.DEFAULT_FILE):
        pytest.skip("codegemma[default-model] is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = hub.resolve()
    assert stores.weight_bytes(path) == 253_113_024 and path.is_symlink()
    assert not any(tensor.data.flags.owndata for tensor in open_checkpoint(path).tensors.values())
    start = time.process_time()
    hub.resolve()
    assert time.process_time() - start < 0.05
