"""KerasHub presets, read and written: config.json, model.weights.h5 (one file or several), vocabulary.spm."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import huggingface, table
from codegemma.checkpoints.checkpoint import Checkpoint
from codegemma.checkpoints.tensors import BLOCKS, DTYPES, ELEMENTS, TYPES_BY_DTYPE, LazyTensor, Tensor
from codegemma.checkpoints.untrusted import damaged, indexed_files, naming, read_bytes, read_json, refusing
from codegemma.config import ModelConfig
from codegemma.extras import require
from codegemma.files import PLACEHOLDER_BYTES, atomic_write, refuse_placeholder
from codegemma.tokenizer import Tokenizer

MAX_DATASETS = 65_536
CLASSES = {"GemmaBackbone": "gemma", "Gemma3Backbone": "gemma3"}
# Stands in metadata.json, since KerasHub's config.json has no key for the context.
CONTEXT_KEY = "codegemma_context"
VOCABULARY = Path("assets", "tokenizer", "vocabulary.spm")


def config(path: Path, document: Mapping[str, Any]) -> ModelConfig:
    """The architecture in a preset's config.json; errors name `path`. Raises ValueError on other models."""
    fields, name = document.get("config"), document.get("class_name")
    kind: Any = CLASSES.get(str(name))
    if kind is None or not isinstance(fields, dict):
        rule = f"but this program reads {' and '.join(CLASSES)}: choose a Gemma or CodeGemma preset"
        raise ValueError(f"{path}: class_name is {name!r}, {rule}")
    if kind == "gemma" and fields.get("use_post_ffw_norm"):
        kind = "gemma2"
    values = table.config_values("keras", kind, fields)
    if isinstance(values["ffn_width"], int) and kind != "gemma3":
        values["ffn_width"] //= 2  # KerasHub counts gate and up together, except in Gemma 3
    if fields.get("use_sliding_window_attention"):
        values["window"] = fields.get("sliding_window_size")
    else:
        values["global_every"] = 1
    if kind == "gemma3":
        values["rope_scale"] = fields.get("global_rope_scaling_factor", 1.0)
    with naming(path):
        if not fields.get("query_head_dim_normalize", True):
            values["query_scale"] = (values["width"] / values["heads"]) ** -0.5
        return ModelConfig(kind, **values)


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """A preset's config.json for a config. Raises ValueError for a query scale that it cannot express."""
    by_head_width, by_heads = (
        math.isclose(config.query_scale, size**-0.5, rel_tol=1e-6)
        for size in (config.head_width, config.width / config.heads)
    )
    if not by_head_width and not by_heads:
        raise ValueError(f"KerasHub cannot say the query scale {config.query_scale}: write safetensors")
    is_gemma3 = config.architecture == "gemma3"
    module = "gemma3_backbone" if is_gemma3 else "gemma_backbone"
    fields = table.config_keys("keras", config)
    if not is_gemma3:
        fields["intermediate_dim"] *= 2
    fields |= {
        "name": module,
        **table.written_fields("keras_backbone"),
        "query_head_dim_normalize": by_head_width,
        "use_post_ffw_norm": config.post_norms,
        "use_post_attention_norm": config.post_norms,
        "use_sliding_window_attention": config.global_every > 1,
        "sliding_window_size": config.window or 4096,
    }
    if is_gemma3:
        fields |= table.written_fields("keras_gemma3")
        fields["global_rope_scaling_factor"] = config.rope_scale
    return _serialized(module, "Gemma3Backbone" if is_gemma3 else "GemmaBackbone", fields)


