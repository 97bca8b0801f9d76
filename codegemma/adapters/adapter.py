"""LoRA adapters: names, shapes, load, save, merge. NumPy only; the format on disk is PEFT's.

An adapter adds `(alpha / rank) * (x a^T) b^T` to what a linear layer makes of x, and may replace rows of the tied
embedding, as input and as output. Its folder holds adapter_config.json and adapter_model.safetensors (read by `peft`),
card.json (what it was trained for, on what) and the card as README.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import Checkpoint, torch
from codegemma.checkpoints import huggingface as safetensors
from codegemma.checkpoints.table import TABLE, Deferred, Tensor, places, plain
from codegemma.config import LIMITS, ModelConfig
from codegemma.convert.quantize import QUANTISED, quantize, rows_float32
from codegemma.files import building, mapped
from codegemma.hub.catalogue import NOTICE, preset

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODULES = {
    row.name.removeprefix("layers.{i}."): row.hf.removeprefix("model.layers.{i}.").removesuffix(".weight")
    for row in TABLE
    if row.name.removeprefix("layers.{i}.") in LINEAR
}  # "q": "self_attn.q_proj"
MOST_ROWS = 65_536  # replaced rows of the embedding


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes of linear layers, by our names ("layers.0.q"), and replaced rows of the embedding.

    `a` [r, in] and `b` [out, r] are float32; r is `rank`, or less where a layer has a rank of its own. `rows` [D] by
    token id. `card` is free; `card["fim"]` = {"psm": bool, "spm": bool} says which orders it was trained to complete
    in, `card["base"]` what it belongs to. Raises ValueError on parts that do not fit each other.
    """

    name: str
    rank: int
    alpha: float
    a: Mapping[str, np.ndarray]
    b: Mapping[str, np.ndarray]
    rows: Mapping[int, np.ndarray] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (
            type(self.rank) is not int
            or not 1 <= self.rank <= LIMITS["width"]
            or not 0 < abs(self.alpha) < 1e9
        ):
            raise ValueError(
                f"adapter {self.name}: rank must be a whole number from 1 and alpha a finite number other "
                f"than 0, got {self.rank!r} and {self.alpha!r}"
            )
        if lone := sorted(self.a.keys() ^ self.b.keys()):
            raise ValueError(
                f"adapter {self.name}: {lone[0]} has one of its two matrices only: save the adapter again"
            )
        if not self.a and not self.rows:
            raise ValueError(f"adapter {self.name}: changes no layer and no token")
        for name, a_rI in self.a.items():
            if not re.fullmatch(rf"layers\.\d+\.({'|'.join(LINEAR)})", name):
                raise ValueError(
                    f"adapter {self.name}: {name} is no linear layer: these are layers.N.{', '.join(LINEAR)}"
                )
            shape = a_rI.shape, self.b[name].shape
            if not (len(shape[0]) == len(shape[1]) == 2 and 1 <= shape[0][0] == shape[1][1] <= self.rank):
                raise ValueError(
                    f"adapter {self.name}: {name} has matrices {list(shape[0])} and {list(shape[1])}, but "
                    f"needs [r, in] and [out, r] with r from 1 to the rank, {self.rank}"
                )
        for name, values in self._arrays():
            if values.dtype != np.float32 or not np.isfinite(values).all():
                raise ValueError(
                    f"adapter {self.name}: {name} must hold finite float32 numbers: it is damaged, or its "
                    "training diverged"
                )

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.alpha / self.rank

    @cached_property
    def digest(self) -> str:
        """A hash of all that changes logits: what caches of keys and values carry."""
        digest = hashlib.sha256(f"{self.scale!r}".encode())
        for name, values in self._arrays():
            digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:32]

    def trained(self, layout: str) -> bool:
        """Whether its card says that it completes in this order, "psm" or "spm"."""
        fim = self.card.get("fim")
        return isinstance(fim, dict) and fim.get(layout) is True

    def delta(self, name: str) -> np.ndarray:
        """float32 [out, in]: what is added to a layer's matrix."""
        product: np.ndarray = np.float32(self.scale) * (self.b[name] @ self.a[name])
        return product

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where it does not belong to a model of this config."""
        shapes = {place.name: place.shape for place in places(config, "hf")}
        for name in self.a:
            shape = self.b[name].shape[0], self.a[name].shape[1]
            if shapes.get(name) != shape:
                raise ValueError(
                    f"adapter {self.name} changes {name} as a matrix of {list(shape)}, but the model has "
                    f"{list(shapes[name]) if name in shapes else 'no such layer'}: it belongs to another "
                    f"model ({self.card.get('base') or 'its card does not say which'})"
                )
        for token, row in self.rows.items():
            if not 0 <= token < config.vocab or row.shape != (config.width,):
                raise ValueError(
                    f"adapter {self.name} replaces row {token} by {list(row.shape)} numbers, but the model "
                    f"has {config.vocab:,} rows of {config.width}: it belongs to another model"
                )

    def described(self) -> dict[str, Any]:
        """What it is, for `codegemma inspect`."""
        kinds = [kind for kind in LINEAR if any(name.endswith(f".{kind}") for name in self.a)]
        return {
            "name": self.name,
            "kind": "LoRA adapter",
            "rank": self.rank,
            "alpha": self.alpha,
            "matrices": kinds,
            "layers": len({name.split(".")[1] for name in self.a}),
            "tokens": sorted(self.rows),
            "parameters": sum(values.size for _, values in self._arrays()),
            "base": self.card.get("base"),
            "digest": self.digest,
            "card": dict(self.card),
        }

    def lines(self) -> Iterator[str]:
        """The same to read."""
        of = self.described()
        yield f"{self.name}: LoRA adapter, rank {self.rank}, alpha {self.alpha:g}, {of['parameters']:,} parameters"
        yield f"for           {of['base'] or 'not said'}"
        yield f"changes       {', '.join(of['matrices']) or 'no matrix'} in {of['layers']} layers; {len(self.rows)} token rows"
        yield f"completes in  {', '.join(order for order in ('psm', 'spm') if self.trained(order)) or 'no order that is named'}"
        yield from (
            f"{key:13} {json.dumps(value)}"
            for key, value in self.card.items()
            if key not in ("name", "base", "fim")
        )

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in sorted(self.a):
            yield from ((f"{name}.a", self.a[name]), (f"{name}.b", self.b[name]))
        for token in sorted(self.rows):
            yield f"row {token}", self.rows[token]


# ------------------------------------------------------------------------------------------------------------ load
# What changes the meaning of an adapter in a way that no low-rank product says; refused where it is switched on.
UNKNOWN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "fan_in_fan_out",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "modules_to_save",
)
REBASED = (
    "pissa",
    "olora",
    "loftq",
    "corda",
    "lora_ga",
)  # initialisations that change the base's own weights


def load(path: Path | str) -> Adapter:
    """An adapter from PEFT's folder (or its weights file), or from NeMo's .nemo archive.

    Raises ValueError naming what is damaged, or which kind of adapter it is that plain LoRA cannot say.
    """
    path = Path(path)
    if path.is_file() and path.name not in WEIGHTS or (path / "model_config.yaml").is_file():
        from codegemma.adapters import nemo as lora_nemo

        return lora_nemo.load(path)
    home = path.parent if path.is_file() else path
    fields, stored = _config(home / "adapter_config.json"), _stored(home)
    a, b, rows = _parts(home, fields, stored)
    if not a and not rows:
        raise ValueError(f"{home}: changes no linear layer: save the adapter again")
    rank = max((value.shape[0] for value in a.values()), default=1)
    scales = {name: _scale(home, fields, name, value.shape[0]) for name, value in a.items()}
    scale = next(iter(scales.values()), 1.0)
    if any(one != scale for one in scales.values()):  # layers with a scale of their own: theirs moves into b
        b = {name: value * np.float32(scales[name] / scale) for name, value in b.items()}
    card = safetensors.read_json(home / "card.json") if (home / "card.json").exists() else {}
    base = fields.get("base_model_name_or_path")
    return Adapter(
        str(card.get("name") or home.resolve().name),
        rank,
        scale * rank,
        a,
        b,
        rows,
        ({"base": base} if base else {}) | card,
    )


def is_adapter(path: Path | str) -> bool:
    """Whether a path is an adapter's, and not a model's."""
    path = Path(path)
    if path.is_file() and path.suffix == ".nemo":
        from codegemma.adapters import nemo as lora_nemo

        return lora_nemo.is_adapter(path)
    return (path / "adapter_config.json").is_file() or path.name in WEIGHTS


def _config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ValueError(
            f"{file.parent}: lacks adapter_config.json: pass the folder that PEFT or codegemma saved"
        )
    fields = safetensors.read_json(file)
    kind = fields.get("peft_type")
    found = [key for key in UNKNOWN if fields.get(key)]
    if kind != "LORA" or found:
        raise ValueError(
            f"{file}: is {' with '.join([str(kind), *found])}, but this program reads plain LoRA: merge it "
            "into its model with peft (merge_and_unload) and load that"
        )
    if fields.get("bias", "none") != "none":
        raise ValueError(f'{file}: bias is {fields["bias"]!r}, but Gemma has no bias: train with bias="none"')
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASED):
        raise ValueError(
            f"{file}: init_lora_weights is {start!r}, which changes the base's weights too: save it as plain "
            "LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    return fields


def _stored(home: Path) -> dict[str, Tensor]:
    if (file := home / WEIGHTS[0]).exists():
        return safetensors.read(file)
    if (file := home / WEIGHTS[1]).exists():
        return torch.state(str(file), torch.read(str(file), mapped(file)))
    raise ValueError(f"{home}: lacks {WEIGHTS[0]}: save the adapter again")


_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.|language_model\.)*(?:layers\.(\d+)\.([\w.]+)\.lora_([AB])"
    r"(?:\.default)?\.weight|(embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta(?:\.default)?)"
)


def _parts(
    home: Path, fields: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[int, np.ndarray]]:
    """The stored tensors as ours."""
    ours = {module: name for name, module in MODULES.items()}
    sides: dict[str, dict[str, np.ndarray]] = {"A": {}, "B": {}}
    rows: dict[int, np.ndarray] = {}
    head: np.ndarray | None = None
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] and match[2] not in ours:
            raise ValueError(
                f"{home}: holds {key}, which is no LoRA of a linear layer and no trained token: train "
                "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, and tokens by "
                "trainable_token_indices"
            )
        values = np.array(tensor.float32(), np.float32)
        if values.ndim != 2 or not values.size:
            raise ValueError(
                f"{home}: {key} has shape {list(values.shape)}, but must be a matrix: save the adapter again"
            )
        if match[4] == "lm_head":  # a second copy, where PEFT did not notice that the two are tied
            head = values
            continue
        name = "the trained tokens" if match[4] else f"layers.{int(match[1])}.{ours[match[2]]}"
        if rows if match[4] else name in sides[match[3]]:
            raise ValueError(f"{home}: holds {name} twice: save the adapter again")
        if match[4]:
            rows = _rows(home, fields.get("trainable_token_indices"), values)
        else:
            sides[match[3]][name] = values
    if head is not None and not np.array_equal(head, list(rows.values())):
        raise ValueError(
            f"{home}: trains tokens of lm_head that are not those of embed_tokens, but Gemma has one table for both: "
            "train the tokens of embed_tokens"
        )
    return sides["A"], sides["B"], rows


def _rows(home: Path, indices: Any, values: np.ndarray) -> dict[int, np.ndarray]:
    tokens = indices.get("embed_tokens") if isinstance(indices, dict) else indices
    if (
        not isinstance(tokens, list)
        or len(tokens) != len(values)
        or len(tokens) > MOST_ROWS
        or len(set(map(str, tokens))) < len(tokens)
        or not all(type(token) is int and token >= 0 for token in tokens)
    ):
        raise ValueError(
            f"{home}: trainable_token_indices must name the {len(values)} token ids of the stored rows, each "
            "once: save the adapter again"
        )
    return dict(zip(tokens, values, strict=True))


def _scale(home: Path, fields: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank of one layer, alpha / sqrt(rank) with rslora; alpha_pattern gives layers an alpha of their own."""
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{home}: alpha_pattern must be an object: save the adapter again")
    layer, ours = name.split(".")[1:]
    module = f"model.layers.{layer}.{MODULES[ours]}"
    own = next((alpha for pattern, alpha in patterns.items() if _matches(home, pattern, module)), None)
    alpha = own if own is not None else fields.get("lora_alpha", 8)
    if type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e9:
        raise ValueError(f"{home}: alpha of {module} is {alpha!r}, but must be a finite number other than 0")
    return float(alpha / rank ** (0.5 if fields.get("use_rslora") else 1.0))


