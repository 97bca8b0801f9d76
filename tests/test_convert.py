"""Conversion through every format, verify, inspect, export and cards."""

import json
import tracemalloc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from mutate import fuzz
from tiny import KINDS, tiny_config, tiny_tensors, tokenizer_metadata, write_tiny_gguf, write_tiny_hf

from codegemma.checkpoints import Checkpoint, gguf, gguf_model, open_checkpoint, tensors
from codegemma.checkpoints.table import to_format
from codegemma.checkpoints.tensors import ArrayTensor, LazyTensor
from codegemma.convert import convert as convert_module
from codegemma.convert.card import card
from codegemma.convert.convert import convert, save
from codegemma.convert.export import export
from codegemma.convert.importance import importance_of
from codegemma.convert.inspect import inspect
from codegemma.convert.quantize import summary
from codegemma.convert.verify import TEXTS, verify


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _source(tmp_path, kind="gemma-mqa", type="BF16", **changes):
    return write_tiny_gguf(tmp_path / "source.gguf", tiny_config(kind, **changes), type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type", ["BF16", "F16"])
def test_a_chain_through_every_format_keeps_every_bit(tmp_path, monkeypatch, kind, type):
    if type == "F16":
        monkeypatch.setattr(tensors, "PIECE", 3_000)  # every matrix goes through in several pieces
    source = path = _source(tmp_path, kind, type)
    nemo = [("nemo", "n.nemo")] if kind.startswith("gemma-") else []
    for to, name in [
        ("safetensors", "s"),
        ("orbax", "o"),
        *nemo,
        ("keras", "k"),
        ("gguf", "g.gguf"),
        ("gemma_pytorch", "t"),
        ("safetensors", "end"),
    ]:
        path = convert(path, tmp_path / name, to).path
    first, last = open_checkpoint(source), open_checkpoint(path)
    for name, tensor in first.tensors.items():
        if name.endswith("norm"):
            np.testing.assert_allclose(last.tensors[name].float32(), tensor.float32(), rtol=1e-6)
        else:
            assert last.tensors[name].type == type and np.array_equal(last.tensors[name].data, tensor.data)
    proof = verify(source, path, threads=1)
    assert proof.same_ids and not proof.faults and proof.kl < 1e-9 and proof.agreement == 1


@pytest.mark.parametrize("type", ["q8_0", "q4_k_m", "q4_0"])
def test_a_quantised_file_passes_and_a_damaged_one_does_not(tmp_path, type):
    source = _source(tmp_path, width=256, ffn_width=512)
    converted = convert(source, tmp_path / "q.gguf", quantize_to=type)
    assert converted.costs and all(cost.before == "BF16" for cost in converted.costs)
    assert all("matrices BF16 -> Q" in line and "error at most" in line for line in summary(converted.costs))
    proof = verify(source, converted.path, threads=1)
    assert (
        not proof.faults
        and proof.kl > 0
        and max(proof.errors.values()) == pytest.approx(max(cost.error for cost in converted.costs), rel=1e-3)
    )
    metadata, stored = gguf.read(converted.path)
    bad = stored["blk.1.ffn_up.weight"].data.copy()
    bad[::2] = bad[1::2]
    stored["blk.1.ffn_up.weight"] = replace(stored["blk.1.ffn_up.weight"], data=bad)
    gguf.write(tmp_path / "bad.gguf", metadata, stored)
    proof = verify(source, tmp_path / "bad.gguf", threads=1)
    assert any("layers.1.up" in fault and "allows" in fault for fault in proof.faults)
    assert any(line.startswith("FAULT") and "layers.1.up" in line for line in proof.lines())


def test_another_vocabulary_or_config_is_a_fault(tmp_path):
    config = tiny_config("gemma-mqa")
    source, stored = _source(tmp_path), to_format("gguf", config, tiny_tensors(config, "BF16"))
    header = gguf_model.config_metadata(config) | tokenizer_metadata(config)
    header["tokenizer.ggml.tokens"][67] = "<unused60>"
    gguf.write(tmp_path / "v.gguf", header, stored)
    proof = verify(source, tmp_path / "v.gguf", threads=1)
    assert proof.same_ids is False and any("tokenizers give different ids" in fault for fault in proof.faults)
    gguf.write(tmp_path / "c.gguf", header | {"gemma.attention.layer_norm_rms_epsilon": 1e-5}, stored)
    assert "the configs differ" in verify(source, tmp_path / "c.gguf").faults[0]


def test_models_without_a_tokenizer_convert_too(tmp_path):
    source = write_tiny_hf(tmp_path / "hf", tiny_config("gemma3"), "BF16", shards=2)
    path = convert(source, tmp_path / "k", "keras").path
    path = convert(path, tmp_path / "g.gguf").path
    assert open_checkpoint(path).tokenizer is None
    proof = verify(source, path, threads=1)
    assert proof.same_ids is None and not proof.faults


def test_blocks_become_bfloat16_where_a_format_has_none_and_dtype_decides(tmp_path):
    source = _source(tmp_path, type="Q8_0", width=256, ffn_width=512)
    plain = open_checkpoint(convert(source, tmp_path / "s", "safetensors").path)
    assert {t.type for t in plain.tensors.values() if len(t.shape) == 2} == {"BF16"}
    wide = open_checkpoint(convert(source, tmp_path / "w.gguf", dtype="f32").path)
    assert {t.type for t in wide.tensors.values()} == {"F32"}
    assert not verify(source, tmp_path / "w.gguf", threads=1).faults
    assert not verify(source, tmp_path / "s", threads=1).faults
    huge = tiny_tensors(tiny_config("gemma-mqa")) | {
        "layers.0.q": ArrayTensor.of(np.full((128, 96), 1e6, np.float32))
    }
    write_tiny_gguf(tmp_path / "huge.gguf", tiny_config("gemma-mqa"), tensors=huge)
    with pytest.raises(
        ValueError, match=r"tensor layers\.0\.q: holds NaN, infinite or \(for f16\) too large"
    ):
        convert(tmp_path / "huge.gguf", tmp_path / "h", "safetensors", dtype="f16")
    assert not (tmp_path / "h").exists() and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x", {}, "does not say its format: pass --to gguf, safetensors"),
        ("x.nemo", {"quantize_to": "q8_0"}, "use it without --to nemo"),
        ("x.gguf", {"quantize_to": "q3"}, "cannot quantize to 'q3'"),
        ("x.gguf", {"dtype": "int8"}, "dtype must be bf16, f16 or f32"),
        ("x.gguf", {"dtype": "f32", "quantize_to": "q8_0"}, "use it without --dtype f32"),
        ("source.gguf", {}, "source.gguf exists: choose another name, or pass --overwrite"),
    ],
)
def test_impossible_conversions_are_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        convert(_source(tmp_path), tmp_path / name, **options)


