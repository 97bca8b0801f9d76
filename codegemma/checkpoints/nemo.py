"""NeMo 1 archives (.nemo), read and written without NeMo: a tar of model_config.yaml, weights, tokenizer.

The weights are one PyTorch archive (model_weights.ckpt) or a distributed checkpoint of Megatron core in a
directory, with layers stacked on axis 0: as Zarr arrays, or as PyTorch's .metadata and *.distcp. A tar is
never unpacked: its members are looked up by name in a memory map, so that hostile paths in it have no effect.
It may be gzipped.
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
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import table, torch
from codegemma.checkpoints.checkpoint import Checkpoint, stated_ends
from codegemma.checkpoints.tensors import BLOCKS, ELEMENTS, ArrayTensor, LazyTensor, Tensor, possible_shape
from codegemma.checkpoints.untrusted import damaged, naming, refusing
from codegemma.config import LIMITS, ModelConfig
from codegemma.extras import require
from codegemma.files import atomic_write, map_file
from codegemma.tokenizer import Tokenizer

ZARR_TYPES = {"bfloat16": "BF16", "<f4": "F32", "<f2": "F16"}
# Megatron core refuses a checkpoint without the (empty) state of these modules of Transformer Engine.
_LINEAR = ("qkv", "proj", "fc1", "fc2")
ENGINE_MODULES = [f"{'mlp' if name[:2] == 'fc' else 'self_attention'}.linear_{name}" for name in _LINEAR]
MAX_MEMBERS = 65_536
MAX_CONFIG = 1 << 20  # bytes of YAML
MAX_INFLATION = 20  # bytes from one byte of gzip; weights hardly compress at all
Members = dict[str, np.ndarray]
# The pieces of one tensor: the offset of each on every axis, and its elements.
Pieces = list[tuple[tuple[int, ...], Tensor]]


def read_members(path: Path) -> Members:
    """The bytes of every file in an archive, or in the directory of an unpacked one, by name without "./".

    Raises ValueError where the archive is damaged or holds too much to be a model.
    """
    if path.is_dir():
        files = itertools.islice((file for file in sorted(path.rglob("*")) if file.is_file()), MAX_MEMBERS)
        maps = {str(file.relative_to(path)): map_file(file) if file.stat().st_size else b"" for file in files}
        return {name: np.frombuffer(data, np.uint8) for name, data in maps.items()}
    data: Any = map_file(path)
    if data[:2] == b"\x1f\x8b":
        data = _inflated(path)
    raw = np.frombuffer(data, np.uint8)
    members: Members = {}
    with (
        refusing(f"{path}: is no readable tar archive", tarfile.TarError, OSError, OverflowError),
        tarfile.open(fileobj=torch.BufferFile(data), mode="r:") as archive,  # type: ignore[call-overload]
    ):
        for count, info in enumerate(archive):
            if count >= MAX_MEMBERS:
                raise ValueError(f"{path}: holds more than {MAX_MEMBERS:,} members: it is no model")
            if not info.isreg() or info.sparse:
                continue
            if info.size < 0 or info.offset_data + info.size > raw.size:
                raise damaged(f"{path}: its member {info.name} reaches beyond the end")
            members[info.name.removeprefix("./")] = raw[info.offset_data : info.offset_data + info.size]
    return members


def _inflated(path: Path) -> Any:
    """A map of the unzipped archive, in a nameless file on the same disk that is freed with the map."""
    max_bytes = path.stat().st_size * MAX_INFLATION + (1 << 20)
    with tempfile.TemporaryFile(dir=path.parent) as out, gzip.open(path) as source:
        with refusing(f"{path}: is a damaged gzip file", EOFError, zlib.error, gzip.BadGzipFile):
            while block := source.read(1 << 20):
                out.write(block)
                if out.tell() > max_bytes:
                    rule = f"grows to more than {MAX_INFLATION} times its size: it is no model"
                    raise ValueError(f"{path}: {rule}")
        out.flush()
        return mmap.mmap(out.fileno(), 0, access=mmap.ACCESS_READ) if out.tell() else b""


def read(path: Path, members: Members) -> dict[str, Tensor]:
    """The tensors of an archive, layer by layer, from any of the three forms of weights.

    Raises ValueError where it has none of these, or is damaged.
    """
    archives = [name for name in members if name.rpartition("/")[2] == "model_weights.ckpt"]
    if archives == ["model_weights.ckpt"]:
        value = torch.read(f"{path}: {archives[0]}", members[archives[0]])
        return torch.state_dict(str(path), value, "nemo")
    if archives:
        parts = f"is split into {len(archives)} parts for tensor parallelism"
        raise ValueError(f"{path}: {parts}: save it with tensor_model_parallel_size=1")
    if "model_weights/.metadata" in members:
        return _unstacked(dict(_distributed(path, members)))
    arrays = [name.split("/")[1] for name in members if re.fullmatch(r"model_weights/[^/]+/\.zarray", name)]
    if not arrays:
        rule = "holds neither model_weights.ckpt nor a distributed checkpoint in model_weights/"
        raise ValueError(f"{path}: {rule}: export the model again")
    return _unstacked({name: _zarr(path, members, name) for name in arrays})


def _unstacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with stacks of layers (axis 0) separated into one tensor for each layer."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        stacked = re.fullmatch(r"(.*decoder\.layers)(\.\D.*)", name)
        if stacked is None:
            tensors[name] = tensor
            continue
        for index in range(min(tensor.shape[0], LIMITS["layers"])):
            layer = LazyTensor.computed(tensor.type, tensor.shape[1:], partial(_layer, tensor, index))
            tensors[f"{stacked[1]}.{index}{stacked[2]}"] = layer
    return tensors


def _layer(tensor: Tensor, index: int) -> np.ndarray:
    return tensor.rows(index, index + 1).array()[0]


def _zarr(path: Path, members: Members, name: str) -> Tensor:
    """A Zarr array of uncompressed chunks, which are joined when it is read."""
    folder, label = f"model_weights/{name}/", f"{path}: array {name}"
    errors = (ValueError, KeyError, TypeError, RecursionError)
    with refusing(f"{label} has a .zarray that this program does not read", *errors):
        zarray = json.loads(bytes(members[folder + ".zarray"][:65_536]))
        shape, chunk = tuple(zarray["shape"]), tuple(zarray["chunks"])
        type, compressed = ZARR_TYPES[zarray["dtype"]], zarray["compressor"] or zarray.get("filters")
    supported = not compressed and zarray.get("order", "C") == "C" and len(shape) == len(chunk)
    if not supported or not possible_shape(shape) or not possible_shape(chunk):
        raise damaged(f"{label} is compressed or has the impossible shape {shape} in chunks of {chunk}")
    grid = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    if math.prod(grid) > MAX_MEMBERS:
        raise damaged(f"{label} has {math.prod(grid):,} chunks")
    size = math.prod(chunk) * BLOCKS[type][1]
    dot, pieces = zarray.get("dimension_separator", "."), Pieces()
    for index in np.ndindex(*grid):
        raw = members.get(folder + dot.join(map(str, index)))
        if raw is not None and raw.size == size:
            pieces.append((tuple(np.multiply(index, chunk)), ArrayTensor.view(type, chunk, raw)))
    if missing := math.prod(grid) - len(pieces):
        raise damaged(f"{label} lacks {missing} of its {math.prod(grid)} chunks")
    return _joined(type, shape, pieces)


def _joined(type: str, shape: tuple[int, ...], pieces: Pieces) -> Tensor:
    """A tensor joined from pieces. Where a piece reaches beyond the tensor's shape, that part is padding."""

    def rows(first: int, last: int) -> np.ndarray:
        out = np.zeros((last - first, *shape[1:]), ELEMENTS[type])
        for offset, piece in pieces:
            low, high = max(offset[0], first), min(offset[0] + piece.shape[0], last)
            if low >= high:
                continue
            values = piece.rows(low - offset[0], high - offset[0]).array()
            if values.shape == out.shape:  # this piece covers all the rows by itself
                return values
            ends = np.add(offset[1:], piece.shape[1:])
            target = out[(slice(low - first, high - first), *map(slice, offset[1:], ends))]
            target[...] = values[tuple(map(slice, target.shape))]
        return out

    return LazyTensor(type, shape, rows)


