"""The public API of a loaded model, on tiny files of each format."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from reference import logits as twin
from reference import tolerance
from tiny import (
    KINDS,
    random_adapter,
    random_weights,
    tiny_config,
    tiny_tensors,
    tokenizer_metadata,
    write_tiny_gguf,
    write_tiny_hf,
)

import codegemma
from codegemma import Completion, File, Message, Sampling, load
from codegemma.adapters import load as adapters
from codegemma.adapters.merge import merge as merge_adapters
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import gguf, gguf_model, open_checkpoint
from codegemma.checkpoints.table import to_format
from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.config import PRESETS
from codegemma.generate import model as local
from codegemma.generate.benchmark import benchmark
from codegemma.generate.resolve import truncate_left
from codegemma.native import Cancel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", KINDS["gemma-mqa"], "Q8_0")


@pytest.fixture(scope="module")
def model(path):
    return load(path, threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_give_the_twins_logits(kind, tmp_path):
    config = tiny_config(kind)
    params = random_weights(config)
    tensors = {name: ArrayTensor.of(value) for name, value in params.items()}
    ids = [2, *np.random.default_rng(0).integers(3, 515, 70).tolist()]
    expected, bound = twin(config, params, ids), tolerance(config, params, ids)
    sources = (
        write_tiny_gguf(tmp_path / "a.gguf", config, tensors=tensors),
        write_tiny_hf(tmp_path / "b", config, tensors=tensors),
        write_tiny_hf(tmp_path / "c", config, tensors=tensors, shards=3),
    )
    for source in sources:
        actual = load(source, threads=2).logits(ids)
        assert actual.dtype == np.float32 and actual.shape == (71, 515)
        assert np.abs(actual - expected).max() < bound


def test_public_names():
    assert codegemma.__version__ and all(getattr(codegemma, name) for name in codegemma.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        codegemma.loud  # noqa: B018


def test_a_completion_is_an_iterator_that_keeps_its_steps(model, path):
    completion = model.generate("def f", max_tokens=5)
    assert isinstance(completion, Completion)
    first = next(completion)
    assert [first, *completion] == completion.steps and len(completion.steps) == 5
    assert completion.text == "".join(step.text for step in completion.steps)
    assert completion.ids == [step.token for step in completion.steps] and completion.stop == "length"
    assert completion.prompt_tokens == len(model.tokenizer.encode("def f", bos=True))
    again = model.generate([2, *model.tokenizer.encode("def f")], max_tokens=5)
    assert again.steps == completion.steps and again.cached_tokens == again.prompt_tokens - 1
    assert model.path == path


def test_closing_ends_a_completion(model):
    completion = model.generate("x", max_tokens=50)
    taken = [next(completion), next(completion)]
    completion.close()
    assert completion.steps == taken and completion.stop is None


def test_cancelling_ends_a_completion(model):
    cancel = Cancel()
    completion = model.generate("x", max_tokens=50, cancel=cancel)
    next(completion)
    cancel.set()
    assert completion.stop == "cancelled" and completion.ids == completion.ids[:1]


def test_sampling_options_reach_the_engine(model):
    draws = [Sampling(temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    texts = [model.generate("x", max_tokens=20, sampling=draw).ids for draw in draws]
    assert texts[0] == texts[1] != texts[2]
    step = next(model.generate("x", top=3))
    assert len(step.top) == 3 and step.top[0] == (step.token, step.logprob)


def test_prompts_that_are_too_long(model):
    ids = [2, *range(300, 500)] * 3
    with pytest.raises(ValueError, match=r'603 tokens but the model reads 512.*truncate="left"'):
        model.generate(ids)
    short = model.generate(ids, max_tokens=12, truncate="left")
    assert short.prompt_tokens == 500 and len(short.steps) == 12
    assert short.steps == model.generate([2, *ids[-499:]], max_tokens=12).steps
    with pytest.raises(ValueError, match='truncate must be None or "left"'):
        model.generate("x", truncate="right")
    assert truncate_left([2, 3, 4, 5], 2) == [2, 5] and truncate_left([2, 3], 2) == [2, 3]
    assert truncate_left([2, 3, 4], 1) == [2]


def test_raw_reads_control_tokens_and_text_does_not(model):
    prompt = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    spelled, plain = (model.generate(prompt, max_tokens=1, raw=raw).prompt_tokens for raw in (True, False))
    assert spelled == 6 and plain > 30


def test_complete(model):
    context = [("b.py", "c"), File("d.py", "e")]
    same = model.complete("def f(", "x\n", "a.py", context, trim="none", max_tokens=5)
    ids = [
        2,
        *model.tokenizer.encode(
            "b.py\nc<|file_separator|>d.py\ne<|file_separator|>a.py\n<|fim_prefix|>def f("
            "<|fim_suffix|>x\n<|fim_middle|>",
            control=True,
        ),
    ]
    assert same.steps == model.generate(ids, max_tokens=5).steps
    for prefix, suffix in (("", ""), ("a", ""), ("", "b")):
        for mode in ("auto", "psm", "spm", "prefix"):
            assert model.complete(prefix, suffix, mode=mode, trim="line", max_tokens=3).stop in (
                "end",
                "length",
            )


def test_completions_refuse_bad_input_at_once(model):
    for options, message in (
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"trim": "word"}, 'trim must be "auto", "none", "line" or "block"'),
        ({"time_budget": 0}, "time budget must be above 0"),
        ({"time_budget": float("nan")}, "time budget"),
        ({"mode": "mps"}, "mode must be"),
        ({"adapter": None}, "adapter must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model.complete("a", **options)


def test_chat(model):
    messages = [("system", "s"), {"role": "user", "content": "u"}, Message("assistant", "a"), ("user", "v")]
    answer = model.chat(messages, max_tokens=3)
    ids = [
        2,
        *model.tokenizer.encode(
            "<start_of_turn>user\ns\n\nu<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
            "<start_of_turn>user\nv<end_of_turn>\n<start_of_turn>model\n",
            control=True,
        ),
    ]
    assert answer.prompt_tokens == len(ids) and answer.steps == model.generate(ids, max_tokens=3).steps
    assert model.chat([("user", "u"), ("model", "a"), ("user", "v")], max_tokens=1).prompt_tokens > 10
    several = [
        ("developer", "s"),
        ("user", "u"),
        ("model", "a"),
        ("user", "v"),
        {"role": "tool", "content": "w"},
    ]
    joined = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v\n\nw")]
    assert model.chat(several, max_tokens=3).steps == model.chat(joined, max_tokens=3).steps
    for wrong in ([("robot", "x")], [("user", 3)], [{"role": "user"}], []):
        with pytest.raises(ValueError, match="chat"):
            model.chat(wrong)


def test_a_directory_without_a_tokenizer_still_loads(tmp_path):
    model = load(write_tiny_hf(tmp_path, KINDS["gemma3"]), threads=1)
    assert model.logits([2, 3]).shape == (2, 515)
    completion = model.generate([2, 3], max_tokens=4)
    assert len(completion.ids) == 4 and completion.text == "" and not model.fim_trained
    for call in (
        lambda: model.tokenizer,
        lambda: model.generate("x"),
        lambda: model.complete("x"),
        lambda: model.chat([("user", "x")]),
    ):
        with pytest.raises(ValueError, match="has no tokenizer.*tokenizer.model"):
            call()


@pytest.mark.parametrize("quantize, min_cosine", [("q8_0", 0.999), ("q4_0", 0.9)])
def test_quantised_while_loading(tmp_path, quantize, min_cosine):
    """The logits have almost the direction of the float model's, but are not equal."""
    path = write_tiny_hf(tmp_path, tiny_config("gemma-mqa", ffn_width=192))
    ids = list(range(2, 60))
    exact, coarse = load(path, threads=1).logits(ids), load(path, threads=1, quantize=quantize).logits(ids)
    cosine = (exact * coarse).sum() / np.linalg.norm(exact) / np.linalg.norm(coarse)
    assert min_cosine < cosine < 0.999999
    with pytest.raises(ValueError, match="q3_9"):
        load(path, quantize="q3_9")


