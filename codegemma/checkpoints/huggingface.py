"""Hugging Face directories, read and written: config.json, *.safetensors (sharded or not), tokenizer files.

Both generations of config.json are read: that of transformers 4 (rope_theta, rope_local_base_freq,
rope_scaling, sliding_window_pattern) and that of transformers 5 (rope_parameters, layer_types). A multimodal
Gemma 3 is read without its vision part.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from codegemma.checkpoints import huggingface_tokenizer, safetensors, table
from codegemma.checkpoints.checkpoint import FIM_ORDERS_KEY, Checkpoint, stated_ends
from codegemma.checkpoints.tensors import DTYPES, Tensor
from codegemma.checkpoints.untrusted import damaged, indexed_files, naming, read_json
from codegemma.config import GEMMA2_2B, PRESETS, ModelConfig

# Prefixes of the language model's tensors: in multimodal models (new, old), in text models, and without any.
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
NOT_TEXT = ("vision_tower.", "multi_modal_projector.")
ACTIVATIONS = (None, "gelu_pytorch_tanh", "gelu")  # the first Gemma configs say gelu, but mean the tanh form
MAX_SHARD = 5 << 30  # bytes of a weight file, as transformers writes them


def shards(path: Path) -> list[Path]:
    """The weight files of a directory, or the file itself. Raises ValueError where files are missing."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = [path / name for name in indexed_files(index, "safetensors")]
    elif (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    else:
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter"))
    if missing := [file.name for file in files if not file.exists()]:
        raise damaged(f"{path}: lacks {', '.join(missing)}, which its index names")
    if not files:
        raise ValueError(f"{path}: holds no *.safetensors: download it in that format, or pass a .gguf")
    return files


def _text_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the language model, named as in a model of text alone."""
    stored: dict[str, Tensor] = {}
    for file in shards(path):
        for name, tensor in safetensors.read(file).items():
            if name.removeprefix("model.").startswith(NOT_TEXT):
                continue
            if not name.endswith("lm_head.weight"):
                prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
                name = "model." + name.removeprefix(prefix)
            name = name.removeprefix("language_model.")
            if name in stored:
                raise ValueError(f"{file}: holds {name} a second time: remove shards that no index names")
            stored[name] = tensor
    return stored


def config(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    """The architecture in a config.json; errors name `path`. Raises ValueError on other models."""
    with naming(path):
        return _config(fields)


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    kind = fields.get("model_type")
    if kind == "gemma3" and isinstance(fields.get("text_config"), dict):
        return _config({"model_type": "gemma3_text"} | fields["text_config"])
    architecture: Any = "gemma3" if kind == "gemma3_text" else kind
    architectures = list(table.format_table("hf")["defaults"])
    if architecture not in architectures:
        rule = f"but this program runs {', '.join(architectures)}: choose a Gemma or CodeGemma"
        raise ValueError(f"model_type is {kind!r}, {rule}")
    if fields.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention makes this an embedding model: choose another")
    for key in ("hidden_activation", "hidden_act"):
        if fields.get(key) not in ACTIVATIONS:
            raise ValueError(
                f"{key} is {fields[key]!r}, but every Gemma uses gelu_pytorch_tanh: choose a Gemma"
            )
    values = table.config_values("hf", architecture, fields)
    if architecture == "gemma":
        values["window"] = None
    scalar = fields.get("query_pre_attn_scalar")
    if scalar is None:
        scalar = values["head_width"] if architecture == "gemma" else 256
    if type(scalar) not in (int, float) or not 0 < scalar < 1e12:
        raise damaged(f"query_pre_attn_scalar must be a number above 0, got {scalar!r}")
    values |= _ropes(architecture, fields, values["rope_base"])
    values["global_every"] = _global_every(fields, values)
    return ModelConfig(architecture, **values, query_scale=scalar**-0.5)


def _global_every(fields: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """The period of global layers, by layer_types or sliding_window_pattern; 1 where all are global."""
    if values["window"] is None:
        return 1
    period = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern")
    period = period or values["global_every"]
    types = fields.get("layer_types")
    if types is None or type(period) is not int:
        return period
    if not isinstance(types, list):
        raise damaged(f"layer_types must be a list with an entry for each of {values['layers']} layers")
    is_global = [kind == "full_attention" for kind in types]
    return table.global_period("layer_types", is_global, values["layers"], period)


def _ropes(architecture: str, fields: Mapping[str, Any], default: float) -> dict[str, Any]:
    """Rotary bases and scale, from rope_parameters (by layer type in Gemma 3) or from the older fields."""
    ropes = _object(fields, "rope_parameters")
    full = _object(ropes, "full_attention") if ropes.get("full_attention") is not None else ropes
    local = _object(ropes, "sliding_attention")
    scaling = _object(fields, "rope_scaling") or full
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear") or (local.get("rope_type") or "default") != "default":
        kinds = f"{kind!r} (local: {local.get('rope_type')!r})"
        raise ValueError(f"rope type {kinds} is in no Gemma: choose a model with linear scaling")
    is_gemma3 = architecture == "gemma3"
    base = _first(default, full.get("rope_theta"), fields.get("rope_theta"))
    local_base = base
    if is_gemma3:
        local_base = _first(1e4, local.get("rope_theta"), fields.get("rope_local_base_freq"))
    scale = scaling.get("factor", 1.0) if kind == "linear" or not is_gemma3 else 1.0
    return {"rope_base": base, "rope_base_local": local_base, "rope_scale": scale}


def _first(default: Any, *values: Any) -> Any:
    """The first value that is not null."""
    return next((value for value in values if value is not None), default)


def _object(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise damaged(f"{key} must be an object, got {value!r}")
    return value or {}


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a config: the keys of transformers 4, which 5 reads too, and the layer_types of 5.

    Raises ValueError for a query scale that it cannot express.
    """
    scalar = max(1, round(config.query_scale**-2))
    exact = math.isclose(scalar**-0.5, config.query_scale, rel_tol=1e-6)
    if not exact or config.architecture == "gemma" and scalar != config.head_width:
        rule = "transformers takes 1 / sqrt of a whole number, and in Gemma 1 of head_dim alone"
        raise ValueError(
            f"config.json cannot say the query scale {config.query_scale}, as {rule}: write another format"
        )
    fields: dict[str, Any] = {
        "architectures": [f"G{config.architecture[1:]}ForCausalLM"],
        "model_type": "gemma3_text" if config.architecture == "gemma3" else config.architecture,
        **table.config_keys("hf", config),
        "query_pre_attn_scalar": scalar,
        "rope_theta": config.rope_base,
        **table.written_fields("hf_config"),
    }
    if config.architecture == "gemma":
        del fields["sliding_window"], fields["query_pre_attn_scalar"]
    else:
        kinds = {True: "full_attention", False: "sliding_attention"}
        fields["layer_types"] = [kinds[config.is_global(layer)] for layer in range(config.layers)]
        fields["sliding_window_pattern"] = config.global_every
    if config.architecture == "gemma3":
        fields["rope_local_base_freq"] = config.rope_base_local
    if config.rope_scale != 1:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_scale}
    return fields


