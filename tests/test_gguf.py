"""The GGUF reader against the `gguf` package's, its writer by that reader, and both against damaged files."""

import struct
import time

import gguf as peer
import numpy as np
import pytest
from mutate import fuzz
from tiny import KINDS, fitting, tiny_config, tiny_tensors, tokenizer_metadata, write_tiny_gguf

from codegemma.checkpoints import gguf, gguf_model, open_checkpoint
from codegemma.checkpoints.table import tensor_locations
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor, LazyTensor
from codegemma.config import GEMMA2_2B, GEMMA3_270M, GEMMA_2B, ModelConfig


@pytest.mark.parametrize("type", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_as_by_the_gguf_package(tmp_path, kind, type):
    config = tiny_config(kind, width=256, ffn_width=512, heads=8, kv_heads=8 if kind == "gemma-mha" else 1)
    path = write_tiny_gguf(tmp_path / "m.gguf", config, type)
    checkpoint, tensors = open_checkpoint(path), tiny_tensors(config, type)
    assert checkpoint.config == config
    theirs = {tensor.name: tensor for tensor in peer.GGUFReader(path).tensors}
    assert len(theirs) == len(tensors)
    for location in tensor_locations(config, "gguf"):
        ours, other = checkpoint.tensors[location.name], theirs[location.stored]
        assert (
            ours.type
            == other.tensor_type.name
            == ("F32" if location.is_norm else fitting(type, location.shape[-1]))
        )
        assert ours.shape == tuple(other.shape[::-1]) == location.shape
        raw = other.data.view(np.uint8).reshape(ours.data.shape)
        assert np.array_equal(ours.data, raw) and np.array_equal(ours.data, tensors[location.name].data)
        assert not ours.data.flags.owndata and ours.data.flags.c_contiguous


def test_reads_what_the_gguf_package_wrote(tmp_path):
    path = tmp_path / "m.gguf"
    writer = peer.GGUFWriter(path, "gemma", use_temp_file=False)
    pieces = ["<pad>", "päd", "\n"]
    writer.add_string("text", "größer 🙂")
    writer.add_array("pieces", pieces)
    writer.add_array("numbers", [1, -2, 3])
    writer.add_bool("yes", True)
    writer.add_float32("eps", 1e-6)
    writer.add_uint64("large", 2**63)
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = gguf.read(path)
    assert list(metadata.pop("pieces")) == pieces
    assert metadata.pop("numbers").tolist() == [1, -2, 3]
    assert metadata == {
        "general.architecture": "gemma",
        "text": "größer 🙂",
        "yes": True,
        "eps": 1e-6,
        "large": 2**63,
    }
    assert tensors["a"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["b"].float32().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("config", [GEMMA_2B, GEMMA2_2B, GEMMA3_270M], ids=lambda config: config.architecture)
def test_a_config_survives_its_header_entries(config):
    assert gguf_model.config("f", gguf_model.config_metadata(config), config.vocab) == config


def test_missing_header_entries_have_llama_cpps_defaults():
    shape = {
        "block_count": 46,
        "embedding_length": 4608,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
        "feed_forward_length": 36_864,
        "context_length": 8192,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 128,
    }

    def config(architecture, **more):
        entries = shape | {key.replace("__", "."): value for key, value in more.items()}
        return gguf_model.config(
            "f",
            {"general.architecture": architecture}
            | {f"{architecture}.{key}": value for key, value in entries.items()},
            1000,
        )

    gemma2 = config("gemma2")  # the 27B of Gemma 2: its query scale goes by D / N, not by H
    assert (gemma2.window, gemma2.global_every, gemma2.attention_softcap, gemma2.final_softcap) == (
        4096,
        2,
        50.0,
        30.0,
    )
    assert (
        gemma2.query_scale == pytest.approx((4608 / 32) ** -0.5)
        and gemma2.rope_base == gemma2.rope_base_local == 1e4
    )
    gemma3 = config(
        "gemma3",
        rope__freq_base=1e6,
        rope__scaling__factor=8.0,
        rope__scaling__type="linear",
        attention__sliding_window=1024,
    )
    assert (gemma3.rope_base, gemma3.rope_base_local, gemma3.rope_scale, gemma3.global_every) == (
        1e6,
        1e4,
        8.0,
        6,
    )
    assert gemma3.query_scale == pytest.approx(128**-0.5) and gemma3.attention_softcap is None
    assert config("gemma3").window is None and config("gemma3").global_every == 1
    assert config("gemma").rope_base == 1e4


def test_the_vocabulary_is_decoded_when_it_is_first_used(tmp_path):
    path = tmp_path / "m.gguf"
    pieces = [f"piece{number}é" for number in range(262_144)]
    gguf.write(path, {"pieces": pieces}, {})
    start = time.process_time()
    strings = gguf.read(path).metadata["pieces"]
    assert time.process_time() - start < 0.3
    assert len(strings) == len(pieces) and "_items" not in vars(strings) and list(strings) == pieces


def test_the_tokenizer_comes_from_the_header(tmp_path):
    config = tiny_config("gemma-mqa")
    tokenizer = open_checkpoint(write_tiny_gguf(tmp_path / "m.gguf", config)).tokenizer
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x")) == "def f(x):\n    return x"
    assert tokenizer.token_id("<|fim_suffix|>") == 69
    assert open_checkpoint(write_tiny_gguf(tmp_path / "n.gguf", config, tokenizer=False)).tokenizer is None


def test_writing_streams_and_leaves_no_incomplete_file(tmp_path):
    path, order = tmp_path / "m.gguf", []

    def lazy(name):
        return LazyTensor.computed("F32", (8,), lambda: order.append(name) or np.ones(8, np.float32))

    gguf.write(path, {}, {name: lazy(name) for name in "ab"})
    assert order == ["a", "b"] and gguf.read(path).tensors["b"].float32().tolist() == [1] * 8
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tensor c has 28 bytes, but its type and shape make 32"):
        gguf.write(path, {}, {"c": ArrayTensor("F32", (8,), np.zeros(28, np.uint8))})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def _file(tmp_path, tensors=(), metadata=b"", entries=0, version=3, magic=b"GGUF", data=b"", claimed=None):
    """A file put together by hand; tensors are (name, axes, type code, offset)."""
    infos = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, code, offset)
        for name, axes, code, offset in tensors
    )
    raw = (
        magic
        + struct.pack("<IQQ", version, len(tensors) if claimed is None else claimed, entries)
        + metadata
        + infos
    )
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw + bytes(-len(raw) % 32) + data)
    return path


