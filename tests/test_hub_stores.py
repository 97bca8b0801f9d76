"""Models as they lie on disks: quantisations, split files, and the stores of other programs."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from homes import set_home
from tiny import tiny_config, tiny_tensors, tokenizer_metadata, write_tiny_gguf, write_tiny_hf

import codegemma
from codegemma import hub
from codegemma.checkpoints import gguf, gguf_files, gguf_model, open_checkpoint, table
from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.cli.main import main as command_line
from codegemma.config import PRESETS
from codegemma.hub import pull as hub_pull
from codegemma.hub import stores
from codegemma.serve.requests import can_chat, model_id

CONFIG = tiny_config("gemma-mqa")


def main(arguments):
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as exit:
        command_line(arguments)
    return exit.value.code or 0


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home, and no package of the default model."""
    set_home(tmp_path, monkeypatch)
    monkeypatch.setattr(hub, "DEFAULT_FILE", replace(hub.DEFAULT_FILE, package="no_such_package"))
    return tmp_path


def _write(path, config=CONFIG, **header):
    """A GGUF file; `header` are further entries, a dot written as two underscores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = gguf_model.config_metadata(config) | tokenizer_metadata(config)
    entries |= {key.replace("__", "."): value for key, value in header.items()}
    gguf.write(path, entries, table.to_format("gguf", config, tiny_tensors(config)))
    return path


def _snapshot(repository, revision="0" * 40):
    folder = hub.hub_cache_dir() / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    return folder / "snapshots" / revision


def _ollama(folder, name, file, host="registry.ollama.ai", separator="-", **layers):
    """Puts a file into Ollama's store under "namespace/model:tag"."""
    model, tag = name.split(":")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    blob = folder / "blobs" / f"sha256{separator}{digest}"
    shutil.copy(file, blob)
    manifest = folder / "manifests" / host / model / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"license": "1" * 64, "model": digest, **layers}
    entries = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{hash}"}
        for kind, hash in kinds.items()
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": entries}))
    return blob


# -------------------------------------------------------------------------------- several files of one model
PARTS = ["Q8_0/g-00001-of-00002.gguf", "Q8_0/g-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("names", "quantisation", "expected"),
    [
        (["g-Q4_K_M.gguf", "g-Q8_0.gguf"], None, "g-Q4_K_M.gguf"),
        (["g-Q4_K_M.gguf", "g-Q8_0.gguf"], "q8_0", "g-Q8_0.gguf"),
        (["g.Q2_K.gguf", "g.Q5_K_M.gguf", "g.F16.gguf"], None, "g.Q5_K_M.gguf"),
        (["g-fp16.gguf", "g-bf16.gguf"], "F16", "g-fp16.gguf"),
        (["g-IQ4_XS.gguf", "g-UD-Q4_K_XL.gguf"], "q4_k_xl", "g-UD-Q4_K_XL.gguf"),
        (["g.gguf", "g-Q6_K.gguf", "mmproj-F16.gguf", "imatrix_g.gguf"], None, "g-Q6_K.gguf"),
        ([*PARTS, "BF16/g.gguf"], "Q8_0", PARTS[0]),
        (["a.gguf", "b.gguf"], "b.gguf", "b.gguf"),
        (["g-Q8_0.gguf", "README.md"], None, "g-Q8_0.gguf"),
        (["config.json"], None, None),
    ],
)  # fmt: skip
def test_one_of_several_files_is_chosen(names, quantisation, expected):
    chosen = gguf_files.choose(names, quantisation)
    assert (chosen or [None])[0] == expected
    if expected and "00001" in expected:
        assert chosen == names[:2]


def test_a_missing_quantisation_and_two_models_are_named(home):
    with pytest.raises(ValueError, match=r"no quantisation 'Q3_K': there is Q4_K_M, Q8_0"):
        gguf_files.choose(["g-Q4_K_M.gguf", "g-Q8_0.gguf"], "Q3_K")
    for name in ("a-Q4_0", "b-Q4_0"):
        _write(home / "m" / f"{name}.gguf")
    with pytest.raises(ValueError, match=r"m: holds 2 models \(a-Q4_0, b-Q4_0\): name one of the files"):
        open_checkpoint(home / "m")
    assert open_checkpoint(hub.resolve(f"{home}/m:b-Q4_0.gguf")).path.name == "b-Q4_0.gguf"