def _matches(home: Path, pattern: str, module: str) -> bool:
    """PEFT's rule: a regular expression for the end of a module's name. One that could run away is refused."""
    if len(pattern) > 512 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{?]", pattern):
        raise ValueError(f"{home}: alpha_pattern {pattern[:40]!r} is too intricate: name the modules in full")
    try:
        return re.match(rf"(?:.*\.)?(?:{pattern})$", module) is not None
    except re.error as error:
        raise ValueError(f"{home}: alpha_pattern {pattern!r} is no regular expression ({error})") from None


# ------------------------------------------------------------------------------------------------------------ save
def save(adapter: Adapter, folder: Path | str, dtype: str = "F32") -> Path:
    """Writes PEFT's folder with a card; `dtype` is F32, F16 or BF16. It appears when it is complete.

    Raises ValueError where the folder holds something already, or where a weight is too large for F16.
    """
    folder = Path(folder)
    if dtype not in safetensors.TYPES:
        raise ValueError(f"dtype must be {', '.join(safetensors.TYPES)}, got {dtype!r}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists: choose another folder for the adapter")
    stored: dict[str, Tensor] = {}
    for name in sorted(adapter.a):
        layer, ours = name.split(".")[1:]
        for letter, values in (("A", adapter.a[name]), ("B", adapter.b[name])):
            stored[f"base_model.model.model.layers.{layer}.{MODULES[ours]}.lora_{letter}.weight"] = _typed(
                values, dtype
            )
    if adapter.rows:
        stored["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = _typed(
            np.stack([adapter.rows[token] for token in sorted(adapter.rows)]), dtype
        )
    with building(folder) as part:
        safetensors.write_safetensors(part / WEIGHTS[0], stored)
        (part / "adapter_config.json").write_text(json.dumps(_fields(adapter), indent=2) + "\n")
        (part / "card.json").write_text(json.dumps({**adapter.card, "name": adapter.name}, indent=2) + "\n")
        (part / "README.md").write_text(readme(adapter))
        (part / "NOTICE").write_text(NOTICE)
    return folder