def test_a_saved_cache_is_loaded(path, tmp_path):
    first = load(path, threads=1)
    steps = first.generate(list(range(2, 90)), max_tokens=4).steps
    first.engine.cache.save(tmp_path / "cache")
    second = load(path, threads=2, cache=tmp_path / "cache")
    completion = second.generate(list(range(2, 90)), max_tokens=4)
    assert completion.cached_tokens == 87 and completion.steps == steps
    assert load(path, threads=1, cache=tmp_path / "none").engine.cache.nbytes == 0


def test_a_cache_of_another_model_is_not_loaded(path, tmp_path):
    first = load(path, threads=1)
    list(first.generate([2, 3], max_tokens=2))
    first.engine.cache.save(tmp_path / "cache")
    other = write_tiny_gguf(tmp_path / "other.gguf", KINDS["gemma-mqa"], "Q8_0", seed=1)
    with pytest.warns(UserWarning, match="another model"):
        assert load(other, threads=1, cache=tmp_path / "cache").engine.cache.nbytes == 0


def test_benchmark(model):
    result = benchmark(model, prompt_tokens=70, decode_tokens=3, repeats=1)
    shares = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "prefill_share_of_peak",
        "decode_share_of_bandwidth",
        "bandwidth_bytes_per_second",
        "bfloat16_operations_per_second" if model.backend.level == "amx" else "int8_operations_per_second",
    )
    assert all(result[name] > 0 for name in shares)
    assert (result["threads"], result["prompt_tokens"], result["decode_tokens"]) == (1, 70, 3)
    assert result["simd"] == model.backend.level
    for prompt, decode in ((0, 1), (1, 0), (500, 13)):
        with pytest.raises(ValueError, match="must lie in the context of 512"):
            benchmark(model, prompt, decode)