@pytest.mark.parametrize("place", ["folder", "hub", "lmstudio"])
def test_a_quantisation_is_found_by_name_beside_a_projector(home, place):
    folders = {"folder": home / "models", "lmstudio": home / ".lmstudio" / "models" / "o" / "g-GGUF"}
    folder = folders.get(place) or _snapshot("o/g-GGUF")
    name = str(folder) if place == "folder" else "o/g-GGUF"
    image = ArrayTensor("F32", (4,), bytearray(16))
    folder.mkdir(parents=True, exist_ok=True)
    gguf.write(folder / "g-vision-F16.gguf", {"general.architecture": "clip"}, {"v.a": image})
    for quantisation in ("Q4_K_M", "Q8_0"):
        _write(folder / f"g-{quantisation}.gguf")
    for suffix, expected in (("", "Q4_K_M"), (":Q8_0", "Q8_0"), (":q4_k_m", "Q4_K_M")):
        assert open_checkpoint(hub.resolve(name + suffix)).path == folder / f"g-{expected}.gguf"
    with pytest.raises(ValueError, match="no quantisation 'Q6_K': there is Q4_K_M, Q8_0"):
        hub.resolve(f"{name}:Q6_K")


def test_a_repository_of_gguf_files_with_a_config_is_opened(home):
    """Repositories of GGUF files often hold config.json too."""
    folder = _snapshot("o/g-GGUF")
    (folder / "config.json").write_text("{}")
    file = _write(folder / "g-Q4_K_M.gguf")
    assert hub.resolve("o/g-GGUF") == file and open_checkpoint(folder).path == file


def _split(folder, count=3, **changes):
    """A model in parts, tensors dealt out in order; only the first part has the header."""
    stored = list(table.to_format("gguf", CONFIG, tiny_tensors(CONFIG)).items())
    total = {"split.tensors.count": len(stored)}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        header = gguf_model.config_metadata(CONFIG) | tokenizer_metadata(CONFIG) if number == 0 else {}
        header |= {"split.no": number, "split.count": count} | total | changes.get(f"part{number}", {})
        part = dict(stored[number::count])
        gguf.write(folder / f"m-Q8_0-{number + 1:05}-of-{count:05}.gguf", header, part)
    return folder


@pytest.mark.parametrize("opened", ["", "m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"])
def test_a_split_model_is_mapped_part_by_part(home, opened):
    checkpoint = open_checkpoint(_split(home / "m") / opened)
    whole = open_checkpoint(_write(home / "whole.gguf"))
    assert checkpoint.path.name == "m-Q8_0-00001-of-00003.gguf" and checkpoint.config == whole.config
    assert (
        checkpoint.identity == whole.identity
        and checkpoint.tokenizer.fingerprint == whole.tokenizer.fingerprint
    )
    assert not any(tensor.data.flags.owndata for tensor in checkpoint.tensors.values())
    assert stores.weight_bytes(checkpoint.path) == sum(file.stat().st_size for file in (home / "m").iterdir())


def test_a_split_model_is_packed_whole(home, monkeypatch):
    pack = hub_pull.pack(hub.resolve(_split(home / "m") / "m-Q8_0-00001-of-00003.gguf"), home / "m.pack")
    path = hub_pull.install(pack)
    assert open_checkpoint(path).identity == open_checkpoint(home / "m").identity


