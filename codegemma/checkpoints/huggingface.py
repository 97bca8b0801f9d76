"""A Hugging Face directory: config.json, *.safetensors (sharded or not) by memory map, and a tokenizer if there is one.

Both generations of config.json are read: that of transformers 4 (rope_theta, rope_local_base_freq, rope_scaling,
sliding_window_pattern) and that of 5 (rope_parameters, layer_types). The text part of a multimodal Gemma 3 is enough.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from codegemma.checkpoints import table as weights
from codegemma.checkpoints.table import BLOCKS, Tensor
from codegemma.config import GEMMA2_2B, PRESETS, ModelConfig
from codegemma.files import mapped, replacing
from codegemma.tokenizer import Tokenizer

TYPES = ("F32", "F16", "BF16")
MOST_HEADER = 1 << 24  # bytes of JSON; a 7B's is under 100 kB
PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.",
    "",
)  # multimodal (new, old), causal, bare
NOT_TEXT = ("vision_tower.", "multi_modal_projector.")


def read_json(path: Path, most: int = MOST_HEADER) -> dict[str, Any]:
    """A JSON object from a file of bounded size; ValueError names the file."""
    if path.stat().st_size > most:
        raise ValueError(f"{path}: is larger than {most:,} bytes: check that it is the right file")
    return _json(path, path.read_bytes())


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}): download or convert it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object: download or convert it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file under their own names, as views of its memory map.

    Layout: u64 length of the header, JSON header {name: {dtype, shape, data_offsets}}, then the data without gaps.
    Raises ValueError naming file, tensor and rule where the header does not fit the file.
    """
    data = mapped(path)
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MOST_HEADER, len(data) - 8):
        raise ValueError(
            f"{path}: its header of {size:,} bytes must fit the file and be at most {MOST_HEADER:,} "
            "bytes: the file is damaged or no safetensors; download it again"
        )
    infos = _json(path, data[8 : 8 + size])
    infos.pop("__metadata__", None)
    raw = np.frombuffer(data, np.uint8)[8 + size :]
    spans = [(_span(path, name, info, raw.size), name) for name, info in infos.items()]
    end = 0
    for (start, stop), name in sorted(spans):
        if start < end:
            raise ValueError(f"{path}: tensor {name} overlaps the one before it: download the file again")
        end = stop
    return {name: _tensor(infos[name], raw[start:stop]) for (start, stop), name in spans}


def _span(path: Path, name: str, info: Any, size: int) -> tuple[int, int]:
    """First and last byte of a tensor, once its dtype, shape and offsets agree with each other and with the file."""
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise ValueError(
                f"{path}: tensor {name} lacks dtype, shape or data_offsets: download the file again"
            )
    if dtype not in TYPES:
        raise ValueError(
            f"{path}: tensor {name} is {dtype}, but this program reads {', '.join(TYPES)}: use the "
            "unquantised model, or a GGUF file"
        )
    if not shape or len(shape) > 4 or not all(type(axis) is int and 0 < axis <= 1 << 31 for axis in shape):
        raise ValueError(f"{path}: tensor {name} has the impossible shape {shape}: download the file again")
    need = math.prod(shape) * BLOCKS[dtype][1]
    if not 0 <= start <= stop <= size or stop - start != need:
        raise ValueError(
            f"{path}: tensor {name} of {need:,} bytes lies at {start:,} to {stop:,} in {size:,} bytes of "
            "data: the file is damaged or cut short; download it again"
        )
    return start, stop


def _tensor(info: Mapping[str, Any], raw: np.ndarray) -> Tensor:
    if (
        raw.ctypes.data % BLOCKS[info["dtype"]][1]
    ):  # a header of odd length: rare, and no number lies straight
        raw = raw.copy()
    return Tensor.view(info["dtype"], tuple(info["shape"]), raw)


