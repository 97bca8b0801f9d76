"""Headers of GGUF files as Ollama and other writers make them, and entries that nobody here knows."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_config, write_tiny_gguf

from codegemma.checkpoints import gguf, gguf_model, open_checkpoint
from codegemma.checkpoints.tensors import ArrayTensor

GEMMA3 = tiny_config("gemma3")
LOCAL = np.array([not GEMMA3.is_global(layer) for layer in range(GEMMA3.layers)])


def _rewritten(tmp_path, change, tensors=()):
    """The config of a file whose header was changed (None removes an entry) and that has further tensors."""
    metadata, stored = gguf.read(write_tiny_gguf(tmp_path / "m.gguf", GEMMA3))
    entries = {key: value for key, value in (metadata | change).items() if value is not None}
    gguf.write(tmp_path / "n.gguf", entries, stored | dict(tensors))
    return open_checkpoint(tmp_path / "n.gguf").config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attention.sliding_window_pattern": LOCAL}, {}),
        ({"attention.sliding_window_pattern": LOCAL.astype("<i4")}, {}),
        ({"attention.sliding_window_pattern": np.arange(7) % 3 != 2}, {"global_every": 3}),
        ({"attention.sliding_window_pattern": np.zeros(7, bool)}, {"global_every": 1}),
        ({"rope.local.freq_base": 77.0}, {"rope_base_local": 77.0}),
        ({"rope.global.freq_base": 5e5, "rope.freq_base": None}, {"rope_base": 5e5}),
        ({"rope.scale_linear": 4.0}, {"rope_scale": 4.0}),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, {"rope_scale": 1.0}),
        ({"attention.layer_norm_rms_epsilon": None}, {}),
        (
            {"text.attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None},
            {"norm_eps": 1e-5},
        ),
        ({"attention.head_count_kv": np.full(7, 1, "<i4")}, {}),
        ({"vision.block_count": 27, "mm.tokens_per_image": 256, "vocab_size": 515}, {}),
        ({"attention.causal": True, "expert_count": 0, "rope.dimension_count_swa": 32}, {}),
    ],
)
def test_headers_of_other_writers_mean_the_same(tmp_path, change, expected):
    change = {f"gemma3.{key}": value for key, value in change.items()}
    assert _rewritten(tmp_path, change) == replace(GEMMA3, **expected)


def test_the_image_tower_that_ollama_keeps_in_the_file_is_left_out(tmp_path):
    image = ArrayTensor.of(np.ones((4, 4), np.float32))
    names = ("v.blk.0.attn_q.weight", "v.patch_embedding.weight", "mm.mm_input_projection.weight")
    assert _rewritten(tmp_path, {}, tensors=[(name, image) for name in names]) == GEMMA3
    with pytest.raises(ValueError, match="also holds 1 tensors .blk.0.attn_q.bias"):
        _rewritten(tmp_path, {}, tensors=[("blk.0.attn_q.bias", image)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention.temperature_length": 8192},
            "attention.temperature_length .8192., which this program does",
        ),
        ({"rope.scaling.yarn_beta_fast": 32.0}, "may change the result"),
        ({"logit_scale": 0.5}, "may change the result"),
        ({"expert_count": 8}, "expert_count is 8, but this program supports only 0"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"pooling_type": 1}, "pooling_type is 1"),
        ({"attention.key_length_swa": 64}, "key_length_swa must equal attention.key_length"),
        ({"rope.local.freq_base": 77.0, "rope.freq_base_swa": 78.0}, "another entry of the same meaning"),
        ({"attention.sliding_window_pattern": LOCAL[:3]}, "an entry for each of 7 layers"),
        ({"attention.sliding_window_pattern": ~LOCAL}, "does not repeat one global layer"),
        ({"attention.head_count": np.array([4] * 6 + [2], "<i4")}, "head_count must be one number"),
    ],
)
def test_an_entry_that_changes_the_result_is_not_passed_over(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        _rewritten(tmp_path, {f"gemma3.{key}": value for key, value in change.items()})
    assert "n.gguf" in str(caught.value)


def test_another_unknown_entry_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"gemma3.flavour .'sour'., which this program does not know"):
        assert _rewritten(tmp_path, {"gemma3.flavour": "sour"}) == GEMMA3


def test_ollamas_first_files_of_larger_models_are_read_as_published():
    """They lack the linear scaling of 4B to 27B, and state a soft cap for 1B that Gemma 3 never had."""
    entries = {
        "block_count": 34,
        "embedding_length": 2560,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "feed_forward_length": 10_240,
        "context_length": 131_072,
        "attention.key_length": 256,
        "attention.sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        "rope.local.freq_base": 1e4,
    }
    header = {f"gemma3.{key}": value for key, value in entries.items()} | {"general.architecture": "gemma3"}
    assert gguf_model.config("f", header, 1000).rope_scale == 8.0
    assert gguf_model.config("f", header | {"gemma3.block_count": 26}, 1000).final_softcap is None
    for layers, scale in ((34, 1.0), (34, 8.0), (26, 1.0)):  # what we write says it either way
        config = replace(gguf_model.config("f", header, 1000), layers=layers, rope_scale=scale)
        assert gguf_model.config("f", gguf_model.config_metadata(config), 1000) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_every": 0}, r"global_every must be a whole number above 0 \(1: .*\), got 0$"),
        ({"global_every": 2.5}, "global_every must be a whole number above 0 .*, got 2.5$"),
        ({"window": 0.5}, "window must be a whole number of tokens, or None, got 0.5$"),
        (
            {"window": None},
            "global_every is 6, so some layers are local and need a window, got None: set window",
        ),
    ],
)
def test_windows_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(GEMMA3, **changes)