def test_faults_of_split_models_are_named(home):
    folder = _split(home / "m")
    (folder / "m-Q8_0-00002-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match="its parts m-Q8_0-00002-of-00003.gguf are not beside it"):
        open_checkpoint(folder)
    (folder / "m-Q8_0-00001-of-00003.gguf").rename(home / "renamed.gguf")
    with pytest.raises(
        ValueError,
        match="is one of 3 parts, but its name does not end in its number: name the first -00001-of-00003",
    ):
        open_checkpoint(home / "renamed.gguf")
    with pytest.raises(
        ValueError, match=r"states split.no 2 of 3, but by its name it is 1 \(from 0\) of 3: .*own names back"
    ):
        open_checkpoint(_split(home / "n", part1={"split.no": 2}))
    with pytest.raises(ValueError, match=r"states split.no 1 of 4, but by its name it is 1 \(from 0\) of 3"):
        open_checkpoint(_split(home / "n", part1={"split.count": 4}))


def test_parts_of_another_model_are_noticed(home):
    folder, second = _split(home / "m"), "m-Q8_0-00002-of-00003.gguf"
    other = list(table.to_format("gguf", CONFIG, tiny_tensors(CONFIG)).items())
    header = {"split.no": 1, "split.count": 3}
    gguf.write(folder / second, header, dict(other[1::3][:-1]))
    with pytest.raises(ValueError, match=r"00001.*hold 28 tensors, but it states 29: they are of different"):
        open_checkpoint(folder)
    gguf.write(folder / second, header, dict(other[:9]))
    with pytest.raises(
        ValueError,
        match=r"00002-of-00003\.gguf: repeats the tensor blk\.0\.attn_output\.weight of another part",
    ):
        open_checkpoint(folder)
    wide = table.to_format("gguf", wider := replace(CONFIG, ffn_width=192), tiny_tensors(wider))
    gguf.write(folder / second, header, dict(list(wide.items())[1::3]))
    with pytest.raises(ValueError, match=r"ffn_\w+\.weight has shape"):
        open_checkpoint(folder)


def test_a_first_part_of_a_hostile_number_is_one_error(home):
    path = _write(home / "m-00001-of-99999.gguf", split__no=0, split__count=99999)
    with pytest.raises(
        ValueError, match=r"00002-of-99999.gguf, .* and 99995 more are not beside it"
    ) as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 400


# ------------------------------------------------------------------------------------ other programs' stores
@pytest.mark.parametrize(
    ("stored", "host", "asked"),
    [
        ("library/codegemma:2b", "registry.ollama.ai", "codegemma:2b"),
        ("library/codegemma:latest", "registry.ollama.ai", "codegemma"),
        ("library/codegemma:latest", "registry.ollama.ai", "CodeGemma:latest"),
        ("library/codegemma:2b", "registry.ollama.ai", "registry.ollama.ai/library/codegemma:2b"),
        ("someone/tuned:q8", "registry.ollama.ai", "someone/tuned:q8"),
        ("google/codegemma-2b-GGUF:Q4_K_M", "hf.co", "hf.co/google/codegemma-2b-GGUF:Q4_K_M"),
    ],
)
@pytest.mark.parametrize("separator", ["-", ":"])
def test_ollamas_models_are_found_by_name(home, stored, host, asked, separator):
    blob = _ollama(home / ".ollama" / "models", stored, _write(home / "m.gguf"), host, separator)
    assert hub.resolve(f"ollama:{asked}") == blob
    assert open_checkpoint(hub.resolve(f"ollama:{asked}")).tokenizer.control.fim == "named"
    listed = stores.stored_models()
    assert [model.path for model in listed] == [blob] and hub.resolve(listed[0].name) == blob


def test_ollamas_folder_moves_and_what_is_missing_is_named(home, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    blob = _ollama(home / "elsewhere", "library/codegemma:2b", _write(home / "m.gguf"))
    with pytest.raises(
        ValueError, match=r"no model 'codegemma:7b' in .*elsewhere \(there: codegemma:2b\): `ollama pull"
    ):
        hub.resolve("ollama:codegemma:7b")
    for hostile in ("../../etc/passwd", "a/../codegemma:2b", ""):
        with pytest.raises(ValueError, match="Ollama has no model"):
            hub.resolve(f"ollama:{hostile}")
    blob.unlink()
    with pytest.raises(ValueError, match="names no model file that is there"):
        hub.resolve("ollama:codegemma:2b")
    assert stores.stored_models() == []


def test_an_adapter_of_ollamas_is_told(home):
    _ollama(home / ".ollama" / "models", "me/tuned:latest", _write(home / "m.gguf"), adapter="2" * 64)
    with pytest.warns(
        UserWarning, match=r"ollama:me/tuned has an adapter, not applied: pass --adapter .*sha256-2222"
    ):
        hub.resolve("ollama:me/tuned")


@pytest.mark.parametrize(
    "manifest", ["{", "[]", '{"layers": 3}', '{"layers": [{"digest": "sha256:../../x"}, 4]}']
)
def test_a_damaged_manifest_is_passed_over(home, manifest):
    folder = home / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / "bad"
    folder.mkdir(parents=True)
    (folder / "latest").write_text(manifest)
    assert stores.stored_models() == [] and stores.names_of(home / "sha256-0")
    with pytest.raises(ValueError, match="bad"):
        hub.resolve("ollama:bad")


@pytest.mark.parametrize("models", [".lmstudio/models", ".cache/lm-studio/models", "moved/models"])
def test_lm_studios_folder_is_searched(home, models):
    (home / ".lmstudio-home-pointer").write_text(f"{home}/moved\n")
    file = _write(home / models / "google" / "codegemma-2b-GGUF" / "codegemma-2b-Q8_0.gguf")
    for name in (
        "google/codegemma-2b-GGUF",
        "lmstudio:Google/CodeGemma-2B-GGUF",
        "google/codegemma-2b-GGUF:Q8_0",
        "2b",
    ):
        assert hub.resolve(name) == file
    assert [model.name for model in stores.stored_models()] == ["lmstudio:google/codegemma-2b-GGUF:Q8_0"]


def test_lm_studios_model_is_found_beside_the_hubs_of_the_same_name(home):
    cached = _write(_snapshot("a/b") / "b-Q4_0.gguf")
    file = _write(home / ".lmstudio" / "models" / "a" / "b" / "b-Q8_0.gguf")
    assert hub.resolve("a/b:Q8_0") == hub.resolve("lmstudio:a/b:Q8_0") == hub.resolve("lmstudio:a/b") == file
    assert hub.resolve("a/b") == hub.resolve("a/b:Q4_0") == cached
    with pytest.raises(ValueError, match="no quantisation 'Q5_0': there is Q4_0"):
        hub.resolve("a/b:Q5_0")
    with pytest.raises(ValueError, match=r"LM Studio has no model 'o/hf' in .*\.lmstudio/models"):
        hub.resolve("lmstudio:o/hf")


def test_models_lists_what_can_be_run_and_each_name_runs(home, capsys):
    _write(_snapshot("o/g-GGUF") / "g-Q4_K_M.gguf")
    write_tiny_hf(_snapshot("o/hf"), CONFIG)
    gguf.write(_snapshot("o/llama") / "l-Q4_0.gguf", {"general.architecture": "llama"}, {})
    (_snapshot("o/bert") / "config.json").write_text('{"model_type": "bert"}')
    _ollama(home / ".ollama" / "models", "library/codegemma:2b", _write(home / "m.gguf"))
    _write(home / ".lmstudio" / "models" / "a" / "b" / "c.gguf")
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    stored = {row["name"]: row for row in rows if "store" in row}
    assert sorted(stored) == ["lmstudio:a/b:c", "o/g-GGUF:Q4_K_M", "o/hf", "ollama:codegemma:2b"]
    for name, row in stored.items():
        assert str(hub.resolve(name)) == row["path"] and row["bytes"] > 1000
        assert open_checkpoint(hub.resolve(name)).config.layers == 3
    assert main(["models"]) == 0
    lines = capsys.readouterr().out
    assert all(f"\n{name}  (" in lines for name in stored)


# ---------------------------------------------------------------------------------- which model it is (N1)
@pytest.mark.parametrize("name", ["2b", "7b-it"])
@pytest.mark.parametrize("place", ["hub", "hub gguf", "cache", "kaggle"])
def test_a_model_is_what_was_asked_for_by_its_place_alone(home, name, place):
    """As `pull` leaves it: config.json without _name_or_path, in a folder called by a revision's hash."""
    preset = PRESETS[name]
    config = tiny_config("gemma3")  # whose ids 67 to 70 are <unusedN>
    if place == "hub gguf":
        path = _write(_snapshot(f"{preset.hub}-GGUF") / "m.gguf", config)
    elif place == "kaggle":
        path = _write(
            home / "kagglehub" / "models" / "google" / "codegemma" / "flax" / preset.kaggle / "2" / "m.gguf",
            config,
        )
    else:
        path = _snapshot(preset.hub) if place == "hub" else hub.cache_dir() / "models" / name
        write_tiny_hf(path, config)
        tokenizer = open_checkpoint(_write(home / "t.gguf", config)).tokenizer
        (path / "tokenizer.model").write_bytes(tokenizer.model)
    model = codegemma.load(path if place == "kaggle" else name)
    assert model.preset is preset and model.title == preset.title
    assert model_id(model.preset, model.path)[0] == f"codegemma-{name}"
    assert can_chat(model.preset, model.tokenizer) == (name == "7b-it")
    assert model.fim_orders() == {"psm"}  # told by the preset, since the vocabulary names no FIM ids


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("2b", "2b"),
        ("2b-code-v1.1-q4_K_M", "1.1-2b"),
        ("7b", "7b-it"),
        ("7b-code-q8_0", "7b"),
        ("latest", "7b-it"),
    ],
)
def test_ollamas_tags_of_codegemma_are_understood(home, tag, expected):
    """Its 7b is the one that follows instructions."""
    _ollama(home / ".ollama" / "models", f"library/codegemma:{tag}", _write(home / "m.gguf"))
    checkpoint = open_checkpoint(hub.resolve(f"ollama:codegemma:{tag}"))
    assert hub.preset_of(checkpoint) is PRESETS[expected]
    assert hub.name_of(checkpoint.path) == f"codegemma-{expected}"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tiny.gguf", "tiny"),
        ("codegemma-mine/model.safetensors", "codegemma-mine"),
        ("My Model 1.5/", "My Model 1.5"),
        ("m-Q8_0-00001-of-00003.gguf", "m-Q8_0"),
        ("hub/models--o--my-codegemma-2b/snapshots/1111/", "my-codegemma-2b"),
        ("a/archive.nemo", "archive"),
    ],
)
def test_other_models_have_their_repositorys_or_files_name(home, path, expected):
    assert hub.name_of(home / path) == expected


