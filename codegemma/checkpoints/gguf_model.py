"""Gemma models in GGUF, read and written: config and tokenizer from llama.cpp's header entries, and back."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import gguf, gguf_files, table
from codegemma.checkpoints.checkpoint import Checkpoint, stated_ends
from codegemma.checkpoints.tensors import Tensor
from codegemma.checkpoints.untrusted import damaged, naming
from codegemma.config import ModelConfig
from codegemma.tokenizer import BYTE, NORMAL, UNUSED, USER_DEFINED, Tokenizer

# The ids that end an answer: llama.cpp's three, and Ollama's list.
END_KEYS = [
    f"tokenizer.ggml.{name}" for name in ("eos_token_id", "eot_token_id", "eom_token_id", "eos_token_ids")
]

SOFTCAPS = ("attention_softcap", "final_softcap")
HEAD_WIDTHS = (  # keys that must state the head width, where a header has them
    *("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"),
    *("rope.dimension_count", "rope.dimension_count_swa"),
)
# Names of keys that may change what a model computes: an unknown key of such a name is refused.
CHANGES_RESULT = re.compile(
    r"^(attention|rope|expert|ssm|moe|altup|laurel)\b|softcap|scale|residual|activation|shared|sparsity"
)


def config(path: Path, metadata: Mapping[str, Any], vocab: int) -> ModelConfig:
    """The architecture that a header describes; errors name `path`. Raises ValueError on other models."""
    keys, architectures = (table.format_table("gguf")[name] for name in ("config", "defaults"))
    architecture: Any = str(metadata.get("general.architecture"))
    if architecture not in architectures:
        rule = f"but this program runs {', '.join(architectures)}: choose a Gemma or CodeGemma file"
        raise ValueError(f"{path}: general.architecture is {architecture!r}, {rule}")
    entries = _entries(path, architecture, metadata)
    values = table.config_values("gguf", architecture, entries)
    values = {name: value for name, value in values.items() if value is not None}
    for required in ("layers", "width", "heads", "ffn_width", "context"):
        if required not in values:
            raise damaged(f"{path}: the header lacks {architecture}.{keys[required]}")
    pattern = values.get("global_every")
    if isinstance(pattern, np.ndarray):  # for each layer whether it has a window
        is_global = [not is_local for is_local in pattern.tolist()]
        values["global_every"] = table.global_period(
            f"{path}: {architecture}.{keys['global_every']}", is_global, values["layers"]
        )
    for name, value in values.items():
        if isinstance(value, np.ndarray) and len({*value.tolist()}) == 1 and value.size == values["layers"]:
            values[name] = value = value[0].item()  # one number for each layer, all the same
        if not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {architecture}.{keys[name]} must be one number: choose a Gemma file")
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_width", values["width"] // max(1, values["heads"]))
    values.setdefault("rope_base_local", values["rope_base"])
    for name in ("window", *SOFTCAPS):  # 0 means none
        values[name] = values.get(name) or None
    for name in SOFTCAPS:
        values[name] = values[name] if metadata.get(f"codegemma.{name}", True) else None
    if values["window"] is None:
        values["global_every"] = 1
    width = values["head_width"]
    for key in HEAD_WIDTHS:
        if str(value := entries.get(key, width)) != str(width):
            rule = f"must equal attention.key_length ({width}), got {value}"
            raise damaged(f"{path}: {architecture}.{key} {rule}")
    if (kind := str(entries.get("rope.scaling.type", "linear"))) not in ("linear", "none"):
        rule = f"must be linear or none, got {kind!r}: choose a Gemma file"
        raise ValueError(f"{path}: {architecture}.rope.scaling.type {rule}")
    values["query_scale"] = _query_scale(architecture, values)
    if kind == "none" or "rope.scaling.factor" not in entries:
        values["rope_scale"] = 1.0 if kind == "none" else _implied_rope_scale(architecture, values["layers"])
    if f"{architecture}.rope.local.freq_base" in metadata and values["layers"] == 26:
        values["final_softcap"] = None  # Ollama's first files of the 1B state Gemma 2's, which it never had
    with naming(path):
        return ModelConfig(architecture, vocab=vocab, **values)


def _entries(path: Path, architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's header entries under llama.cpp's names.

    Raises ValueError on entries that contradict each other, and on unknown ones that may change the result;
    warns of the other unknown ones.
    """
    gguf_table, start = table.format_table("gguf"), f"{architecture}."
    entries: dict[str, Any] = {}
    for key, value in metadata.items():
        if not key.startswith(start):
            continue
        name = key.removeprefix(start).removeprefix("text.")
        name = gguf_table["aliases"].get(name, name)
        if name in entries and str(entries[name]) != str(value):
            raise damaged(
                f"{path}: {key} is {value!r}, but another entry of the same meaning is {entries[name]!r}"
            )
        entries[name] = value
    known = {*gguf_table["config"].values(), *HEAD_WIDTHS}
    for name, value in entries.items():
        required = gguf_table["required"].get(name, value)
        if isinstance(value, np.ndarray) is not isinstance(required, np.ndarray) or str(value) != str(
            required
        ):
            raise ValueError(
                f"{path}: {start}{name} is {value!r}, but this program supports only {required!r}"
            )
        if (
            name in known
            or name in gguf_table["required"]
            or re.fullmatch(gguf_table["meaningless"]["keys"], name)
        ):
            continue
        rule = f"the header has {start}{name} ({value!r}), which this program does not know"
        if CHANGES_RESULT.search(name):
            remedy = (
                "choose a file of a plain Gemma, or convert it again with llama.cpp's convert_hf_to_gguf.py"
            )
            raise ValueError(f"{path}: {rule}, and which may change the result: {remedy}")
        warnings.warn(f"{path}: {rule}: it is ignored", stacklevel=2)
    return entries


