"""NeMo 1 archives (.nemo) without NeMo: a tar, plain or gzipped, of model_config.yaml, weights and a tokenizer.

The weights are one PyTorch archive (model_weights.ckpt) or a distributed checkpoint of Megatron core in a directory:
Zarr arrays, or PyTorch's (.metadata and *.distcp); there the layers lie stacked on axis 0. A tar is never unpacked: its
members are looked up by name and mapped where they lie, so that no path in it means anything.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import mmap
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import table as weights
from codegemma.checkpoints import torch
from codegemma.checkpoints.table import BLOCKS, Deferred, Tensor
from codegemma.config import ModelConfig
from codegemma.files import mapped, missing, replacing
from codegemma.tokenizer import Tokenizer

ZARR_TYPES = {"bfloat16": "BF16", "<f4": "F32", "<f2": "F16"}
STACK = r"(.*decoder\.layers)(\.\D.*)"
# Megatron core refuses a checkpoint without the state (none, as nothing is 8-bit here) of Transformer Engine's modules.
ENGINE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
MOST_MEMBERS = 65_536
MOST_CONFIG = 1 << 20
MOST_INFLATION = 20  # bytes from one byte of gzip; weights hardly shrink at all
KEYS = {
    "layers": "num_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_query_groups",
    "head_width": "kv_channels",
    "ffn_width": "ffn_hidden_size",
    "context": "encoder_seq_length",
    "norm_eps": "layernorm_epsilon",
}
FIXED = {
    "mcore_gpt": True,
    "normalization": "rmsnorm",
    "activation": "geglu",
    "openai_gelu": True,
    "bias": False,
    "apply_embedding_scaling": True,
    "share_embeddings_and_output_weights": True,
    "rotary_percentage": 1.0,
    "position_embedding_type": "rope",
    "transformer_block_type": "pre_ln",
}

Members = dict[str, np.ndarray]


def members(path: Path) -> Members:
    """The bytes of every file in the archive (or in an unpacked one, a directory), without a leading "./"."""
    if path.is_dir():
        files = list(
            itertools.islice((file for file in sorted(path.rglob("*")) if file.is_file()), MOST_MEMBERS)
        )
        return {
            str(file.relative_to(path)): np.frombuffer(mapped(file), np.uint8)
            if file.stat().st_size
            else np.empty(0, np.uint8)
            for file in files
        }
    data: Any = mapped(path)
    if data[:2] == b"\x1f\x8b":
        data = _inflated(path)
    raw = np.frombuffer(data, np.uint8)
    found: Members = {}
    try:
        with tarfile.open(fileobj=torch._File(data), mode="r:") as archive:  # type: ignore[call-overload]
            for count, info in enumerate(archive):
                if count >= MOST_MEMBERS:
                    raise ValueError(f"{path}: holds more than {MOST_MEMBERS:,} members: it is no model")
                if info.isreg() and not info.sparse:
                    if info.size < 0 or info.offset_data + info.size > raw.size:
                        raise ValueError(
                            f"{path}: its member {info.name} reaches beyond the end: download it again"
                        )
                    found[info.name.removeprefix("./")] = raw[info.offset_data : info.offset_data + info.size]
    except (tarfile.TarError, OSError, OverflowError) as error:
        raise ValueError(f"{path}: is no readable tar archive ({error}): download it again") from None
    return found


def _inflated(path: Path) -> Any:
    """A map of the unzipped archive, in an unnamed file beside it that goes away with the map."""
    most = path.stat().st_size * MOST_INFLATION + (1 << 20)
    with tempfile.TemporaryFile(dir=path.parent) as out, gzip.open(path) as source:
        try:
            while block := source.read(1 << 20):
                out.write(block)
                if out.tell() > most:
                    raise ValueError(
                        f"{path}: grows to more than {MOST_INFLATION} times its size: it is no model"
                    )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: is a damaged gzip file ({error}): download it again") from None
        out.flush()
        return mmap.mmap(out.fileno(), 0, access=mmap.ACCESS_READ) if out.tell() else b""


def read(path: Path, found: Members) -> dict[str, Tensor]:
    """The tensors of an archive, layer by layer, whichever of the three forms its weights have."""
    plain = [name for name in found if name.rpartition("/")[2] == "model_weights.ckpt"]
    if len(plain) == 1 and "/" not in plain[0]:
        return torch.state(
            str(path), torch.read(f"{path}: {plain[0]}", found[plain[0]]), weights.IGNORED["nemo"]
        )
    if plain:
        raise ValueError(
            f"{path}: is split into {len(plain)} parts for tensor parallelism: save it again with "
            "tensor_model_parallel_size=1"
        )
    if "model_weights/.metadata" in found:
        return weights.unstacked(dict(_distributed(path, found)), 0, STACK)
    arrays = [name.split("/")[1] for name in found if re.fullmatch(r"model_weights/[^/]+/\.zarray", name)]
    if not arrays:
        raise ValueError(
            f"{path}: holds neither model_weights.ckpt nor a distributed checkpoint in model_weights/: "
            "export the model again"
        )
    return weights.unstacked({name: _zarr(path, found, name) for name in arrays}, 0, STACK)


def _zarr(path: Path, found: Members, name: str) -> Tensor:
    """A Zarr array of uncompressed chunks, put together when it is looked at."""
    at = f"model_weights/{name}/"
    try:
        described = json.loads(bytes(found[at + ".zarray"][:65_536]))
        shape, chunk = tuple(described["shape"]), tuple(described["chunks"])
        type, packed = ZARR_TYPES[described["dtype"]], described["compressor"] or described.get("filters")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: array {name} is described in a way unknown here ({error}): export the model again"
        ) from None
    if (
        packed
        or described.get("order", "C") != "C"
        or len(shape) != len(chunk)
        or not shape
        or not all(isinstance(n, int) and 0 < n <= 1 << 31 for n in shape + chunk)
    ):
        raise ValueError(
            f"{path}: array {name} is compressed or of the impossible shape {list(shape)} in chunks of "
            f"{list(chunk)}: export the model again"
        )
    grid = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    if math.prod(grid) > MOST_MEMBERS:
        raise ValueError(f"{path}: array {name} has {math.prod(grid):,} chunks: export the model again")
    size = math.prod(chunk) * BLOCKS[type][1]
    dot = described.get("dimension_separator", ".")
    chunks = {index: found.get(at + dot.join(map(str, index))) for index in np.ndindex(*grid)}
    if wrong := [index for index, part in chunks.items() if part is None or part.size != size]:
        raise ValueError(
            f"{path}: array {name} lacks {len(wrong)} of its {len(chunks)} chunks: download it again"
        )

    def make(first: int, last: int) -> np.ndarray:
        index, low = divmod(first, chunk[0])
        part = chunks[(index, *[0] * (len(shape) - 1))]
        if (
            chunk[1:] == shape[1:] and low + last - first <= chunk[0] and part is not None
        ):  # in one piece: a view
            return (
                np.ascontiguousarray(part)
                .view(weights.ELEMENTS[type])
                .reshape(chunk)[low : low + last - first]
            )
        whole = np.empty((last - first, *shape[1:]), weights.ELEMENTS[type])
        for index, part in chunks.items():
            at = [i * step for i, step in zip(index, chunk, strict=True)]
            low, high = max(at[0], first), min(at[0] + chunk[0], last)
            if low < high and part is not None:
                target = whole[
                    (
                        slice(low - first, high - first),
                        *(slice(start, start + step) for start, step in zip(at[1:], chunk[1:], strict=True)),
                    )
                ]
                values = np.frombuffer(part.tobytes(), whole.dtype).reshape(chunk)[low - at[0] : high - at[0]]
                target[...] = values[tuple(slice(length) for length in target.shape)]
        return whole

    return Deferred(type, shape, part=make)


def _distributed(path: Path, found: Members) -> Iterator[tuple[str, Tensor]]:
    """The tensors of PyTorch's distributed checkpoint: each in pieces, each piece an archive inside a .distcp file."""
    described = torch.unpickle(f"{path}: .metadata", bytes(found["model_weights/.metadata"]))
    pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, place in described.field("storage_data").items():
        offset = getattr(index.field("offset"), "args", [()])[0] if index.field("offset") is not None else ()
        pieces.setdefault(index.field("fqn"), []).append((tuple(offset), place))
    for name, entry in described.field("state_dict_metadata").items():
        if "size" not in getattr(entry, "state", {}):
            continue  # bytes: _extra_state
        shape = tuple(entry.field("size").args[0])
        parts = [(offset, _piece(path, found, name, place)) for offset, place in pieces.get(name, [])]
        if not parts or sum(math.prod(part.shape) for _, part in parts) != math.prod(shape):
            raise ValueError(
                f"{path}: the pieces of {name} do not make its shape {list(shape)}: export it again"
            )
        yield name, _joined(path, name, shape, parts)