# -------------------------------------------------------------------------------------------- removing
def test_models_are_removed_from_the_caches_alone(home, capsys):
    cached = _write(hub.cache_dir() / "models" / "2b" / "m.gguf")
    pulled = _write(_snapshot("google/codegemma-2b-GGUF") / "m.gguf")
    url = _write(hub.cache_dir() / "models" / "urls" / "x.gguf")
    mine = _write(home / "mine.gguf")
    studio = _write(home / ".lmstudio" / "models" / "a" / "b" / "c.gguf")
    blob = _ollama(home / ".ollama" / "models", "library/codegemma:2b", mine)
    assert main(["models", "--remove", "codegemma-2b"]) == 0
    out = capsys.readouterr().out
    assert out.count("removed ") == 2 and " MB)" in out and not cached.exists() and not pulled.exists()
    assert main(["models", "--remove", "x.gguf"]) == 0 and not url.exists()
    for name in (
        "2b",
        "urls",
        "local",
        "a/b",
        "lmstudio:a/b:c",
        "o/none:Q8_0",
        str(mine),
        "ollama:codegemma:2b",
        "..",
        ".",
        "../..",
        "urls/..",
        "",
    ):
        assert main(["models", "--remove", name]) == 2, name
    assert "`ollama rm` removes it" in capsys.readouterr().err
    assert mine.exists() and studio.exists() and blob.exists() and (hub.cache_dir() / "models").exists()