def _entry(key, code, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", code) + value


TEXT = struct.pack("<Q", 1) + b"x"
FAULTS = {
    "wrong magic": ({"magic": b"GGML"}, "is not a GGUF file"),
    "big endian": ({"version": 3 << 24}, "big-endian"),
    "version 1": ({"version": 1}, "GGUF version 1"),
    "tensor count": ({"claimed": 2**60}, r"claims 1,152,921,504,606,846,976 tensors"),
    "entry count": ({"entries": 2**40}, "claims .* header entries"),
    "cut short": ({"entries": 1}, "ends inside its header|reaches beyond|value type"),
    "long key": ({"entries": 1, "metadata": struct.pack("<Q", 2**63)}, "bytes in a key"),
    "long string": (
        {"entries": 1, "metadata": _entry(b"k", 8, struct.pack("<Q", 2**20))},
        "the value of k reaches beyond",
    ),
    "not UTF-8": (
        {"entries": 1, "metadata": _entry(b"k", 8, struct.pack("<Q", 1) + b"\xff")},
        "value of k is not UTF-8",
    ),
    "duplicate key": ({"entries": 2, "metadata": _entry(b"k", 8, TEXT) * 2}, "key k appears twice"),
    "value type": ({"entries": 1, "metadata": _entry(b"k", 77, b"")}, "k has the unknown value type 77"),
    "nested array": (
        {"entries": 1, "metadata": _entry(b"k", 9, struct.pack("<IQ", 9, 1))},
        "array of the value type 9",
    ),
    "long array": (
        {"entries": 1, "metadata": _entry(b"k", 9, struct.pack("<IQ", 10, 2**61))},
        "array k of .* reaches",
    ),
    "many strings": (
        {"entries": 1, "metadata": _entry(b"k", 9, struct.pack("<IQ", 8, 2**40))},
        "k claims .* strings",
    ),
    "wrong lengths of strings": (
        {"entries": 1, "metadata": _entry(b"k", 9, struct.pack("<IQQ", 8, 9, 2**63))},
        "array k of 9 strings",
    ),
    "alignment": (
        {"entries": 1, "metadata": _entry(b"general.alignment", 4, struct.pack("<I", 0))},
        "multiple of 8",
    ),
    "duplicate tensor": ({"tensors": [(b"a", (8,), 0, 0)] * 2, "data": bytes(64)}, "tensor a appears twice"),
    "overlap": (
        {"tensors": [(b"a", (16,), 0, 0), (b"b", (8,), 0, 32)], "data": bytes(96)},
        "tensors a and b overlap",
    ),
    "beyond the file": (
        {"tensors": [(b"a", (2**20,), 0, 0)], "data": bytes(64)},
        "tensor a needs .* bytes of file",
    ),
    "offset": ({"tensors": [(b"a", (8,), 0, 2**62)], "data": bytes(64)}, "tensor a needs .* bytes of file"),
    "misaligned": ({"tensors": [(b"a", (8,), 0, 4)], "data": bytes(64)}, "no multiple of 32"),
    "absurd axis": ({"tensors": [(b"a", (2**40, 2**40), 0, 0)]}, "impossible shape"),
    "no axis": ({"tensors": [(b"a", (), 0, 0)]}, "impossible shape"),
    "empty axis": ({"tensors": [(b"a", (8, 0), 0, 0)]}, "impossible shape"),
    "many axes": ({"tensors": [(b"a", (1,) * 9, 0, 0)]}, "axes in tensor a"),
    "foreign type": (
        {"tensors": [(b"a", (256,), 16, 0)]},
        "tensor a is IQ2_XXS, but this program computes with F32, .*IQ4_XS: choose another file.*Q4_K_M",
    ),
    "unknown type": ({"tensors": [(b"a", (256,), 999, 0)]}, "unknown type 999"),
    "part of a block": (
        {"tensors": [(b"a", (33,), 8, 0)], "data": bytes(64)},
        "row of 33 weights cannot be Q8_0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_header_is_named(tmp_path, fault):
    parts, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as caught:
        gguf.read(_file(tmp_path, **parts))
    assert "bad.gguf" in str(caught.value)


def test_an_empty_file_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match="the file is empty"):
        gguf.read(tmp_path / "empty.gguf")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "general.architecture is 'llama'"),
        ({"gemma3.block_count": 2**31}, "layers must be a whole number"),
        ({"gemma3.embedding_length": "wide"}, "embedding_length must be one number"),
        ({"gemma3.feed_forward_length": [1, 2]}, "feed_forward_length must be one number"),
        ({"gemma3.rope.freq_base": float("nan")}, "rope_base must be a finite number"),
        ({"gemma3.attention.value_length": 128}, "value_length must equal attention.key_length \\(32\\)"),
        ({"gemma3.rope.scaling.type": "yarn"}, "rope.scaling.type must be linear"),
        ({"gemma3.attention.head_count": 3}, "shape|multiple"),
        ({"split.count": 4}, "llama-gguf-split --merge"),
        ({"tokenizer.ggml.tokens": ["x"] * 600}, "tokenizer.ggml.tokens must be at most 515"),
    ],
)
def test_a_header_of_another_model_is_refused(tmp_path, change, message):
    config = tiny_config("gemma3")
    metadata, tensors = gguf.read(write_tiny_gguf(tmp_path / "m.gguf", config))
    gguf.write(tmp_path / "m2.gguf", metadata | change, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path / "m2.gguf")
    assert "m2.gguf" in str(caught.value)


