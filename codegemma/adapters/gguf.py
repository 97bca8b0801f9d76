"""GGUF adapters, as llama.cpp's convert_lora_to_gguf.py writes them and its --lora reads them.

The header has general.type = adapter, adapter.type = lora and adapter.lora.alpha. For each matrix that the
adapter changes, the file has NAME.lora_a [r, in] and NAME.lora_b [out, r]; NAME is the matrix's name in GGUF.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from codegemma.adapters.adapter import LINEAR, Adapter
from codegemma.checkpoints import gguf, gguf_files
from codegemma.checkpoints.table import format_table, stored_name
from codegemma.checkpoints.untrusted import damaged
from codegemma.native import dequantize

KINDS = {stored_name("gguf", kind).removeprefix("blk.{i}."): kind for kind in LINEAR}  # "attn_q.weight": "q"
KEY = re.compile(r"blk\.(\d+)\.([\w.]+)\.lora_([ab])")
OTHER_PART = re.compile(r"(v|mm)\..*")  # tensors of the image tower, which are left out


def is_adapter(path: Path) -> bool:
    """Whether a file is GGUF and says that it is an adapter."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" and gguf_files.role(path) == "adapter"


def load(path: Path) -> Adapter:
    """The adapter in a file. Raises ValueError on a damaged one, and on more than LoRA of linear layers."""
    metadata, stored = gguf.read(path)
    architecture, kind = (metadata.get(key) for key in ("general.architecture", "adapter.type"))
    if architecture not in format_table("gguf")["defaults"]:
        raise ValueError(f"{path}: is an adapter of {architecture!r}, not of a Gemma: choose another")
    if kind != "lora" or "adapter.alora.invocation_tokens" in metadata:
        name = "an activated LoRA" if kind == "lora" else repr(kind)
        raise ValueError(f"{path}: is {name}, but this program reads plain LoRA: merge it into its model")
    sides: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    for key, tensor in stored.items():
        match = KEY.fullmatch(key)
        if match and match[2] in KINDS:
            if len(tensor.shape) != 2:
                raise damaged(f"{path}: {key} has shape {list(tensor.shape)}, but must be a matrix")
            sides[match[3]][f"layers.{int(match[1])}.{KINDS[match[2]]}"] = dequantize(tensor)
        elif not OTHER_PART.fullmatch(key):
            rule = f"which is no LoRA of a linear layer ({', '.join(KINDS)})"
            raise ValueError(f"{path}: holds {key}, {rule}: merge it into its model with llama-export-lora")
    ranks = [len(values) for values in sides["a"].values()]
    if not ranks:
        raise damaged(f"{path}: changes no linear layer of the text model")
    rank, alpha = max(ranks), metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float):
        raise damaged(f"{path}: adapter.lora.alpha must be a number, got {alpha!r}")
    if not alpha:  # llama.cpp then uses the scale 1
        return Adapter(path.stem, rank, float(rank), sides["a"], sides["b"])
    b = {
        name: values * np.float32(rank / len(sides["a"].get(name, values.T)))
        for name, values in sides["b"].items()
    }  # the file means alpha / its own rank for each matrix; Adapter has one scale, alpha / the largest rank
    return Adapter(path.stem, rank, float(alpha), sides["a"], b)
