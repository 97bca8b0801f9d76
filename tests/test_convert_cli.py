"""convert, export and inspect on the command line: adapters by name, what is said about them, exit codes."""

from dataclasses import replace

import pytest
from tiny import KINDS, random_adapter, tiny_config, write_tiny_gguf
from typer.testing import CliRunner

from codegemma import hub
from codegemma.adapters import load as adapters
from codegemma.adapters.merge import merge
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import gguf, open_checkpoint
from codegemma.cli.main import app
from codegemma.config import PRESETS

NAME = "gemma-3-270m-fim"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(params=["BF16", "Q8_0"])
def source(request, tmp_path, monkeypatch):
    """A model that counts as a published one, with a packaged adapter."""
    adapter = replace(random_adapter(KINDS["gemma3"], tokens=(67, 70)), card={"fim": {"psm": True}})
    save_adapter(adapter, tmp_path / "packaged" / NAME)
    monkeypatch.setattr(adapters, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(hub, "preset_of", lambda checkpoint: PRESETS["gemma-3-270m"])
    return write_tiny_gguf(tmp_path / "base.gguf", tiny_config("gemma3"), request.param)


def same_weights(path, expected):
    checkpoint = open_checkpoint(path)
    return all(
        tensor.type == expected.tensors[name].type
        and (tensor.data.tobytes() == expected.tensors[name].data.tobytes())
        for name, tensor in checkpoint.tensors.items()
    )


def test_convert_says_that_it_leaves_the_adapter_out_and_takes_it_by_any_name(source, tmp_path):
    base = open_checkpoint(source)
    merged = merge(base, adapters.load(tmp_path / "packaged" / NAME))
    assert f"--adapter auto merges {NAME}" in run("convert", source, tmp_path / "plain.gguf")
    assert same_weights(tmp_path / "plain.gguf", base)
    assert "merges" not in run("convert", source, tmp_path / "none.gguf", "--adapter", "none")
    for number, name in enumerate(("auto", NAME, tmp_path / "packaged" / NAME)):
        target = tmp_path / f"{number}.gguf"
        assert "auto merges" not in run("convert", source, target, "--adapter", name)
        assert same_weights(target, merged)
        assert open_checkpoint(target).fim_orders == {"psm"}
    again = run("convert", tmp_path / "0.gguf", tmp_path / "again.gguf")
    assert "adapter" not in again  # it holds one already
    for model, name, fault in (
        ("0", "auto", "has no packaged adapter"),
        ("base", "nowhere", "does not exist"),
    ):
        command = ["convert", str(tmp_path / f"{model}.gguf"), str(tmp_path / "x.gguf"), "--adapter", name]
        assert fault in str(CliRunner().invoke(app, command).exception)


@pytest.mark.parametrize("program", ["ollama", "llamacpp", "lmstudio", "transformers"])
def test_an_export_holds_what_completes_here(source, tmp_path, program):
    output = run("export", program, source, tmp_path / "out")
    assert NAME in output and "is merged" in output
    pattern = "model.safetensors" if program == "transformers" else "*.gguf"
    (file,) = (tmp_path / "out").rglob(pattern)
    path = file.parent if program == "transformers" else file
    assert open_checkpoint(path).fim_orders == {"psm"}
    if program != "transformers":
        is_quantised = source.read_bytes() and open_checkpoint(source).tensors["layers.0.q"].type == "Q8_0"
        assert ("q8_0" in output) is is_quantised
    output = run("export", program, source, tmp_path / "base", "--adapter", "none")
    assert "is merged" not in output
    (file,) = (tmp_path / "base").rglob(pattern)
    assert open_checkpoint(file.parent if program == "transformers" else file).fim_orders is None


def test_an_export_of_a_model_without_packaged_adapter_is_silent(tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa"), "BF16")
    assert "adapter" not in run("export", "llamacpp", source, tmp_path / "out")
    save_adapter(random_adapter(KINDS["gemma-mqa"]), tmp_path / "mine")
    run("export", "llamacpp", source, tmp_path / "mine-out", "--adapter", tmp_path / "mine")
    (file,) = (tmp_path / "mine-out").glob("*.gguf")
    assert gguf.read(file).metadata["codegemma.fim"] == ""


def test_damage_is_exit_1_and_notes_are_not(tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa"), "Q8_0")
    output = run("inspect", source)
    assert "note" in output and "PROBLEM" not in output
    metadata, stored = gguf.read(source)
    bad = stored["blk.0.attn_q.weight"].data.copy()
    bad[0, :2] = 0xFF, 0x7F  # a NaN scale
    stored["blk.0.attn_q.weight"] = replace(stored["blk.0.attn_q.weight"], data=bad)
    gguf.write(tmp_path / "bad.gguf", metadata, stored)
    assert "tensor layers.0.q holds NaN" in run("inspect", tmp_path / "bad.gguf", code=1)
    assert "holds NaN" in run("inspect", tmp_path / "bad.gguf", "--json", code=1)


@pytest.mark.parametrize("to", ["orbax", "safetensors", "keras", "gemma_pytorch"])
def test_a_flipped_bit_of_the_weights_is_found(tmp_path, to):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa"), "BF16")
    run("convert", source, tmp_path / "m", "--to", to, "--adapter", "none")
    run("inspect", tmp_path / "m")
    weights = [
        file for file in (tmp_path / "m").rglob("*") if file.is_file() and file.stat().st_size > 20_000
    ]
    file = max(
        (file for file in weights if "tokenizer" not in file.name), key=lambda file: file.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    output = run("inspect", tmp_path / "m", code=1)
    assert f"{file.name} was changed or damaged" in output
    if to == "gemma_pytorch":  # ZIP has checksums of its own
        (tmp_path / "m" / "SHA256SUMS").unlink()
        assert "the checksum of" in run("inspect", tmp_path / "m", code=1)
