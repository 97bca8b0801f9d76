"""NeMo's LoRA adapters: a small .nemo archive of the model's config, with a `peft` section, and a state dict.

NeMo 1 gives q, k and v one adapter together, whose output is laid out as linear_qkv's, and gate and up
another; its "canonical" variant gives each its own. Both are read; the fused one, which every NeMo 1 reads,
is written."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.adapters.adapter import Adapter
from codegemma.checkpoints import nemo, table, torch
from codegemma.checkpoints.table import StoredTensor
from codegemma.checkpoints.tensors import ArrayTensor, Tensor
from codegemma.config import ModelConfig
from codegemma.files import atomic_write

# By module of the model: the adapter's module, and the name of the target in `target_modules`.
ATTENTION, MLP = "self_attention.adapter_layer", "mlp.adapter_layer"
FUSED = {
    "self_attention.linear_qkv": (f"{ATTENTION}.lora_kqv_adapter", "attention_qkv"),
    "self_attention.linear_proj": (f"{ATTENTION}.lora_dense_attention_adapter", "attention_dense"),
    "mlp.linear_fc1": (f"{MLP}.lora_hto4h_adapter", "mlp_fc1"),
    "mlp.linear_fc2": (f"{MLP}.lora_4htoh_adapter", "mlp_fc2"),
}
MODULES = {adapter: module for module, (adapter, _) in FUSED.items()}
SEPARATE = {f"{ATTENTION}.lora_unfused_kqv_adapter.{name}_adapter": name for name in "qkv"}
SEPARATE |= {f"{MLP}.lora_unfused_hto4h_adapter.{name}_adapter": name for name in ("gate", "up")}
KEY = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.(\d+)\.([\w.]+)\.linear_(in|out)\.weight")
TUNING = {
    "adapter_dropout": 0.0,
    "column_init_method": "xavier",
    "row_init_method": "zero",
    "weight_tying": False,
    "position_embedding_strategy": None,
}


def is_adapter(path: Path) -> bool:
    """Whether a .nemo archive is an adapter, by its config."""
    members = nemo.read_members(path)
    return (
        "model_config.yaml" in members
        and isinstance(_peft(path, members)[1].get("peft_scheme"), str)
        and not any("word_embeddings" in name for name in members)
    )


def load(path: Path) -> Adapter:
    """The adapter in an archive. Raises ValueError on other kinds of adapters and on damaged files."""
    members = nemo.read_members(path)
    fields, peft = _peft(path, members)
    scheme, tuning = peft.get("peft_scheme"), peft.get("lora_tuning")
    if scheme != "lora" or not isinstance(tuning, dict):
        raise ValueError(
            f"{path}: peft_scheme is {scheme!r}, but this program reads LoRA: pass an adapter trained with "
            "peft_scheme=lora"
        )
    config = nemo.config(path, fields, 1)
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    for name, a_rI, b_Or in _matrices(path, config, members):
        a[name], b[name] = a_rI, b_Or
    rank, alpha = max((len(value) for value in a.values()), default=0), tuning.get("alpha")
    if alpha is not None and (type(alpha) not in (int, float) or alpha == 0):
        raise ValueError(f"{path}: alpha is {alpha!r}, but must be a number other than 0")
    card = {"nemo": json.loads(json.dumps(tuning, default=str, skipkeys=True))}  # YAML has dates
    adapter = Adapter(path.stem, rank, float(alpha or rank), a, b, card=card)
    adapter.check(replace(config, vocab=max(config.vocab, 1)))
    return adapter


def _matrices(
    path: Path, config: ModelConfig, members: nemo.Members
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Our name, a and b of each changed layer."""
    halves: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, tensor in nemo.read(path, members).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path}: holds {key}, which is no part of a LoRA adapter: pass the adapter's own .nemo"
            )
        values = np.array(tensor.float32(), np.float32)
        if values.ndim != 2:
            raise ValueError(
                f"{path}: {key} has shape {list(values.shape)}, but must be a matrix: export it again"
            )
        halves.setdefault((match[1], match[2]), {})[match[3]] = values
    layouts = {layout.name: layout for layout in table.stored_tensors(config, "nemo")}
    for (layer, name), half in halves.items():
        if half.keys() != {"in", "out"}:
            raise ValueError(
                f"{path}: layer {layer}'s {name} has one of its two matrices only: export it again"
            )
        a_rI, b_Or = half["in"], half["out"]
        if name in SEPARATE:
            yield f"layers.{layer}.{SEPARATE[name]}", a_rI, b_Or
            continue
        layout = layouts.get(f"model.decoder.layers.{layer}.{MODULES.get(name)}.weight")
        if layout is None or b_Or.shape != (layout.shape[0], len(a_rI)):
            raise ValueError(
                f"{path}: layer {layer}'s {name} of {list(b_Or.shape)} fits no matrix of a model of "
                f"{config.layers} layers and width {config.width}: it is of another kind"
            )
        for index, part in enumerate(layout.parts):
            output = b_Or if len(layout.parts) == 1 else _with_rank(layout, len(a_rI)).part(index, b_Or)
            yield part.name, a_rI, np.ascontiguousarray(output)