def shards(path: Path) -> list[Path]:
    """The weight files of a directory (or the file itself), as its index names them. Raises ValueError or OSError."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in places.values()
        ):
            raise ValueError(
                f"{index}: weight_map must give a file of the same directory for each tensor: "
                "download it again"
            )
        found = [path / name for name in sorted(set(places.values()))]
    elif (path / "model.safetensors").exists():
        found = [path / "model.safetensors"]
    else:
        found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter"))
    if missing := [file.name for file in found if not file.exists()]:
        raise ValueError(
            f"{path}: lacks {', '.join(missing)}, which its index names: download the directory again"
        )
    if not found:
        raise ValueError(
            f"{path}: holds no *.safetensors: download the model in that format, or pass a .gguf file"
        )
    return found


def _text_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the language model, all named as in a causal model."""
    stored: dict[str, Tensor] = {}
    for file in shards(path):
        for name, tensor in read(file).items():
            if name.removeprefix("model.").startswith(NOT_TEXT):
                continue
            if not name.endswith("lm_head.weight"):
                name = "model." + name.removeprefix(
                    next(prefix for prefix in PREFIXES if name.startswith(prefix))
                )
            name = name.removeprefix("language_model.")
            if name in stored:
                raise ValueError(
                    f"{file}: holds {name} a second time: remove the shards that its index does not name"
                )
            stored[name] = tensor
    return stored


# The fields of config.json for those of ModelConfig, read and written.
KEYS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "ffn_width": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "window": "sliding_window",
}
# What a field that is not there stands for: multimodal configs state only what differs from transformers' classes.
_GEMMA3 = {
    "layers": 26,
    "width": 2304,
    "heads": 8,
    "kv_heads": 4,
    "head_width": 256,
    "ffn_width": 9216,
    "vocab": 262_208,
    "context": 131_072,
    "norm_eps": 1e-6,
    "attention_softcap": None,
    "final_softcap": None,
    "window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "layers": 28,
        "width": 3072,
        "heads": 16,
        "kv_heads": 16,
        "head_width": 256,
        "ffn_width": 24_576,
        "vocab": 256_000,
        "context": 8_192,
        "norm_eps": 1e-6,
        "attention_softcap": None,
        "final_softcap": None,
        "window": None,
    },
    "gemma2": _GEMMA3
    | {"vocab": 256_000, "context": 8_192, "attention_softcap": 50.0, "final_softcap": 30.0},
    "gemma3": _GEMMA3,
}
ACTIVATIONS = (None, "gelu_pytorch_tanh", "gelu")  # the first Gemma configs said gelu, but mean the tanh form


