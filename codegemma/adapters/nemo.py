"""NeMo's LoRA adapters: a small .nemo with the model's config, `peft` in it, and a state dict of low-rank parts.

NeMo 1 gives q, k, v one adapter together, whose output is laid out as linear_qkv's, and gate and up another; its
"canonical" variant gives each its own. Both are read; the fused one, which every NeMo 1 reads, is written.
"""

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
from codegemma.checkpoints import nemo, torch
from codegemma.checkpoints import table as weights
from codegemma.checkpoints.table import Group, Tensor
from codegemma.config import ModelConfig
from codegemma.files import missing, replacing

# Module of the model: adapter beside it, and the name of the target in `target_modules`.
FUSED = {
    "self_attention.linear_qkv": ("self_attention.adapter_layer.lora_kqv_adapter", "attention_qkv"),
    "self_attention.linear_proj": (
        "self_attention.adapter_layer.lora_dense_attention_adapter",
        "attention_dense",
    ),
    "mlp.linear_fc1": ("mlp.adapter_layer.lora_hto4h_adapter", "mlp_fc1"),
    "mlp.linear_fc2": ("mlp.adapter_layer.lora_4htoh_adapter", "mlp_fc2"),
}
ALONE = {f"self_attention.adapter_layer.lora_unfused_kqv_adapter.{name}_adapter": name for name in "qkv"} | {
    f"mlp.adapter_layer.lora_unfused_hto4h_adapter.{name}_adapter": name for name in ("gate", "up")
}
_KEY = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.(\d+)\.([\w.]+)\.linear_(in|out)\.weight")


def is_adapter(path: Path) -> bool:
    """Whether a .nemo archive is an adapter, by its config."""
    found = nemo.members(path)
    return (
        "model_config.yaml" in found
        and isinstance(_peft(path, found)[1].get("peft_scheme"), str)
        and not any("word_embeddings" in name for name in found)
    )


def load(path: Path) -> Adapter:
    """The adapter in an archive. Raises ValueError on other kinds of adapters and on damaged files."""
    found = nemo.members(path)
    fields, peft = _peft(path, found)
    scheme, tuning = peft.get("peft_scheme"), peft.get("lora_tuning")
    if scheme != "lora" or not isinstance(tuning, dict):
        raise ValueError(
            f"{path}: peft_scheme is {scheme!r}, but this program reads LoRA: pass an adapter trained with "
            "peft_scheme=lora"
        )
    config = nemo.config(path, fields, 1)
    groups = {group.stored: group for group in weights.groups(config, "nemo")}
    halves: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, tensor in nemo.read(path, found).items():
        match = _KEY.fullmatch(key)
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
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    modules = {adapter: module for module, (adapter, _) in FUSED.items()}
    for (layer, name), half in halves.items():
        if half.keys() != {"in", "out"}:
            raise ValueError(
                f"{path}: layer {layer}'s {name} has one of its two matrices only: export it again"
            )
        if name in ALONE:
            a[f"layers.{layer}.{ALONE[name]}"], b[f"layers.{layer}.{ALONE[name]}"] = half["in"], half["out"]
            continue
        group = groups.get(f"model.decoder.layers.{layer}.{modules.get(name)}.weight")
        if group is None or half["out"].shape != (group.shape[0], len(half["in"])):
            raise ValueError(
                f"{path}: layer {layer}'s {name} of {list(half['out'].shape)} fits no matrix of a model of "
                f"{config.layers} layers and width {config.width}: it is of another kind"
            )
        for index, place in enumerate(group.parts):
            a[place.name] = half["in"]
            b[place.name] = (
                half["out"]
                if len(group.parts) == 1
                else np.ascontiguousarray(_narrow(group, len(half["in"])).part(index, half["out"]))
            )
    rank = max((len(value) for value in a.values()), default=0)
    alpha = tuning.get("alpha")
    if alpha is not None and (type(alpha) not in (int, float) or alpha == 0):
        raise ValueError(f"{path}: alpha is {alpha!r}, but must be a number other than 0")
    card = {"nemo": json.loads(json.dumps(tuning, default=str, skipkeys=True))}  # YAML has dates
    made = Adapter(path.stem, rank, float(alpha or rank), a, b, card=card)
    made.check(replace(config, vocab=max(config.vocab, 1)))
    return made


