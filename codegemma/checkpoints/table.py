"""Every tensor of the family, stated once: its axes, the models that have it, and what each file format calls it.

One row of `TABLE` gives the shape, the reading, the writing, and the check that nothing is missing or left over.
Norm factors are held as float32 with the 1 already added (what is multiplied); formats differ in what they store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from codegemma.config import LIMITS, ModelConfig

Format = Literal["gguf", "hf", "flax", "maxtext", "keras", "nemo", "pytorch"]

BLOCKS: dict[str, tuple[int, int]] = {  # type: (weights per block, bytes per block), as in ggml
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


PIECE = 1 << 24  # weights that are written at once
ELEMENTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # unquantised types as NumPy sees them


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

    @property
    def nbytes(self) -> int:
        """Bytes of `data`, without making it."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Some of its rows, along the first axis."""
        return Tensor(self.type, (stop - start, *self.shape[1:]), self.data[start:stop])

    def pieces(self) -> Iterator[Tensor]:
        """All rows, a few at a time: what is written so takes little memory."""
        step = max(1, PIECE // max(1, math.prod(self.shape[1:])))
        if len(self.shape) == 1 or self.shape[0] <= step:
            yield self
            return
        whole = self if isinstance(self, Deferred) and self.part else Tensor(self.type, self.shape, self.data)
        yield from (
            whole.rows(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)
        )

    def array(self) -> np.ndarray:
        """The elements of an unquantised tensor as they are stored, in its shape: bfloat16 as uint16."""
        return np.ascontiguousarray(self.data).view(ELEMENTS[self.type]).reshape(self.shape)

    def float32(self) -> np.ndarray:
        """The values of an unquantised tensor."""
        if self.type == "BF16":
            return (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        if self.type not in ("F32", "F16"):
            raise ValueError(f"a {self.type} tensor has no plain float32 view: decode its blocks")
        return self.data.view("<f4" if self.type == "F32" else "<f2").astype(np.float32, copy=False)


class Deferred(Tensor):
    """A tensor whose data is made each time it is looked at, and not kept: how a large model passes through little
    memory. Where `part` is given it makes only some rows (start, stop), and `layer` one layer of many stacked on axis 1."""

    make: Callable[[], np.ndarray]
    part: Callable[[int, int], np.ndarray] | None
    layer: Callable[[int], np.ndarray] | None

    def __init__(
        self,
        type: str,
        shape: tuple[int, ...],
        make: Callable[[], np.ndarray] | None = None,
        part: Callable[[int, int], np.ndarray] | None = None,
        layer: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        vars(self).update(
            type=type,
            shape=shape,
            make=make or (lambda: part(0, shape[0])),  # type: ignore[misc]
            part=part,
            layer=layer,
        )

    def _bytes(self, shape: tuple[int, ...], made: np.ndarray) -> np.ndarray:
        return Tensor.view(self.type, shape, np.ascontiguousarray(made).view(np.uint8).reshape(-1)).data

    @property
    def data(self) -> np.ndarray:  # type: ignore[override]
        return self._bytes(self.shape, self.make())

    def rows(self, start: int, stop: int) -> Tensor:
        if self.part is None:
            return super().rows(start, stop)
        shape = (stop - start, *self.shape[1:])
        return Tensor(self.type, shape, self._bytes(shape, self.part(start, stop)))


def unstacked(stored: Mapping[str, Tensor], axis: int, pattern: str) -> dict[str, Tensor]:
    """Tensors whose layers lie stacked on an axis, one by one. The groups of `pattern` are the name up to the layer's
    number, and the rest with its separator."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        match = re.fullmatch(pattern, name)
        if match is None or len(tensor.shape) <= axis:
            found[name] = tensor
            continue
        for index in range(min(tensor.shape[axis], LIMITS["layers"])):
            found[f"{match[1]}{match[2][0]}{index}{match[2]}"] = _layer(tensor, axis, index)
    return found


def _layer(tensor: Tensor, axis: int, index: int) -> Tensor:
    def make() -> np.ndarray:
        if axis == 0:
            return tensor.rows(index, index + 1).array()[0]
        if isinstance(tensor, Deferred) and tensor.layer:
            return tensor.layer(index)
        return np.take(tensor.array(), index, axis)

    return Deferred(tensor.type, tensor.shape[:axis] + tensor.shape[axis + 1 :], make)


def plain(type: str, values: np.ndarray) -> np.ndarray:
    """float32 values as elements of an unquantised type, to nearest even."""
    if type == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, bits >> 16 | 0x40, bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.asarray(values, ELEMENTS[type])


@dataclass(frozen=True)
class Row:
    """One kind of tensor. `axes` are the config's letters, rows first; letters side by side multiply into one axis."""

    name: str
    axes: str
    gguf: str
    hf: str
    where: Mapping[str, bool] = field(default_factory=dict)  # only models whose config says so

    def applies(self, config: ModelConfig) -> bool:
        return all(getattr(config, name) == value for name, value in self.where.items())


_POST, _QK = {"post_norms": True}, {"qk_norm": True}

TABLE = (
    Row("embed", "V,D", "token_embd.weight", "model.embed_tokens.weight"),
    Row("final_norm", "D", "output_norm.weight", "model.norm.weight"),
    Row("layers.{i}.attn_norm", "D", "blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("layers.{i}.q", "NH,D", "blk.{i}.attn_q.weight", "model.layers.{i}.self_attn.q_proj.weight"),
    Row("layers.{i}.k", "KH,D", "blk.{i}.attn_k.weight", "model.layers.{i}.self_attn.k_proj.weight"),
    Row("layers.{i}.v", "KH,D", "blk.{i}.attn_v.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    Row(
        "layers.{i}.q_norm",
        "H",
        "blk.{i}.attn_q_norm.weight",
        "model.layers.{i}.self_attn.q_norm.weight",
        _QK,
    ),
    Row(
        "layers.{i}.k_norm",
        "H",
        "blk.{i}.attn_k_norm.weight",
        "model.layers.{i}.self_attn.k_norm.weight",
        _QK,
    ),
    Row("layers.{i}.o", "D,NH", "blk.{i}.attn_output.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Row(
        "layers.{i}.post_attn_norm",
        "D",
        "blk.{i}.post_attention_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        _POST,
    ),
    # Hugging Face says post_attention_layernorm for two different norms: in Gemma 1 it stands before the feed-forward.
    Row(
        "layers.{i}.ffn_norm",
        "D",
        "blk.{i}.ffn_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        {"post_norms": False},
    ),
    Row(
        "layers.{i}.ffn_norm",
        "D",
        "blk.{i}.ffn_norm.weight",
        "model.layers.{i}.pre_feedforward_layernorm.weight",
        _POST,
    ),
    Row("layers.{i}.gate", "F,D", "blk.{i}.ffn_gate.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    Row("layers.{i}.up", "F,D", "blk.{i}.ffn_up.weight", "model.layers.{i}.mlp.up_proj.weight"),
    Row("layers.{i}.down", "D,F", "blk.{i}.ffn_down.weight", "model.layers.{i}.mlp.down_proj.weight"),
    Row(
        "layers.{i}.post_ffn_norm",
        "D",
        "blk.{i}.post_ffw_norm.weight",
        "model.layers.{i}.post_feedforward_layernorm.weight",
        _POST,
    ),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a format that arranges them in its own way: the parts of ours, each with its axes as they lie there.

    Commas divide stored axes, letters side by side multiply, 1 is an axis of one, and N may be spelled K G. The parts
    stand one after another along the letter `join`. The values are ours times `scale`.
    """

    name: str
    parts: Mapping[str, str]  # a layer's tensors without their "layers.{i}."
    join: int = 0
    where: Callable[[ModelConfig], bool] = lambda config: True
    scale: Callable[[ModelConfig], float] = lambda config: 1.0


def _post(config: ModelConfig) -> bool:
    return config.post_norms


def _qk(config: ModelConfig) -> bool:
    return config.qk_norm


def _fused(config: ModelConfig) -> bool:
    return config.kv_heads == config.heads


def _turned(config: ModelConfig) -> bool:
    """DeepMind's `transpose_gating_einsum`: Gemma 3, and Gemma 2 from 9B on."""
    return config.architecture == "gemma3" or config.architecture == "gemma2" and config.width > 2304


def _norms(at: str, end: str, **names: str) -> tuple[Stored, ...]:
    """A layer's norms, under the format's names for them."""
    when = {"post_attn_norm": _post, "post_ffn_norm": _post, "q_norm": _qk, "k_norm": _qk}
    return tuple(
        Stored(
            f"{at}{name}{end}",
            {ours: "H" if ours in ("q_norm", "k_norm") else "D"},
            where=when.get(ours, lambda config: True),
        )
        for ours, name in names.items()
    )


_FLAX, _KERAS, _NEMO, _MAXTEXT = (
    "transformer/layer_{i}/",
    "layers/{block}/",
    "model.decoder.layers.{i}.",
    "decoder/layers/{i}/",
)
ARRANGED: dict[Format, tuple[Stored, ...]] = {
    "flax": (  # google-deepmind/gemma, as published on Kaggle
        Stored("transformer/embedder/input_embedding", {"embed": "V,D"}),
        Stored("transformer/final_norm/scale", {"final_norm": "D"}),
        *_norms(
            _FLAX,
            "/scale",
            attn_norm="pre_attention_norm",
            ffn_norm="pre_ffw_norm",
            q_norm="attn/_query_norm",
            k_norm="attn/_key_norm",
            post_attn_norm="post_attention_norm",
            post_ffn_norm="post_ffw_norm",
        ),
        Stored(_FLAX + "attn/qkv_einsum/w", {"q": "1,N,D,H", "k": "1,K,D,H", "v": "1,K,D,H"}, where=_fused),
        Stored(_FLAX + "attn/q_einsum/w", {"q": "N,D,H"}, where=lambda config: not _fused(config)),
        Stored(
            _FLAX + "attn/kv_einsum/w",
            dict.fromkeys("kv", "1,K,D,H"),
            where=lambda config: not _fused(config),
        ),
        Stored(_FLAX + "attn/attn_vec_einsum/w", {"o": "N,H,D"}),
        Stored(_FLAX + "mlp/gating_einsum/w", dict.fromkeys(("gate", "up"), "1,F,D"), where=_turned),
        Stored(
            _FLAX + "mlp/gating_einsum/w",
            dict.fromkeys(("gate", "up"), "1,D,F"),
            where=lambda config: not _turned(config),
        ),
        Stored(_FLAX + "mlp/linear/w", {"down": "F,D"}),
    ),
    "maxtext": (  # Gemma 1 alone; its layers lie stacked on axis 1 (formats/orbax.py takes them apart)
        Stored("token_embedder/embedding", {"embed": "V,D"}, scale=lambda config: config.width**0.5),
        Stored("decoder/decoder_norm/scale", {"final_norm": "D"}),
        *_norms(_MAXTEXT, "/scale", attn_norm="pre_self_attention_norm", ffn_norm="pre_ffw_norm"),
        Stored(
            _MAXTEXT + "self_attention/query/kernel",
            {"q": "D,N,H"},
            scale=lambda config: config.head_width**-0.5,
        ),
        Stored(_MAXTEXT + "self_attention/key/kernel", {"k": "D,K,H"}),
        Stored(_MAXTEXT + "self_attention/value/kernel", {"v": "D,K,H"}),
        Stored(_MAXTEXT + "self_attention/out/kernel", {"o": "N,H,D"}),
        Stored(_MAXTEXT + "mlp/wi_0/kernel", {"gate": "D,F"}),
        Stored(_MAXTEXT + "mlp/wi_1/kernel", {"up": "D,F"}),
        Stored(_MAXTEXT + "mlp/wo/kernel", {"down": "F,D"}),
    ),
    "keras": (
        Stored("layers/reversible_embedding/vars/0", {"embed": "V,D"}),
        Stored("layers/rms_normalization/vars/0", {"final_norm": "D"}),
        *_norms(
            _KERAS,
            "/vars/0",
            attn_norm="pre_attention_norm",
            ffn_norm="pre_ffw_norm",
            q_norm="attention/query_norm",
            k_norm="attention/key_norm",
            post_attn_norm="post_attention_norm",
            post_ffn_norm="post_ffw_norm",
        ),
        Stored(_KERAS + "attention/query_dense/vars/0", {"q": "N,D,H"}),
        Stored(_KERAS + "attention/key_dense/vars/0", {"k": "K,D,H"}),
        Stored(_KERAS + "attention/value_dense/vars/0", {"v": "K,D,H"}),
        Stored(_KERAS + "attention/output_dense/vars/0", {"o": "N,H,D"}),
        Stored(_KERAS + "gating_ffw/vars/0", {"gate": "D,F"}),
        Stored(_KERAS + "gating_ffw_2/vars/0", {"up": "D,F"}),
        Stored(_KERAS + "ffw_linear/vars/0", {"down": "F,D"}),
    ),
    "nemo": (  # NeMo 1 with Megatron core: Gemma 1 alone
        Stored("model.embedding.word_embeddings.weight", {"embed": "V,D"}),
        Stored("model.decoder.final_layernorm.weight", {"final_norm": "D"}),
        *_norms(
            _NEMO, ".layer_norm_weight", attn_norm="self_attention.linear_qkv", ffn_norm="mlp.linear_fc1"
        ),
        Stored(
            _NEMO + "self_attention.linear_qkv.weight", {"q": "KGH,D", "k": "K1H,D", "v": "K1H,D"}, join=1
        ),
        Stored(_NEMO + "self_attention.linear_proj.weight", {"o": "D,NH"}),
        Stored(_NEMO + "mlp.linear_fc1.weight", {"gate": "F,D", "up": "F,D"}),
        Stored(_NEMO + "mlp.linear_fc2.weight", {"down": "D,F"}),
    ),
    "pytorch": (  # google/gemma_pytorch
        Stored("embedder.weight", {"embed": "V,D"}),
        Stored("model.norm.weight", {"final_norm": "D"}),
        *(
            Stored(row.hf, {row.name.removeprefix("layers.{i}."): row.axes}, where=row.applies)
            for row in TABLE[2:]
            if not re.fullmatch(r"layers\.\{i\}\.[qkv](_norm)?", row.name)
        ),
        *_norms("model.layers.{i}.self_attn.", ".weight", q_norm="query_norm", k_norm="key_norm"),
        Stored("model.layers.{i}.self_attn.qkv_proj.weight", {"q": "NH,D", "k": "KH,D", "v": "KH,D"}),
    ),
}
ONLY_GEMMA_1 = ("maxtext", "nemo")

STORES_ONE_PLUS_NORM = {
    "gguf": True,
    "hf": False,
    "flax": False,
    "maxtext": True,
    "keras": False,
    "nemo": True,
    "pytorch": False,
}
TIED_HEAD = {
    "gguf": "output.weight",
    "hf": "lm_head.weight",
}  # a second copy of the embedding, where a file has one
IGNORED = {
    "gguf": r"rope_freqs\.weight",
    "hf": r".*\.rotary_emb\.inv_freq",  # follow from the config
    "pytorch": r"(local_|global_)?freqs_cis|.*\.rotary_emb\.inv_freq",
    "nemo": r".*(_extra_state|inv_freq)",
}


class Place(NamedTuple):
    name: str  # ours
    stored: str  # the format's
    shape: tuple[int, ...]

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm")


def sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of the axes stand for."""
    return {
        "V": config.vocab,
        "D": config.width,
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_width,
        "F": config.ffn_width,
        "G": config.heads // config.kv_heads,
        "1": 1,
    }


def places(config: ModelConfig, format: Literal["gguf", "hf"]) -> Iterator[Place]:
    """Every tensor that a model of this config has, layer by layer."""
    size = sizes(config)
    rows = [row for row in TABLE if row.applies(config)]
    for layer in (None, *range(config.layers)):
        for row in rows:
            if ("{i}" in row.name) == (layer is not None):
                shape = tuple(math.prod(size[letter] for letter in axis) for axis in row.axes.split(","))
                yield Place(row.name.format(i=layer), getattr(row, format).format(i=layer), shape)


@dataclass(frozen=True)
class Group:
    """A stored tensor of one model: our tensors in it, and how to come from one to the other and back."""

    stored: str
    shape: tuple[int, ...]
    parts: tuple[Place, ...]  # ours; `stored` holds the axes there
    join: int
    scale: float
    size: Mapping[str, int]

    @property
    def is_norm(self) -> bool:
        return self.parts[0].is_norm

    @property
    def same(self) -> bool:
        """Whether it lies there as it does here."""
        return (
            len(self.parts) == 1
            and self.scale == 1
            and self.parts[0].shape == self.shape
            and len({*self._letters(self.parts[0])}) == 1
        )

    def gather(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The stored elements from ours."""
        turned = []
        for place, array in zip(self.parts, arrays, strict=True):
            ours, theirs = self._letters(place)
            loose = array.reshape([self.size[letter] for letter in ours])
            turned.append(
                loose.transpose([ours.index(letter) for letter in theirs if letter != "1"]).reshape(
                    [self.size[letter] for letter in theirs]
                )
            )
        return (turned[0] if len(turned) == 1 else np.concatenate(turned, self.join)).reshape(self.shape)

    def part(self, index: int, array: np.ndarray) -> np.ndarray:
        """One of ours from the stored elements."""
        place = self.parts[index]
        ours, theirs = self._letters(place)
        lengths = [self.size[self._letters(part)[1][self.join]] for part in self.parts]
        loose = [self.size[letter] for letter in theirs]
        whole = array.reshape([*loose[: self.join], sum(lengths), *loose[self.join + 1 :]])
        start = sum(lengths[:index])
        cut = whole[(slice(None),) * self.join + (slice(start, start + lengths[index]),)]
        named = [letter for letter in theirs if letter != "1"]
        return (
            cut.reshape([self.size[letter] for letter in named])
            .transpose([named.index(letter) for letter in ours])
            .reshape(place.shape)
        )

    def _letters(self, place: Place) -> tuple[str, str]:
        """Our letters in their order, and the format's."""
        theirs = place.stored.replace(",", "")
        ours = _AXES[re.sub(r"\d+", "{i}", place.name)]
        return ours.replace("N", "KG") if "G" in theirs else ours, theirs


_AXES = {row.name: row.axes.replace(",", "") for row in TABLE}


def groups(config: ModelConfig, format: Format) -> Iterator[Group]:
    """Every tensor that a file of this format has for a model of this config, layer by layer.

    Raises ValueError where the format cannot hold the architecture.
    """
    if format in ONLY_GEMMA_1 and config.architecture != "gemma":
        raise ValueError(
            f"{format} checkpoints are known here for Gemma 1 (CodeGemma) alone, not for "
            f"{config.architecture}: choose safetensors, gguf, orbax, keras or gemma_pytorch"
        )
    size, shapes = sizes(config), {place.name: place.shape for place in places(config, "hf")}
    rows = [row for row in ARRANGED[format] if row.where(config)]
    for layer in (None, *range(config.layers)):
        for row in rows:
            if ("{" in row.name) != (layer is not None):
                continue
            at = "" if layer is None else f"layers.{layer}."
            parts = tuple(Place(at + ours, axes, shapes[at + ours]) for ours, axes in row.parts.items())
            loose = [list(part.stored.replace(",", "")) for part in parts]
            lengths = [size[letter] for letter in loose[0]]
            lengths[row.join] = sum(size[letters[row.join]] for letters in loose)
            shape, start = [], 0
            for axis in parts[0].stored.split(","):
                shape.append(math.prod(lengths[start : start + len(axis)]))
                start += len(axis)
            yield Group(
                _named(row.name, config, layer), tuple(shape), parts, row.join, row.scale(config), size
            )


def _named(name: str, config: ModelConfig, layer: int | None) -> str:
    kind = "gemma3" if config.architecture == "gemma3" else "gemma"
    return name.format(i=layer, block=f"{kind}_decoder_block" + (f"_{layer}" if layer else ""))


def read(format: Format, path: Path, config: ModelConfig, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from a file's. Raises ValueError on missing, extra or misshapen tensors and on an untied head."""
    wanted = {place.stored: place.shape for place in _stored(config, format)}
    known = wanted.keys() | {TIED_HEAD.get(format, "")}
    extra = [name for name in stored if name not in known and not re.fullmatch(IGNORED.get(format, ""), name)]
    missing = [name for name in wanted if name not in stored]
    stored = {
        name: _cut(tensor, wanted[name]) if format in ARRANGED and name in wanted else tensor
        for name, tensor in stored.items()
    }
    for fault, names in (("lacks", missing), ("also holds", extra)):
        if names:
            raise ValueError(
                f"{path}: {fault} {len(names)} tensors ({', '.join(names[:3])}"
                f"{', ...' * (len(names) > 3)}): a {config.architecture} model of {config.layers} layers "
                f"has exactly {len(wanted)}; the file is incomplete, or of a model unknown here"
            )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {list(stored[name].shape)}, but the "
                f"config makes it {list(shape)}: the header and the weights are of different models"
            )
    if format not in ARRANGED:
        head = TIED_HEAD[format]
        if head in stored:
            _check_tied(path, head, stored[head], stored[next(iter(wanted))])
        return {
            place.name: _factor(format, path, place.stored, stored[place.stored])
            if place.is_norm
            else stored[place.stored]
            for place in places(config, format)
        }  # type: ignore[arg-type]
    tensors = {
        place.name: _factor(format, path, group.stored, stored[group.stored])
        if group.is_norm
        else _part(group, index, stored[group.stored])
        for group in groups(config, format)
        for index, place in enumerate(group.parts)
    }
    return {place.name: tensors[place.name] for place in places(config, "hf")}


def write(format: Format, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same row read backwards: a file's tensors from ours."""
    shift = np.float32(0.0 if STORES_ONE_PLUS_NORM[format] else 1.0)
    if format not in ARRANGED:
        return {
            place.stored: Tensor.of(tensors[place.name].float32() - shift)
            if place.is_norm
            else tensors[place.name]
            for place in places(config, format)
        }  # type: ignore[arg-type]
    return {
        group.stored: Tensor.of(tensors[group.parts[0].name].float32() - shift)
        if group.is_norm
        else _gathered(group, [tensors[place.name] for place in group.parts])
        for group in groups(config, format)
    }


def _cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An embedding without the rows that pad it: DeepMind's has 256,128 for 256,000 tokens."""
    if (
        len(shape) == 2
        and len(tensor.shape) == 2
        and tensor.shape[1] == shape[1]
        and shape[0] < tensor.shape[0] <= shape[0] + 1024
        and shape[0] >= 256_000
    ):
        return Deferred(tensor.type, shape, part=lambda start, stop: tensor.rows(start, stop).data)
    return tensor


def _stored(config: ModelConfig, format: Format) -> Iterator[Place]:
    if format not in ARRANGED:
        return places(config, format)  # type: ignore[arg-type]
    return (Place("", group.stored, group.shape) for group in groups(config, format))


def _part(group: Group, index: int, stored: Tensor) -> Tensor:
    if group.same:
        return stored

    def make() -> np.ndarray:
        array = stored.array()
        if group.scale != 1:
            values = Tensor(stored.type, stored.shape, array.view(np.uint8)).float32() / np.float32(
                group.scale
            )
            array = plain(stored.type, values)
        return group.part(index, array)

    return Deferred(stored.type, group.parts[index].shape, make)


def _gathered(group: Group, ours: list[Tensor]) -> Tensor:
    kinds = sorted({tensor.type for tensor in ours})
    if len(kinds) > 1 or kinds[0] not in ELEMENTS:
        raise ValueError(
            f"tensor {group.stored} is made of {' and '.join(kinds)}, but this format holds unquantised "
            "tensors of one type: pass --dtype"
        )

    if group.same:
        return ours[0]

    def make() -> np.ndarray:
        array = group.gather([tensor.array() for tensor in ours])
        if group.scale != 1:
            values = Tensor(kinds[0], group.shape, np.ascontiguousarray(array).view(np.uint8)).float32()
            array = plain(kinds[0], values * np.float32(group.scale))
        return array

    return Deferred(kinds[0], group.shape, make)


def _factor(format: Format, path: Path, stored: str, norm: Tensor) -> Tensor:
    try:
        values = norm.float32()
    except ValueError:
        raise ValueError(
            f"{path}: tensor {stored} is {norm.type}, but norms are F32, F16 or BF16: convert the model again"
        ) from None
    if STORES_ONE_PLUS_NORM[format]:
        return norm if norm.type == "F32" else Tensor.of(values)
    with np.errstate(invalid="ignore"):  # a damaged norm is reported by name elsewhere
        return Tensor.of(values + np.float32(1))


def _check_tied(path: Path, name: str, head: Tensor, embed: Tensor) -> None:
    same = (head.type, head.shape) == (embed.type, embed.shape) and all(
        np.array_equal(head.data[at : at + 4096], embed.data[at : at + 4096])
        for at in range(0, len(embed.data), 4096)
    )
    if not same:
        raise ValueError(
            f"{path}: tensor {name} differs from the embedding, but Gemma's output layer is the "
            "embedding itself: merge or drop the separate output layer and convert the model again"
        )