def test_only_a_model_is_written_over_and_only_by_a_complete_one(tmp_path, monkeypatch):
    source = _source(tmp_path)
    (tmp_path / "notes.gguf").write_text("my notes")
    with pytest.raises(ValueError, match="is neither GGUF"):
        convert(source, tmp_path / "notes.gguf", overwrite=True)
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("import jax\n")
    with pytest.raises(ValueError, match="project"):
        convert(source, project, "safetensors", overwrite=True)
    assert (project / "train.py").exists() and (tmp_path / "notes.gguf").read_text() == "my notes"
    old = convert(source, tmp_path / "model", "safetensors").path
    files = {file.name: file.read_bytes() for file in old.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(convert_module.huggingface, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, old, "safetensors", overwrite=True)
    assert {file.name: file.read_bytes() for file in old.iterdir()} == files
    convert(source, old, "safetensors", overwrite=True)
    assert {file.name: file.read_bytes() for file in old.iterdir()} == files


@pytest.mark.parametrize("to", ["safetensors", "orbax", "keras", "gemma_pytorch"])
def test_a_folder_that_holds_more_than_a_model_is_not_written_over(tmp_path, to):
    source, target = _source(tmp_path), tmp_path / "model"
    convert(source, target, to)
    convert(source, target, to, overwrite=True)
    for name in ("thesis.txt", "data.json", "scripts/train.py", "notes/private.bin"):
        mine = target / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(ValueError, match=f"model holds {name}, which is no part of a model"):
            convert(source, target, to, overwrite=True)
        assert mine.read_text() == "mine"
        mine.unlink()


def test_a_small_model_fits_a_small_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000_000))
    assert convert(_source(tmp_path), tmp_path / "x.gguf").path.exists()


