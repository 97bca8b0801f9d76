"""Adapters: PEFT's format and logits (golden files by tools/make_golden_lora.py), merging, hostile files; and
the laws of the engine with adapters on, bit for bit, on tiny models of every architecture."""

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from reference import golden, logits, tolerance
from test_engine import logits_in_chunks, native, random_ids, repeated, run_all
from test_native import LEVELS
from tiny import KINDS, dequantize, random_adapter, random_weights, tiny_config, tiny_tensors, write_tiny_hf

from codegemma.adapters.adapter import Adapter
from codegemma.adapters.load import is_adapter
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.merge import merge as merge_adapters
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import Checkpoint, nemo, safetensors, table, torch
from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.generate.engine import Batch, Engine
from codegemma.generate.request import Request
from codegemma.generate.sampling import Sampling
from codegemma.native import PAGE, Native, Slice

GOLDEN = Path(__file__).parent / "golden"
PEFT = ("gemma1-mqa", "gemma1-mha", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that peft saved: {kind}/peft."""
    folder = tmp_path_factory.mktemp("peft")
    with zipfile.ZipFile(GOLDEN / "lora.zip") as archive:
        archive.extractall(folder)
    return folder


@cache
def peft_logits(kind):
    with zipfile.ZipFile(GOLDEN / "lora.zip") as archive:
        return [np.load(io.BytesIO(archive.read(f"{kind}/{name}.npy"))) for name in ("ids", "logits")]


def checkpoint(config, params):
    return Checkpoint(
        Path("tiny"), config, {name: ArrayTensor.of(value) for name, value in params.items()}, {}, None
    )


def floats(model):
    return {name: dequantize(tensor) for name, tensor in model.tensors.items()}


# ---------------------------------------------------------------------- peft's format
@pytest.mark.parametrize("kind", PEFT)
def test_merged_adapters_of_peft_give_its_logits(kind, saved):
    """Subsets of layers and modules, ranks and alphas by pattern, rslora, trained tokens."""
    config, params, *_ = golden(kind)
    ids, theirs = peft_logits(kind)
    adapter = load_adapter(saved / kind / "peft")
    merged = floats(merge_adapters(checkpoint(config, params), adapter))
    assert np.abs(logits(config, merged, ids) - theirs).max() < 2 * tolerance(config, merged, ids)
    assert np.abs(logits(config, params, ids) - theirs).max() > 1


@pytest.mark.parametrize("kind", PEFT)
def test_saved_adapters_load_as_they_were(kind, saved, tmp_path):
    adapter = load_adapter(saved / kind / "peft")
    assert load_adapter(save_adapter(adapter, tmp_path / "again")).digest == adapter.digest
    for dtype in ("F16", "BF16"):
        rounded = load_adapter(save_adapter(adapter, tmp_path / dtype, dtype))
        assert rounded.scale == adapter.scale
        for name, values in adapter.a.items():
            np.testing.assert_allclose(rounded.a[name], values, rtol=2.0**-8, atol=1e-7)


def test_card_and_fim_orders_travel(tmp_path):
    adapter = replace(
        random_adapter(tiny_config("gemma3"), tokens=(67,)),
        name="fim",
        card={"base": "google/gemma-3-270m", "fim": {"spm": True, "psm": False}, "hours": 3.5},
    )
    again = load_adapter(save_adapter(adapter, tmp_path / "a"))
    assert (again.name, again.card) == ("fim", {"name": "fim", **adapter.card})
    assert (
        again.trained_for("spm")
        and not again.trained_for("psm")
        and not random_adapter(tiny_config("gemma3")).trained_for("spm")
    )
    readme = (tmp_path / "a" / "README.md").read_text()
    assert (
        "base_model: google/gemma-3-270m" in readme and "rank 4" in readme and "Gemma Terms of Use" in readme
    )
    with pytest.raises(ValueError, match="exists: choose another folder"):
        save_adapter(adapter, tmp_path / "a")


def test_layers_of_different_ranks_keep_their_scale(tmp_path):
    adapter = random_adapter(tiny_config("gemma2"), ranks=(6, 2, 3), kinds=("q", "down"))
    again = load_adapter(save_adapter(adapter, tmp_path / "a"))
    for name in adapter.a:
        np.testing.assert_allclose(again.delta(name), adapter.delta(name), rtol=1e-6, atol=1e-7)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["rank_pattern"][r"model\.layers\.1\.mlp\.down_proj"] == 2


# ---------------------------------------------------------------------- NeMo's archives
@pytest.mark.parametrize("kind", ["gemma-mqa", "gemma-mha"])
@pytest.mark.parametrize(
    "left_out, alpha", [((), 16), (("lora_kqv", "lora_hto4h"), 3.0), (("lora_dense",), None)]
)
def test_nemos_fused_adapter_changes_the_fused_matrix(kind, left_out, alpha, tmp_path):
    """As NeMo merges: linear_qkv += linear_out linear_in (alpha / dim), rows interleaved by
    group; and the same read by us, merged into the model, and written in NeMo's layout."""
    config, rng = tiny_config(kind), np.random.default_rng(0)
    layer = "model.decoder.layers.1."
    shapes = {
        "self_attention.adapter_layer.lora_kqv_adapter": ((config.heads + 2 * config.kv_heads) * 32, 96),
        "self_attention.adapter_layer.lora_dense_attention_adapter": (96, 128),
        "mlp.adapter_layer.lora_hto4h_adapter": (320, 96),
        "mlp.adapter_layer.lora_4htoh_adapter": (96, 160),
    }
    state = {}
    adapted = {name: shape for name, shape in shapes.items() if not any(part in name for part in left_out)}
    for name, (rows, columns) in adapted.items():
        state[f"{layer}{name}.linear_in.weight"] = rng.normal(0, 0.3, (8, columns)).astype(np.float32)
        state[f"{layer}{name}.linear_out.weight"] = rng.normal(0, 0.3, (rows, 8)).astype(np.float32)
    write_nemo(tmp_path / "a.nemo", config, state, {"adapter_dim": 8, "alpha": alpha})
    with tarfile.open(tmp_path / "a.nemo") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert is_adapter(tmp_path / "a.nemo") and is_adapter(tmp_path / "unpacked")
    assert load_adapter(tmp_path / "unpacked").digest == load_adapter(tmp_path / "a.nemo").digest
    merged = merge_adapters(checkpoint(config, random_weights(config)), load_adapter(tmp_path / "a.nemo"))
    before = table.to_format("nemo", config, checkpoint(config, random_weights(config)).tensors)
    after = table.to_format("nemo", config, merged.tensors)
    modules = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    for module, name in zip(modules, shapes, strict=True):
        delta = np.zeros(1, np.float32)
        if name in adapted:
            scale = np.float32((alpha or 8) / 8)
            delta = (
                scale * state[f"{layer}{name}.linear_out.weight"] @ state[f"{layer}{name}.linear_in.weight"]
            )
        np.testing.assert_allclose(
            after[f"{layer}{module}.weight"].float32(),
            before[f"{layer}{module}.weight"].float32() + delta,
            rtol=1e-5,
            atol=1e-5,
        )


def write_nemo(path, config, state, tuning, scheme="lora"):
    fields = yaml.safe_load(nemo.config_yaml(config, None)) | {
        "peft": {"peft_scheme": scheme, "lora_tuning": tuning}
    }
    torch.write(stored := io.BytesIO(), {name: ArrayTensor.of(value) for name, value in state.items()})
    with tarfile.open(path, "w") as archive:
        for name, raw in (
            ("./model_config.yaml", yaml.safe_dump(fields).encode()),
            ("./model_weights.ckpt", stored.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))


ONE = "model.decoder.layers.0.self_attention.adapter_layer."


@pytest.mark.parametrize(
    "state, tuning, scheme, message",
    [
        (
            {f"{ONE}lora_kqv_adapter.linear_in.weight": np.ones((4, 96))},
            {},
            "lora",
            "one of its two matrices",
        ),
        (
            {f"{ONE}lora_kqv_adapter.linear_{side}.weight": np.ones((4, 96)) for side in ("in", "out")},
            {},
            "lora",
            "fits no matrix",
        ),
        (
            {f"{ONE}odd_adapter.linear_{side}.weight": np.ones((4, 96)) for side in ("in", "out")},
            {},
            "lora",
            "fits no matrix",
        ),
        ({"model.decoder.final_layernorm.weight": np.ones(96)}, {}, "lora", "no part of a LoRA"),
        ({}, {}, "ptuning", "peft_scheme is 'ptuning'"),
        ({}, None, "lora", "peft_scheme is 'lora'"),
        (
            {
                f"{ONE}lora_unfused_kqv_adapter.q_adapter.linear_{side}.weight": np.ones(shape)
                for side, shape in (("in", (4, 96)), ("out", (128, 4)))
            },
            {"alpha": "x"},
            "lora",
            "alpha is 'x'",
        ),
    ],
)
def test_other_nemo_archives_are_refused(state, tuning, scheme, message, tmp_path):
    write_nemo(tmp_path / "a.nemo", tiny_config("gemma-mqa"), state, tuning, scheme)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "a.nemo")