def _piece(path: Path, found: Members, name: str, place: Any) -> Tensor:
    file, start, length = (place.field(key) for key in ("relative_path", "offset", "length"))
    data = found.get(f"model_weights/{file}")
    if data is None or not (type(start) is type(length) is int and 0 <= start < start + length <= data.size):
        raise ValueError(
            f"{path}: the file {file}, or a piece of tensor {name} in it, is missing: download it again"
        )
    value = torch.read(f"{path}: {file}", data[start : start + length])
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: a piece of tensor {name} is no float tensor: export the model in bfloat16")
    return value


def _joined(
    path: Path, name: str, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Tensor]]
) -> Tensor:
    type = parts[0][1].type
    fits = all(
        part.type == type
        and len(offset or shape) == len(part.shape) == len(shape)
        and all(
            at + size <= whole
            for at, size, whole in zip(offset or (0,) * len(shape), part.shape, shape, strict=True)
        )
        for offset, part in parts
    )
    if not fits:
        raise ValueError(
            f"{path}: the pieces of tensor {name} do not fit its shape {list(shape)}: export it again"
        )
    if len(parts) == 1:
        return parts[0][1]

    def make(first: int, last: int) -> np.ndarray:
        whole = np.zeros((last - first, *shape[1:]), weights.ELEMENTS[type])
        for offset, part in parts:
            low, high = max(offset[0], first), min(offset[0] + part.shape[0], last)
            if low < high:
                rest = (slice(at, at + size) for at, size in zip(offset[1:], part.shape[1:], strict=True))
                whole[(slice(low - first, high - first), *rest)] = part.array()[
                    low - offset[0] : high - offset[0]
                ]
        return whole

    return Deferred(type, shape, part=make)