def test_a_full_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="GB free: make room"):
        convert(_source(tmp_path), tmp_path / "x.gguf")


def test_a_large_model_passes_through_little_memory(tmp_path):
    """Each tensor is computed when it is written, then freed: the peak is a few tensors, not the model."""
    config = tiny_config("gemma-mqa", layers=24, width=256, ffn_width=1024)
    matrix_bytes = config.ffn_width * config.width * 2
    tensors = {
        name: tensor
        if len(tensor.shape) == 1
        else LazyTensor.computed("BF16", tensor.shape, lambda shape=tensor.shape: np.zeros(shape, "<u2"))
        for name, tensor in tiny_tensors(config, "BF16").items()
    }
    model = Checkpoint(tmp_path / "none.gguf", config, tensors, {}, None)
    for to in ("safetensors", "gguf", "nemo", "gemma_pytorch", "keras"):
        folder = tmp_path / to
        folder.mkdir()
        tracemalloc.start()
        save(to, folder / f"m.{to}" if to in ("gguf", "nemo") else folder, model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * matrix_bytes < model.nbytes / 8, to


def test_an_interrupted_quantisation_resumes(tmp_path):
    source, target = _source(tmp_path, width=256, ffn_width=512), tmp_path / "q.gguf"
    uninterrupted = convert(source, tmp_path / "uninterrupted.gguf", quantize_to="q4_k_m")

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, quantize_to="q4_k_m", progress=stop)
        assert not target.exists() and len(list(tmp_path.glob(".q.gguf.at-*.part"))) == 1
    rest = convert(source, target, quantize_to="q4_k_m").costs
    assert 0 < len(rest) < 0.7 * len(uninterrupted.costs) and set(rest) < set(uninterrupted.costs)
    assert target.read_bytes() == uninterrupted.path.read_bytes() and not list(tmp_path.glob(".*.part"))


def test_leftovers_of_other_conversions_and_killed_processes_are_removed(tmp_path):
    source, target = _source(tmp_path, width=256, ffn_width=512), tmp_path / "q.gguf"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, quantize_to="q4_0", progress=stop)
    (tmp_path / ".q.gguf.4194305.part").write_text("of a process number that Linux never gives")
    (tmp_path / ".s.4194305.part").mkdir()
    convert(source, target, quantize_to="q8_0")
    convert(source, tmp_path / "s", "safetensors")
    assert not list(tmp_path.glob(".*.part"))


def test_importance_lowers_the_cost_of_quantising(tmp_path):
    """In a model whose norms make every eighth column thirty times as large as the others."""
    config = tiny_config("gemma-mqa", width=256, ffn_width=512)
    factors = ArrayTensor.of(np.where(np.arange(256) % 8 == 0, 3.0, 0.1))
    tensors = {
        name: factors if name.endswith((".attn_norm", ".ffn_norm")) else tensor
        for name, tensor in tiny_tensors(config).items()
    }
    source = write_tiny_gguf(tmp_path / "source.gguf", config, tensors=tensors)
    (tmp_path / "code.py").write_text("def f(x):\n    return x\n" * 40)
    divergences = [
        verify(
            source,
            convert(source, tmp_path / f"{name}.gguf", quantize_to="q4_0", importance=path).path,
            ("def g(x, y):\n    return y + 12\n", TEXTS[0]),
            threads=1,
        ).kl
        for name, path in (("without", None), ("with", tmp_path / "code.py"))
    ]
    assert 0 < divergences[1] < 0.95 * divergences[0]
    with pytest.raises(ValueError, match=r"nowhere: does not exist: pass a file of llama-imatrix"):
        importance_of(tmp_path / "nowhere", open_checkpoint(source))
    with pytest.raises(ValueError, match="importance weighs the columns that --quantize rounds"):
        convert(source, tmp_path / "x.gguf", importance=tmp_path / "code.py")


