"""Every field of a config through every format: kept or refused by name; what GGUF says to llama.cpp."""

from dataclasses import replace

import pytest
from tiny import KINDS, tiny_config, tiny_tensors, write_tiny_gguf

from codegemma.checkpoints import gguf, open_checkpoint
from codegemma.config import GEMMA2_2B, PRESETS
from codegemma.convert.convert import convert
from codegemma.convert.fields import check_fields
from codegemma.convert.verify import verify

pytest.importorskip("tensorstore")
pytest.importorskip("h5py")

FORMATS = ("gguf", "safetensors", "orbax", "keras", "nemo", "gemma_pytorch")
ODD = {
    **{
        "layers": 4,
        "width": 160,
        "heads": 6,
        "kv_heads": 1,
        "head_width": 22,
        "ffn_width": 100,
        "vocab": 777,
    },
    **{"context": 1234, "norm_eps": 3e-5, "rope_base": 5e5, "rope_base_local": 77.0, "rope_scale": 4.0},
    **{
        "window": 48,
        "global_every": 3,
        "query_scale": 0.11,
        "attention_softcap": 33.0,
        "final_softcap": 17.0,
    },
}
CHANGES = [
    *({name: value} for name, value in ODD.items()),
    *({"window": None, "global_every": 1}, {"attention_softcap": None}, {"final_softcap": None}),
    *({"rope_base": 5e5, "rope_base_local": 5e5}, {"query_scale": 64**-0.5}),
    *({"qk_norm": True}, {"qk_norm": False}, {"post_norms": True}, {"post_norms": False}),
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SIZES = {"layers": 2, "width": 32, "head_width": 16, "ffn_width": 32, "vocab": 64, "query_scale": 0.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("source") / "m.gguf", tiny_config("gemma-mqa"), "BF16")


def written(tmp_path, to, config, source):
    """A checkpoint of random weights in a format; of `source` nothing is in it."""

    def other(checkpoint):
        weights = tiny_tensors(config, "BF16")
        return replace(checkpoint, config=config, tensors=weights, build_tokenizer=None, metadata={})

    name = {"gguf": "m.gguf", "nemo": "m.nemo"}.get(to, "m")
    return open_checkpoint(convert(source, tmp_path / name, to, merge=other).path)


def used(config):
    """The fields that decide what a model computes."""
    fields = dict(vars(config))
    if config.global_every == 1:
        fields |= {"window": None, "rope_base_local": None}
    return fields


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["gemma-mqa", "gemma2", "gemma3"])
def test_an_odd_value_is_kept_or_refused_by_name(tmp_path, to, kind, source):
    kept = set()
    same_config = to in ("orbax", "gemma_pytorch")  # a config.json beside the weights, as for safetensors
    for number, changes in enumerate(CHANGES[9:14] if same_config else CHANGES):
        base = tiny_config(kind, **SIZES)
        if "global_every" in changes and not base.window:
            base = replace(base, window=16)
        config = replace(base, **{"query_scale": 0.0} | changes)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            result = written(folder, to, config, source).config
        except ValueError as error:
            names = [*changes, *(name.replace("_", " ") for name in changes), "Gemma 1 alone", "architecture"]
            assert any(name in str(error) for name in names), error
            assert not any(folder.glob("m*")), "what is refused leaves nothing behind"
            continue
        for name, value in used(config).items():
            is_number = isinstance(value, float)
            assert used(result)[name] == (pytest.approx(value, rel=1e-6) if is_number else value), changes
        kept |= changes.keys()
    sizes = {
        "layers",
        "width",
        "heads",
        "kv_heads",
        "head_width",
        "ffn_width",
        "vocab",
        "context",
        "norm_eps",
    }
    assert kept >= (set() if same_config or to == "nemo" and kind != "gemma-mqa" else sizes)


def test_the_published_models_fit_every_format():
    for config in (GEMMA2_2B, *(preset.config for preset in PRESETS.values())):
        for to in FORMATS:
            check_fields(to, config)


def test_what_is_kept_computes_the_same(tmp_path):
    """Another base of positions and a sharper cap change the logits, so that a loss would show."""
    config = tiny_config("gemma3", rope_base=5e5, rope_base_local=77.0, rope_scale=4.0, final_softcap=17.0)
    source = write_tiny_gguf(tmp_path / "source.gguf", config, "BF16")
    assert not verify(source, convert(source, tmp_path / "s", "safetensors").path, threads=1).faults
    with pytest.raises(ValueError, match="keras has no place for rope_base 500000.0 .*rope_base_local 77.0"):
        convert(source, tmp_path / "k", "keras")
    plain = replace(config, rope_base=1e6)
    write_tiny_gguf(tmp_path / "plain.gguf", plain, "BF16")
    assert verify(source, tmp_path / "plain.gguf", threads=1).faults


def test_gguf_says_no_soft_caps_and_no_vocabulary_as_llama_cpp_reads_them(tmp_path, source):
    for kind in ("gemma-mqa", "gemma2", "gemma3"):
        folder = tmp_path / kind
        folder.mkdir()
        config = replace(KINDS[kind], attention_softcap=None, final_softcap=None)
        checkpoint = written(folder, "gguf", config, source)
        header = gguf.read(checkpoint.path).metadata
        assert not [key for key in header if "softcap" in key and key.startswith(config.architecture)]
        assert (checkpoint.config.attention_softcap, checkpoint.config.final_softcap) == (None, None)
        assert checkpoint.tokenizer is None and header["tokenizer.ggml.model"] == "no_vocab"
        assert header[f"{config.architecture}.vocab_size"] == config.vocab
    reader = pytest.importorskip("gguf").GGUFReader(checkpoint.path)
    field = reader.fields["tokenizer.ggml.model"]
    assert bytes(field.parts[field.data[0]]) == b"no_vocab"
    one_cap = replace(KINDS["gemma2"], attention_softcap=None, final_softcap=20.0)
    (tmp_path / "one").mkdir()
    checkpoint = written(tmp_path / "one", "gguf", one_cap, source)
    assert checkpoint.config == one_cap
    assert gguf.read(checkpoint.path).metadata["gemma2.final_logit_softcapping"] == 20.0


def test_what_a_user_should_know_is_said(tmp_path):
    config = tiny_config("gemma2", attention_softcap=None)
    source = write_tiny_gguf(tmp_path / "source.gguf", config, "BF16")
    notes = convert(source, tmp_path / "m.gguf").notes
    assert len(notes) == 1 and "attention_softcap" in notes[0] and "llama.cpp" in notes[0]
    assert convert(tmp_path / "m.gguf", tmp_path / "s", "safetensors").notes == []


def test_a_source_without_tokenizer_is_said(tmp_path, source):
    path = written(tmp_path, "gguf", KINDS["gemma3"], source).path
    (note,) = convert(path, tmp_path / "s", "safetensors").notes
    assert "no tokenizer" in note
