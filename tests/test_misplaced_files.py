"""Files of a known form in the wrong place are called what they are; the tensors decide what loads."""

import json
import shutil
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
from tiny import random_adapter, tiny_config, tiny_pieces, write_tiny_gguf, write_tiny_hf

import codegemma
from codegemma.adapters import peft
from codegemma.adapters.load import is_adapter, load
from codegemma.checkpoints import huggingface, open_checkpoint, safetensors
from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.config import GEMMA3_270M
from codegemma.convert.convert import convert
from codegemma.tokenizer import Tokenizer

CONFIG = tiny_config("gemma3")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 536223056\n"
LFS = "is a Git LFS pointer to a file of 536,223,056 bytes, not the file: run `git lfs pull`"
PLACEHOLDERS = {
    LFS: POINTER,
    "is a git-annex pointer": b"/annex/objects/SHA256E-s9--0.gguf\n",
    "is a web page": b"\n<!DOCTYPE html><html><title>Sign in</title>",
}


# ---------------------------------------------------------------------------------------------- placeholders
@pytest.mark.parametrize("message", PLACEHOLDERS)
@pytest.mark.parametrize(
    "name", ["m.gguf", "m.safetensors", "m.nemo", "m.ckpt", "m.bin", "adapter_model.bin"]
)
def test_a_placeholder_for_a_file_is_named(tmp_path, message, name):
    (tmp_path / name).write_bytes(PLACEHOLDERS[message])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (load,) if name.startswith("adapter") else (open_checkpoint, load):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "generation_config.json"],
)
def test_a_placeholder_in_a_folder_is_named(tmp_path, name):
    write_tiny_hf(tmp_path, CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(Tokenizer.from_pieces(*tiny_pieces(CONFIG)).model)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=LFS) as caught:
        assert open_checkpoint(tmp_path).tokenizer
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["model.weights.h5", "config.json", "assets/tokenizer/vocabulary.spm"])
def test_a_placeholder_in_a_keras_preset_is_named(tmp_path, name):
    source = write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma-mqa"), "BF16")
    folder = convert(source, tmp_path / "keras", "keras").path
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=LFS):
        assert open_checkpoint(folder).tokenizer