def test_a_merge_is_applied_to_the_opened_model(tmp_path):
    def doubled(model):
        return replace(
            model,
            tensors=model.tensors | {"layers.0.q": ArrayTensor.of(model.tensors["layers.0.q"].float32() * 2)},
        )

    path = convert(_source(tmp_path, type="F32"), tmp_path / "m.gguf", merge=doubled).path
    np.testing.assert_array_equal(
        open_checkpoint(path).tensors["layers.0.q"].float32(),
        open_checkpoint(tmp_path / "source.gguf").tensors["layers.0.q"].float32() * 2,
    )


def test_progress_ends_near_the_total(tmp_path):
    reports = []
    convert(
        _source(tmp_path), tmp_path / "m.gguf", progress=lambda done, total: reports.append((done, total))
    )
    assert reports == sorted(reports) and reports[-1][0] > 0.9 * reports[-1][1]


def test_written_files_stop_at_the_separator(tmp_path):
    source = _source(tmp_path)
    assert any("will not stop at the file separator" in note for note in inspect(source).notes)
    path = convert(source, tmp_path / "m.gguf").path
    header = gguf.read(path).metadata
    assert [header[f"tokenizer.ggml.fim_{name}_token_id"] for name in ("pre", "mid", "suf", "sep")] == [
        67,
        68,
        69,
        70,
    ]
    assert header["tokenizer.ggml.eot_token_id"] == 107 and not inspect(path).notes
    convert(source, tmp_path / "s", "safetensors")
    assert json.loads((tmp_path / "s" / "generation_config.json").read_text())["eos_token_id"] == [
        1,
        67,
        68,
        69,
        70,
        107,
    ]


def test_inspect_counts_and_finds_damage(tmp_path):
    facts = inspect(_source(tmp_path, type="Q8_0"))
    assert (facts.format, facts.architecture, facts.types, facts.vocabulary) == (
        "gguf",
        "gemma",
        {"Q8_0": 22},
        515,
    )
    assert facts.parameters == sum(np.prod(t.shape) for t in tiny_tensors(tiny_config("gemma-mqa")).values())
    assert facts.control["file_separator"] == 70 and facts.control["fim"] == "named"
    metadata, stored = gguf.read(tmp_path / "source.gguf")
    bad = stored["blk.0.attn_q.weight"].data.copy()
    bad[0, :2] = 0xFF, 0x7F  # a NaN scale
    stored["blk.0.attn_q.weight"] = replace(stored["blk.0.attn_q.weight"], data=bad)
    gguf.write(tmp_path / "bad.gguf", metadata, stored)
    damaged = inspect(tmp_path / "bad.gguf")
    assert "tensor layers.0.q holds NaN" in " ".join(damaged.problems)
    text = "\n".join(damaged.lines())
    assert "22 Q8_0" in text and "file_separator 70" in text and "PROBLEM" in text


@pytest.mark.parametrize(
    ("to", "name", "files"),
    [
        ("gguf", "m.gguf", ["."]),
        ("nemo", "m.nemo", ["."]),
        ("gemma_pytorch", "m", ["model.ckpt"]),
        (
            "safetensors",
            "m",
            ["config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.model"],
        ),
        ("keras", "m", ["config.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"]),
        ("orbax", "m", ["config.json", "checkpoint/manifest.ocdbt"]),
    ],
)
def test_inspecting_damaged_files_reports_or_refuses(tmp_path, to, name, files):
    source = _source(tmp_path, width=32, ffn_width=32, head_width=16, layers=1, heads=2)
    path = convert(source, tmp_path / name, to).path
    for file in (path / part for part in files):
        raw = file.read_bytes()
        fuzz(lambda: list(inspect(path).lines()), file, raw, min(len(raw), 20_000), 40)