def config(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes; `path` is for errors. Raises ValueError on any other model."""
    try:
        return _config(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    kind = fields.get("model_type")
    if "quantization_config" in fields:
        raise ValueError(
            "the weights are quantised in a way of their own (quantization_config): use the unquantised "
            "model, or a GGUF file"
        )
    if kind == "gemma3" and isinstance(fields.get("text_config"), dict):
        return _config({"model_type": "gemma3_text"} | fields["text_config"])
    architecture: Any = "gemma3" if kind == "gemma3_text" else kind
    if architecture not in ("gemma", "gemma2", "gemma3"):
        raise ValueError(
            f"model_type is {kind!r}, but this program runs {', '.join(DEFAULTS)}: choose a Gemma or "
            "CodeGemma model"
        )
    if fields.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention makes this an embedding model, which writes no text: choose another"
        )
    for key in ("hidden_activation", "hidden_act"):
        if fields.get(key) not in ACTIVATIONS:
            raise ValueError(f"{key} is {fields[key]!r}, but every Gemma uses gelu_pytorch_tanh")
    values = {name: fields.get(key, DEFAULTS[architecture][name]) for name, key in KEYS.items()}
    if architecture == "gemma":
        values["window"] = None
    scalar = fields.get("query_pre_attn_scalar", values["head_width"] if architecture == "gemma" else 256)
    if type(scalar) not in (int, float) or not 0 < scalar < 1e12:
        raise ValueError(f"query_pre_attn_scalar must be a number above 0, got {scalar!r}")
    return ModelConfig(
        architecture,
        **values,
        **_ropes(architecture, fields),
        post_norms=architecture != "gemma",
        global_every=_period(architecture, fields, values),
        qk_norm=architecture == "gemma3",
        query_scale=scalar**-0.5,
    )


def _period(architecture: str, fields: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """Every how many layers one is global, from layer_types or from the pattern's length."""
    if values["window"] is None:
        return 1
    default = {"gemma2": 2, "gemma3": 6}[architecture]
    period = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern")) or default
    types = fields.get("layer_types")
    if types is None or type(period) is not int:
        return period
    if not isinstance(types, list) or len(types) != values["layers"]:
        raise ValueError(
            f"layer_types must be a list with one entry for each of the {values['layers']} layers"
        )
    whole = [kind == "full_attention" for kind in types]
    period = whole.index(True) + 1 if True in whole else max(period, len(types) + 1)
    if whole != [(layer + 1) % period == 0 for layer in range(len(types))]:
        raise ValueError(
            f"layer_types {types} does not repeat: every Gemma has one full_attention after a fixed "
            "number of sliding_attention layers"
        )
    return period


def _ropes(architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary bases and scale, from rope_parameters (by layer type in Gemma 3) or the older single fields."""
    given = _table(fields, "rope_parameters")
    full = _table(given, "full_attention") if "full_attention" in given else given
    local = _table(given, "sliding_attention")
    scaling = _table(fields, "rope_scaling") or full
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear") or local.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope type {kind!r} (local: {local.get('rope_type')!r}) is in no Gemma: only linear scaling "
            "of the global layers is known"
        )
    base = full.get("rope_theta", fields.get("rope_theta", 1e6 if architecture == "gemma3" else 1e4))
    if architecture != "gemma3":
        return {"rope_base": base, "rope_base_local": base, "rope_scale": scaling.get("factor", 1.0)}
    return {
        "rope_base": base,
        "rope_scale": scaling.get("factor", 1.0) if kind == "linear" else 1.0,
        "rope_base_local": local.get("rope_theta", fields.get("rope_local_base_freq", 1e4)),
    }


def _table(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value or {}


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a config, in the words that transformers 4 and 5 both read."""
    kind = "gemma3_text" if config.architecture == "gemma3" else config.architecture
    scalar = max(1, round(config.query_scale**-2))
    if (
        config.architecture == "gemma"
        and scalar != config.head_width
        or not math.isclose(scalar**-0.5, config.query_scale, rel_tol=1e-6)
    ):
        raise ValueError(
            f"config.json cannot say the query scale {config.query_scale}: transformers takes 1 / sqrt of "
            "a whole number, and in Gemma 1 of head_dim alone"
        )
    fields: dict[str, Any] = {
        "architectures": [f"G{config.architecture[1:]}ForCausalLM"],
        "model_type": kind,
        **{key: getattr(config, name) for name, key in KEYS.items()},
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_theta": config.rope_base,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if config.architecture == "gemma":
        del fields["sliding_window"], fields["query_pre_attn_scalar"]
    else:
        fields["layer_types"] = [
            "full_attention" if config.is_global(layer) else "sliding_attention"
            for layer in range(config.layers)
        ]
        fields["sliding_window_pattern"] = config.global_every
    if config.architecture == "gemma3":
        fields["rope_local_base_freq"] = config.rope_base_local
    if config.rope_scale != 1:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_scale}
    return fields


def tokenizer(path: Path) -> Callable[[], Tokenizer] | None:
    """What builds the directory's tokenizer: tokenizer.model, else tokenizer.json; None where there is neither."""
    if (model := path / "tokenizer.model").exists():
        return lambda: Tokenizer.from_sentencepiece(model.read_bytes())
    if (file := path / "tokenizer.json").exists():
        return lambda: Tokenizer.from_json(file)
    return None


def described(
    home: Path, format: weights.Format, stored: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and config.json of a checkpoint whose own files do not tell: from the config.json of its directory, else
    the published model that has exactly these tensors. Raises ValueError where there is neither."""
    file = home / "config.json"
    fields = read_json(file) if file.exists() else {}
    if "model_type" in fields:
        return config(file, fields), fields
    for known in {preset.config for preset in PRESETS.values()} | {GEMMA2_2B}:
        with contextlib.suppress(ValueError):
            weights.read(format, home, known, stored)
            return known, fields
    raise ValueError(
        f"{home}: its tensors are those of no published model, and no config.json tells what they are: "
        "put the model's Hugging Face config.json beside them"
    )


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], Callable[[], Tokenizer] | None]:
    """Config, our tensors, config.json, and what builds the tokenizer, from a directory or a file in one.

    The vocabulary is as many rows as the embedding has: at least what config.json says, which may be less.
    """
    home = path if path.is_dir() else path.parent
    file = home / "config.json"
    if not file.exists():
        raise ValueError(f"{home}: lacks config.json: download the whole directory, or pass a .gguf file")
    fields = read_json(file)
    model, stored = config(file, fields), _text_tensors(path)
    embed = stored.get(weights.TABLE[0].hf)
    if embed is not None and len(embed.shape) == 2 and embed.shape[0] > model.vocab:
        model = replace(model, vocab=embed.shape[0])
    return model, weights.read("hf", path, model, stored), fields, tokenizer(home)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes unquantised tensors into one file, which appears only when complete."""
    infos, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.type not in TYPES:
            raise ValueError(
                f"{path}: tensor {name} is {tensor.type}, but safetensors holds {', '.join(TYPES)}: "
                "decode it first, or write GGUF"
            )
        infos[name] = {
            "dtype": tensor.type,
            "shape": tensor.shape,
            "data_offsets": (offset, offset := offset + tensor.nbytes),
        }
    header = json.dumps({"__metadata__": {"format": "pt"}, **infos}).encode()
    header += b" " * (-len(header) % 64 + 56)
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece.data).data)


SHARD = 5 << 30  # bytes of a file, as transformers cuts
# Gemma's turns, as prompts.chat builds them; a system text goes before the first user's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' "
    "+ (first if loop.first else '') + (turn['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tokenizer_fields(tokenizer: Tokenizer, template: str | None) -> dict[str, Any]:
    """A tokenizer_config.json: the control pieces are added tokens, the FIM ones not special, as published."""
    control = tokenizer.control
    fim = (control.fim_prefix, control.fim_middle, control.fim_suffix, control.file_separator)
    steer = (control.pad, control.eos, control.bos, control.unk, control.start_of_turn, control.end_of_turn)
    added = {
        str(token): {
            "content": tokenizer.piece(token),
            "special": token not in fim,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for token in sorted({one for one in (*fim, *steer) if one is not None})
    }
    names = {
        f"{key}_token": tokenizer.piece(token)
        for key, token in (
            ("bos", control.bos),
            ("eos", control.eos),
            ("pad", control.pad),
            ("unk", control.unk),
        )
        if token is not None
    }
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **names,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "sp_model_kwargs": {},
        "use_default_system_prompt": False,
        **({"chat_template": template} if template else {}),
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json with the same merges: transformers reads tokenizer.model only where protobuf is installed."""
    names, scores, kinds = tokenizer.pieces()
    ids = {name: token for token, name in enumerate(names)}
    merges = [
        (-scores[token], token, ids[name[:at]], ids[name[at:]])
        for token, name in enumerate(names)
        if kinds[token] in (1, 4)
        for at in range(1, len(name))
        if name[:at] in ids and name[at:] in ids
    ]
    added = [token for token, kind in enumerate(kinds) if kind in (2, 3, 4)]
    plain = tokenizer.control
    fim = (plain.fim_prefix, plain.fim_middle, plain.fim_suffix, plain.file_separator)
    space, bos = {"String": " "}, "<bos>" if plain.bos is None else names[plain.bos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": names[token],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kinds[token] != 4 and token not in fim,
            }
            for token in added
        ],
        "normalizer": {"type": "Replace", "pattern": space, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": space,
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [plain.bos], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [(names[left], names[right]) for *_, left, right in sorted(merges)],
        },
    }


def save(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    template: str | None,
    stops: list[int],
    told: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a directory that transformers reads, in files of at most 5 GB; generation ends at `stops`, config.json says what is
    `told` too."""
    stored = weights.write("hf", config, tensors)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in stored.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(path / file, shard)
    kind = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[tensors["embed"].type]
    documents: dict[str, Any] = {
        "config.json": {**config_fields(config), "torch_dtype": kind, **told},
        "generation_config.json": {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": stops or 1},
    }
    if len(shards) > 1:
        documents["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
    if tokenizer:
        (path / "tokenizer.model").write_bytes(tokenizer.model)
        documents["tokenizer_config.json"] = tokenizer_fields(tokenizer, template)
        (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer), ensure_ascii=False))
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document, indent=2) + "\n")
