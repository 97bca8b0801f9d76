"""NeMo's LoRA adapters: a small .nemo archive of the model's config, with a `peft` section, and a state dict.

In NeMo 1, q, k and v share one adapter, whose output has the layout of linear_qkv, and gate and up share
another. In its "canonical" variant of LoRA, each of the five has its own adapter. Both variants are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.adapters.adapter import Adapter
from codegemma.checkpoints import nemo, table
from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.config import ModelConfig

ATTENTION, MLP = "self_attention.adapter_layer", "mlp.adapter_layer"
# Adapter in the state dict -> the module that it changes. Two of these modules hold several matrices.
MODULE_ADAPTERS = {
    f"{ATTENTION}.lora_kqv_adapter": "self_attention.linear_qkv",
    f"{ATTENTION}.lora_dense_attention_adapter": "self_attention.linear_proj",
    f"{MLP}.lora_hto4h_adapter": "mlp.linear_fc1",
    f"{MLP}.lora_4htoh_adapter": "mlp.linear_fc2",
}
# The canonical variant: adapter in the state dict -> our name of the matrix that it changes.
SEPARATE = {f"{ATTENTION}.lora_unfused_kqv_adapter.{name}_adapter": name for name in "qkv"}
SEPARATE |= {f"{MLP}.lora_unfused_hto4h_adapter.{name}_adapter": name for name in ("gate", "up")}
KEY = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.(\d+)\.([\w.]+)\.linear_(in|out)\.weight")


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
    card = {"nemo": json.loads(json.dumps(tuning, default=str, skipkeys=True))}  # since YAML may hold dates
    adapter = Adapter(path.stem, rank, float(alpha or rank), a, b, card=card)
    adapter.check(replace(config, vocab=max(config.vocab, 1)))
    return adapter


def _matrices(
    path: Path, config: ModelConfig, members: nemo.Members
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, a and b for each matrix that the adapter changes."""
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
        module = f"{path}: layer {layer}'s {name}"
        if half.keys() != {"in", "out"}:
            raise ValueError(f"{module} has one of its two matrices only: export it again")
        a_rI, b_Or = half["in"], half["out"]
        if name in SEPARATE:
            yield f"layers.{layer}.{SEPARATE[name]}", a_rI, b_Or
            continue
        layout = layouts.get(f"model.decoder.layers.{layer}.{MODULE_ADAPTERS.get(name)}.weight")
        if layout is None or b_Or.shape != (layout.shape[0], len(a_rI)):
            size = f"{config.layers} layers and width {config.width}"
            raise ValueError(
                f"{module} of {list(b_Or.shape)} fits no matrix of a model of {size}: pass another adapter"
            )
        if len(layout.parts) > 1:  # b is laid out like the fused matrix, but its columns are the ranks
            layout = replace(layout, size={**layout.size, "D": len(a_rI)})
        for index, part in enumerate(layout.parts):
            output = layout.part(index, ArrayTensor.of(b_Or)).float32() if len(layout.parts) > 1 else b_Or
            yield part.name, a_rI, np.ascontiguousarray(output)


def _peft(path: Path, members: nemo.Members) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the config, and of its `peft` section."""
    fields = nemo.read_config(path, members)
    peft = fields.get("peft")
    return fields, peft if isinstance(peft, dict) else {}