# ------------------------------------------------------------------------------------------ the wrong option
def test_an_adapter_for_a_model_and_a_model_for_an_adapter_are_told(tmp_path):
    adapter = peft.save(random_adapter(CONFIG, 1), tmp_path / "adapter")
    lora = _gguf_adapter(tmp_path / "lora.gguf", random_adapter(CONFIG, 1))
    for path in (adapter, adapter / "adapter_model.safetensors", lora):
        with pytest.raises(ValueError, match="is an adapter, not a model: pass it by --adapter"):
            open_checkpoint(path)
        assert is_adapter(path)
    (tmp_path / "g").mkdir()
    lora.rename(tmp_path / "g" / "lora.gguf")
    assert is_adapter(tmp_path / "g") and load(tmp_path / "g").name == "lora"
    model = write_tiny_hf(tmp_path / "hf", CONFIG)
    for path in (model, model / "model.safetensors", write_tiny_gguf(tmp_path / "m.gguf", CONFIG)):
        with pytest.raises(ValueError, match="a model is passed by -m"):
            load(path)
        assert not is_adapter(path)
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "none")
    write_tiny_gguf(tmp_path / "g" / "m.gguf", CONFIG)  # an adapter beside its model: the folder of a model
    assert not is_adapter(tmp_path / "g") and open_checkpoint(tmp_path / "g")
    assert not is_adapter(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_part_of_a_model_asks_for_its_folder(tmp_path, name):
    write_tiny_hf(tmp_path, CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(Tokenizer.from_pieces(*tiny_pieces(CONFIG)).model)
    with pytest.raises(ValueError, match=f"is a part of a model: pass its folder, {tmp_path}"):
        open_checkpoint(tmp_path / name)


def test_an_image_projector_is_no_model(tmp_path):
    for key, value in (("general.architecture", "clip"), ("general.type", "mmproj")):
        writer = peer.GGUFWriter(tmp_path / "m.gguf", value if key.endswith("ure") else "gemma3")
        writer.add_string("general.type", value if key.endswith("type") else "model")
        writer.add_tensor("v.patch_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match="is an image projector, not a model: pass the model's own file"):
            open_checkpoint(tmp_path / "m.gguf")


# --------------------------------------------------------------------------------- judged by the tensors
LEFT_OVER = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize("left", [None, LEFT_OVER, {"quant_method": "gptq", "bits": 4}, {}])
def test_a_merged_model_that_still_names_its_bases_quantisation_loads(tmp_path, left):
    write_tiny_hf(tmp_path, CONFIG)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": left}))
    assert open_checkpoint(tmp_path).config == CONFIG


def test_quantised_tensors_are_refused_with_the_method_that_made_them(tmp_path):
    write_tiny_hf(tmp_path, CONFIG)
    stored = safetensors.read(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    extra = {f"{name}.absmax": ArrayTensor.of(np.ones(4, np.float32))}
    safetensors.write(tmp_path / "other.safetensors", stored | extra)
    (tmp_path / "other.safetensors").rename(tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"also holds 1 tensors .*absmax"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": LEFT_OVER}))
    with pytest.raises(
        ValueError, match=r"absmax.*are quantised \(bitsandbytes\): use the unquantised model"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "key",
    ["num_key_value_heads", "head_dim", "rope_theta", "query_pre_attn_scalar", "rope_scaling",
     "sliding_window_pattern", "rope_local_base_freq", "final_logit_softcapping", "quantization_config"],
)  # fmt: skip
def test_null_is_as_good_as_left_out(key):
    fields = huggingface.config_fields(GEMMA3_270M)
    missing = {name: value for name, value in fields.items() if name != key}
    assert huggingface.config(Path("m"), fields | {key: None}) == huggingface.config(Path("m"), missing)


# -------------------------------------------------------------------------------------------- adapters
def _gguf_adapter(path, adapter, alpha=8.0, extra=(), **entries):
    """An adapter as llama.cpp's converter writes it, by the gguf package."""
    names = {
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    writer = peer.GGUFWriter(path, entries.pop("architecture", "gemma3"))
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | entries).items():
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name in adapter.a:
        _, layer, kind = name.split(".")
        for side, values in (("a", adapter.a[name]), ("b", adapter.b[name])):
            writer.add_tensor(f"blk.{layer}.{names[kind]}.weight.lora_{side}", np.ascontiguousarray(values))
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("ranks", [(4,), (4, 2)])
@pytest.mark.parametrize("folder", [False, True])
def test_a_gguf_adapter_computes_what_its_peft_folder_does(tmp_path, ranks, folder):
    """llama.cpp scales each matrix by alpha over its own rank."""
    made = random_adapter(CONFIG, 1, ranks=ranks)
    (tmp_path / "g").mkdir()
    loaded = load(_gguf_adapter(tmp_path / "g" / "lora.gguf", made).parent / ("" if folder else "lora.gguf"))
    assert loaded.name == "lora" and loaded.rank == 4 and loaded.a.keys() == made.a.keys()
    for name in made.a:
        own_scale = 8.0 / len(made.a[name])
        expected = own_scale * made.b[name] @ made.a[name]
        np.testing.assert_allclose(loaded.delta(name), expected, rtol=1e-5, atol=1e-6)
    model = codegemma.load(write_tiny_gguf(tmp_path / "m.gguf", CONFIG))
    name = model.adapter_at(tmp_path / "g" / "lora.gguf")
    before, after = model.logits([2, 5, 9]), model.logits([2, 5, 9], name)
    assert name == "lora" and np.abs(before - after).max() > 0.01


def test_without_alpha_a_gguf_adapter_is_not_scaled(tmp_path):
    made = random_adapter(CONFIG, 1, ranks=(4, 2))
    for alpha in (None, 0.0):
        loaded = load(_gguf_adapter(tmp_path / "lora.gguf", made, alpha))
        for name in made.a:
            np.testing.assert_allclose(loaded.delta(name), made.b[name] @ made.a[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama"}, "is an adapter of 'llama', not of a Gemma"),
        ({"adapter.type": "control_vector"}, "is 'control_vector', but this program reads plain LoRA"),
        (
            {"extra": [("token_embd.weight.lora_a", np.zeros((4, 515), np.float32))]},
            "no LoRA of a linear layer",
        ),
        ({"extra": [("blk.0.attn_norm.weight", np.zeros(96, np.float32))]}, "holds blk.0.attn_norm.weight"),
        (
            {"extra": [("blk.90.attn_q.weight.lora_a", np.zeros((4, 96), np.float32))]},
            "one of its two matrices",
        ),
        ({"extra": [("blk.9.attn_q.weight.lora_a", np.zeros(96, np.float32))]}, "must be a matrix"),
        ({"alpha": float("nan")}, "alpha a finite number"),
    ],
)
def test_a_gguf_adapter_that_is_more_than_lora_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(_gguf_adapter(tmp_path / "lora.gguf", random_adapter(CONFIG, 1), **changes))


PREFIXES = ("base_model.model.model.", "base_model.model.model.model.", "base_model.model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "part", ["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "multi_modal_projector.linear"]
)
def test_the_text_part_of_a_multimodal_adapter_loads(tmp_path, prefix, part):
    made = random_adapter(CONFIG, 1)
    folder = peft.save(made, tmp_path / "adapter")
    image = {
        f"{prefix}{part}.lora_{side}.weight": ArrayTensor.of(np.ones((4, 4), np.float32)) for side in "AB"
    }
    stored = safetensors.read(folder / "adapter_model.safetensors")
    safetensors.write(folder / "new.safetensors", stored | image)
    shutil.move(folder / "new.safetensors", folder / "adapter_model.safetensors")
    loaded = load(folder)
    assert loaded.a.keys() == made.a.keys() and loaded.digest == load(folder).digest
    safetensors.write(folder / "new.safetensors", image)
    shutil.move(folder / "new.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="changes no linear layer"):
        load(folder)