def _serialized(module: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """An object as Keras serialises it."""
    package = f"keras_hub.src.models.{module.split('_')[0]}.{module}"
    return {"module": package, "class_name": name, "config": fields, "registered_name": f"keras_hub>{name}"}


def read(path: Path) -> dict[str, Tensor]:
    """The datasets of an HDF5 file by their paths, each read when it is used.

    Raises ValueError on a file that is not HDF5, or that refers to others.
    """
    h5py = require("h5py", "Keras presets", "formats")
    stored: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual or len(stored) >= MAX_DATASETS:
            rule = f"is one of more than {MAX_DATASETS:,}, or stored in another file, which no preset needs"
            raise damaged(f"{path}: dataset {name} {rule}")
        is_bfloat16 = item.attrs.get("dtype") == "bfloat16"  # stored as bytes without a number type
        type = "BF16" if is_bfloat16 else TYPES_BY_DTYPE.get(item.dtype.name)
        fits = type is not None and item.dtype.itemsize == BLOCKS[type][1]
        if type is None or not fits or not item.shape or not all(item.shape):
            return

        def rows(start: int, stop: int) -> np.ndarray:
            with refusing(f"{path}: dataset {name} cannot be read", OSError, RuntimeError):
                return np.ascontiguousarray(item[start:stop]).view(ELEMENTS[type])

        stored[_current_name(name)] = LazyTensor(type, item.shape, rows)

    with open(path, "rb") as file:
        refuse_placeholder(path, file.read(PLACEHOLDER_BYTES))
    errors = (OSError, RuntimeError, KeyError, TypeError, UnicodeDecodeError)
    with refusing(f"{path}: is no readable HDF5 file", *errors):
        h5py.File(path, "r").visititems(visit)
    return stored


def _current_name(name: str) -> str:
    """The path that Keras 3 writes today, from that of its first versions, which named layers otherwise."""
    name = name.replace("\\", "/").replace("_layer_checkpoint_dependencies/", "layers/")
    name = name.removeprefix("backbone/").replace("/token_embedding/", "/reversible_embedding/")
    return name.replace("/final_normalization/", "/rms_normalization/")


def load(path: Path) -> Checkpoint:
    """Opens the directory of a preset."""
    document = read_json(path / "config.json")
    model = config(path / "config.json", document)
    about = read_json(path / "metadata.json") if (path / "metadata.json").exists() else {}
    with naming(path / "metadata.json"):
        model = replace(model, context=about.get(CONTEXT_KEY, model.context))
    index = path / "model.weights.json"
    stored: dict[str, Tensor] = {}
    for name in indexed_files(index, "h5") if index.exists() else ["model.weights.h5"]:
        stored |= read(path / name)
    tensors = table.from_format("keras", path, model, stored)
    vocabulary = path / VOCABULARY
    build = (lambda: Tokenizer.from_sentencepiece(read_bytes(vocabulary))) if vocabulary.exists() else None
    return Checkpoint(path, model, tensors, document, build, huggingface.end_ids(path, {}))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a preset that keras_hub.models.GemmaCausalLM.from_preset reads."""
    stored = table.to_format("keras", checkpoint.config, checkpoint.tensors)
    _write_weights(path / "model.weights.h5", stored)
    document = config_fields(checkpoint.config)
    dtype = {"config": {"name": DTYPES[checkpoint.tensors["embed"].type]}}
    document["config"]["dtype"] = table.written_fields("keras_dtype") | dtype
    count = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    metadata = table.written_fields("keras_metadata") | {"parameter_count": count}
    metadata[CONTEXT_KEY] = checkpoint.config.context
    documents = {"config.json": document, "metadata.json": metadata}
    if checkpoint.tokenizer:
        (path / VOCABULARY).parent.mkdir(parents=True)
        (path / VOCABULARY).write_bytes(checkpoint.tokenizer.model)
        family = "gemma3" if checkpoint.config.architecture == "gemma3" else "gemma"
        fields = table.written_fields("keras_tokenizer") | {"name": f"{family}_tokenizer"}
        name = f"{family.capitalize()}Tokenizer"
        documents["tokenizer.json"] = _serialized(f"{family}_tokenizer", name, fields)
    if checkpoint.end_ids_to_write:  # KerasHub has no file for them
        documents["generation_config.json"] = {"eos_token_id": checkpoint.end_ids_to_write}
    for name, content in documents.items():
        with atomic_write(path / name) as out:
            out.write(json.dumps(content, indent=2).encode())


def _write_weights(path: Path, stored: Mapping[str, Tensor]) -> None:
    h5py = require("h5py", "Keras presets", "formats")
    with h5py.File(path, "w") as file:
        for name, tensor in stored.items():
            kind = "V2" if tensor.type == "BF16" else ELEMENTS[tensor.type]
            dataset, start = file.create_dataset(name, tensor.shape, kind), 0
            for piece in tensor.pieces():
                dataset[start : start + piece.shape[0]] = piece.array().view(kind)
                start += piece.shape[0]
            if tensor.type == "BF16":
                dataset.attrs["dtype"] = "bfloat16"
