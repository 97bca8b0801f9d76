"""PEFT's folder: adapter_config.json and adapter_model.safetensors, as the `peft` library writes them.

`save` adds card.json (Adapter.card), a README.md made from it, and Gemma's NOTICE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.adapters.adapter import LINEAR, Adapter
from codegemma.checkpoints import safetensors, torch
from codegemma.checkpoints.table import stored_name
from codegemma.checkpoints.tensors import ELEMENTS, ArrayTensor, Tensor, from_float32
from codegemma.checkpoints.untrusted import read_json
from codegemma.convert.card import render
from codegemma.files import atomic_directory, map_file
from codegemma.hub import NOTICE, preset

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODULES = {
    kind: stored_name("hf", kind).removeprefix("model.layers.{i}.").removesuffix(".weight") for kind in LINEAR
}  # "q": "self_attn.q_proj"
KINDS = {module: kind for kind, module in MODULES.items()}
MAX_ROWS = 65_536  # replaced rows of the embedding
# Options that make an adapter more than low-rank products: where one is set, the adapter is refused.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "lora_bias"),
    *("fan_in_fan_out", "target_parameters", "arrow_config", "kasa_config", "monteclora_config"),
    *("megatron_config", "modules_to_save"),
)
# Starts of the names of initialisations that change the base's weights too.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.|language_model\.)*"
    r"(?:layers\.(?P<layer>\d+)\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
    r"|(?P<table>embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta(?:\.default)?)"
)
# Keys of the image tower of a multimodal Gemma 3: they are left out, since this program runs the text part.
OTHER_PART = re.compile(r"(^|\.)(vision_tower|vision_model|multi_modal_projector)\.")
TRAINED_ROWS_KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def load(path: Path) -> Adapter:
    """The adapter in a folder, or in the folder of a weights file. Raises ValueError where it is damaged or
    more than plain LoRA."""
    home = path.parent if path.is_file() else path
    fields = _config(home / "adapter_config.json")
    a, b, rows = _parts(home, fields, _stored(home))
    if not a and not rows:
        raise _damaged(home, "changes no linear layer")
    rank = max((value.shape[0] for value in a.values()), default=1)
    scales = {name: _scale(home, fields, name, value.shape[0]) for name, value in a.items()}
    scale = next(iter(scales.values()), 1.0)
    # Adapter has one scale, so each b is multiplied by its own scale divided by that one.
    if len(set(scales.values())) > 1:
        b = {name: value * np.float32(scales[name] / scale) for name, value in b.items()}
    base = fields.get("base_model_name_or_path")
    card = {"base": base} if base else {}
    if (file := home / "card.json").exists():
        card |= read_json(file)
    return Adapter(str(card.get("name") or home.resolve().name), rank, scale * rank, a, b, rows, card)


def save(adapter: Adapter, folder: Path | str, dtype: str = "F32") -> Path:
    """Writes an adapter's folder, which appears only when it is complete; `dtype` is F32, F16 or BF16.

    Raises ValueError where the folder exists and is not empty, or where a weight is too large for F16.
    """
    folder = Path(folder)
    if dtype not in ELEMENTS:
        raise ValueError(f"dtype must be {', '.join(ELEMENTS)}, got {dtype!r}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists: choose another folder for the adapter")
    stored: dict[str, Tensor] = {}
    for name in sorted(adapter.a):
        for side, values in (("A", adapter.a[name]), ("B", adapter.b[name])):
            stored[f"base_model.model.{_module(name)}.lora_{side}.weight"] = _with_dtype(values, dtype)
    if adapter.rows:
        rows = np.stack([adapter.rows[token] for token in sorted(adapter.rows)])
        stored[TRAINED_ROWS_KEY] = _with_dtype(rows, dtype)
    with atomic_directory(folder) as part:
        safetensors.write(part / WEIGHTS[0], stored)
        (part / "adapter_config.json").write_text(json.dumps(_fields(adapter), indent=2) + "\n")
        (part / "card.json").write_text(json.dumps({**adapter.card, "name": adapter.name}, indent=2) + "\n")
        (part / "README.md").write_text(readme(adapter))
        (part / "NOTICE").write_text(NOTICE)
    return folder


def hub_name(adapter: Adapter) -> Any:
    """The adapter's base model: its name on the Hub if it is a preset, else as the card names it."""
    base = adapter.card.get("base")
    known = preset(str(base))
    return known.hub if known else base