def test_exports_hold_what_each_program_needs(tmp_path):
    source = _source(tmp_path)
    for program in ("ollama", "lmstudio", "llamacpp", "transformers", "nemo"):
        files = {
            str(file.relative_to(tmp_path / program)) for file in export(program, source, tmp_path / program)
        }
        assert "NOTICE" in files and len(files) > 1
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert (
        "{{- if .Suffix }}<|fim_prefix|>{{ .Prompt }}<|fim_suffix|>{{ .Suffix }}<|fim_middle|>{{- else }}"
        "{{ .Prompt }}" in text
    )
    assert 'PARAMETER stop "<|file_separator|>"' in text and "PARAMETER repeat_penalty 1" in text
    assert (
        open_checkpoint(tmp_path / "transformers").tokenizer
        and (tmp_path / "lmstudio" / "codegemma").is_dir()
    )


@pytest.mark.parametrize("program", ["transformers", "nemo"])
def test_an_export_without_gguf_takes_no_blocks(tmp_path, program):
    with pytest.raises(
        ValueError, match=f"--quantize makes GGUF blocks, which {program} does not read: leave"
    ):
        export(program, _source(tmp_path), tmp_path / "out", "q4_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "name"), [("ollama", "Modelfile"), ("llamacpp", "README.md"), ("transformers", "NOTICE")]
)
def test_an_export_keeps_the_users_files(tmp_path, program, name):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists, and is kept: choose another folder"):
        export(program, _source(tmp_path), tmp_path / "project")
    assert [*(tmp_path / "project").iterdir()] == [tmp_path / "project" / name]
    assert (tmp_path / "project" / name).read_text() == "mine"


def test_a_card_states_scores_licence_and_changes(tmp_path):
    from huggingface_hub import ModelCard

    scores = tmp_path / "scores"
    scores.mkdir()
    with pytest.raises(ValueError, match="holds no finished benchmark"):
        card(_source(tmp_path), scores)
    (scores / "humaneval.json").write_text(
        json.dumps(
            {
                "title": "HumanEval",
                "score": 0.311,
                "low": 0.24,
                "high": 0.385,
                "items": 164,
                "note": "pass@1",
                "model": "m",
            }
        )
    )
    (scores / "humaneval.times.json").write_text("{}")
    text = card(_source(tmp_path), scores, changes="Fine-tuned on X.")
    parsed = ModelCard(text)
    (result,) = parsed.data.eval_results
    assert (parsed.data.license, result.dataset_name, result.metric_value) == ("gemma", "HumanEval", 31.1)
    assert "| HumanEval | 31.1 | 24.0 - 38.5 | 164 | pass@1 |" in text and "ai.google.dev/gemma/terms" in text
    assert "## Statement of changes\n\nFine-tuned on X." in text


@pytest.mark.parametrize(
    ("fim_orders", "changes"),
    [
        (None, "codegemma did not train them further."),
        ((), "codegemma changed the weights: it trained them further, or merged an adapter into them."),
        (("spm", "psm"), "into them. It knows the FIM orders psm, spm."),
    ],
)
def test_a_card_says_whether_codegemma_changed_the_weights(tmp_path, fim_orders, changes):
    source = _source(tmp_path)
    if fim_orders is not None:
        checkpoint = open_checkpoint(source)
        merge = partial(Checkpoint.with_weights, tensors=dict(checkpoint.tensors), fim_orders=fim_orders)
        source = convert(source, tmp_path / "changed.gguf", merge=merge).path
    text = card(source)
    assert changes in text and ("not train" in text) is (fim_orders is None)