def _typed(values: np.ndarray, dtype: str) -> Tensor:
    stored = np.ascontiguousarray(plain(dtype, values))
    if dtype == "F16" and not np.isfinite(stored).all():
        raise ValueError("the adapter holds weights above 65,504, too large for F16: choose BF16 or F32")
    return Tensor(dtype, values.shape, stored.view(np.uint8))


def _fields(adapter: Adapter) -> dict[str, Any]:
    """An adapter_config.json that PEFT reads."""
    modules = {
        name: "model.layers.{}.{}".format(name.split(".")[1], MODULES[name.split(".")[2]])
        for name in adapter.a
    }
    kinds = sorted({module.rpartition(".")[2] for module in modules.values()})
    layers = {name.split(".")[1] for name in modules}
    whole = len(modules) == len(kinds) * len(layers) and layers == {
        str(layer) for layer in range(len(layers))
    }
    own = {name: value.shape[0] for name, value in adapter.a.items() if value.shape[0] != adapter.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "base_model_name_or_path": on_hub(adapter),
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": kinds if whole else sorted(modules.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(modules[name]): rank for name, rank in own.items()},
        "alpha_pattern": {re.escape(modules[name]): adapter.scale * rank for name, rank in own.items()},
        "trainable_token_indices": {"embed_tokens": sorted(adapter.rows)} if adapter.rows else None,
    }


