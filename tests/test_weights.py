"""The table of names against published parameter counts and llama.cpp's map; its checks of each fault."""

import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import KINDS, dequantize, encode, random_blocks, random_weights, tiny_config, tiny_tensors

from codegemma import native
from codegemma.checkpoints import table
from codegemma.checkpoints.gguf import TYPES
from codegemma.checkpoints.table import tensor_locations
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor, row_bytes
from codegemma.config import GEMMA2_2B, GEMMA3_270M, GEMMA_2B, GEMMA_7B

FILE = Path("model.gguf")


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (GEMMA_2B, 2_506_172_416),
        (GEMMA_7B, 8_537_680_896),
        (GEMMA2_2B, 2_614_341_888),
        (GEMMA3_270M, 268_098_176),
    ],
    ids=lambda value: getattr(value, "architecture", ""),
)
def test_the_shapes_add_up_to_the_published_parameter_count(config, parameters):
    assert sum(math.prod(location.shape) for location in tensor_locations(config, "hf")) == parameters


@pytest.mark.parametrize("kind", KINDS)
def test_names_agree_with_llama_cpps_map_from_hugging_face(kind):
    config = tiny_config(kind)
    arch = {
        "gemma": gguf.MODEL_ARCH.GEMMA,
        "gemma2": gguf.MODEL_ARCH.GEMMA2,
        "gemma3": gguf.MODEL_ARCH.GEMMA3,
    }
    names = gguf.get_tensor_name_map(arch[config.architecture], config.layers)
    for ours, theirs in zip(tensor_locations(config, "gguf"), tensor_locations(config, "hf"), strict=True):
        assert names.get_name(theirs.stored, try_suffixes=(".weight",)) == ours.stored, theirs.stored


@pytest.mark.parametrize("type", BLOCKS)
def test_types_are_those_of_the_gguf_package(type):
    values = np.random.default_rng(1).normal(0.0, 0.5, (5, 512)).astype(np.float32)
    tensor, code = encode(values, type), gguf.GGMLQuantizationType[type]
    assert gguf.GGML_QUANT_SIZES.get(code) == BLOCKS[type] and TYPES[code] == type
    raw = tensor.data.view({"F32": "<f4", "F16": "<f2"}.get(type, "u1"))
    np.testing.assert_array_equal(native.dequantize(tensor), gguf.dequantize(raw, code))
    assert 0.2 < dequantize(tensor).std() < 2


@pytest.mark.parametrize("format", ["gguf", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_undoes_writing(kind, format):
    config = tiny_config(kind)
    tensors = tiny_tensors(config, "BF16")
    read = table.from_format(format, FILE, config, table.to_format(format, config, tensors))
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].type == ("F32" if name.endswith("norm") else "BF16")
        np.testing.assert_allclose(dequantize(read[name]), dequantize(tensor), rtol=1e-6)


def test_norms_hold_the_one_in_gguf_and_lack_it_in_hugging_face():
    config = tiny_config("gemma3")
    factor = random_weights(config)["final_norm"]
    tensors = tiny_tensors(config)
    np.testing.assert_array_equal(
        table.to_format("gguf", config, tensors)["output_norm.weight"].float32(), factor
    )
    stored = table.to_format("hf", config, tensors)
    np.testing.assert_array_equal(stored["model.norm.weight"].float32(), factor - np.float32(1))
    stored["model.norm.weight"] = encode(np.full(config.width, 0.5, np.float32), "BF16")
    np.testing.assert_array_equal(table.from_format("hf", FILE, config, stored)["final_norm"].float32(), 1.5)


def test_post_attention_layernorm_is_the_norm_before_the_feed_forward_only_in_gemma_1():
    for kind, ours in (("gemma-mqa", "layers.0.ffn_norm"), ("gemma2", "layers.0.post_attn_norm")):
        names = {location.stored: location.name for location in tensor_locations(tiny_config(kind), "hf")}
        assert names["model.layers.0.post_attention_layernorm.weight"] == ours


def _stored(kind="gemma2", format="gguf"):
    config = tiny_config(kind)
    return config, table.to_format(format, config, tiny_tensors(config, "F16"))


def test_a_missing_or_extra_tensor_is_named():
    config, stored = _stored()
    removed = stored.pop("blk.1.attn_k.weight")
    with pytest.raises(ValueError, match=r"model\.gguf: lacks 1 tensors \(blk\.1\.attn_k\.weight\)"):
        table.from_format("gguf", FILE, config, stored)
    with pytest.raises(ValueError, match=r"also holds 1 tensors \(blk\.9\.attn_k\.weight\)"):
        table.from_format(
            "gguf", FILE, config, stored | {"blk.1.attn_k.weight": removed, "blk.9.attn_k.weight": removed}
        )


def test_a_transposed_tensor_is_refused():
    config, stored = _stored()
    tensor = stored["blk.0.ffn_up.weight"]
    stored["blk.0.ffn_up.weight"] = ArrayTensor.view(tensor.type, tensor.shape[::-1], tensor.data.reshape(-1))
    with pytest.raises(
        ValueError, match=r"blk\.0\.ffn_up\.weight has shape \[96, 160\].*makes it \[160, 96\]"
    ):
        table.from_format("gguf", FILE, config, stored)


@pytest.mark.parametrize(
    ("format", "head", "embed"),
    [("gguf", "output.weight", "token_embd.weight"), ("hf", "lm_head.weight", "model.embed_tokens.weight")],
)
def test_a_second_copy_of_the_embedding_is_dropped_but_another_output_layer_refused(format, head, embed):
    config, stored = _stored(format=format)
    stored[head] = stored[embed]
    assert "output" not in table.from_format(format, FILE, config, stored)
    other = stored[embed].data.copy()
    other[-1, -1] ^= 1
    with pytest.raises(ValueError, match=f"{head} differs from the embedding"):
        table.from_format(format, FILE, config, stored | {head: replace(stored[embed], data=other)})


def test_stored_tensors_that_follow_from_the_config_are_ignored():
    config, stored = _stored("gemma-mha", "hf")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = ArrayTensor.of(np.ones(16))
    assert len(table.from_format("hf", FILE, config, stored)) == len(stored) - 1


def test_a_quantised_norm_is_refused():
    config, stored = _stored()
    stored["output_norm.weight"] = random_blocks("Q8_0", (config.width,))
    with pytest.raises(ValueError, match=r"output_norm\.weight is Q8_0, but norms are"):
        table.from_format("gguf", FILE, config, stored)


def test_a_row_that_blocks_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="a row of 96 weights cannot be Q4_K"):
        row_bytes("Q4_K", 96)