def test_nemo_adapters_with_unfused_parts_are_read(tmp_path):
    config = tiny_config("gemma-mqa")
    adapter = random_adapter(config, kinds=("q", "gate"))
    names = {
        "q": "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter",
        "gate": "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter",
    }
    state = {
        f"model.decoder.layers.{name.split('.')[1]}.{names[name.split('.')[2]]}.linear_{side}.weight": value[
            name
        ]
        for name in adapter.a
        for side, value in (("in", adapter.a), ("out", adapter.b))
    }
    write_nemo(tmp_path / "a.nemo", config, state, {"adapter_dim": 4, "alpha": adapter.alpha})
    assert load_adapter(tmp_path / "a.nemo").digest == adapter.digest
    write_tiny_hf(tmp_path / "model", config)
    assert not is_adapter(tmp_path / "model")


# ---------------------------------------------------------------------- merging
@pytest.mark.parametrize("type", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_merging_keeps_types_and_changes_the_adapted_layers_only(type):
    config = tiny_config("gemma3", width=256, head_width=64, ffn_width=512)
    model = Checkpoint(Path("tiny"), config, tiny_tensors(config, type), {}, None)
    adapter = random_adapter(config, kinds=("q", "up"), tokens=(67, 70))
    merged = merge_adapters(model, adapter)
    error = {"F32": 1e-6, "BF16": 2.0**-8, "Q8_0": 0.012, "Q4_K": 0.19}[
        type
    ]  # of the type, as a share of the norm
    for name, tensor in merged.tensors.items():
        before, after = (
            dequantize(model.tensors[name]),
            dequantize(ArrayTensor(tensor.type, tensor.shape, tensor.data)),
        )
        assert tensor.type == model.tensors[name].type
        if name in adapter.a:
            wanted = before + adapter.scale * adapter.b[name].astype(np.float64) @ adapter.a[name]
            assert np.linalg.norm(after - wanted) <= error * np.linalg.norm(wanted)
            assert np.linalg.norm(after - before) > 0.1 * np.linalg.norm(before)
        elif name == "embed":
            kept = [token for token in range(config.vocab) if token not in adapter.rows]
            assert np.array_equal(after[kept], before[kept])
            for token, row in adapter.rows.items():
                assert np.linalg.norm(after[token] - row) <= error * np.linalg.norm(row)
        else:
            assert np.array_equal(after, before)


def test_blocks_may_become_floats_and_adapters_add_up():
    config = tiny_config("gemma3", width=256, head_width=64, ffn_width=512)
    model = Checkpoint(Path("tiny"), config, tiny_tensors(config, "Q8_0"), {}, None)
    two = random_adapter(config, kinds="q"), random_adapter(config, 1, kinds="qk")
    merged = merge_adapters(model, *two, blocks_as="F32")
    wanted = dequantize(model.tensors["layers.0.q"]) + two[0].delta("layers.0.q") + two[1].delta("layers.0.q")
    np.testing.assert_allclose(dequantize(merged.tensors["layers.0.q"]), wanted, rtol=1e-6, atol=1e-6)
    assert merged.tensors["layers.0.v"] is model.tensors["layers.0.v"]


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "LORA with use_dora.*plain LoRA.*merge"),
        ({"peft_type": "IA3"}, "is IA3"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, "with modules_to_save"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights"),
        ({"lora_alpha": float("nan")}, "alpha of .* is nan"),
        ({"lora_alpha": True}, "alpha of .* is True"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "too intricate"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "must be an object"),
        ({"trainable_token_indices": [7]}, "2 token ids"),
        ({"trainable_token_indices": [7, 7]}, "each once"),
        ({"trainable_token_indices": [7, -1]}, "each once"),
        ({"trainable_token_indices": None}, "2 token ids"),
    ],
)
def test_configs_beyond_plain_lora_are_refused(changes, message, saved, tmp_path):
    home = copied(saved / "gemma2" / "peft", tmp_path)
    fields = json.loads((home / "adapter_config.json").read_text())
    (home / "adapter_config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(home)


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t | {Q_A.replace("lora_A", "lora_magnitude_vector"): ArrayTensor.of(np.ones(4))},
            "no LoRA of a linear layer",
        ),
        (
            lambda t: (
                t
                | {"base_model.model.model.embed_tokens.lora_embedding_A": ArrayTensor.of(np.ones((6, 307)))}
            ),
            "no LoRA",
        ),
        (
            lambda t: {key: value for key, value in t.items() if "layers.1.mlp.up_proj.lora_A" not in key},
            "one of its two",
        ),
        (lambda t: t | {Q_A: ArrayTensor.of(np.ones((7, 72)))}, r"needs \[r, in\] and \[out, r\]"),
        (lambda t: t | {Q_A: ArrayTensor.of(np.full((6, 72), np.nan))}, "finite"),
        (lambda t: t | {key.removeprefix("base_model.model."): value for key, value in t.items()}, "twice"),
        (lambda t: t | {Q_A.removeprefix("base_model.model."): t[Q_A]}, "layers.0.q twice"),
        (lambda t: t | {Q_A: ArrayTensor.of(np.ones(72))}, r"shape \[72\], but must be a matrix"),
        (
            lambda t: (
                t
                | {
                    "base_model.model.lm_head.token_adapter.trainable_tokens_delta": ArrayTensor.of(
                        np.ones((2, 72))
                    )
                }
            ),
            "of lm_head",
        ),
        (lambda t: {}, "no linear layer"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, saved, tmp_path):
    home = copied(saved / "gemma2" / "peft", tmp_path)
    safetensors.write(
        home / "adapter_model.safetensors",
        change(safetensors.read(saved / "gemma2" / "peft" / "adapter_model.safetensors")),
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(home)


def copied(source, target):
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_damaged_and_missing_files_are_named(saved, tmp_path):
    home = copied(saved / "gemma1-mqa" / "peft", tmp_path)
    assert (
        is_adapter(home) and is_adapter(home / "adapter_model.safetensors") and not is_adapter(tmp_path / "x")
    )
    file = home / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(home)
    file.unlink()
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors"):
        load_adapter(home)
    with pytest.raises(ValueError, match="nowhere: does not exist: pass PEFT's folder"):
        load_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="lacks adapter_config.json"):
        load_adapter(tmp_path / "empty")


