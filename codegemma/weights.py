"""Every tensor of the family, stated once: its axes, the models that have it, and what each file format calls it.

One row of `TABLE` gives the shape, the reading, the writing, and the check that nothing is missing or left over.
Norm factors are held as float32 with the 1 already added (what is multiplied); formats differ in what they store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from codegemma.config import ModelConfig

Format = Literal["gguf", "hf"]

BLOCKS: dict[str, tuple[int, int]] = {  # type: (weights per block, bytes per block), as in ggml
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}


def row_bytes(type: str, width: int) -> int:
    """Bytes of one row of `width` weights. Raises ValueError where blocks do not fill the row."""
    weights, size = BLOCKS[type]
    if width % weights:
        raise ValueError(f"a row of {width} weights cannot be {type}: its blocks hold {weights} weights")
    return width // weights * size


@dataclass(frozen=True, eq=False)
class Tensor:
    """A weight as it lies in its file: `data` is uint8 [rows, row bytes], flat for a vector, usually a memory map."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def view(cls, type: str, shape: tuple[int, ...], raw: np.ndarray) -> Tensor:
        """Lays a shape over flat bytes without copying them."""
        width = row_bytes(type, shape[-1])
        return cls(type, shape, raw.reshape(*shape[:-1], width))

    @classmethod
    def of(cls, values: np.ndarray) -> Tensor:
        """A float32 tensor with these values."""
        array = np.ascontiguousarray(values, np.float32)
        return cls("F32", array.shape, array.view(np.uint8))

    def float32(self) -> np.ndarray:
        """The values of an unquantised tensor."""
        if self.type == "BF16":
            return (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        if self.type not in ("F32", "F16"):
            raise ValueError(f"a {self.type} tensor has no plain float32 view: decode its blocks")
        return self.data.view("<f4" if self.type == "F32" else "<f2").astype(np.float32, copy=False)


@dataclass(frozen=True)
class Row:
    """One kind of tensor. `axes` are the config's letters, rows first; letters side by side multiply into one axis."""

    name: str
    axes: str
    gguf: str
    hf: str
    where: Mapping[str, bool] = field(default_factory=dict)  # only models whose config says so


_POST, _QK = {"post_norms": True}, {"qk_norm": True}

TABLE = (
    Row("embed", "V,D", "token_embd.weight", "model.embed_tokens.weight"),
    Row("final_norm", "D", "output_norm.weight", "model.norm.weight"),
    Row("layers.{i}.attn_norm", "D", "blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("layers.{i}.q", "NH,D", "blk.{i}.attn_q.weight", "model.layers.{i}.self_attn.q_proj.weight"),
    Row("layers.{i}.k", "KH,D", "blk.{i}.attn_k.weight", "model.layers.{i}.self_attn.k_proj.weight"),
    Row("layers.{i}.v", "KH,D", "blk.{i}.attn_v.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    Row("layers.{i}.q_norm", "H", "blk.{i}.attn_q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight", _QK),
    Row("layers.{i}.k_norm", "H", "blk.{i}.attn_k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight", _QK),
    Row("layers.{i}.o", "D,NH", "blk.{i}.attn_output.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Row("layers.{i}.post_attn_norm", "D", "blk.{i}.post_attention_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight", _POST),
    # Hugging Face says post_attention_layernorm for two different norms: in Gemma 1 it stands before the feed-forward.
    Row("layers.{i}.ffn_norm", "D", "blk.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight",
        {"post_norms": False}),
    Row("layers.{i}.ffn_norm", "D", "blk.{i}.ffn_norm.weight", "model.layers.{i}.pre_feedforward_layernorm.weight",
        _POST),
    Row("layers.{i}.gate", "F,D", "blk.{i}.ffn_gate.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    Row("layers.{i}.up", "F,D", "blk.{i}.ffn_up.weight", "model.layers.{i}.mlp.up_proj.weight"),
    Row("layers.{i}.down", "D,F", "blk.{i}.ffn_down.weight", "model.layers.{i}.mlp.down_proj.weight"),
    Row("layers.{i}.post_ffn_norm", "D", "blk.{i}.post_ffw_norm.weight",
        "model.layers.{i}.post_feedforward_layernorm.weight", _POST),
)

STORES_ONE_PLUS_NORM = {"gguf": True, "hf": False}
TIED_HEAD = {"gguf": "output.weight", "hf": "lm_head.weight"}  # a second copy of the embedding, where a file has one
IGNORED = {"gguf": r"rope_freqs\.weight", "hf": r".*\.rotary_emb\.inv_freq"}  # follow from the config


class Place(NamedTuple):
    name: str                            # ours
    stored: str                          # the format's
    shape: tuple[int, ...]

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm")


def places(config: ModelConfig, format: Format) -> Iterator[Place]:
    """Every tensor that a model of this config has, layer by layer."""
    size = {"V": config.vocab, "D": config.width, "N": config.heads, "K": config.kv_heads, "H": config.head_width,
            "F": config.ffn_width}
    rows = [row for row in TABLE if all(getattr(config, name) == value for name, value in row.where.items())]
    for layer in (None, *range(config.layers)):
        for row in rows:
            if ("{i}" in row.name) == (layer is not None):
                shape = tuple(math.prod(size[letter] for letter in axis) for axis in row.axes.split(","))
                yield Place(row.name.format(i=layer), getattr(row, format).format(i=layer), shape)


def read(format: Format, path: Path, config: ModelConfig, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from a file's. Raises ValueError on missing, extra or misshapen tensors and on an untied head."""
    wanted = list(places(config, format))
    known = {place.stored for place in wanted} | {TIED_HEAD[format]}
    extra = [name for name in stored if name not in known and not re.fullmatch(IGNORED[format], name)]
    missing = [place.stored for place in wanted if place.stored not in stored]
    for fault, names in (("lacks", missing), ("also holds", extra)):
        if names:
            raise ValueError(f"{path}: {fault} {len(names)} tensors ({', '.join(names[:3])}"
                             f"{', ...' * (len(names) > 3)}): a {config.architecture} model of {config.layers} layers "
                             f"has exactly {len(wanted)}; the file is incomplete, or of a model unknown here")
    for place in wanted:
        if stored[place.stored].shape != place.shape:
            raise ValueError(f"{path}: tensor {place.stored} has shape {list(stored[place.stored].shape)}, but the "
                             f"config makes it {list(place.shape)}: the header and the weights are of different models")
    if TIED_HEAD[format] in stored:
        _check_tied(path, TIED_HEAD[format], stored[TIED_HEAD[format]], stored[wanted[0].stored])
    return {place.name: _factor(format, path, place, stored[place.stored]) if place.is_norm else stored[place.stored]
            for place in wanted}


def write(format: Format, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same row read backwards: a file's tensors from ours."""
    shift = 0.0 if STORES_ONE_PLUS_NORM[format] else 1.0
    return {place.stored: Tensor.of(tensors[place.name].float32() - np.float32(shift)) if place.is_norm
            else tensors[place.name] for place in places(config, format)}


def _factor(format: Format, path: Path, place: Place, norm: Tensor) -> Tensor:
    try:
        values = norm.float32()
    except ValueError:
        raise ValueError(f"{path}: tensor {place.stored} is {norm.type}, but norms are F32, F16 or BF16: "
                         "convert the model again") from None
    if STORES_ONE_PLUS_NORM[format]:
        return norm if norm.type == "F32" else Tensor.of(values)
    return Tensor.of(values + np.float32(1))


def _check_tied(path: Path, name: str, head: Tensor, embed: Tensor) -> None:
    same = (head.type, head.shape) == (embed.type, embed.shape) and all(
        np.array_equal(head.data[at:at + 4096], embed.data[at:at + 4096]) for at in range(0, len(embed.data), 4096))
    if not same:
        raise ValueError(f"{path}: tensor {name} differs from the embedding, but Gemma's output layer is the "
                         "embedding itself: merge or drop the separate output layer and convert the model again")
