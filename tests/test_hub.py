"""Where models come from: names, caches in their real layouts, and the assembly of the packaged default."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tiny import tiny_config, write_tiny_gguf, write_tiny_hf

from codegemma import hub
from codegemma.config import PRESETS


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Empty caches, and no package of the default model."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "DEFAULT_FILE", replace(hub.DEFAULT_FILE, package="no_such_package"))
    return tmp_path


PARTS = [b"first" * 1000, b"second" * 500, b"third"]


@pytest.fixture
def packaged(home, monkeypatch):
    """A package in parts on the import path, in the layout of the real one."""
    for number, part in enumerate(PARTS, 1):
        data = home / "site" / f"tiny_model_part{number}" / "data"
        data.mkdir(parents=True)
        (data / f"m.part{number}").write_bytes(part)
    terms = home / "site" / "tiny_model" / "data"
    terms.mkdir(parents=True)
    (terms / "GEMMA_TERMS.html").write_text("terms")
    monkeypatch.syspath_prepend(home / "site")
    joined = b"".join(PARTS)
    packaged = hub.Packaged(
        "tiny_model",
        tuple(f"m.part{number}" for number in (1, 2, 3)),
        "m.gguf",
        len(joined),
        hashlib.sha256(joined).hexdigest(),
    )
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


def test_the_default_model_is_assembled_once_and_checked(packaged):
    assert [info.packaged for info in hub.models()] == [False] * 5 + [True]
    assert not (hub.cache_dir() / "models").exists()
    path = hub.resolve()
    assert path.read_bytes() == b"".join(PARTS)
    assert "ai.google.dev/gemma/terms" in (path.parent / "NOTICE").read_text()
    assert (path.parent / "GEMMA_TERMS.html").read_text() == "terms"
    first = path.stat().st_ino
    assert hub.resolve("gemma-3-270m") == path and path.stat().st_ino == first
    assert hub.models()[-1].path == path and hub.models()[-1].size == packaged.size


def test_later_starts_do_not_read_the_file(packaged, monkeypatch):
    path = hub.resolve()
    monkeypatch.setattr(hub, "_size_and_sha256", lambda *_: pytest.fail("read again"))
    assert hub.resolve() == path


def test_a_damaged_file_in_the_cache_is_assembled_again(packaged):
    path = hub.resolve()
    path.write_bytes(b"x" * packaged.size)
    os.utime(path, (1, 1))
    assert hub.models()[-1].path is None
    assert hub.resolve().read_bytes() == b"".join(PARTS)


def test_a_lost_stamp_needs_no_package(packaged, monkeypatch):
    path = hub.resolve()
    (path.parent / "m.gguf.verified").unlink()
    monkeypatch.setattr(hub, "DEFAULT_FILE", replace(packaged, package="no_such_package"))
    assert hub.resolve() == path
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"missing or damaged: .*\[default-model\]"):
        hub.resolve()


def test_a_package_that_makes_another_file_is_refused_and_leaves_nothing(packaged, home):
    (home / "site" / "tiny_model_part2" / "data" / "m.part2").write_bytes(b"evil")
    with pytest.raises(ValueError, match="sha256 .* were expected: .* --force-reinstall tiny-model"):
        hub.resolve()
    assert [file.name for file in (hub.cache_dir() / "models" / hub.DEFAULT).iterdir()] == [".lock"]


@pytest.mark.parametrize("lost", [1, 3])
def test_a_missing_part_is_a_missing_package(packaged, home, lost):
    (home / "site" / f"tiny_model_part{lost}" / "data" / f"m.part{lost}").unlink()
    with pytest.raises(ValueError, match=r"\[default-model\]"):
        hub.resolve()


def test_processes_at_once_assemble_one_file(packaged, home):
    code = (
        "from codegemma import hub; "
        f"hub.DEFAULT_FILE = hub.Packaged({packaged.package!r}, {packaged.parts!r}, "
        f"{packaged.name!r}, "
        f"{packaged.size}, {packaged.sha256!r}); print(hub.resolve().stat().st_ino)"
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


def test_the_real_default_package_if_installed(monkeypatch):
    monkeypatch.undo()
    if not hub._part_files(hub.DEFAULT_FILE):
        pytest.skip("codegemma[default-model] is not installed")
    path = hub.resolve()
    assert path.stat().st_size == 253_113_024
    start = time.process_time()
    hub.resolve()
    assert time.process_time() - start < 0.05