def test_adapters_of_another_model_are_refused():
    adapter = random_adapter(tiny_config("gemma3"), tokens=(67,))
    with pytest.raises(
        ValueError, match=r"layers.0.q as a matrix of \[128, 96\], but the model has \[128, 256\]"
    ):
        adapter.check(tiny_config("gemma3", width=256))
    with pytest.raises(ValueError, match="no such layer"):
        adapter.check(tiny_config("gemma-mqa"))
    with pytest.raises(ValueError, match="replaces row 600"):
        random_adapter(tiny_config("gemma3"), kinds=(), tokens=(600,)).check(tiny_config("gemma3"))
    for kind in KINDS:
        random_adapter(tiny_config(kind)).check(tiny_config(kind))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank must be"),
        ({"alpha": 0.0}, "alpha a finite"),
        ({"a": {}, "b": {}}, "changes no layer"),
        (
            {
                "a": {"layers.0.norm": np.ones((4, 4), np.float32)},
                "b": {"layers.0.norm": np.ones((4, 4), np.float32)},
            },
            "no linear",
        ),
        ({"rank": 3}, "r from 1 to the rank"),
        ({"rows": {3: np.ones(4)}}, "float32"),
    ],
)
def test_illegal_adapters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(random_adapter(tiny_config("gemma-mqa")), **changes)


