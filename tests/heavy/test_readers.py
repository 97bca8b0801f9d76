"""Files that we write, read by the programs they are written for; each test needs its program installed.

PYTHONPATH=.:tests .venv-formats/bin/python -m pytest tests/heavy    # transformers, KerasHub, Orbax, PyTorch
PYTHONPATH=.:tests .venv-bench/bin/python -m pytest tests/heavy      # llama-cpp-python, transformers
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pytest
from reference import logits
from tiny import KINDS, dequantize, tiny_config, write_tiny_gguf

from codegemma import hub, load, prompts
from codegemma.checkpoints import open_checkpoint, table
from codegemma.convert import verify
from codegemma.convert.convert import convert
from codegemma.prompts import Message

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = "def f(x):\n\treturn  x + 1 # größer 🙂\n\n"


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_tiny_gguf(
        folder / "CodeGemma-tiny.gguf", tiny_config(request.param, width=256, ffn_width=512), "BF16"
    )


def _expected(path, ids):
    checkpoint = open_checkpoint(path)
    return logits(checkpoint.config, {name: dequantize(t) for name, t in checkpoint.tensors.items()}, ids)


def _ids(path):
    return [2, *open_checkpoint(path).tokenizer.encode(TEXT)]


def test_transformers_gives_our_logits_and_ids(source, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    path = convert(source, tmp_path / "m", "safetensors").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer(TEXT)["input_ids"] == _ids(source)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = model(torch.tensor([_ids(source)])).logits[0].detach().numpy()
    np.testing.assert_allclose(theirs, _expected(source, _ids(source)), atol=2e-4)
    assert set(model.generation_config.eos_token_id) == prompts.fim_stops(open_checkpoint(source).tokenizer)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "back")
    back, first = open_checkpoint(tmp_path / "back"), open_checkpoint(source)
    assert back.config == first.config
    for name, tensor in first.tensors.items():
        if not name.endswith("norm"):
            np.testing.assert_array_equal(back.tensors[name].data, tensor.data)


def test_the_model_cards_samples_run(source, tmp_path):
    """The two samples of the model cards, a FIM prompt and a chat, with our folder as the model."""
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(source)
    if checkpoint.tokenizer.control.fim != "named":
        pytest.skip("the samples have CodeGemma's control tokens in their text")
    path = convert(source, tmp_path / "m", "safetensors").path
    config = json.loads((path / "tokenizer_config.json").read_text())
    from codegemma.prompts import CHAT_TEMPLATE

    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    tokenizer = transformers.GemmaTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    prompt = "<|fim_prefix|>import datetime\n<|fim_suffix|>\nprint(x)<|fim_middle|>"
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    assert inputs["input_ids"][0].tolist() == prompts.raw(checkpoint.tokenizer, prompt).ids
    outputs = model.generate(**inputs, max_new_tokens=8)
    assert isinstance(tokenizer.decode(outputs[0][inputs["input_ids"].shape[-1] :]), str)
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " Write a hello world program "},
        {"role": "assistant", "content": "print()"},
        {"role": "user", "content": "Thanks"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")
    ours = prompts.chat(checkpoint.tokenizer, [Message(turn["role"], turn["content"]) for turn in chat]).ids
    assert ids[0].tolist() == ours
    model.generate(input_ids=ids.to(model.device), max_new_tokens=8)


@pytest.mark.parametrize("type", [None, "q8_0", "q4_k_m", "q4_0"])
def test_llama_cpp_gives_our_logits_and_stops_at_the_separator(source, tmp_path, type):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = convert(source, tmp_path / "m.gguf", quantize_to=type).path
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    assert model.tokenize(TEXT.encode()) == _ids(source)
    control = open_checkpoint(source).tokenizer.control
    ends = {token for token in range(515) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}
    assert ends == {control.eos, control.end_of_turn, control.file_separator}
    fim_ids = [
        getattr(llama_cpp, f"llama_vocab_fim_{name}")(vocabulary) for name in ("pre", "mid", "suf", "sep")
    ]
    assert fim_ids == [67, 68, 69, 70]
    model.eval(_ids(source)[:20])
    theirs, ours = np.array(model.scores[:20]), _expected(path, _ids(source)[:20])
    assert np.abs(theirs - ours).max() < (0.3 if type else 0.05)  # llama.cpp rounds keys, values, activations
    assert (theirs.argmax(-1) == ours.argmax(-1)).mean() > 0.8


def test_llama_cpps_quantiser_chooses_the_same_types_and_makes_the_same_blocks(source, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    wide = convert(source, tmp_path / "f32.gguf", dtype="f32").path
    for type, code in (
        ("q8_0", 7),
        ("q4_k_m", 15),
        ("q5_k_m", 17),
        ("q4_0", 2),
        ("q6_k", 18),
        ("iq4_nl", 25),
    ):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = code, 2
        theirs = tmp_path / f"theirs-{type}.gguf"
        assert llama_cpp.llama_model_quantize(str(wide).encode(), str(theirs).encode(), params) == 0
        ours = open_checkpoint(convert(wide, tmp_path / f"{type}.gguf", quantize_to=type).path)
        for name, tensor in open_checkpoint(theirs).tensors.items():
            assert ours.tensors[name].type == tensor.type, (type, name)
            np.testing.assert_array_equal(ours.tensors[name].data, tensor.data, err_msg=f"{type} {name}")


@pytest.mark.parametrize("code, types", [(10, {"Q3_K"}), (12, {"Q4_K"}), (30, {"IQ4_XS"})])
def test_llama_cpps_small_quantisations_give_its_logits(source, tmp_path, code, types):
    """Q2_K, Q3_K_M and IQ4_XS, with the types that its quantiser mixes into them."""
    llama_cpp = pytest.importorskip("llama_cpp")
    wide, path = convert(source, tmp_path / "f32.gguf", dtype="f32").path, tmp_path / "small.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = code
    assert llama_cpp.llama_model_quantize(str(wide).encode(), str(path).encode(), params) == 0
    assert types <= {tensor.type for tensor in open_checkpoint(path).tensors.values()}
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False)
    ids = _ids(source)[:20]
    model.eval(ids)
    theirs, twin = np.array(model.scores[: len(ids)]), _expected(path, ids)
    assert np.abs(theirs - twin).max() < 0.3 and np.abs(load(path).logits(ids) - twin).max() < 0.3


def test_keras_hub_gives_our_logits(source, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    path = convert(source, tmp_path / "m", "keras").path
    config, ids = open_checkpoint(source).config, _ids(source)
    kind = (
        keras_hub.models.Gemma3Backbone if config.architecture == "gemma3" else keras_hub.models.GemmaBackbone
    )
    model = kind.from_preset(str(path), dtype="float32")
    hidden = model({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)))})
    theirs = np.asarray(model.token_embedding(hidden, reverse=True).detach())[0]
    np.testing.assert_allclose(theirs, _expected(source, ids), atol=2e-4)
    if config.architecture != "gemma3":
        tokenizer = keras_hub.models.GemmaTokenizer.from_preset(str(path))
        assert [2, *np.asarray(tokenizer(TEXT)).tolist()] == ids


def test_orbax_and_pytorch_restore_what_we_wrote(source, tmp_path):
    ocp, torch = pytest.importorskip("orbax.checkpoint"), pytest.importorskip("torch")
    checkpoint = open_checkpoint(source)
    path = convert(source, tmp_path / "o", "orbax").path / "checkpoint"
    expected = table.to_format("flax", checkpoint.config, checkpoint.tensors)
    restored = {
        f"{group}/{key}": np.asarray(value).astype(np.float32)
        for group, leaves in ocp.StandardCheckpointer().restore(path).items()
        for key, value in leaves.items()
    }
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(restored[name].reshape(-1), tensor.float32().reshape(-1))
    path = convert(source, tmp_path / "t", "gemma_pytorch").path / "model.ckpt"
    expected = table.to_format("pytorch", checkpoint.config, checkpoint.tensors)
    state = torch.load(path, weights_only=True)["model_state_dict"]
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(state[name].float().numpy().reshape(-1), tensor.float32().reshape(-1))


def test_the_default_model_in_transformers(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    try:
        hub.resolve()
    except ValueError as error:
        pytest.skip(str(error))
    path = convert(hub.DEFAULT, tmp_path / "m", "safetensors", dtype="f32").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ours = open_checkpoint(path)
    for text in (*verify.TEXTS[:3], "<start_of_turn>user\nWhy?<end_of_turn>\n"):
        assert tokenizer(text)["input_ids"] == [2, *ours.tokenizer.encode(text, control=True)], text
    ids = [2, *ours.tokenizer.encode(verify.TEXTS[0])]
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    theirs = model(torch.tensor([ids])).logits[0].detach().numpy()
    np.testing.assert_allclose(theirs, next(verify._logits(ours, [ids], None)), atol=2e-3)
