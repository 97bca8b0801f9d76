"""A KerasHub preset: config.json, model.weights.h5 (whole or in parts), assets/tokenizer/vocabulary.spm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import huggingface as safetensors
from codegemma.checkpoints import table as weights
from codegemma.checkpoints.table import Deferred, Tensor
from codegemma.config import ModelConfig
from codegemma.files import missing, replacing
from codegemma.tokenizer import Tokenizer

MOST_DATASETS = 65_536
CLASSES = {"GemmaBackbone": "gemma", "Gemma3Backbone": "gemma3"}
KEYS = {
    "layers": "num_layers",
    "width": "hidden_dim",
    "heads": "num_query_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "ffn_width": "intermediate_dim",
    "vocab": "vocabulary_size",
    "norm_eps": "layer_norm_epsilon",
    "attention_softcap": "attention_logit_soft_cap",
    "final_softcap": "final_logit_soft_cap",
}
CONTEXT = {"gemma": 8_192, "gemma2": 8_192, "gemma3": 32_768}


def config(path: Path, document: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a preset's config.json describes; `path` is for errors."""
    fields = document.get("config")
    kind: Any = CLASSES.get(str(document.get("class_name")))
    if kind is None or not isinstance(fields, dict):
        raise ValueError(
            f"{path}: class_name is {document.get('class_name')!r}, but this program reads "
            f"{' and '.join(CLASSES)}: choose a Gemma or CodeGemma preset"
        )
    if kind == "gemma" and fields.get("use_post_ffw_norm"):
        kind = "gemma2"
    values: dict[str, Any] = {name: fields.get(key) for name, key in KEYS.items()}
    if isinstance(values["ffn_width"], int) and kind != "gemma3":
        values["ffn_width"] //= 2  # KerasHub counts gate and up together, except in Gemma 3
    if fields.get("use_sliding_window_attention"):
        values |= {"window": fields.get("sliding_window_size"), "global_every": 6 if kind == "gemma3" else 2}
    if kind == "gemma3":
        values |= {"rope_base": 1e6, "rope_scale": fields.get("global_rope_scaling_factor", 1.0)}
    scale = fields.get("query_head_dim_normalize", True)
    try:
        if not scale:
            values["query_scale"] = (values["width"] / values["heads"]) ** -0.5
        return ModelConfig(
            kind, **values, context=CONTEXT[kind], post_norms=kind != "gemma", qk_norm=kind == "gemma3"
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """A preset's config.json for a config. Raises ValueError for what KerasHub cannot say."""
    three = config.architecture == "gemma3"
    whole = math.isclose(config.query_scale, config.head_width**-0.5, rel_tol=1e-6)
    if not whole and not math.isclose(
        config.query_scale, (config.width / config.heads) ** -0.5, rel_tol=1e-6
    ):
        raise ValueError(
            f"KerasHub cannot say the query scale {config.query_scale}: write safetensors instead"
        )
    name = "Gemma3Backbone" if three else "GemmaBackbone"
    snake = "gemma3_backbone" if three else "gemma_backbone"
    fields = {key: getattr(config, field) for field, key in KEYS.items()}
    if not three:
        fields["intermediate_dim"] *= 2
    fields |= {
        "name": snake,
        "trainable": True,
        "dropout": 0,
        "query_head_dim_normalize": whole,
        "use_post_ffw_norm": config.post_norms,
        "use_post_attention_norm": config.post_norms,
        "use_sliding_window_attention": config.window is not None,
        "sliding_window_size": config.window or 4096,
    }
    if three:
        fields |= {
            "image_size": 896,
            "use_query_key_norm": True,
            "vision_encoder": None,
            "local_rope_scaling_factor": 1.0,
            "global_rope_scaling_factor": config.rope_scale,
        }
    return {
        "module": f"keras_hub.src.models.{snake.split('_')[0]}.{snake}",
        "class_name": name,
        "config": fields,
        "registered_name": f"keras_hub>{name}",
    }


def read(path: Path) -> dict[str, Tensor]:
    """The datasets of a file under their paths, each read when it is looked at."""
    h5py = missing("h5py", "Keras presets", "formats")
    stored: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual or len(stored) >= MOST_DATASETS:
            raise ValueError(
                f"{path}: dataset {name} lies in another file, which no preset needs: download it again"
            )
        label = item.attrs.get("dtype")
        type = "BF16" if label == "bfloat16" else {"float32": "F32", "float16": "F16"}.get(item.dtype.name)
        if (
            type is None
            or not item.shape
            or not all(item.shape)
            or item.dtype.itemsize != weights.BLOCKS[type][1]
        ):
            return
        stored[_name(name)] = Deferred(
            type, item.shape, part=lambda start, stop: _values(path, name, item, type, start, stop)
        )

    try:
        h5py.File(path, "r").visititems(visit)
    except (OSError, RuntimeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: is no readable HDF5 file ({str(error)[:200]}): download it again"
        ) from None
    return stored


def _values(path: Path, name: str, dataset: Any, type: str, start: int, stop: int) -> np.ndarray:
    try:
        return np.ascontiguousarray(dataset[start:stop]).view(weights.ELEMENTS[type])
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{path}: dataset {name} cannot be read ({str(error)[:200]}): download it again"
        ) from None