def save(adapter: Adapter, path: Path, config: ModelConfig) -> None:
    """Writes an archive that NeMo 1 restores beside a model of this config. Raises ValueError on replaced token rows,
    which NeMo's adapters cannot say, and on models that are no Gemma 1."""
    adapter.check(config)
    if adapter.rows:
        raise ValueError(
            f"adapter {adapter.name} replaces {len(adapter.rows)} token rows, which NeMo's adapters have no "
            "place for: merge it into the model instead"
        )
    parts = dict(_fused(adapter, config))
    dim = max(len(down) for down, _ in parts.values())
    state: dict[str, Tensor] = {}
    for key, (a_rI, b_Or) in parts.items():
        spare = dim - len(a_rI)
        state[f"{key}.linear_in.weight"] = Tensor.of(np.pad(a_rI, ((0, spare), (0, 0))))
        state[f"{key}.linear_out.weight"] = Tensor.of(np.pad(b_Or, ((0, 0), (0, spare))))
    layers = sorted({int(key.split(".")[3]) for key in parts})
    yaml = missing("yaml", "NeMo archives", "formats")
    fields = yaml.safe_load(nemo.config_yaml(config, None))
    fields["peft"] = {
        "peft_scheme": "lora",
        "restore_from_path": None,
        "lora_tuning": {
            "target_modules": sorted(
                {target for name, target in FUSED.values() if any(name in key for key in parts)}
            ),
            "adapter_dim": dim,
            "alpha": adapter.scale * dim,
            "adapter_dropout": 0.0,
            "column_init_method": "xavier",
            "row_init_method": "zero",
            "weight_tying": False,
            "position_embedding_strategy": None,
            "layer_selection": None if len(layers) == config.layers else [layer + 1 for layer in layers],
        },
    }
    torch.archive(stored := io.BytesIO(), state)
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        nemo._add(archive, "model_config.yaml", yaml.safe_dump(fields).encode())
        nemo._add(archive, "model_weights.ckpt", stored.getvalue())


def _peft(path: Path, found: nemo.Members) -> tuple[dict[str, Any], dict[str, Any]]:
    if "model_config.yaml" not in found:
        raise ValueError(f"{path}: holds no model_config.yaml: pass a .nemo archive of NeMo 1")
    fields = nemo._yaml(path, bytes(found["model_config.yaml"]))
    peft = fields.get("peft")
    return fields, peft if isinstance(peft, dict) else {}


def _narrow(group: Group, rank: int) -> Group:
    """A fused matrix with `rank` columns instead of the model's width."""
    return replace(
        group,
        size={**group.size, "D": rank},
        shape=(group.shape[0], rank),
        parts=tuple(place._replace(shape=(place.shape[0], rank)) for place in group.parts),
    )


def _fused(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """NeMo's modules with what they add: one `a` where the fused parts share theirs, else all of them in a row, each
    with columns of its own in b."""
    for group in weights.groups(config, "nemo"):
        module = re.fullmatch(r"model\.decoder\.layers\.\d+\.([\w.]+)\.weight", group.stored)
        mine = [place.name for place in group.parts if place.name in adapter.a]
        if not mine or module is None or module[1] not in FUSED:
            continue
        shared = all(np.array_equal(adapter.a[name], adapter.a[mine[0]]) for name in mine)
        stacked = [adapter.a[name] for name in (mine[:1] if shared else mine)]
        rank, at = sum(map(len, stacked)), 0
        outs = []
        for place in group.parts:
            outs.append(np.zeros((place.shape[0], rank), np.float32))
            if place.name in adapter.a:
                own = adapter.b[place.name]
                outs[-1][:, at : at + own.shape[1]] = own
                at += 0 if shared else own.shape[1]
        key = group.stored.removesuffix(f"{module[1]}.weight") + FUSED[module[1]][0]
        out = outs[0] if len(outs) == 1 else np.ascontiguousarray(_narrow(group, rank).gather(outs))
        yield key, (np.concatenate(stacked), out)
