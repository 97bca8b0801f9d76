"""Hugging Face directories against the `safetensors` library, published config.json files, and damage."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mutate import fuzz
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import KINDS, dequantize, tiny_config, tiny_tensors, write_tiny_gguf, write_tiny_hf

from codegemma.checkpoints import huggingface, open_checkpoint, safetensors, table
from codegemma.config import GEMMA2_2B, GEMMA3_270M, GEMMA_2B


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_returns_what_was_written(tmp_path, kind, type, shards):
    config = tiny_config(kind)
    checkpoint = open_checkpoint(write_tiny_hf(tmp_path, config, type, shards=shards))
    tensors = tiny_tensors(config, type)
    assert (
        checkpoint.config == config
        and list(checkpoint.tensors) == list(tensors)
        and checkpoint.tokenizer is None
    )
    for name, tensor in tensors.items():
        read = checkpoint.tensors[name]
        if name.endswith("norm"):
            np.testing.assert_allclose(read.float32(), tensor.float32(), rtol=1e-6)
        else:
            assert (read.type, read.shape) == (type, tensor.shape) and np.array_equal(read.data, tensor.data)
            assert not read.data.flags.owndata


def test_the_safetensors_library_and_ours_read_each_others_files(tmp_path):
    stored = table.to_format("hf", config := tiny_config("gemma2"), tiny_tensors(config))
    safetensors.write(tmp_path / "ours.safetensors", stored)
    with safe_open(tmp_path / "ours.safetensors", "np") as file:
        assert set(file.keys()) == set(stored) and file.metadata() == {"format": "pt"}
        for name, tensor in stored.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor.float32())
    arrays = {name: tensor.float32().astype(np.float16) for name, tensor in stored.items()}
    save_file(arrays, tmp_path / "theirs.safetensors")
    for name, tensor in safetensors.read(tmp_path / "theirs.safetensors").items():
        assert tensor.type == "F16"
        np.testing.assert_array_equal(tensor.float32(), arrays[name])


def test_the_same_weights_from_gguf_and_from_hugging_face_are_equal(tmp_path):
    config = tiny_config("gemma3")
    from_gguf = open_checkpoint(write_tiny_gguf(tmp_path / "m.gguf", config, "BF16"))
    from_hf = open_checkpoint(write_tiny_hf(tmp_path / "hf", config, "BF16"))
    assert from_gguf.config == from_hf.config
    for name, tensor in from_gguf.tensors.items():
        np.testing.assert_allclose(dequantize(from_hf.tensors[name]), dequantize(tensor), rtol=1e-6)


# As published on the Hub (fields without a part in the architecture left out).
CODEGEMMA_2B = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3_270M = {
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
ROPES_5 = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        (CODEGEMMA_2B, GEMMA_2B),
        (
            _without(CODEGEMMA_2B, "rope_theta")
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            GEMMA_2B,
        ),
        (GEMMA_2_2B, GEMMA2_2B),
        (GEMMA_2_2B | {"layer_types": ["sliding_attention", "full_attention"] * 13}, GEMMA2_2B),
        (GEMMA_3_270M, GEMMA3_270M),
        (_without(GEMMA_3_270M, "layer_types") | {"sliding_window_pattern": 6}, GEMMA3_270M),
        (
            _without(GEMMA_3_270M, "rope_theta", "rope_local_base_freq") | {"rope_parameters": ROPES_5},
            GEMMA3_270M,
        ),
        (_without(GEMMA_3_270M, "rope_theta", "rope_local_base_freq", "layer_types"), GEMMA3_270M),
    ],
    ids=lambda value: getattr(value, "architecture", ""),
)
def test_published_configs_of_both_generations(fields, config):
    assert huggingface.config("config.json", fields) == config


def test_the_text_part_of_a_multimodal_config_states_only_what_differs():
    four_b = {
        "model_type": "gemma3",
        "vision_config": {},
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    config = huggingface.config("config.json", four_b)
    assert (config.heads, config.kv_heads, config.head_width, config.vocab) == (8, 4, 256, 262_208)
    assert (config.rope_base, config.rope_base_local, config.rope_scale, config.context) == (
        1e6,
        1e4,
        8.0,
        131_072,
    )
    four_b["text_config"].pop("rope_scaling")
    four_b["text_config"]["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": None,
    }
    assert huggingface.config("config.json", four_b) == config


@pytest.mark.parametrize("config", [GEMMA_2B, GEMMA2_2B, GEMMA3_270M, tiny_config("gemma3", rope_scale=8.0)])
def test_a_config_survives_its_file(config):
    fields = json.loads(json.dumps(huggingface.config_fields(config)))
    assert huggingface.config("config.json", fields) == config


def test_a_query_scale_that_transformers_cannot_say_is_refused():
    for config in (tiny_config("gemma-mqa", query_scale=0.5), tiny_config("gemma2", query_scale=0.4)):
        with pytest.raises(ValueError, match="cannot say the query scale"):
            huggingface.config_fields(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": ["gemma"]}, "model_type is"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"use_bidirectional_attention": True}, "embedding model"),
        ({"layer_types": ["full_attention"]}, "an entry for each of 18 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 9}, "does not repeat"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope type 'yarn'"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"num_hidden_layers": 10**30, "layer_types": None}, "layers must be a whole number"),
        ({"hidden_size": "640"}, "width must be a whole number"),
        ({"rms_norm_eps": None}, "norm_eps must be a finite number"),
        ({"rope_theta": 10**400}, "rope_base must be a finite number"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be"),
        ({"sliding_window": "all"}, "window"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message):
    with pytest.raises(ValueError, match=f"some/config.json: .*{message}"):
        huggingface.config("some/config.json", GEMMA_3_270M | change)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_every_prefix_in_use_is_understood(tmp_path, prefix, head):
    config = tiny_config("gemma3")
    stored = table.to_format("hf", config, tiny_tensors(config, "BF16"))
    write_tiny_hf(tmp_path, config)
    named = {prefix + name.removeprefix("model."): tensor for name, tensor in stored.items()}
    norm, query = stored["model.norm.weight"], stored["model.layers.1.self_attn.q_proj.weight"]
    named |= {
        head: stored["model.embed_tokens.weight"],
        "vision_tower.x": norm,
        "model.multi_modal_projector.y": norm,
    }
    safetensors.write(tmp_path / "model.safetensors", named)
    read = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(read.tensors["layers.1.q"].data, query.data)
    assert set(read.tensors) == {location.name for location in table.tensor_locations(config, "hf")}


def test_the_vocabulary_has_the_embeddings_rows(tmp_path):
    config = tiny_config("gemma-mqa")
    write_tiny_hf(tmp_path, config)
    for vocab, message in ((config.vocab - 3, None), (config.vocab + 1, "embed_tokens.weight has shape")):
        fields = huggingface.config_fields(replace(config, vocab=vocab))
        (tmp_path / "config.json").write_text(json.dumps(fields))
        if message is None:
            assert open_checkpoint(tmp_path).config == config
        else:
            with pytest.raises(ValueError, match=message):
                open_checkpoint(tmp_path)


def test_a_header_of_odd_length_gives_aligned_tensors(tmp_path):
    raw = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    raw += b" " * (3 - len(raw) % 4)
    (tmp_path / "odd").write_bytes(len(raw).to_bytes(8, "little") + raw + np.array([1, 2], "<f4").tobytes())
    tensor = safetensors.read(tmp_path / "odd")["a"]
    assert tensor.data.ctypes.data % 4 == 0 and tensor.float32().tolist() == [1, 2]


def _info(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _info(offsets=(0, 4))}, "tensor a takes 8 bytes, but its data_offsets are 0 to 4"),
        ({"a": _info(offsets=(8, 0))}, "tensor a takes 8 bytes"),
        ({"a": _info(offsets=(-8, 0))}, "tensor a takes 8 bytes"),
        ({"a": _info(offsets=(60, 68))}, "its data_offsets are 60 to 68, in 64 bytes of data:"),
        ({"a": _info(shape=(2**40, 2**40))}, "impossible shape"),
        ({"a": _info(shape=())}, "impossible shape"),
        ({"a": _info(shape=(2, -1))}, "impossible shape"),
        ({"a": _info(shape=("2",))}, "impossible shape"),
        ({"a": _info(dtype="F8_E4M3")}, "tensor a is F8_E4M3, but this program reads"),
        ({"a": _info(), "b": _info(offsets=(4, 12))}, "tensor b overlaps"),
        ({"a": 3}, "tensor a lacks dtype"),
        ([], "must hold a JSON object"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_fault_in_the_header_is_named(tmp_path, header, message):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "bad.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(64))
    with pytest.raises(ValueError, match=rf"bad\.safetensors.*{message}"):
        safetensors.read(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("size", [2**63, 2**24 + 1, 1000])
def test_a_wrong_header_length_is_refused(tmp_path, size):
    (tmp_path / "bad").write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="header of .* bytes is longer than the file"):
        safetensors.read(tmp_path / "bad")


def test_faults_of_the_directory_are_named(tmp_path):
    write_tiny_hf(tmp_path, tiny_config("gemma2"), shards=2)
    shard, index = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    moved = shard.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="lacks model-00001-of-00002.safetensors, which its index names"):
        open_checkpoint(tmp_path)
    moved.rename(shard)
    index_text = index.read_text()
    index.write_text(index_text.replace("model-00001", "../model-00001", 1))
    with pytest.raises(ValueError, match="weight_map must give a file of the same directory"):
        open_checkpoint(tmp_path)
    index.unlink()
    assert len(open_checkpoint(tmp_path).tensors) > 10  # without an index, all files together
    shard.with_name("again.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="a second time"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no config.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="lacks config.json"):
        open_checkpoint(shard)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is neither GGUF"):
        open_checkpoint(tmp_path / "text")


def test_a_directory_with_one_gguf_is_that_gguf(tmp_path):
    path = write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma-mqa"))
    assert open_checkpoint(tmp_path).path == path


def test_quantised_tensors_are_not_written(tmp_path):
    tensors = tiny_tensors(tiny_config("gemma-mqa"), "Q8_0")
    with pytest.raises(ValueError, match="embed is Q8_0, but safetensors holds"):
        safetensors.write(tmp_path / "m.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_thousands_of_damaged_files_raise_or_load_within_little_memory(tmp_path):
    config = tiny_config("gemma2", layers=1, width=32, ffn_width=32, heads=2, head_width=16, vocab=100)
    raw = (write_tiny_hf(tmp_path, config, "BF16") / "model.safetensors").read_bytes()
    fields = (tmp_path / "config.json").read_bytes()
    outcomes = fuzz(
        lambda: open_checkpoint(tmp_path),
        tmp_path / "model.safetensors",
        raw,
        int.from_bytes(raw[:8], "little") + 8,
        2000,
    )
    outcomes += fuzz(lambda: open_checkpoint(tmp_path), tmp_path / "config.json", fields, len(fields), 1000)
    assert outcomes["loaded"] > 20 and outcomes["refused"] > 1000