def on_hub(adapter: Adapter) -> Any:
    """Its base by the name that the Hub has for it, where it has one."""
    base = adapter.card.get("base")
    known = preset(str(base))
    return known.hub if known else base


def readme(adapter: Adapter) -> str:
    """The card, in the Hub's form."""
    of = adapter.described()
    base = on_hub(adapter)
    about = {key: value for key, value in adapter.card.items() if key not in ("name", "base")}
    return "\n".join(
        [
            "---",
            "license: gemma",
            "library_name: peft",
            *([f"base_model: {base}"] if base else []),
            "tags: [lora, code, gemma]",
            "---",
            f"# {adapter.name}",
            "",
            f"A LoRA adapter of rank {adapter.rank} (alpha {adapter.alpha:g}) for {base or 'a Gemma model'}: "
            f"{', '.join(of['matrices']) or 'no linear layer'} in {of['layers']} layers, and "
            f"{len(adapter.rows)} replaced rows of the embedding, as input and as output. Use it as "
            "`codegemma complete --adapter FOLDER`, or with `peft`.",
            "",
            *(["## About", "", "```json", json.dumps(about, indent=2), "```", ""] if about else []),
            "## Licence",
            "",
            NOTICE.strip(),
            "",
            "## Statement of changes",
            "",
            "The base model's weights are unchanged; this adapter changes what they compute, as said above.",
            "",
        ]
    )