def test_one_quantisation_is_removed_with_its_blob(home):
    folder = _snapshot("o/g-GGUF")
    for quantisation in ("Q4_K_M", "Q8_0"):
        blob = _write(folder.parents[1] / "blobs" / quantisation)
        (folder / f"g-{quantisation}.gguf").symlink_to(blob)
    [(path, size)] = hub.remove("o/g-GGUF:q8_0")
    assert path.name == "g-Q8_0.gguf" and size > 1000
    assert [file.name for file in (folder.parents[1] / "blobs").iterdir()] == ["Q4_K_M"]
    assert [file.name for file in folder.iterdir()] == ["g-Q4_K_M.gguf"]


def test_a_linked_folder_of_the_cache_is_kept(home):
    target = _write(home / "elsewhere" / "m.gguf").parent
    (hub.cache_dir() / "models").mkdir(parents=True)
    (hub.cache_dir() / "models" / "7b").symlink_to(target)
    with pytest.raises(ValueError, match="to remove"):
        hub.remove("7b")
    assert (target / "m.gguf").exists()


def test_a_users_missing_home_directory_is_no_fault(monkeypatch, home):
    monkeypatch.setattr(stores.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert stores.stored_models() == []
    assert write_tiny_gguf(home / "m.gguf", CONFIG) == hub.resolve(home / "m.gguf")


@pytest.mark.parametrize("reference", [None, "", "\n", b"\xff"])
def test_the_only_snapshot_is_taken_where_no_main_branch_is_recorded(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = _snapshot("owner/tiny")
    path = _write(snapshot / "tiny-Q8_0.gguf")
    main = snapshot.parents[1] / "refs" / "main"
    main.unlink()
    if reference is not None:
        main.write_bytes(reference if isinstance(reference, bytes) else reference.encode())
    assert stores.in_hub_cache("owner/tiny", "Q8_0") == path
    (snapshot.parent / "another").mkdir()
    assert stores.in_hub_cache("owner/tiny", "Q8_0") is None