def _implied_rope_scale(architecture: str, layers: int) -> float:
    """The scale where a header states none: 8 in Gemma 3 4B, 12B and 27B, whose files by Ollama lack it."""
    return 8.0 if architecture == "gemma3" and layers in (34, 48, 62) else 1.0


def _query_scale(architecture: str, values: Mapping[str, Any]) -> float:
    """The factor on q, which GGUF has no key for; 0 stands for head_width ** -0.5.

    Only 27B models have another one, and are recognised by their number of layers.
    """
    is_27b = {"gemma2": 46, "gemma3": 62}.get(architecture) == values["layers"]
    return max(1, values["width"] // max(1, values["heads"])) ** -0.5 if is_27b else 0.0


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """The header entries for a config. Raises ValueError for a query scale that GGUF cannot express."""
    architecture = config.architecture
    entries: dict[str, Any] = {"general.architecture": architecture}
    implied = {"rope_base_local": config.rope_base, "global_every": 1}
    implied["rope_scale"] = _implied_rope_scale(architecture, config.layers)
    implied |= dict.fromkeys(("window", "attention_softcap", "final_softcap"), 0)
    implied |= table.config_defaults("gguf", architecture)
    for field, key in table.format_table("gguf")["config"].items():
        value = getattr(config, field) or 0
        if field in SOFTCAPS and not value:  # llama.cpp refuses 0, and has no other word for "none"
            entries |= {f"codegemma.{field}": False} if implied[field] else {}
            continue
        if field in ("rope_base", "norm_eps") or implied.get(field) != value:
            entries[f"{architecture}.{key}"] = value
    if config.rope_scale != 1:
        entries[f"{architecture}.rope.scaling.type"] = "linear"
    entries[f"{architecture}.attention.value_length"] = config.head_width
    scale = _query_scale(architecture, vars(config)) or config.head_width**-0.5
    if not math.isclose(config.query_scale, scale, rel_tol=1e-6):
        rule = f"readers of a {architecture} file take {scale}; write safetensors instead"
        raise ValueError(f"GGUF has no key for the query scale {config.query_scale}: {rule}")
    return entries


def tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the header. Raises ValueError where that is missing or not SentencePiece's."""
    kind = metadata.get("tokenizer.ggml.model")
    fields = ("tokens", "scores", "token_type")
    pieces, scores, types = (metadata.get(f"tokenizer.ggml.{field}") for field in fields)
    if not (
        str(kind) == "llama"
        and isinstance(pieces, gguf.Strings)
        and isinstance(scores, np.ndarray)
        and isinstance(types, np.ndarray)
        and len(pieces) == scores.size == types.size
    ):
        raise damaged(f"{path}: its tokenizer ({kind!r}) is not a complete SentencePiece vocabulary")
    return Tokenizer.cached(
        b"gguf" + bytes(pieces.raw) + scores.tobytes() + types.tobytes(),
        lambda: Tokenizer.from_pieces(pieces, scores, types),
    )


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The header entries for a vocabulary, padded to the embedding's rows, with its control ids.

    llama.cpp stops at eos, eot and fim_sep. The last is our file separator, with which CodeGemma ends a fill.
    """
    pieces, scores, types = tokenizer.pieces()
    padding = range(len(pieces), rows)
    texts = [
        piece.replace("\u2581", " ") if type == USER_DEFINED else piece
        for piece, type in zip(pieces, types, strict=True)
    ]
    names = table.format_table("gguf")["token_ids"]
    ids: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer.control, field) for name, field in names.items()
    }
    known = {ids.get(f"{name}_token_id") for name in ("eos", "eot", "fim_sep")}
    if more := sorted(tokenizer.end_ids - known):
        ids |= {"eom_token_id": more[0], "eos_token_ids": np.array(sorted(tokenizer.end_ids), "<i4")}
    entries = {
        "model": "llama",
        "pre": "default",
        "tokens": texts + [f"[PAD{token}]" for token in padding],
        "scores": np.array([*scores, *[0.0] * len(padding)], "<f4"),
        "token_type": np.array([*types, *[UNUSED] * len(padding)], "<i4"),
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
        **{name: token for name, token in ids.items() if token is not None},
    }
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items()}


def _read_parts(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The first part of a file, its header, and the tensors of all parts; an unsplit file is its only part.

    Raises ValueError where a part is missing or of another model.
    """
    opened = gguf.read(path)
    count = opened.metadata.get("split.count", 1)
    if str(count) in ("0", "1"):
        return path, *opened
    files = gguf_files.parts(path)
    if len(files) != count:
        rule = f"is one of {count} parts, but its name does not end in its number"
        remedy = (
            f"name the first -00001-of-{count:05}.gguf and so on, or join them by llama-gguf-split --merge"
        )
        raise ValueError(f"{path}: {rule}: {remedy}")
    if missing := [file.name for file in files if not file.exists()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path}: its parts {', '.join(missing[:3])}{more} are not beside it: download them too"
        )
    contents = [opened if file == path else gguf.read(file) for file in files]
    tensors: dict[str, Tensor] = {}
    for number, (file, part) in enumerate(zip(files, contents, strict=True)):
        stated = part.metadata.get("split.no"), part.metadata.get("split.count")
        if stated != (number, count):
            by_name = f"by its name it is {number} (from 0) of {count}"
            rule = f"states split.no {stated[0]!r} of {stated[1]!r}, but {by_name}"
            raise ValueError(f"{file}: {rule}: give the parts their own names back, or download them again")
        if repeated := sorted(tensors.keys() & part.tensors.keys()):
            raise damaged(f"{file}: repeats the tensor {repeated[0]} of another part")
        tensors |= part.tensors
    metadata = contents[0].metadata
    if str(total := metadata.get("split.tensors.count", len(tensors))) != str(len(tensors)):
        rule = f"its parts hold {len(tensors):,} tensors, but it states {total}"
        raise damaged(f"{files[0]}: {rule}: they are of different models")
    return files[0], metadata, tensors