def end_ids(directory: Path, fields: Mapping[str, Any]) -> frozenset[int]:
    """The end tokens that config.json (its `fields`), its text_config and generation_config.json state."""
    ends = stated_ends(directory / "config.json", fields)
    ends |= stated_ends(directory / "config.json", _object(fields, "text_config"))
    if (file := directory / "generation_config.json").exists():
        ends |= stated_ends(file, read_json(file))
    return ends


def checkpoint_of(
    path: Path, directories: list[Path], format: table.Format, stored: Mapping[str, Tensor]
) -> Checkpoint:
    """A checkpoint from the tensors of a format that stores no config with them (PyTorch, Orbax).

    The config is the first config.json in `directories`, else that of the published model with these tensors;
    the tokenizer is the first in `directories`. Raises ValueError where there is neither kind of config.
    """
    files = [directory / "config.json" for directory in directories]
    file = next((file for file in files if file.exists()), files[0])
    fields = read_json(file) if file.exists() else {}
    build = next(filter(None, map(huggingface_tokenizer.builder, directories)), None)
    ends = end_ids(file.parent, fields)
    if "model_type" in fields:
        model = config(file, fields)
        return Checkpoint(path, model, table.from_format(format, path, model, stored), fields, build, ends)
    for model in {preset.config for preset in PRESETS.values()} | {GEMMA2_2B}:
        with contextlib.suppress(ValueError):
            tensors = table.from_format(format, path, model, stored)
            return Checkpoint(path, model, tensors, fields, build, ends)
    rule = "its tensors are those of no published model, and no config.json is beside them: add it"
    raise ValueError(f"{file.parent}: {rule}")


