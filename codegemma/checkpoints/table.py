"""Converts the tensors of each file format to ours and back, by one table of names and axes (formats.toml).

Section [axes] of that table lists our tensors; the shapes of each file are checked against it. We hold norm
factors as float32 with the 1 of Gemma's (1 + w) added; some formats store w alone.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from codegemma.checkpoints.tensors import ELEMENTS, ArrayTensor, LazyTensor, Tensor, from_float32
from codegemma.checkpoints.untrusted import damaged
from codegemma.config import ModelConfig

Format = Literal["gguf", "hf", "flax", "maxtext", "keras", "nemo", "pytorch"]
OPTIONAL = ("kv_heads", "head_width", "rope_base", "global_every")  # fields that some writers state as null
MAX_PADDING = 1024  # rows; DeepMind's embedding has 256,128 for 256,000 tokens
AXES = {"V": "vocab", "D": "width", "N": "heads", "K": "kv_heads", "H": "head_width", "F": "ffn_width"}


def _transposed_gating(config: ModelConfig) -> bool:
    """DeepMind's `transpose_gating_einsum`: Gemma 3, and Gemma 2 from 9B on."""
    return config.architecture == "gemma3" or config.architecture == "gemma2" and config.width > 2304


CONDITIONS: dict[str, Callable[[ModelConfig], bool]] = {
    "always": lambda config: True,
    "with_post_norms": lambda config: config.post_norms,
    "without_post_norms": lambda config: not config.post_norms,
    "with_qk_norm": lambda config: config.qk_norm,
    "multi_head": lambda config: config.kv_heads == config.heads,
    "grouped_query": lambda config: config.kv_heads != config.heads,
    "transposed_gating": _transposed_gating,
    "plain_gating": lambda config: not _transposed_gating(config),
}


@cache
def _data(name: str) -> dict[str, Any]:
    text = Path(__file__).with_name(name).read_text("utf-8")
    return tomllib.loads(text) if name.endswith(".toml") else dict(json.loads(text))


def format_table(format: Format) -> dict[str, Any]:
    """The section of a format in formats.toml."""
    return dict(_data("formats.toml")[format])


def written_fields(name: str) -> dict[str, Any]:
    """The constant fields of a document that a format's writer writes, from written_fields.json."""
    return dict(copy.deepcopy(_data("written_fields.json")[name]))


def stored_name(format: Format, name: str) -> str:
    """A format's name of a tensor that it stores unchanged, such as "embed"; {i} stands for the layer."""
    return next(stored for stored, ours in format_table(format)["tensors"]["always"].items() if ours == name)


def is_ignored(format: Format, name: str) -> bool:
    """Whether a stored tensor is not needed: it follows from the config, or is not of the language model."""
    return re.fullmatch(format_table(format).get("ignored", ""), name) is not None


class TensorLocation(NamedTuple):
    """A tensor of a model: our name, the name of the stored tensor that contains it, and our shape."""

    name: str
    stored: str
    shape: tuple[int, ...]

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm")


