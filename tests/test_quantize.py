"""Blocks against llama.cpp's own (golden), the gguf package's and each other; types against llama.cpp's
rules."""

from dataclasses import replace
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
from reference import logits
from tiny import KINDS, dequantize, encode, tiny_config, tiny_tensors, write_tiny_gguf

from codegemma.checkpoints import gguf, open_checkpoint
from codegemma.checkpoints.tensors import ArrayTensor, row_bytes
from codegemma.convert.importance import importance_of
from codegemma.convert.quantize import (
    bits,
    choose_types,
    quantize_checkpoint,
    quantize_matrix,
    relative_error,
)
from codegemma.native import QUANTISERS, _native

GOLDEN = np.load(Path(__file__).parent / "golden" / "quantize.npz")
LEVELS = list({"plain": None, _native.level("auto"): None})  # all but plain share one


def _blocks(type, values, importance=None, level="auto"):
    out = np.zeros((len(values), row_bytes(type, values.shape[1])), np.uint8)
    _native.quantise(_native.level(level), type, values, out, importance)
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weighted", ["", "_weighted"])
@pytest.mark.parametrize("type", QUANTISERS)
def test_blocks_are_llama_cpps_bit_for_bit(type, weighted, level):
    ours = _blocks(type, GOLDEN["values"], GOLDEN["importance"] if weighted else None, level)
    np.testing.assert_array_equal(ours, GOLDEN[type + weighted])


@pytest.mark.parametrize("type", ["Q8_0", "Q4_1", "Q5_1"])  # it models fused multiply-add in the other two
def test_blocks_are_the_gguf_packages(type):
    values = np.random.default_rng(3).normal(0, 1, (64, 768)).astype(np.float32)
    np.testing.assert_array_equal(
        _blocks(type, values), peer.quantize(values, peer.GGMLQuantizationType[type])
    )


@pytest.mark.parametrize(
    ("type", "max_error"),
    [
        ("Q8_0", 0.006),
        ("Q6_K", 0.019),
        ("Q5_K", 0.04),
        ("Q5_1", 0.04),
        ("Q5_0", 0.046),
        ("Q4_K", 0.077),
        ("Q4_1", 0.081),
        ("Q4_0", 0.091),
        ("IQ4_NL", 0.079),
    ],
)
def test_the_reported_error_is_the_actual_error(type, max_error):
    values = np.random.default_rng(4).normal(0, 1, (100, 512)).astype(np.float32)
    blocks, *norms = quantize_matrix(encode(values, "F32"), type, threads=2)
    tensor, error = ArrayTensor(type, values.shape, blocks), relative_error(*norms)
    true = np.linalg.norm(dequantize(tensor) - values) / np.linalg.norm(values)
    assert error == pytest.approx(true, rel=1e-3) and 0.5 * max_error < error < max_error
    single_threaded, *_ = quantize_matrix(encode(values, "F32"), type, threads=1)
    assert np.array_equal(blocks, single_threaded)


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_importance_lowers_the_weighted_error(type):
    values = np.random.default_rng(5).normal(0, 1, (64, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 8 == 0, 50.0, 0.1).astype(np.float32)

    def weighted_error(weights):
        blocks = quantize_matrix(encode(values, "F32"), type, weights)[0]
        return (np.square(dequantize(ArrayTensor(type, values.shape, blocks)) - values) * importance).sum()

    assert weighted_error(importance) < 0.8 * weighted_error(None)


def _imatrix(path, importances):
    """As llama-imatrix writes it."""
    sums = {f"{name}.in_sum2": ArrayTensor.of(values[None] * 8) for name, values in importances.items()}
    counts = {f"{name}.counts": ArrayTensor.of(np.full((1, 1), 8)) for name in importances}
    gguf.write(path, {"general.type": "imatrix", "imatrix.datasets": ["code"]}, sums | counts)


def test_importance_is_read_as_llama_imatrix_writes_it(tmp_path):
    model, narrow = _open(tiny_config("gemma-mqa")), _open(tiny_config("gemma-mqa", width=64))
    q, down = np.arange(96, dtype=np.float32), np.ones(160, np.float32)
    _imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": q, "blk.2.ffn_down.weight": down})
    read = importance_of(tmp_path / "i.gguf", model)
    assert read.keys() == {"layers.0.q", "layers.2.down"} and np.array_equal(read["layers.0.q"], q)
    with pytest.raises(
        ValueError, match="blk.0.attn_q.weight has 96 importances, but there must be 64, one for each column"
    ):
        importance_of(tmp_path / "i.gguf", narrow)
    with pytest.raises(ValueError, match="holds no importances"):
        importance_of(write_tiny_gguf(tmp_path / "m.gguf", model.config), model)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_mean_square_of_each_matrix_input(kind, tmp_path):
    """Compared with the float64 twin, which records the inputs of each matrix."""
    model = open_checkpoint(write_tiny_gguf(tmp_path / "m.gguf", tiny_config(kind)))
    params = {name: dequantize(tensor).astype(np.float64) for name, tensor in model.tensors.items()}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "texts" / "b.bin").write_bytes(b"\xff\xfe\x00")
    ids = [2, *model.tokenizer.encode("def f(x):\n    return x\n")]
    inputs = {}

    def dot(x, w):
        inputs.update({name: np.square(x).mean(0) for name, values in params.items() if values is w})
        return x @ w.swapaxes(-1, -2)

    logits(model.config, params, ids, dot)
    importance = importance_of(tmp_path / "texts", model)
    assert importance.keys() == inputs.keys() - {"embed"}
    for name, values in importance.items():
        np.testing.assert_allclose(
            values, inputs[name], rtol=1e-3, atol=1e-5 * inputs[name].max(), err_msg=name
        )
    (tmp_path / "texts" / "a.py").unlink()
    with pytest.raises(ValueError, match="holds no UTF-8 text"):
        importance_of(tmp_path / "texts", model)


