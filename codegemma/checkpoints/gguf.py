"""GGUF, the file format of llama.cpp (versions 2 and 3, little endian): read by memory map, written tensor by tensor.

Layout as in ggml's docs/gguf.md: magic, version, counts, typed key-values, tensor infos, then aligned tensor data.
Nothing in the header is believed before it is checked against the file's length, and no array is copied.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codegemma.checkpoints import table as weights
from codegemma.checkpoints.table import Tensor, row_bytes
from codegemma.config import LIMITS, ModelConfig
from codegemma.files import mapped, replacing, resuming
from codegemma.tokenizer import Tokenizer

TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
FOREIGN_TYPES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
_CODES = {np.dtype(name): code for code, name in SCALARS.items()}
_STRUCTS = {code: struct.Struct("<" + letter) for code, letter in zip(SCALARS, "BbHhIif?Qqd", strict=True)}
_U32, _U64 = _STRUCTS[4], _STRUCTS[10]

ALIGNMENT = 32
MOST_ENTRIES = 65_536  # key-values, tensors
MOST_ITEMS = LIMITS["vocab"]  # strings in arrays
MOST_STRING = 1 << 24  # bytes; the longest real one is a chat template


class Strings(Sequence[str]):
    """An array of strings, left in the file until it is looked at (a vocabulary holds 262,144 of them)."""

    def __init__(self, name: str, data: mmap.mmap, start: int, end: int, count: int) -> None:
        self._name, self._data, self._start, self._end, self._count = name, data, start, end, count

    @property
    def raw(self) -> bytes:
        """The array as it lies in the file, each string after its length: enough to tell two arrays apart."""
        return self._data[self._start : self._end]

    @cached_property
    def _items(self) -> list[str]:
        raw, at, items, length = self.raw, 0, [], _U64.unpack_from
        try:
            for _ in range(self._count):
                end = at + 8 + length(raw, at)[0]
                items.append(raw[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._name}: string {len(items)} is not UTF-8 ({error.reason}): "
                "the file is damaged, or its converter wrote bytes"
            ) from None
        return items

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


class Contents(NamedTuple):
    """A file's header values and its tensors under their own names; `tensors` are views of the memory map."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Header:
    """A cursor over the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.items = path, data, 0, 0

    def fault(self, what: str, remedy: str = "download or convert the file again") -> ValueError:
        return ValueError(f"{self.path}: {what}: {remedy}")

    def number(self, kind: struct.Struct) -> Any:
        if self.at + kind.size > len(self.data):
            raise self.fault(f"ends inside its header, at byte {len(self.data):,}")
        value = kind.unpack_from(self.data, self.at)[0]
        self.at += kind.size
        return value

    def count(self, of: str, most: int, kind: struct.Struct = _U64) -> int:
        value = self.number(kind)
        if value > most:
            raise self.fault(f"claims {value:,} {of}, but at most {most:,} make sense")
        return value

    def skip(self, size: int, what: str) -> int:
        start = self.at
        if size > len(self.data) - start:
            raise self.fault(f"{what} reaches beyond the end of the file ({len(self.data):,} bytes)")
        self.at += size
        return start

    def string(self, what: str, most: int = MOST_STRING) -> str:
        size = self.count(f"bytes in {what}", most)
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8 ({error.reason})") from None

    def value(self, key: str) -> Any:
        code = self.number(_U32)
        if code == STRING:
            return self.string(f"the value of {key}")
        if code == ARRAY:
            return self.array(key)
        if code not in _STRUCTS:
            raise self.fault(f"{key} has the unknown value type {code}")
        number = self.number(_STRUCTS[code])
        return (
            float(str(np.float32(number))) if SCALARS[code] == "<f4" else number
        )  # 1e-6, not 9.99999997e-07

    def array(self, key: str) -> np.ndarray | Strings:
        code, count = self.number(_U32), self.number(_U64)
        if code == STRING:
            return self.strings(key, count)
        if code not in SCALARS:
            raise self.fault(
                f"{key} is an array of the value type {code}, but only numbers and strings are known"
            )
        dtype = np.dtype(SCALARS[code])
        start = self.skip(count * dtype.itemsize, f"the array {key} of {count:,} items")
        raw = np.frombuffer(self.data, np.uint8, count * dtype.itemsize, start)
        return raw.view(dtype) if code != 7 else raw != 0

    def strings(self, key: str, count: int) -> Strings:
        self.items += count
        if self.items > MOST_ITEMS:
            raise self.fault(f"{key} claims {count:,} strings, but at most {MOST_ITEMS:,} in all make sense")
        data, at, length = self.data, self.at, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + length(data, at)[0]
        except (struct.error, OverflowError):
            at = len(data) + 1
        start = self.skip(at - self.at, f"the array {key} of {count:,} strings")
        return Strings(f"{self.path}: {key}", data, start, at, count)


def read(path: Path) -> Contents:
    """Reads header and tensor places. Raises ValueError naming the file and the rule broken; OSError as `open` does."""
    header = _Header(path, mapped(path))
    if header.data[:4] != b"GGUF":
        raise header.fault("is not a GGUF file: it does not begin with GGUF", "check the path")
    header.at = 4
    version = header.number(_U32)
    if version & 0xFFFF == 0:
        raise header.fault("is a big-endian GGUF", "convert it for little-endian machines")
    if version not in (2, 3):
        raise header.fault(
            f"is GGUF version {version}, but only 2 and 3 are known", "convert the model again"
        )
    tensors, entries = header.count("tensors", MOST_ENTRIES), header.count("header entries", MOST_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = header.string("a key", 65_535)
        if key in metadata:
            raise header.fault(f"the key {key} stands twice in its header")
        metadata[key] = header.value(key)
    return Contents(metadata, _tensors(header, tensors, metadata.get("general.alignment", ALIGNMENT)))


def _tensors(header: _Header, count: int, alignment: Any) -> dict[str, Tensor]:
    if not isinstance(alignment, int) or alignment % 8 or not 8 <= alignment <= 1 << 20:
        raise header.fault(f"general.alignment must be a multiple of 8, got {alignment!r}")
    infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = header.string("a tensor name", 1024)
        if name in infos:
            raise header.fault(f"the tensor {name} stands twice in its header")
        infos[name] = _info(header, name)
    start = -(-header.at // alignment) * alignment
    raw = np.frombuffer(header.data, np.uint8)
    tensors, previous, end = {}, "", 0
    for name, (type, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        size = math.prod(shape[:-1]) * row_bytes(type, shape[-1])
        if offset % alignment:
            raise header.fault(
                f"tensor {name} begins at offset {offset}, which is no multiple of {alignment}"
            )
        if offset < end:
            raise header.fault(f"tensors {previous} and {name} overlap")
        previous, end = name, offset + size
        if start + end > len(raw):
            raise header.fault(
                f"tensor {name} needs {start + end:,} bytes of file, but there are {len(raw):,}"
            )
        tensors[name] = Tensor.view(type, shape, raw[start + offset : start + end])
    return {name: tensors[name] for name in infos}


def _info(header: _Header, name: str) -> tuple[str, tuple[int, ...], int]:
    """Type, shape (rows first: GGUF counts its axes from the innermost) and offset within the data."""
    axes = header.count(f"axes in tensor {name}", 4, _U32)
    shape = tuple(header.number(_U64) for _ in range(axes))[::-1]
    code, offset = header.number(_U32), header.number(_U64)
    if not shape or not all(1 <= size <= 1 << 31 for size in shape):
        raise header.fault(f"tensor {name} has the impossible shape {list(shape)}")
    if code not in TYPES:
        raise header.fault(
            f"tensor {name} is {FOREIGN_TYPES.get(code, f'of the unknown type {code}')}, which this "
            "program does not compute with",
            "use a Q4_K_M, Q5_K_M, Q6_K, Q8_0, Q4_0, BF16 or F16 file",
        )
    try:
        row_bytes(TYPES[code], shape[-1])
    except ValueError as error:
        raise header.fault(f"tensor {name}: {error}") from None
    return TYPES[code], shape, offset


# The header's keys for the fields of ModelConfig, read and written.
KEYS = {
    "layers": "block_count",
    "width": "embedding_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "ffn_width": "feed_forward_length",
    "context": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_base": "rope.freq_base",
    "rope_base_local": "rope.freq_base_swa",
    "rope_scale": "rope.scaling.factor",
    "window": "attention.sliding_window",
    "global_every": "attention.sliding_window_pattern",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
# What a key that is not there stands for (llama.cpp's load_hparams). Its rope.freq_base is 10000 for every
# architecture, but no Gemma 3 was trained so: converters that leave the key out mean 1e6.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"window": 4096, "global_every": 2, "attention_softcap": 50.0, "final_softcap": 30.0},
    "gemma3": {"rope_base": 1e6, "rope_base_local": 1e4, "global_every": 6},
}


def config(path: Path, metadata: Mapping[str, Any], vocab: int) -> ModelConfig:
    """The architecture that the header describes. Raises ValueError on one that is no Gemma 1, 2 or 3."""
    architecture: Any = str(metadata.get("general.architecture"))
    if architecture not in DEFAULTS:
        raise ValueError(
            f"{path}: general.architecture is {architecture!r}, but this program runs "
            f"{', '.join(DEFAULTS)}: choose a Gemma or CodeGemma file"
        )
    values: dict[str, Any] = {"rope_base": 1e4, **DEFAULTS[architecture]}
    stated = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    values |= {field: stated[key] for field, key in KEYS.items() if key in stated}
    for required in ("layers", "width", "heads", "ffn_width", "context", "norm_eps"):
        if required not in values:
            raise ValueError(
                f"{path}: the header lacks {architecture}.{KEYS[required]}: convert the model again"
            )
    for name, value in values.items():
        if not isinstance(value, (int, float)):
            raise ValueError(
                f"{path}: {architecture}.{KEYS[name]} must be one number: "
                "per-layer values and text are of another kind of model"
            )
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_width", values["width"] // max(1, values["heads"]))
    values.setdefault("rope_base_local", values["rope_base"])
    for name in ("window", "attention_softcap", "final_softcap"):  # 0 stands for none
        values[name] = values.get(name) or None
    if values["window"] is None:
        values["global_every"] = 1
    for key in ("attention.value_length", "rope.dimension_count"):
        if str(stated.get(key, values["head_width"])) != str(values["head_width"]):
            raise ValueError(
                f"{path}: {architecture}.{key} must equal attention.key_length ({values['head_width']}) "
                "in a Gemma model: convert the model again"
            )
    if str(stated.get("rope.scaling.type", "linear")) not in ("linear", "none"):
        raise ValueError(
            f"{path}: {architecture}.rope.scaling.type must be linear or none, as in every Gemma"
        )
    later = architecture != "gemma"
    try:
        return ModelConfig(
            architecture,
            vocab=vocab,
            post_norms=later,
            qk_norm=architecture == "gemma3",
            query_scale=_query_scale(architecture, values),
            **values,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _query_scale(architecture: str, values: Mapping[str, Any]) -> float:
    """Factor on q: no key holds it; llama.cpp knows the 27B models, whose factor differs, by their layers."""
    odd = {"gemma2": 46, "gemma3": 62}.get(architecture) == values["layers"]
    return max(1, values["width"] // max(1, values["heads"])) ** -0.5 if odd else 0.0


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """The header entries for a config: `config` read backwards. Raises ValueError for what GGUF cannot say."""
    entries: dict[str, Any] = {"general.architecture": config.architecture}
    implied = {
        "rope_base_local": config.rope_base,
        "rope_scale": 1.0,
        "global_every": 1,
        "window": 0,
        "attention_softcap": 0,
        "final_softcap": 0,
        **DEFAULTS[config.architecture],
    }
    for field, key in KEYS.items():
        value = getattr(config, field) or 0
        if field == "rope_base" or implied.get(field) != value:
            entries[f"{config.architecture}.{key}"] = value
    if config.rope_scale != 1:
        entries[f"{config.architecture}.rope.scaling.type"] = "linear"
    entries[f"{config.architecture}.attention.value_length"] = config.head_width
    scale = _query_scale(config.architecture, vars(config)) or config.head_width**-0.5
    if not math.isclose(config.query_scale, scale, rel_tol=1e-6):
        raise ValueError(
            f"GGUF has no key for the query scale {config.query_scale}: readers of a "
            f"{config.architecture} file take {scale}; write safetensors instead"
        )
    return entries


def tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the header. Raises ValueError where there is none, or none that Gemma uses."""
    kind = metadata.get("tokenizer.ggml.model")
    pieces, scores, types = (
        metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    if not (
        str(kind) == "llama"
        and isinstance(pieces, Strings)
        and isinstance(scores, np.ndarray)
        and isinstance(types, np.ndarray)
        and len(pieces) == scores.size == types.size
    ):
        raise ValueError(
            f"{path}: the header's tokenizer ({kind!r}) is not a complete "
            "SentencePiece vocabulary (tokens, scores, token_type): convert the model again"
        )
    return Tokenizer.cached(
        b"gguf" + pieces.raw + scores.tobytes() + types.tobytes(),
        lambda: Tokenizer.from_pieces(pieces, scores, types),
    )


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], Callable[[], Tokenizer] | None]:
    """Config, our tensors, header, and what builds the tokenizer (None where the file has none)."""
    metadata, stored = read(path)
    embed = next(iter(weights.TABLE)).gguf
    if str(metadata.get("split.count", 1)) not in ("0", "1"):
        raise ValueError(
            f"{path}: is one part of a model split into several files: join them with "
            "llama-gguf-split --merge"
        )
    vocab = stored[embed].shape[0] if embed in stored else 1
    model = config(path, metadata, vocab)
    tensors = weights.read("gguf", path, model, stored)
    pieces = metadata.get("tokenizer.ggml.tokens")
    if pieces is None:
        return model, tensors, metadata, None
    if not isinstance(pieces, Strings) or len(pieces) > vocab:
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens must be at most {vocab:,} strings, one for each row of "
            f"{embed}: convert the model again"
        )
    return model, tensors, metadata, lambda: tokenizer(path, metadata)