class TensorPart(NamedTuple):
    """One of our tensors inside a stored one: its name, our axes ("NH,D") and the stored axes ("N,D,H")."""

    name: str
    axes: str
    stored_axes: str

    @property
    def letters(self) -> tuple[str, str]:
        """The letters of our axes and of the stored ones, without commas: ("NHD", "NDH").

        N is written KG where the format splits it.
        """
        ours, stored = self.axes.replace(",", ""), self.stored_axes.replace(",", "")
        return ours.replace("N", "KG") if "G" in stored else ours, stored


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a format stores, made of one or more of ours.

    `join` is the index of the axis letter along which they are joined (0: the first), and `size` gives the
    length of each letter. Stored values are ours times `scale`.
    """

    name: str
    parts: tuple[TensorPart, ...]
    size: Mapping[str, int]
    join: int = 0
    scale: float = 1.0

    @property
    def is_norm(self) -> bool:
        return self.parts[0].name.endswith("norm")

    @property
    def is_plain(self) -> bool:
        """Whether it equals one of our tensors."""
        return len(self.parts) == 1 and self.scale == 1 and self.parts[0].axes == self.parts[0].stored_axes

    @cached_property
    def shape(self) -> tuple[int, ...]:
        axes, lengths = self.parts[0].stored_axes.split(","), iter(self._joined_lengths)
        return tuple(math.prod(next(lengths) for _ in axis) for axis in axes)

    def part_shape(self, index: int) -> tuple[int, ...]:
        """Our shape of a part."""
        return tuple(math.prod(self._lengths(axis)) for axis in self.parts[index].axes.split(","))

    def _lengths(self, letters: str) -> list[int]:
        return [self.size[letter] for letter in letters]

    @property
    def _part_lengths(self) -> list[int]:
        """The length of each part along the letter that joins them."""
        return [self.size[part.letters[1][self.join]] for part in self.parts]

    @property
    def _joined_lengths(self) -> list[int]:
        lengths = self._lengths(self.parts[0].letters[1])
        lengths[self.join] = sum(self._part_lengths)
        return lengths

    def joined(self, tensors: list[Tensor]) -> Tensor:
        """The stored tensor, from our tensors. Raises ValueError on quantised tensors or several types."""
        types = sorted({tensor.type for tensor in tensors})
        if len(types) > 1 or types[0] not in ELEMENTS:
            rule = "but this format holds unquantised tensors of one type"
            raise ValueError(f"tensor {self.name} is made of {' and '.join(types)}, {rule}: pass --dtype")
        if self.is_plain:
            return tensors[0]

        def compute() -> np.ndarray:
            arrays = []
            for part, tensor in zip(self.parts, tensors, strict=True):
                ours, stored = part.letters
                arrays.append(self._transposed(tensor.array(), ours, stored).reshape(self._lengths(stored)))
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, self.join)
            return _scaled(types[0], array.reshape(self.shape), self.scale, np.multiply)

        return LazyTensor.computed(types[0], self.shape, compute)

    def part(self, index: int, tensor: Tensor) -> Tensor:
        """One of our tensors, from the stored tensor."""
        if self.is_plain:
            return tensor

        def compute() -> np.ndarray:
            ours, stored = self.parts[index].letters
            array = _scaled(tensor.type, tensor.array(), self.scale, np.divide)
            boundaries = np.cumsum(self._part_lengths)[:-1]
            part = np.split(array.reshape(self._joined_lengths), boundaries, self.join)[index]
            return self._transposed(part, stored, ours).reshape(self.part_shape(index))

        return LazyTensor.computed(tensor.type, self.part_shape(index), compute)

    def _transposed(self, array: np.ndarray, axes: str, new_axes: str) -> np.ndarray:
        """Brings axes into another order; axes of one element ("1") are dropped."""
        axes, new_axes = axes.replace("1", ""), new_axes.replace("1", "")
        return array.reshape(self._lengths(axes)).transpose([axes.index(letter) for letter in new_axes])


def stored_tensors(config: ModelConfig, format: Format) -> list[StoredTensor]:
    """All tensors in a file of this format for a model of this config: layer by layer, in our order.

    Raises ValueError where the format cannot hold the architecture.
    """
    table = format_table(format)
    if table.get("only_gemma_1") and config.architecture != "gemma":
        others = "choose safetensors, gguf, orbax, keras or gemma_pytorch"
        raise ValueError(f"{format} is supported for Gemma 1 alone, not for {config.architecture}: {others}")
    size = {letter: getattr(config, field) for letter, field in AXES.items()}
    size |= {"G": config.heads // config.kv_heads, "1": 1}
    templates = [
        _template(name, entry, size)
        for condition, entries in table["tensors"].items()
        if CONDITIONS[condition](config)
        for name, entry in entries.items()
    ]
    order = list(_data("formats.toml")["axes"])
    templates.sort(key=lambda template: order.index(template.parts[0].name))
    keras_block = f"{'gemma3' if config.architecture == 'gemma3' else 'gemma'}_decoder_block"
    stored = []
    for layer in (None, *range(config.layers)):
        names = {"i": layer, "block": f"{keras_block}_{layer}" if layer else keras_block}
        for template in templates:
            if ("{" in template.name) == (layer is not None):
                parts = tuple(part._replace(name=part.name.format(**names)) for part in template.parts)
                stored.append(replace(template, name=template.name.format(**names), parts=parts))
    return stored


def _template(name: str, entry: str | dict[str, Any], size: Mapping[str, int]) -> StoredTensor:
    """The tensor of an entry in formats.toml; {i} or {block} in its names stands for the layer."""
    axes, prefix = _data("formats.toml")["axes"], "layers.{i}." if "{" in name else ""
    if isinstance(entry, str):
        return StoredTensor(name, (TensorPart(prefix + entry, *[axes[prefix + entry]] * 2),), size)
    parts = dict(entry)
    join, (letter, power) = parts.pop("join", 0), parts.pop("scale", ("1", 1))
    ours = tuple(TensorPart(prefix + part, axes[prefix + part], stored) for part, stored in parts.items())
    return StoredTensor(name, ours, size, join, size[letter] ** power)


def config_defaults(format: Format, architecture: str) -> dict[str, Any]:
    """The fields of ModelConfig that a file of this format may leave out."""
    defaults = format_table(format).get("defaults", {}).get(architecture, {})
    return {**_data("formats.toml")["architectures"][architecture], **defaults}


def config_values(format: Format, architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig from a format's keys; a missing key gives the default, or None.

    A null counts as missing for the OPTIONAL fields; for others, such as a window, it means "none".
    """
    defaults, keys = config_defaults(format, architecture), format_table(format)["config"]
    values = {name: fields.get(key, defaults.get(name)) for name, key in keys.items()}
    null = [name for name in OPTIONAL if name in values and values[name] is None]
    return defaults | values | {name: defaults.get(name) for name in null}


def config_keys(format: Format, config: ModelConfig) -> dict[str, Any]:
    """The fields of a config under a format's own keys."""
    return {key: getattr(config, name) for name, key in format_table(format)["config"].items()}