def test_a_broken_vocabulary_is_refused_when_it_is_needed(tmp_path):
    config = tiny_config("gemma-mqa")
    good = gguf_model.config_metadata(config) | tokenizer_metadata(config)
    stored = gguf.read(write_tiny_gguf(tmp_path / "m.gguf", config)).tensors
    for change in ({"tokenizer.ggml.scores": [0.0]}, {"tokenizer.ggml.model": "gpt2"}):
        gguf.write(tmp_path / "m2.gguf", good | change, stored)
        with pytest.raises(ValueError, match="not a complete SentencePiece vocabulary"):
            assert open_checkpoint(tmp_path / "m2.gguf").tokenizer


def test_a_query_scale_that_gguf_cannot_say_is_refused():
    with pytest.raises(ValueError, match="no key for the query scale"):
        gguf_model.config_metadata(ModelConfig("gemma", 1, 64, 2, 1, 32, 64, 99, 64, query_scale=0.5))


@pytest.mark.filterwarnings("ignore:.*which this program does not know")
def test_thousands_of_damaged_files_raise_or_load_within_little_memory(tmp_path):
    config = tiny_config("gemma3", layers=1, width=32, ffn_width=32, heads=2, head_width=16, vocab=64)
    metadata, tensors = gguf.read(write_tiny_gguf(tmp_path / "m.gguf", config, "Q8_0", tokenizer=False))
    metadata |= {
        "tokenizer.ggml.tokens": ["<pad>", "é", "return"],
        "tokenizer.ggml.scores": np.zeros(3, "<f4"),
    }
    path = tmp_path / "bad.gguf"
    gguf.write(path, metadata, tensors)
    raw = path.read_bytes()
    outcomes = fuzz(
        lambda: list(open_checkpoint(path).metadata.get("tokenizer.ggml.tokens", ())),
        path,
        raw,
        raw.index(b"blk.0.ffn_down.weight") + 60,
        2400,
    )
    assert outcomes["loaded"] > 20 and outcomes["refused"] > 1000