def readme(adapter: Adapter) -> str:
    """The adapter's card in the Hub's form."""
    facts, base = adapter.facts(), hub_name(adapter)
    header = ["library_name: peft", *([f"base_model: {base}"] if base else []), "tags: [lora, code, gemma]"]
    description = (
        f"A LoRA adapter of rank {adapter.rank} (alpha {adapter.alpha:g}) for {base or 'a Gemma model'}: "
        f"{', '.join(facts['matrices']) or 'no linear layer'} in {facts['layers']} layers, and "
        f"{len(adapter.rows)} replaced rows of the embedding, as input and as output. Use it as "
        "`codegemma complete --adapter FOLDER`, or with `peft`."
    )
    about = {key: value for key, value in adapter.card.items() if key not in ("name", "base")}
    sections = {"About": f"```json\n{json.dumps(about, indent=2)}\n```"} if about else {}
    changes = "The base model's weights are unchanged; this adapter changes what they compute, as said above."
    return render(header, adapter.name, description, sections, changes)


def _damaged(home: Path, fault: str) -> ValueError:
    return ValueError(f"{home}: {fault}: save the adapter again")


def _module(name: str) -> str:
    """ "layers.0.q" -> "model.layers.0.self_attn.q_proj"."""
    _, layer, kind = name.split(".")
    return f"model.layers.{layer}.{MODULES[kind]}"