def config(path: Path, fields: Mapping[str, Any], vocab: int) -> ModelConfig:
    """The architecture that a model_config.yaml describes. Raises ValueError on one that is no Gemma 1."""
    for key, value in FIXED.items():
        if fields.get(key, value) != value:
            raise ValueError(
                f"{path}: {key} is {fields[key]!r}, but Gemma has {value!r}: this is another model"
            )
    values = {name: fields.get(key) for name, key in KEYS.items()}
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    try:
        return ModelConfig("gemma", **values, vocab=vocab)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _yaml(path: Path, raw: bytes) -> dict[str, Any]:
    yaml = missing("yaml", "NeMo archives", "formats")
    if (
        len(raw) > MOST_CONFIG
        or b"&" in raw
        and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw))
    ):
        raise ValueError(
            f"{path}: its model_config.yaml is too large or refers to itself: it may be an attack"
        )
    try:
        fields = yaml.safe_load(raw)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: its model_config.yaml cannot be read ({str(error)[:200]})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: its model_config.yaml holds no mapping: export the model again")
    return fields


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], Callable[[], Tokenizer] | None]:
    """Config, our tensors, model_config.yaml, and what builds the tokenizer."""
    found = members(path)
    if "model_config.yaml" not in found:
        raise ValueError(f"{path}: holds no model_config.yaml: pass a .nemo archive of NeMo 1")
    fields = _yaml(path, bytes(found["model_config.yaml"]))
    stored = {
        name if name.startswith("model.") else f"model.{name.removeprefix('module.')}": tensor
        for name, tensor in read(path, found).items()
    }
    stored = {
        name: tensor for name, tensor in stored.items() if not re.fullmatch(weights.IGNORED["nemo"], name)
    }
    embed = stored.get("model.embedding.word_embeddings.weight")
    model = config(path, fields, embed.shape[0] if embed else 1)
    named = fields.get("tokenizer")
    name = str(named.get("model", "")) if isinstance(named, dict) else ""
    file = found.get(name.removeprefix("nemo:"))
    build = (lambda: Tokenizer.from_sentencepiece(bytes(file))) if file is not None else None
    return model, weights.read("nemo", path, model, stored), fields, build