def global_period(label: str, is_global: list[bool], layers: int, default: int = 1) -> int:
    """The period of global layers, from a list that says of each layer whether it is global.

    Where none is, the period is `default`, or the number of layers + 1 if that is more. Raises ValueError,
    with `label`, where the list has no period.
    """
    if len(is_global) != layers:
        raise damaged(f"{label} must be a list with an entry for each of {layers} layers")
    period = is_global.index(True) + 1 if True in is_global else max(default, layers + 1)
    if is_global != [(layer + 1) % period == 0 for layer in range(layers)]:
        rule = "does not repeat one global layer after a fixed number of local ones: choose a Gemma"
        raise ValueError(f"{label} {is_global} {rule}")
    return period


def tensor_locations(config: ModelConfig, format: Format = "hf") -> Iterator[TensorLocation]:
    """Each of our tensors of a model, layer by layer, and where a format stores it."""
    for stored in stored_tensors(config, format):
        for index, part in enumerate(stored.parts):
            yield TensorLocation(part.name, stored.name, stored.part_shape(index))


def from_format(
    format: Format, path: Path, config: ModelConfig, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors, by name, from those of a file. Errors name `path`.

    Raises ValueError on missing, extra or misshapen tensors, and on an untied output layer.
    """
    expected_tensors = {tensor.name: tensor for tensor in stored_tensors(config, format)}
    head = format_table(format).get("tied_head", "")
    missing = [name for name in expected_tensors if name not in stored]
    extra = [
        name
        for name in stored
        if name not in expected_tensors and name != head and not is_ignored(format, name)
    ]
    for fault, names in (("lacks", missing), ("also holds", extra)):
        if names:
            listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            model = (
                f"a {config.architecture} model of {config.layers} layers has exactly {len(expected_tensors)}"
            )
            raise damaged(f"{path}: {fault} {len(names)} tensors ({listed}), but {model}")
    tensors: dict[str, Tensor] = {}
    for name, expected in expected_tensors.items():
        tensor = stored[name] if format in ("gguf", "hf") else _without_padding(stored[name], expected.shape)
        if tensor.shape != expected.shape:
            shapes = f"has shape {list(tensor.shape)}, but the config makes it {list(expected.shape)}"
            raise damaged(f"{path}: tensor {name} {shapes}")
        for index, part in enumerate(expected.parts):
            if expected.is_norm:
                tensors[part.name] = _norm_factor(format, path, name, tensor)
            else:
                tensors[part.name] = expected.part(index, tensor)
    if head in stored:
        _check_tied(path, head, stored[head], tensors["embed"])
    return tensors


def to_format(format: Format, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by its names, from ours. Raises ValueError on types that the format cannot hold."""
    shift = np.float32(0 if format_table(format).get("includes_one") else 1)
    stored: dict[str, Tensor] = {}
    for target in stored_tensors(config, format):
        ours = [tensors[part.name] for part in target.parts]
        if target.is_norm:
            stored[target.name] = ArrayTensor.of(ours[0].float32() - shift)
        elif format in ("gguf", "hf"):
            stored[target.name] = ours[0]
        else:
            stored[target.name] = target.joined(ours)
    return stored


def _without_padding(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor without padding rows, which only embeddings of at least 256,000 rows have."""
    is_embedding = (
        len(shape) == len(tensor.shape) == 2 and tensor.shape[1] == shape[1] and shape[0] >= 256_000
    )
    if not is_embedding or not shape[0] < tensor.shape[0] <= shape[0] + MAX_PADDING:
        return tensor
    return LazyTensor(tensor.type, shape, lambda start, stop: tensor.rows(start, stop).data)


def _scaled(type: str, elements: np.ndarray, scale: float, operation: np.ufunc) -> np.ndarray:
    """Elements of an unquantised type multiplied or divided by a number, in float32."""
    if scale == 1:
        return elements
    values = ArrayTensor(type, elements.shape, np.ascontiguousarray(elements).view(np.uint8)).float32()
    return from_float32(type, operation(values, np.float32(scale)))


def _norm_factor(format: Format, path: Path, name: str, norm: Tensor) -> Tensor:
    if norm.type not in ELEMENTS:
        raise damaged(f"{path}: tensor {name} is {norm.type}, but norms are F32, F16 or BF16")
    values = norm.float32()
    if format_table(format).get("includes_one"):
        return norm if norm.type == "F32" else ArrayTensor.of(values)
    with np.errstate(invalid="ignore"):  # NaN in a damaged norm is reported elsewhere, by its name
        return ArrayTensor.of(values + np.float32(1))


def _check_tied(path: Path, name: str, head: Tensor, embed: Tensor) -> None:
    if (head.type, head.shape) != (embed.type, embed.shape) or not all(
        np.array_equal(ours.data, theirs.data)
        for ours, theirs in zip(head.pieces(), embed.pieces(), strict=True)
    ):
        rule = "differs from the embedding, but Gemma's output layer is the embedding"
        remedy = "remove this tensor, or export the model with tied embeddings"
        raise ValueError(f"{path}: tensor {name} {rule}: {remedy}")