def test_a_damaged_weight_is_refused_and_named(tmp_path):
    config = tiny_config("gemma-mqa")
    tensors = tiny_tensors(config)
    bad = tensors["layers.1.up"].float32().copy()
    bad[3, 5] = np.nan
    path = write_tiny_gguf(
        tmp_path / "m.gguf", config, tensors=tensors | {"layers.1.up": ArrayTensor.of(bad)}
    )
    with pytest.raises(ValueError, match=r"m\.gguf: tensor layers\.1\.up: holds NaN"):
        quantize_checkpoint(open_checkpoint(path), "q8_0")
    with pytest.raises(ValueError, match="cannot quantize to 'q9', which is no type of blocks: choose q4_0"):
        choose_types("q9", open_checkpoint(path))
    with pytest.raises(
        ValueError, match="'q2_k', which is read but not written: choose q4_0.*, iq4_nl, q4_k_m"
    ):
        choose_types("q2_k", open_checkpoint(path))


@pytest.mark.parametrize("type", QUANTISERS)
def test_columns_without_importance_make_no_nan(type):
    values = np.random.default_rng(6).normal(0, 1, (4, 512)).astype(np.float32)
    importance = np.repeat(np.float32([0, 1]), 256)
    blocks = quantize_matrix(encode(values, "F32"), type, importance)[0]
    assert np.isfinite(dequantize(ArrayTensor(type, values.shape, blocks))).all()


def test_mixes_follow_llama_cpps_rules():
    """llama_tensor_get_type for Q4_K_M: v and down get Q6_K in the first and last eighth, and in every third
    layer."""
    config = tiny_config("gemma-mqa", layers=16, width=256, ffn_width=512, head_width=64)
    checkpoint = replace(_open(config), config=config)
    types = choose_types("q4_k_m", checkpoint)
    more = [layer for layer in range(16) if types[f"layers.{layer}.down"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15] and all(
        types[f"layers.{layer}.v"] == "Q6_K" for layer in more
    )
    assert types["embed"] == "Q6_K" and types["layers.3.down"] == types["layers.0.q"] == "Q4_K"
    assert types["final_norm"] == "F32" and choose_types("q8_0", checkpoint)["embed"] == "Q8_0"
    types, weighted = choose_types("iq4_nl", checkpoint), choose_types("iq4_nl", checkpoint, weighted=True)
    assert [name for name in types if types[name] != weighted[name]] == ["layers.0.down", "layers.1.down"]
    assert types["layers.0.down"] == types["layers.9.v"] == weighted["layers.9.v"] == "Q5_K"
    assert types["layers.9.q"] == weighted["layers.0.down"] == "IQ4_NL" and types["embed"] == "Q6_K"


def test_rows_that_blocks_do_not_fill_get_the_next_type_and_nothing_grows():
    narrow = _open(tiny_config("gemma-mqa"))  # rows of 96, 128 and 160
    assert (
        choose_types("q4_k", narrow)["layers.0.q"] == "Q5_0"
        and choose_types("q4_k", narrow)["embed"] == "Q8_0"
    )
    odd = _open(tiny_config("gemma-mqa", width=40))
    assert (
        choose_types("q8_0", odd)["layers.0.q"] == "F32"
        and choose_types("q8_0", odd)["layers.0.down"] == "Q8_0"
    )
    small = quantize_checkpoint(narrow, "q4_0")
    assert small.tensors["layers.0.q"].type == "Q4_0" and small.nbytes < narrow.nbytes / 4
    assert choose_types("q8_0", small)["layers.0.q"] == "Q4_0" and bits("Q4_0") == 4.5


def _open(config):
    from codegemma.checkpoints import Checkpoint

    return Checkpoint(Path("m"), config, tiny_tensors(config), {}, None)