def _value_bytes(value: Any) -> bytes:
    """A value with its type code. Python numbers take the types that llama.cpp asks for: u32, f32, bool."""
    if isinstance(value, str):
        return _U32.pack(STRING) + _text(value)
    if isinstance(value, Strings) or (
        isinstance(value, (list, tuple)) and value and isinstance(value[0], str)
    ):
        return _U32.pack(ARRAY) + _U32.pack(STRING) + _U64.pack(len(value)) + b"".join(map(_text, value))
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.array(value, "<u4" if 0 <= value < 1 << 32 else "<i8" if value < 1 << 63 else "<u8")
    array = np.asarray(value)
    if isinstance(value, (float, list, tuple)) and array.dtype in (np.float64, np.int64):
        array = array.astype("<f4" if array.dtype == np.float64 else "<i4")
    code = _U32.pack(_CODES[array.dtype.newbyteorder("<")])
    head = _U32.pack(ARRAY) + code + _U64.pack(array.size) if array.ndim else code
    return head + array.tobytes()


def _text(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


Data = np.ndarray | Callable[[], np.ndarray | Iterator[np.ndarray]]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, str, tuple[int, ...], Data]],
    stamp: str | None = None,
) -> None:
    """Writes (name, type, shape, data) one by one; `path` appears only when complete.

    `data` are the bytes of the blocks, or a callable that gives them, whole or in pieces, when their turn comes, so that
    a large model passes through little memory. With a `stamp`, which must tell all that the file depends on, an
    interrupted file is gone on with: tensors that are in it already are not asked for.
    """
    infos = list(tensors)
    header = [b"GGUF", _U32.pack(3), _U64.pack(len(infos)), _U64.pack(len(metadata))]
    header += [_text(key) + _value_bytes(value) for key, value in metadata.items()]
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    codes = {name: code for code, name in TYPES.items()}
    places, end = [], 0
    for name, type, shape, _ in infos:
        header.append(
            _text(name)
            + _U32.pack(len(shape))
            + b"".join(map(_U64.pack, shape[::-1]))
            + _U32.pack(codes[type])
            + _U64.pack(end)
        )
        places.append((end, end + math.prod(shape[:-1]) * row_bytes(type, shape[-1])))
        end = -(-places[-1][1] // alignment) * alignment
    head = b"".join(header)
    head += bytes(-len(head) % alignment)
    with replacing(path) if stamp is None else resuming(path, stamp) as file:
        kept = 0 if stamp is None or file.read(len(head)) != head else file.seek(0, 2)
        file.seek(0)
        file.write(head)
        for (name, _, _, data), (start, stop) in zip(infos, places, strict=True):
            if len(head) + stop > kept:
                file.truncate(file.seek(len(head) + start))
                made = data() if callable(data) else data
                for piece in [made] if isinstance(made, np.ndarray) else made:
                    file.write(np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data)
                if (size := file.tell() - len(head) - start) != stop - start:
                    raise ValueError(
                        f"{path}: tensor {name} has {size:,} bytes, but its type and shape make "
                        f"{stop - start:,}"
                    )
        file.truncate(len(head) + end)


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The header entries for a vocabulary, padded to the embedding's rows, with every id that steers or ends.

    llama.cpp ends a generation at the ids under eos, eot and fim_sep: the separator is CodeGemma's own terminator.
    """
    names, scores, kinds = tokenizer.pieces()
    for token in range(len(names), rows):
        names, scores, kinds = [*names, f"[PAD{token}]"], [*scores, 0.0], [*kinds, 5]
    names = [
        name.replace("\u2581", " ") if kind == 4 else name for name, kind in zip(names, kinds, strict=True)
    ]
    control = tokenizer.control
    ids = {
        "bos": control.bos,
        "eos": control.eos,
        "unknown": control.unk,
        "padding": control.pad,
        "fim_pre": control.fim_prefix,
        "fim_mid": control.fim_middle,
        "fim_suf": control.fim_suffix,
        "fim_sep": control.file_separator,
        "eot": control.end_of_turn,
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": np.array(scores, "<f4"),
        "tokenizer.ggml.token_type": np.array(kinds, "<i4"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None},
    }


FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "BF16": 32,
}  # llama.cpp's names for what most matrices are


def save(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    kept: Mapping[str, Any],
    name: str,
    template: str | None,
    stamp: str | None = None,
) -> None:
    """Writes a file that llama.cpp reads, tensor by tensor. `kept` are a source header's entries that stay; `stamp` as in
    `write_gguf`."""
    stored = weights.write("gguf", config, tensors)
    kinds = [tensor.type for tensor in tensors.values() if len(tensor.shape) == 2]
    metadata = {
        **config_metadata(config),
        "general.name": name,
        **kept,
        "general.file_type": FILE_TYPES[max(set(kinds), key=kinds.count)],
        "general.quantization_version": 2,
    }
    if tokenizer:
        metadata |= tokenizer_metadata(tokenizer, config.vocab)
    if template:
        metadata["tokenizer.chat_template"] = template
    write_gguf(
        path,
        metadata,
        [
            (key, tensor.type, tensor.shape, lambda tensor=tensor: (piece.data for piece in tensor.pieces()))  # type: ignore[misc]
            for key, tensor in stored.items()
        ],
        stamp,
    )