def _config(file: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json. Raises ValueError where they ask for more than plain LoRA."""
    if not file.exists():
        raise ValueError(
            f"{file.parent}: lacks adapter_config.json: pass the folder that PEFT or codegemma saved"
        )
    fields = read_json(file)
    kind, unsupported = fields.get("peft_type"), [key for key in UNSUPPORTED if fields.get(key)]
    if kind != "LORA" or unsupported:
        raise ValueError(
            f"{file}: is {' with '.join([str(kind), *unsupported])}, but this program reads plain LoRA: "
            "merge it into its model with peft (merge_and_unload) and load that"
        )
    if fields.get("bias", "none") != "none":
        raise ValueError(f'{file}: bias is {fields["bias"]!r}, but Gemma has no bias: train with bias="none"')
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{file}: init_lora_weights is {start!r}, which changes the base's weights too: save it as plain "
            "LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    return fields


def _stored(home: Path) -> dict[str, Tensor]:
    if (file := home / WEIGHTS[0]).exists():
        return safetensors.read(file)
    if (file := home / WEIGHTS[1]).exists():
        return torch.state_dict(str(file), torch.read(str(file), map_file(file)))
    raise _damaged(home, f"lacks {WEIGHTS[0]}")


def _parts(
    home: Path, fields: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[int, np.ndarray]]:
    """The stored tensors as an adapter's a, b and rows."""
    sides: dict[str, dict[str, np.ndarray]] = {"A": {}, "B": {}}
    tables: dict[str, np.ndarray] = {}
    for key, tensor in stored.items():
        if OTHER_PART.search(key):
            continue
        match = KEY.fullmatch(key)
        if match is None or match["module"] and match["module"] not in KINDS:
            raise ValueError(
                f"{home}: holds {key}, which is no LoRA of a linear layer and no trained token: train only "
                f"{', '.join(module.rpartition('.')[2] for module in KINDS)}, and tokens by "
                "trainable_token_indices"
            )
        values = np.array(tensor.float32(), np.float32)
        if values.ndim != 2 or not values.size:
            raise _damaged(home, f"{key} has shape {list(values.shape)}, but must be a matrix")
        name = match["table"] or f"layers.{int(match['layer'])}.{KINDS[match['module']]}"
        group = tables if match["table"] else sides[match["side"]]
        if name in group and name != "lm_head":
            raise _damaged(home, f"holds {name} twice")
        group[name] = values
    rows: dict[int, np.ndarray] = {}
    if "embed_tokens" in tables:
        rows = _rows(home, fields.get("trainable_token_indices"), tables["embed_tokens"])
    # PEFT stores lm_head too, as a copy, where it does not notice that it is tied to the embedding.
    if "lm_head" in tables and not np.array_equal(tables["lm_head"], list(rows.values())):
        raise ValueError(
            f"{home}: trains tokens of lm_head that are not those of embed_tokens, but Gemma has one table "
            "for both: train the tokens of embed_tokens"
        )
    return sides["A"], sides["B"], rows


def _rows(home: Path, indices: Any, values: np.ndarray) -> dict[int, np.ndarray]:
    """The trained rows by token id."""
    tokens = indices.get("embed_tokens") if isinstance(indices, dict) else indices
    if not isinstance(tokens, list) or any(type(token) is not int or token < 0 for token in tokens):
        tokens = []
    if not len(set(tokens)) == len(tokens) == len(values) <= MAX_ROWS:
        named = f"must name the {len(values)} token ids of the stored rows, each once"
        raise _damaged(home, f"trainable_token_indices {named}")
    return dict(zip(tokens, values, strict=True))


def _scale(home: Path, fields: Mapping[str, Any], name: str, rank: int) -> float:
    """A layer's alpha / rank, with rslora alpha / sqrt(rank). alpha_pattern sets alpha for some layers."""
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _damaged(home, "alpha_pattern must be an object")
    module = _module(name)
    alpha = next((alpha for pattern, alpha in patterns.items() if _matches(home, pattern, module)), None)
    if alpha is None:
        alpha = fields.get("lora_alpha", 8)
    if type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e9:
        raise ValueError(f"{home}: alpha of {module} is {alpha!r}, but must be a finite number other than 0")
    return float(alpha / rank ** (0.5 if fields.get("use_rslora") else 1.0))


def _matches(home: Path, pattern: str, module: str) -> bool:
    """Whether a pattern matches a module. As in PEFT, it is a regular expression for the end of the name.

    Raises ValueError on a pattern that could take very long to match.
    """
    if len(pattern) > 512 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{?]", pattern):
        raise ValueError(f"{home}: alpha_pattern {pattern[:40]!r} is too intricate: name the modules in full")
    try:
        return re.match(rf"(?:.*\.)?(?:{pattern})$", module) is not None
    except re.error as error:
        raise ValueError(f"{home}: alpha_pattern {pattern!r} is no regular expression ({error})") from None


def _with_dtype(values: np.ndarray, dtype: str) -> Tensor:
    stored = np.ascontiguousarray(from_float32(dtype, values))
    if dtype == "F16" and not np.isfinite(stored).all():
        raise ValueError("the adapter holds weights above 65,504, too large for F16: choose BF16 or F32")
    return ArrayTensor(dtype, values.shape, stored.view(np.uint8))


def _fields(adapter: Adapter) -> dict[str, Any]:
    """An adapter_config.json that PEFT reads."""
    modules = {name: _module(name) for name in adapter.a}
    kinds = sorted({module.rpartition(".")[2] for module in modules.values()})
    layers = {int(name.split(".")[1]) for name in modules}
    same_in_all_layers = len(modules) == len(kinds) * len(layers) and layers == set(range(len(layers)))
    ranks = {name: value.shape[0] for name, value in adapter.a.items() if value.shape[0] != adapter.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "base_model_name_or_path": hub_name(adapter),
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": kinds if same_in_all_layers else sorted(modules.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(modules[name]): rank for name, rank in ranks.items()},
        "alpha_pattern": {re.escape(modules[name]): adapter.scale * rank for name, rank in ranks.items()},
        "trainable_token_indices": {"embed_tokens": sorted(adapter.rows)} if adapter.rows else None,
    }