@contextlib.contextmanager
def _blaming_quantisation(file: Path, fields: Mapping[str, Any]) -> Iterator[None]:
    """Where config.json says that the weights are quantised, adds this to a ValueError raised in the block.

    Alone it is no error: merged models keep the quantization_config of their base.
    """
    quantised = fields.get("quantization_config") or _object(fields, "text_config").get("quantization_config")
    try:
        yield
    except ValueError as error:
        if not quantised:
            raise
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        rule = f"{file} says that the weights are quantised ({method})"
        raise ValueError(f"{error}; {rule}: use the unquantised model, or a GGUF file") from None


def load(path: Path) -> Checkpoint:
    """Opens a directory, or a .safetensors file in one.

    The embedding may have more rows than config.json says: then the vocabulary is as large as the embedding.
    """
    home = path if path.is_dir() else path.parent
    file = home / "config.json"
    if not file.exists():
        raise ValueError(f"{home}: lacks config.json: download the whole directory, or pass a .gguf file")
    fields = read_json(file)
    model = config(file, fields)
    with _blaming_quantisation(file, fields):
        stored = _text_tensors(path)
    embed = stored.get(table.stored_name("hf", "embed"))
    if embed is not None and len(embed.shape) == 2 and embed.shape[0] > model.vocab:
        model = replace(model, vocab=embed.shape[0])
    with _blaming_quantisation(file, fields):
        tensors = table.from_format("hf", path, model, stored)
    build = huggingface_tokenizer.builder(home)
    return Checkpoint(path, model, tensors, fields, build, end_ids(home, fields))


def write_companions(path: Path, checkpoint: Checkpoint, **more: Any) -> None:
    """Writes tokenizer.model and config.json, the latter with `more` fields, the FIM orders of changed
    weights, and the end tokens where the vocabulary does not name them all."""
    kept: dict[str, Any] = {
        key: checkpoint.metadata[key] for key in {FIM_ORDERS_KEY} & {*checkpoint.metadata}
    }
    if checkpoint.end_ids_to_write:
        kept["eos_token_id"] = checkpoint.end_ids_to_write
    _write_json(path / "config.json", config_fields(checkpoint.config) | more | kept)
    if checkpoint.tokenizer:
        (path / "tokenizer.model").write_bytes(checkpoint.tokenizer.model)


def save(path: Path, checkpoint: Checkpoint, template: str | None, stops: list[int]) -> None:
    """Writes a directory that transformers reads, with weight files of at most MAX_SHARD bytes.

    `template` is the chat template, and `stops` are the tokens that end generation.
    """
    _write_weights(path, table.to_format("hf", checkpoint.config, checkpoint.tensors))
    write_companions(path, checkpoint, torch_dtype=DTYPES[checkpoint.tensors["embed"].type])
    generation = table.written_fields("hf_generation") | {"eos_token_id": stops or 1}
    _write_json(path / "generation_config.json", generation)
    if tokenizer := checkpoint.tokenizer:
        fields = huggingface_tokenizer.config_fields(tokenizer, template)
        _write_json(path / "tokenizer_config.json", fields)
        document = huggingface_tokenizer.tokenizer_json(tokenizer)
        (path / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))


def _write_weights(path: Path, stored: Mapping[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in stored.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > MAX_SHARD:
            shards.append({})
        shards[-1][name] = tensor
    files, count = ["model.safetensors"], len(shards)
    if count > 1:
        files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        safetensors.write(path / file, shard)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