def config_yaml(config: ModelConfig, tokenizer: str | None) -> bytes:
    """A model_config.yaml as NeMo's converter writes it, for one device."""
    fields: dict[str, Any] = {
        **{key: getattr(config, name) for name, key in KEYS.items()},
        **FIXED,
        "max_position_embeddings": config.context,
        "make_vocab_size_divisible_by": 128,
        "precision": "bf16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "transformer_engine": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "attention_type": "multihead",
        "dist_ckpt_format": "zarr",
        "megatron_amp_O2": False,
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    }
    fields["tokenizer"] = {
        "library": "sentencepiece",
        "model": f"nemo:{tokenizer}" if tokenizer else None,
        "type": None,
        "vocab_file": None,
        "merge_file": None,
        "delimiter": None,
        "sentencepiece_legacy": False,
    }
    return bytes(missing("yaml", "NeMo archives", "formats").safe_dump(fields).encode())


def save(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: bytes | None) -> None:
    """Writes a .nemo with the Zarr checkpoint of NeMo 1.23, layers stacked, one chunk a layer."""
    name = (
        f"{hashlib.md5(tokenizer, usedforsecurity=False).hexdigest()}_tokenizer.model" if tokenizer else None
    )
    stacks: dict[str, list[Tensor]] = {}
    for stored, tensor in weights.write("nemo", config, tensors).items():
        stacks.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", stored), []).append(tensor)
    common = io.BytesIO()
    torch.archive(common, {"checkpoint_version": 3.0})
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        _add(archive, "model_config.yaml", config_yaml(config, name))
        if tokenizer and name:
            _add(archive, name, tokenizer)
        _add(
            archive,
            "model_weights/metadata.json",
            json.dumps(
                {
                    "sharded_backend": "zarr",
                    "sharded_backend_version": 1,
                    "common_backend": "torch",
                    "common_backend_version": 1,
                }
            ).encode(),
        )
        _add(archive, "model_weights/common.pt", common.getvalue())
        nothing = io.BytesIO()
        torch.archive(nothing, None)
        for module, layer in itertools.product(ENGINE_MODULES, range(config.layers)):
            _add(
                archive,
                f"model_weights/model.decoder.layers.{module}._extra_state/shard_{layer}_{config.layers}.pt",
                nothing.getvalue(),
            )
        for stored, layers in stacks.items():
            _add_zarr(archive, f"model_weights/{stored}/", layers, ".layers." in stored)


def _add_zarr(archive: tarfile.TarFile, at: str, layers: list[Tensor], stacked: bool) -> None:
    shape = layers[0].shape
    type = next(name for name, one in ZARR_TYPES.items() if one == layers[0].type)
    described = {
        "chunks": [1, *shape] if stacked else shape,
        "compressor": None,
        "dtype": type,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": [len(layers), *shape] if stacked else shape,
        "zarr_format": 2,
    }
    _add(archive, at + ".zarray", json.dumps(described, indent=4).encode())
    for layer, tensor in enumerate(layers):
        index = [layer, *[0] * len(shape)] if stacked else [0] * len(shape)
        archive.addfile(_info(at + ".".join(map(str, index)), tensor.nbytes))
        for piece in tensor.pieces():
            archive.fileobj.write(np.ascontiguousarray(piece.data).reshape(-1).data)  # type: ignore
        archive.offset += tensor.nbytes + -tensor.nbytes % tarfile.BLOCKSIZE
        archive.fileobj.write(bytes(-tensor.nbytes % tarfile.BLOCKSIZE))  # type: ignore[union-attr]


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    archive.addfile(_info(name, len(data)), io.BytesIO(data))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return info