def load(path: Path) -> Checkpoint:
    """Opens a GGUF file, or all parts of a split one; its tokenizer is None where the header has none."""
    if (kind := gguf_files.role(path)) != "model":
        remedies = {"adapter": "pass it by --adapter, and its model by -m"}
        remedy = remedies.get(kind, "pass the model's own file, which lies beside it")
        raise ValueError(f"{path}: is an {kind}, not a model: {remedy}")
    path, metadata, stored = _read_parts(path)
    embedding = table.stored_name("gguf", "embed")
    vocab = stored[embedding].shape[0] if embedding in stored else 1
    model = config(path, metadata, vocab)
    tensors = table.from_format("gguf", path, model, stored)
    pieces = metadata.get("tokenizer.ggml.tokens")
    if pieces is None:
        return Checkpoint(path, model, tensors, metadata)
    types = metadata.get("tokenizer.ggml.token_type")
    types_beyond_rows = set(types[vocab:].tolist()) if isinstance(types, np.ndarray) else set()
    has_rows = isinstance(pieces, gguf.Strings) and (
        len(pieces) <= vocab or bool(types_beyond_rows) and not {NORMAL, BYTE} & types_beyond_rows
    )
    if not has_rows:
        rule = f"must be at most {vocab:,} strings, one for each row of {embedding}"
        raise damaged(f"{path}: tokenizer.ggml.tokens {rule}")
    ends = stated_ends(path, metadata, END_KEYS)
    return Checkpoint(path, model, tensors, metadata, lambda: tokenizer(path, metadata), ends)


def save(
    path: Path,
    checkpoint: Checkpoint,
    entries: Mapping[str, Any],
    template: str | None,
    stamp: str | None,
    replace: bool = True,
) -> None:
    """Writes a file that llama.cpp reads, with `entries` in its header; the rest as for `gguf.write`."""
    config = checkpoint.config
    types = [tensor.type for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    metadata = {
        **config_metadata(config),
        **entries,
        "general.file_type": table.format_table("gguf")["file_types"][max(set(types), key=types.count)],
        "general.quantization_version": 2,
    }
    if checkpoint.tokenizer:
        metadata |= tokenizer_metadata(checkpoint.tokenizer, config.vocab)
    else:
        metadata |= {"tokenizer.ggml.model": "no_vocab", f"{config.architecture}.vocab_size": config.vocab}
    if template:
        metadata["tokenizer.chat_template"] = template
    gguf.write(path, metadata, table.to_format("gguf", config, checkpoint.tensors), stamp, replace)