def test_digest_changes_with_every_part():
    config = tiny_config("gemma-mqa")
    adapters = [
        random_adapter(config),
        random_adapter(config, 1),
        random_adapter(config, alpha=9),
        random_adapter(config, tokens=(5,)),
        random_adapter(config, kinds="qkv"),
    ]
    assert len({adapter.digest for adapter in adapters}) == 5
    assert (
        isinstance(adapters[0], Adapter) and adapters[0].digest == replace(adapters[0], name="other").digest
    )


# ---------------------------------------------------------------------- the engine's laws
TWO = {
    "one": {"ranks": (40, 3), "tokens": (7, 9)},
    "two": {"seed": 1, "kinds": ("q", "v", "down"), "tokens": (9,)},
}


def adapted(kind, type="F32", threads=1, level=None):
    """A backend with two adapters: one on all layers, with token rows and a rank above 32, which the kernels
    take in slices; one on some of the layers."""
    backend = native(kind, type, threads, level)
    for name, changes in TWO.items():
        backend.add_adapter(name, random_adapter(backend.config, **changes))
    return backend


def all_logits(backend, ids, adapter):
    """The logits of all tokens, in one run."""
    pages = [backend.new_page() for _ in range(-(-len(ids) // PAGE))]
    return backend.run([Slice(ids, 0, pages, len(ids), adapter)]).values.copy()


def ids_with_tokens(count, seed=0):
    ids = random_ids(count, seed)
    ids[1:3] = 7, 9
    return ids


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("level", LEVELS)
def test_the_engine_gives_pefts_logits(kind, level, saved):
    config, params, *_ = golden(kind)
    ids, theirs = peft_logits(kind)
    adapter = load_adapter(saved / kind / "peft")
    backend = Native(checkpoint(config, params), 2, level)
    base = all_logits(backend, list(ids), None)
    backend.add_adapter("peft", adapter)
    bound = 2 * tolerance(config, floats(merge_adapters(checkpoint(config, params), adapter)), ids)
    assert np.abs(all_logits(backend, list(ids), "peft") - theirs).max() < bound
    assert all_logits(backend, list(ids), None).tobytes() == base.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_on_blocks_an_adapter_costs_little_accuracy(kind):
    """Against the float64 model with the adapter merged. Rounding a block of 32 to 127 steps of its largest,
    which is about 3.5 times the root mean square, errs by 3.5 / (127 sqrt(12)) of it, and a dot product by
    that times |x| |w| / sqrt(32)."""
    backend = adapted(kind, "Q8_0")
    model = Checkpoint(Path("tiny"), backend.config, tiny_tensors(backend.config, "Q8_0"), {}, None)
    ids = ids_with_tokens(50)
    merged = floats(
        merge_adapters(
            checkpoint(backend.config, floats(model)), random_adapter(backend.config, **TWO["one"])
        )
    )
    exact = logits(backend.config, merged, ids)
    bound = tolerance(backend.config, merged, ids, 3.5 / (127 * 12**0.5 * 32**0.5))
    assert np.abs(all_logits(backend, ids, "one") - exact).max() < bound
    assert np.abs(all_logits(backend, ids, None) - exact).max() > 2 * bound


@pytest.mark.parametrize(
    "kind, type",
    [
        ("gemma-mqa", "F32"),
        ("gemma-mha", "Q4_0"),
        ("gemma2", "Q5_K"),
        ("gemma3", "Q8_0"),
        ("gemma3", "Q4_K"),
        ("gemma2", "BF16"),
    ],
)
def test_chunks_and_threads_change_nothing(kind, type):
    ids = ids_with_tokens(100)
    expected = None
    for threads, chunks in ((1, (100, 1, 5, 6, 17)), (2, (64, 3)), (3, (40, 1))):
        backend = adapted(kind, type, threads)
        for chunk in chunks:
            with_adapter = logits_in_chunks(Named(backend, "one"), ids, repeated(chunk))
            expected = expected or with_adapter
            assert with_adapter == expected, f"{threads} threads, chunks of {chunk}"


class Named:
    """A backend whose sequences all have one adapter."""

    def __init__(self, backend, name):
        self.backend, self.name = backend, name

    def new_page(self):
        return self.backend.new_page()

    def run(self, slices):
        return self.backend.run([replace(part, adapter=self.name) for part in slices])


@pytest.mark.parametrize(
    "kind, type", [("gemma-mqa", "Q4_0"), ("gemma-mha", "F32"), ("gemma2", "Q6_K"), ("gemma3", "Q8_0")]
)
def test_neighbours_with_other_adapters_change_nothing(kind, type):
    """Nine sequences with either adapter or none, prompts and single tokens mixed, in any order."""
    backend = adapted(kind, type, threads=2)
    texts = [ids_with_tokens(length, length) for length in (3, 4, 5, 7, 63, 64, 65, 130, 290)]
    names = [None, "one", "two", "one", None, "two", "one", "two", None]
    alone = [all_logits(backend, ids, name)[-1].tobytes() for ids, name in zip(texts, names, strict=True)]
    rng = np.random.default_rng(0)
    for count in (9, 9, 9, 4, 2):
        order = rng.permutation(len(texts))[:count]
        heads = {i: len(texts[i]) - 1 if count < 6 else int(rng.integers(0, len(texts[i]))) for i in order}
        pages = {i: [backend.new_page() for _ in range(-(-len(texts[i]) // PAGE))] for i in order}
        backend.run([Slice(texts[i][: heads[i]], 0, pages[i], 0, names[i]) for i in order if heads[i]])
        result = backend.run([Slice(texts[i][heads[i] :], heads[i], pages[i], 1, names[i]) for i in order])
        for row, i in enumerate(order):
            assert result.values[row].tobytes() == alone[i]


@pytest.mark.parametrize("type", ["F32", "Q8_0", "Q4_K"])
def test_without_an_adapter_nothing_changes(type):
    ids = ids_with_tokens(70)
    backend = native("gemma3", type)
    before = all_logits(backend, ids, None)
    with_adapters = adapted("gemma3", type)
    all_logits(with_adapters, ids, "one")
    assert all_logits(with_adapters, ids, None).tobytes() == before.tobytes()
    assert not np.allclose(all_logits(with_adapters, ids, "one"), before, atol=0.1)
    assert not np.allclose(
        all_logits(with_adapters, ids, "one"), all_logits(with_adapters, ids, "two"), atol=0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_levels_agree_with_an_adapter(kind):
    """Products on blocks are equal; norms, softmax and GELU round differently, which may move an activation
    by a step."""
    rows = [all_logits(adapted(kind, "Q8_0", level=level), ids_with_tokens(80), "one") for level in LEVELS]
    for row in rows[1:]:
        assert np.abs(row - rows[0]).max() < 0.02 * np.abs(rows[0]).max()


@pytest.mark.parametrize("kind, type", [("gemma3", "Q4_0"), ("gemma2", "F32")])
def test_cache_batches_and_speculation_change_no_step_with_adapters(kind, type):
    backend = adapted(kind, type, threads=2)
    base = ids_with_tokens(100)
    texts = [base, base, base, base[:70] + random_ids(30, 1), base[:20] + [7, 8, 9, 10] * 20, base]
    names = ["one", "none", "two", "one", "one", "one"]
    requests = [
        Request(ids, 12, Sampling(0.5, seed=3) if i % 2 else Sampling(), top_logprobs=2, adapter=name)
        for i, (ids, name) in enumerate(zip(texts, names, strict=True))
    ]
    fresh = [list(engine_of(backend, 0).generate(replace(request, speculate=False))) for request in requests]
    assert fresh[0] != fresh[1] != fresh[2] != fresh[0]
    shared = engine_of(backend)
    for _ in range(2):  # the second time all is cached
        assert [list(shared.generate(request)) for request in requests] == fresh
    assert run_all(engine_of(backend), requests) == fresh
    assert run_all(shared, requests, order=[3, 5, 0, 1, 4, 2]) == fresh


def engine_of(backend, cache_bytes=1 << 30):
    engine = Engine(backend, cache_bytes=cache_bytes)
    for name, changes in TWO.items():
        engine.add_adapter(name, random_adapter(backend.config, **changes))
    return engine


def test_pages_are_shared_within_an_adapter_only():
    engine, ids = engine_of(native("gemma3", "Q8_0")), ids_with_tokens(200)
    engine.add_adapter("again", random_adapter(engine.backend.config, **TWO["one"], name="again"))
    list(engine.generate(Request(ids, 1, adapter="one")))
    cached = {name: engine.start(Request(ids, adapter=name)).cached for name in engine.adapters}
    assert cached == {"auto": 0, "none": 0, "one": 199, "two": 0, "again": 199}
    assert engine.cached(ids, "one") == 199 and engine.cached(ids) == 0
    batch = Batch(engine_of(engine.backend, 0))
    added = [batch.add(Request(ids, 1, adapter=name)) for name in ("one", "two", "none", "one")]
    assert [request.leader for request in added] == [None, None, None, added[0]]
    assert (
        engine.logits(ids, adapter="one").tobytes()
        == all_logits(engine.backend, ids, engine.adapters["one"]).tobytes()
    )


def test_a_name_may_go_to_another_adapter_while_requests_run():
    engine, ids = engine_of(native("gemma3", "Q8_0")), ids_with_tokens(30)
    request = Request(ids, 10, adapter="one", speculate=False)
    expected = list(engine.generate(request))
    started = engine.generate(request)
    steps = [next(started)]
    engine.add_adapter("one", random_adapter(engine.backend.config, 5))
    assert [*steps, *started] == expected != list(engine.generate(request))


def test_adapters_must_be_known_and_fit():
    engine = engine_of(native("gemma3"))
    with pytest.raises(ValueError, match="no adapter 'three': there are one, two; add it"):
        engine.start(Request([2, 3], adapter="three"))
    with pytest.raises(ValueError, match="belongs to another model"):
        engine.add_adapter("other", random_adapter(tiny_config("gemma3", width=256)))


def test_the_native_program_checks_its_arguments():
    backend = native("gemma3")
    good = backend._low_rank(np.zeros((32, 96), np.float32))
    b = backend._low_rank(np.zeros((128, 32), np.float32))
    add = backend._program.add_adapter
    for sites, ids, rows, message in (
        ([(99, good, [(0, b)])], [], None, "site"),
        ([(0, b, [(0, b)])], [], None, "a must fit its layer"),
        ([(0, good, [(3, b)])], [], None, "b must fit its layer"),
        ([(0, good, [(1, b)])], [], None, "b must fit its layer"),
        ([(0, good, [])], [], None, "a must fit its layer"),
        ([], [2, 1], good, "ids must ascend"),
        ([], [1], None, "rows must be one for each id"),
        ([], [600], backend._low_rank(np.zeros((1, 96), np.float32)), "rows must be"),
        ([], [1], backend._low_rank(np.zeros((1, 95), np.float32)), "rows must be"),
    ):
        with pytest.raises(ValueError, match=f"adapter's {message}"):
            add(sites, ids, rows)