# ----------------------------------------------------------------------------------------------------------- merge
def merge(checkpoint: Checkpoint, *adapters: Adapter, blocks_as: str | None = None) -> Checkpoint:
    """The model with adapters worked into its weights, each tensor made when it is looked at.

    Floats keep their type. Quantised matrices are decoded, changed and quantised again, which costs what quantising
    costs a second time; `blocks_as` ("F32", "BF16", "F16") gives those that change a float type instead.
    Raises ValueError where an adapter does not fit the model.
    """
    tensors = dict(checkpoint.tensors)
    for adapter in adapters:
        adapter.check(checkpoint.config)
    for name, tensor in checkpoint.tensors.items():
        mine = [one for one in adapters if name in one.a or name == "embed" and one.rows]
        if mine:
            type = blocks_as if blocks_as and tensor.type in QUANTISED else tensor.type
            tensors[name] = Deferred(type, tensor.shape, _merged(name, tensor, mine, type))
    orders = {order for one in adapters for order in ("psm", "spm") if one.trained(order)}
    return checkpoint.teach(orders | (checkpoint.taught or set()), tensors)


def _merged(name: str, tensor: Tensor, adapters: list[Adapter], type: str) -> Callable[[], np.ndarray]:
    def stored(values: np.ndarray) -> np.ndarray:
        return (
            quantize(Tensor.of(values), type)[0].data
            if type in QUANTISED
            else np.ascontiguousarray(plain(type, values)).view(np.uint8)
        )

    def make() -> np.ndarray:
        if name != "embed":
            values = rows_float32(tensor, 0, tensor.shape[0])
            for adapter in adapters:
                values += adapter.delta(name)
            return stored(values)
        same = tensor.type == type
        data = np.array(tensor.data) if same else stored(rows_float32(tensor, 0, tensor.shape[0]))
        for adapter in adapters:  # only these rows change, not a bit of the others
            for token, row in adapter.rows.items():
                data.reshape(tensor.shape[0], -1)[token] = stored(row[None]).reshape(-1)
        return data

    return make