@pytest.mark.parametrize(
    "ids, message", [([], "prompt is empty"), ([515], "515 ids"), ([2] * 513, "513 tokens")]
)
def test_logits_refuse_bad_ids(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model.logits(ids)


@pytest.mark.parametrize("threads", [0, -1])
def test_bad_threads(path, threads):
    with pytest.raises(ValueError, match="threads must be at least 1"):
        load(path, threads=threads)


def test_bad_levels_and_paths(path, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEGEMMA_SIMD", "mmx")
    with pytest.raises(ValueError, match="SIMD level 'mmx'"):
        load(path)
    with pytest.raises(ValueError, match="no model"):
        load(tmp_path / "nothing.gguf")


def named(path, name):
    """A file with a preset's name, layers, width and vocabulary, but narrow heads and feed-forward."""
    config = replace(PRESETS[name].config, heads=1, kv_heads=1, head_width=2, ffn_width=32, query_scale=0.0)
    tensors = tiny_tensors(replace(config, vocab=512), "Q4_0")
    zeros = np.zeros((config.vocab, config.width // 32 * 18), np.uint8)
    tensors["embed"] = ArrayTensor("Q4_0", (config.vocab, config.width), zeros)
    stored = to_format("gguf", config, tensors)
    metadata = gguf_model.config_metadata(config) | tokenizer_metadata(replace(config, vocab=515))
    metadata["general.name"] = PRESETS[name].title
    gguf.write(path, metadata, stored)
    return path


def test_a_use_that_the_card_does_not_name_warns_once(tmp_path):
    path = named(tmp_path / "model.gguf", "gemma-3-270m")
    model = load(path, threads=1)
    assert model.preset is PRESETS["gemma-3-270m"] and not model.fim_trained
    with pytest.warns(UserWarning, match="Gemma 3 270M was made for .*generation, not for chat"):
        model.chat([("user", "x")], max_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.chat([("user", "x")], max_tokens=1)
        model.generate("x", max_tokens=1)
    model.preset = replace(model.preset, uses=("chat",))
    calls = {"generation": lambda: model.generate("x"), "completion": lambda: model.complete("x")}
    for use, call in calls.items():
        with pytest.warns(UserWarning, match=f"was made for chat, not for {use}") as caught:
            call()
        assert caught[0].filename == __file__, "the warning shows the line that called the model"
    strict = load(path, threads=1, strict=True)
    strict.generate("x", max_tokens=1)
    with pytest.raises(ValueError, match="not for chat: .*--strict"):
        strict.chat([("user", "x")])


def test_a_model_does_not_hang_after_a_fork(tmp_path, monkeypatch):
    """Threads do not survive a fork: without an error, a run in the child would wait for them for ever."""
    model = load(write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa")), threads=2)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="forked"):
        model.logits([2, 5, 7])


def test_an_invalid_message_names_the_rule(tmp_path):
    model = load(write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa")))
    with pytest.raises(ValueError, match="role"):
        model.chat([7])


def test_the_packaged_adapter_acts_in_completion_alone(path, tmp_path, monkeypatch):
    """The packaged adapter of a preset; its card names the FIM layouts."""
    monkeypatch.setattr(adapters, "PACKAGED", tmp_path)
    adapter = replace(
        random_adapter(KINDS["gemma-mqa"], tokens=(67, 70)), card={"fim": {"spm": True, "psm": True}}
    )
    hole = ("def f(x):\n    return ", "\n")

    def model():
        loaded = load(path, threads=1)
        loaded.preset = PRESETS["gemma-3-270m"]
        return loaded

    absent = model()
    base, text = absent.complete(*hole, max_tokens=8), absent.generate("def", max_tokens=8).ids
    assert not absent.fim_trained and absent.completing_adapter() == "none"
    save_adapter(adapter, tmp_path / "gemma-3-270m-fim")
    present = model()
    assert present.generate("def", max_tokens=8).ids == text and present.adapters == []
    assert present.logits([2, 67]).tobytes() == absent.logits([2, 67]).tobytes()
    completed = present.complete(*hole, max_tokens=8)
    assert (
        present.adapters == ["gemma-3-270m-fim"]
        and present.fim_trained
        and present.fim_orders() == {"psm", "spm"}
    )
    assert completed.ids == present.complete(*hole, mode="spm", max_tokens=8, adapter="gemma-3-270m-fim").ids
    assert completed.running.ids[1] == 69  # SPM: the suffix comes first
    assert present.complete(*hole, max_tokens=8, adapter="none").steps == base.steps
    absent.prefer(tmp_path / "gemma-3-270m-fim")
    assert absent.complete(*hole, max_tokens=8).steps == completed.steps
    assert absent.complete(*hole, max_tokens=8, adapter="none").steps == base.steps
    merged = local.Model(
        merge_adapters(open_checkpoint(path), replace(adapter, card={"fim": {"spm": True}})), 1
    )
    merged.preset = PRESETS["gemma-3-270m"]
    assert merged.completing_adapter() == "none" and merged.fim_orders() == {
        "spm"
    }  # it contains the merged adapter
    with pytest.raises(ValueError, match="cannot be called 'auto'"):
        present.add_adapter("auto", adapter)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        present.complete(*hole, adapter="other")