def save(adapter: Adapter, path: Path, config: ModelConfig) -> None:
    """Writes an archive that NeMo 1 restores beside a model of this config.

    Raises ValueError on replaced token rows, which NeMo's adapters do not have, and on models that are no
    Gemma 1."""
    adapter.check(config)
    if adapter.rows:
        raise ValueError(
            f"adapter {adapter.name} replaces {len(adapter.rows)} token rows, which NeMo's adapters have no "
            "place for: merge it into the model instead"
        )
    modules = dict(_fused(adapter, config))
    rank = max(len(a_rI) for a_rI, _ in modules.values())
    state: dict[str, Tensor] = {}
    for key, (a_rI, b_Or) in modules.items():
        padding = (0, rank - len(a_rI))
        state[f"{key}.linear_in.weight"] = ArrayTensor.of(np.pad(a_rI, (padding, (0, 0))))
        state[f"{key}.linear_out.weight"] = ArrayTensor.of(np.pad(b_Or, ((0, 0), padding)))
    layers = sorted({int(key.split(".")[3]) for key in modules})
    targets = sorted({target for name, target in FUSED.values() if any(name in key for key in modules)})
    tuning = {"target_modules": targets, "adapter_dim": rank, "alpha": adapter.scale * rank, **TUNING}
    tuning["layer_selection"] = None if len(layers) == config.layers else [layer + 1 for layer in layers]
    peft = {"peft_scheme": "lora", "restore_from_path": None, "lora_tuning": tuning}
    torch.write(stored := io.BytesIO(), state)
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        nemo.add_member(archive, "model_config.yaml", nemo.config_yaml(config, None, peft=peft))
        nemo.add_member(archive, "model_weights.ckpt", stored.getvalue())


def _peft(path: Path, members: nemo.Members) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the config, and of its `peft` section."""
    fields = nemo.read_config(path, members)
    peft = fields.get("peft")
    return fields, peft if isinstance(peft, dict) else {}


def _with_rank(layout: StoredTensor, rank: int) -> StoredTensor:
    """The layout of a fused matrix with `rank` columns instead of the model's width."""
    return replace(layout, size={**layout.size, "D": rank})


def _fused(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """NeMo's modules with their a and b.

    Where all parts of a fused matrix have the same `a` it is written once. Else their a's are stacked, and
    each part uses its own columns of b."""
    for layout in table.stored_tensors(config, "nemo"):
        match = re.fullmatch(r"model\.decoder\.layers\.\d+\.([\w.]+)\.weight", layout.name)
        changed = [part.name for part in layout.parts if part.name in adapter.a]
        if not changed or match is None or match[1] not in FUSED:
            continue
        shared = all(np.array_equal(adapter.a[name], adapter.a[changed[0]]) for name in changed)
        stacked = [adapter.a[name] for name in (changed[:1] if shared else changed)]
        rank, column = sum(map(len, stacked)), 0
        outputs = []
        for index, part in enumerate(layout.parts):
            outputs.append(np.zeros((layout.part_shape(index)[0], rank), np.float32))
            if part.name in adapter.a:
                b_Or = adapter.b[part.name]
                outputs[-1][:, column : column + b_Or.shape[1]] = b_Or
                column += 0 if shared else b_Or.shape[1]
        b = (
            outputs[0]
            if len(outputs) == 1
            else np.ascontiguousarray(_with_rank(layout, rank).gather(outputs))
        )
        yield (
            layout.name.removesuffix(f"{match[1]}.weight") + FUSED[match[1]][0],
            (np.concatenate(stacked), b),
        )