def _distributed(path: Path, members: Members) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a distributed checkpoint of PyTorch, joined from archives inside .distcp files."""
    metadata = torch.unpickle(f"{path}: .metadata", bytes(members["model_weights/.metadata"]))
    locations: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, location in metadata.field("storage_data").items():
        offset = getattr(index.field("offset"), "args", [()])[0] if index.field("offset") is not None else ()
        locations.setdefault(index.field("fqn"), []).append((tuple(offset), location))
    for name, entry in metadata.field("state_dict_metadata").items():
        if "size" not in getattr(entry, "state", {}):
            continue  # bytes: _extra_state
        shape = tuple(entry.field("size").args[0])
        pieces: Pieces = [
            (offset or (0,) * len(shape), _piece(path, members, name, location))
            for offset, location in locations.get(name, [])
        ]
        filled = bool(pieces) and sum(math.prod(piece.shape) for _, piece in pieces) == math.prod(shape)
        if not filled or not all(
            piece.type == pieces[0][1].type
            and len(offset) == len(piece.shape) == len(shape)
            and all(np.add(offset, piece.shape) <= shape)
            for offset, piece in pieces
        ):
            raise damaged(f"{path}: the pieces of tensor {name} do not fit its shape {list(shape)}")
        piece = pieces[0][1]
        yield name, piece if len(pieces) == 1 else _joined(piece.type, shape, pieces)


def _piece(path: Path, members: Members, name: str, location: Any) -> Tensor:
    file, start, length = (location.field(key) for key in ("relative_path", "offset", "length"))
    data = members.get(f"model_weights/{file}")
    if data is None or not (type(start) is type(length) is int and 0 <= start < start + length <= data.size):
        raise damaged(f"{path}: the file {file}, or a piece of tensor {name} in it, is missing")
    value = torch.read(f"{path}: {file}", data[start : start + length])
    if not isinstance(value, (ArrayTensor, LazyTensor)):
        raise ValueError(f"{path}: a piece of tensor {name} is no float tensor: export the model in bfloat16")
    return value


def config(path: Path, fields: Mapping[str, Any], vocab: int) -> ModelConfig:
    """The architecture in a model_config.yaml; errors name `path`. Raises ValueError on other models."""
    for key, value in table.written_fields("nemo_required").items():
        if fields.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {fields[key]!r}, but Gemma has {value!r}: choose a Gemma")
    values = table.config_values("nemo", "gemma", fields)
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    with naming(path):
        return ModelConfig("gemma", **values, vocab=vocab)


def read_config(path: Path, members: Members) -> dict[str, Any]:
    """The model_config.yaml of an archive. Raises ValueError where it is missing, too large or recursive."""
    if "model_config.yaml" not in members:
        raise ValueError(f"{path}: holds no model_config.yaml: pass a .nemo archive of NeMo 1")
    raw, label = bytes(members["model_config.yaml"]), f"{path}: its model_config.yaml"
    yaml = require("yaml", "NeMo archives", "formats")
    with refusing(f"{label} cannot be read", yaml.YAMLError, RecursionError, ValueError):
        suspicious = len(raw) > MAX_CONFIG or (
            b"&" in raw and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw))
        )
        fields = None if suspicious else yaml.safe_load(raw)
    if suspicious:
        raise ValueError(f"{label} is too large or refers to itself: it may be an attack")
    if not isinstance(fields, dict):
        raise damaged(f"{label} holds no mapping")
    return fields


def load(path: Path) -> Checkpoint:
    """Opens an archive, or the directory that one was unpacked into."""
    members = read_members(path)
    fields = read_config(path, members)
    stored: dict[str, Tensor] = {}
    for name, tensor in read(path, members).items():
        name = name if name.startswith("model.") else f"model.{name.removeprefix('module.')}"
        if not table.is_ignored("nemo", name):
            stored[name] = tensor
    embed = stored.get(table.stored_name("nemo", "embed"))
    model = config(path, fields, embed.shape[0] if embed else 1)
    tensors = table.from_format("nemo", path, model, stored)
    tokenizer = fields.get("tokenizer")
    name = str(tokenizer.get("model", "")) if isinstance(tokenizer, dict) else ""
    file = members.get(name.removeprefix("nemo:"))
    build = (lambda: Tokenizer.from_sentencepiece(bytes(file))) if file is not None else None
    return Checkpoint(path, model, tensors, fields, build, stated_ends(path, fields))


def config_yaml(config: ModelConfig, tokenizer: str | None, **more: Any) -> bytes:
    """A model_config.yaml as NeMo's converter writes it; `tokenizer` is the name of an archive member."""
    fields = table.written_fields("nemo_required") | table.written_fields("nemo_config")
    fields |= table.config_keys("nemo", config) | more | {"max_position_embeddings": config.context}
    model = f"nemo:{tokenizer}" if tokenizer else None
    fields["tokenizer"] = table.written_fields("nemo_tokenizer") | {"model": model}
    return bytes(require("yaml", "NeMo archives", "formats").safe_dump(fields).encode())


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a .nemo with a Zarr checkpoint as NeMo 1.23 does: layers are stacked, and each is a chunk."""
    model = checkpoint.tokenizer.model if checkpoint.tokenizer else None
    name = f"{hashlib.md5(model, usedforsecurity=False).hexdigest()}_tokenizer.model" if model else None
    stacks: dict[str, list[Tensor]] = {}
    for stored, tensor in table.to_format("nemo", checkpoint.config, checkpoint.tensors).items():
        stacks.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", stored), []).append(tensor)
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        ends = {"eos_token_id": checkpoint.end_ids_to_write} if checkpoint.end_ids_to_write else {}
        add_member(archive, "model_config.yaml", config_yaml(checkpoint.config, name, **ends))
        if model and name:
            add_member(archive, name, model)
        backends = json.dumps(table.written_fields("nemo_distributed")).encode()
        add_member(archive, "model_weights/metadata.json", backends)
        add_member(archive, "model_weights/common.pt", _torch_bytes({"checkpoint_version": 3.0}))
        layers = checkpoint.config.layers
        for module, layer in itertools.product(ENGINE_MODULES, range(layers)):
            folder = f"model_weights/model.decoder.layers.{module}._extra_state"
            add_member(archive, f"{folder}/shard_{layer}_{layers}.pt", _torch_bytes(None))
        for stored, tensors in stacks.items():
            _add_zarr(archive, f"model_weights/{stored}/", tensors, ".layers." in stored)


def _torch_bytes(value: Mapping[str, Any] | None) -> bytes:
    torch.write(file := io.BytesIO(), value)
    return file.getvalue()


def _add_zarr(archive: tarfile.TarFile, folder: str, layers: list[Tensor], stacked: bool) -> None:
    shape = layers[0].shape
    zarray = table.written_fields("zarr_array") | {
        "chunks": [1, *shape] if stacked else shape,
        "dtype": next(dtype for dtype, type in ZARR_TYPES.items() if type == layers[0].type),
        "shape": [len(layers), *shape] if stacked else shape,
    }
    add_member(archive, folder + ".zarray", json.dumps(zarray, indent=4).encode())
    out: Any = archive.fileobj
    for layer, tensor in enumerate(layers):
        index = [layer, *[0] * len(shape)] if stacked else [0] * len(shape)
        archive.addfile(_info(folder + ".".join(map(str, index)), tensor.nbytes))
        tensor.write_to(out)
        padding = -tensor.nbytes % tarfile.BLOCKSIZE
        out.write(bytes(padding))
        archive.offset += tensor.nbytes + padding


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to an archive that is open for writing."""
    archive.addfile(_info(name, len(data)), io.BytesIO(data))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return info