def _name(name: str) -> str:
    """The path as Keras 3 writes it now; its first versions named layers, and called the list otherwise."""
    name = (
        name.replace("\\", "/")
        .replace("_layer_checkpoint_dependencies/", "layers/")
        .removeprefix("backbone/")
    )
    return name.replace("/token_embedding/", "/reversible_embedding/").replace(
        "/final_normalization/", "/rms_normalization/"
    )


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], Callable[[], Tokenizer] | None]:
    """Config, our tensors, config.json, and what builds the tokenizer."""
    document = safetensors.read_json(path / "config.json")
    model = config(path / "config.json", document)
    names = ["model.weights.h5"]
    if (index := path / "model.weights.json").exists():
        places = safetensors.read_json(index).get("weight_map")
        files = (
            [one for some in places.values() for one in ([some] if isinstance(some, str) else some)]
            if isinstance(places, dict)
            else []
        )
        if not files or not all(
            isinstance(name, str) and re.fullmatch(r"[\w.-]+\.h5", name) for name in files
        ):
            raise ValueError(f"{index}: weight_map must name .h5 files of its directory: download it again")
        names = sorted(set(files))
    stored: dict[str, Tensor] = {}
    for name in names:
        stored |= read(path / name)
    vocabulary = path / "assets" / "tokenizer" / "vocabulary.spm"
    build = (lambda: Tokenizer.from_sentencepiece(vocabulary.read_bytes())) if vocabulary.exists() else None
    return model, weights.read("keras", path, model, stored), document, build


def save(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: bytes | None) -> None:
    """Writes a preset that keras_hub.models.GemmaCausalLM.from_preset reads."""
    h5py = missing("h5py", "Keras presets", "formats")
    document = config_fields(config)
    stored = weights.write("keras", config, tensors)
    type = stored["layers/reversible_embedding/vars/0"].type
    document["config"]["dtype"] = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "registered_name": None,
        "config": {"name": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[type]},
    }
    with h5py.File(path / "model.weights.h5", "w") as file:
        for name, tensor in stored.items():
            kind = "V2" if tensor.type == "BF16" else weights.ELEMENTS[tensor.type]
            dataset, at = file.create_dataset(name, tensor.shape, kind), 0
            for piece in tensor.pieces():
                dataset[at : at + piece.shape[0]] = piece.array().view(kind)
                at += piece.shape[0]
            if tensor.type == "BF16":
                dataset.attrs["dtype"] = "bfloat16"
    family = "gemma3" if config.architecture == "gemma3" else "gemma"
    Family = family.capitalize()
    documents = {
        "config.json": document,
        "metadata.json": {
            "keras_version": "3.5.0",
            "keras_hub_version": "0.17.0",
            "tasks": ["CausalLM"],
            "parameter_count": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        },
    }
    if tokenizer:
        (path / "assets" / "tokenizer").mkdir(parents=True)
        (path / "assets" / "tokenizer" / "vocabulary.spm").write_bytes(tokenizer)
        documents["tokenizer.json"] = {
            "module": f"keras_hub.src.models.{family}.{family}_tokenizer",
            "class_name": f"{Family}Tokenizer",
            "config": {
                "name": f"{family}_tokenizer",
                "trainable": True,
                "dtype": "int32",
                "proto": None,
                "sequence_length": None,
                "config_file": "tokenizer.json",
            },
            "registered_name": f"keras_hub>{Family}Tokenizer",
        }
    for name, content in documents.items():
        with replacing(path / name) as out:
            out.write(json.dumps(content, indent=2).encode())
