"""NeMo 1 archives (.nemo) without NeMo: a tar, perhaps gzipped, of model_config.yaml, weights, tokenizer.

The weights are one PyTorch archive (model_weights.ckpt) or a distributed checkpoint of Megatron core in a
directory: Zarr arrays, or PyTorch's (.metadata and *.distcp); there the layers are stacked on axis 0. A tar
is never unpacked: its members are looked up by name and mapped, so that no path in it means anything.
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
from codegemma.checkpoints.checkpoint import Checkpoint
from codegemma.checkpoints.tensors import BLOCKS, ELEMENTS, ArrayTensor, LazyTensor, Tensor, possible_shape
from codegemma.checkpoints.untrusted import damaged, naming, refusing
from codegemma.config import LIMITS, ModelConfig
from codegemma.files import atomic_write, map_file, require
from codegemma.tokenizer import Tokenizer

ZARR_TYPES = {"bfloat16": "BF16", "<f4": "F32", "<f2": "F16"}
# Megatron core refuses a checkpoint without the (empty) state of these modules of Transformer Engine.
_LINEAR = ("qkv", "proj", "fc1", "fc2")
ENGINE_MODULES = [f"{'mlp' if name[:2] == 'fc' else 'self_attention'}.linear_{name}" for name in _LINEAR]
MAX_MEMBERS = 65_536
MAX_CONFIG = 1 << 20  # bytes of YAML
MAX_INFLATION = 20  # bytes from one byte of gzip; weights hardly shrink at all
Members = dict[str, np.ndarray]


def read_members(path: Path) -> Members:
    """The bytes of every file in the archive (or in an unpacked one, a directory), without a leading "./"."""
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
    """A map of the unzipped archive, in an unnamed file beside it that goes away with the map."""
    max_bytes = path.stat().st_size * MAX_INFLATION + (1 << 20)
    with tempfile.TemporaryFile(dir=path.parent) as out, gzip.open(path) as source:
        with refusing(f"{path}: is a damaged gzip file", EOFError, zlib.error, gzip.BadGzipFile):
            while block := source.read(1 << 20):
                out.write(block)
                if out.tell() > max_bytes:
                    raise ValueError(
                        f"{path}: grows to more than {MAX_INFLATION} times its size: it is no model"
                    )
        out.flush()
        return mmap.mmap(out.fileno(), 0, access=mmap.ACCESS_READ) if out.tell() else b""


def read(path: Path, members: Members) -> dict[str, Tensor]:
    """The tensors of an archive, layer by layer, whichever of the three forms its weights have."""
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
        raise ValueError(
            f"{path}: holds neither model_weights.ckpt nor a distributed checkpoint in model_weights/: "
            "export the model again"
        )
    return _unstacked({name: _zarr(path, members, name) for name in arrays})


def _unstacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose layers are stacked on axis 0, one by one."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        stacked = re.fullmatch(r"(.*decoder\.layers)(\.\D.*)", name)
        if stacked is None:
            tensors[name] = tensor
            continue
        for index in range(min(tensor.shape[0], LIMITS["layers"])):
            layer = partial(_layer, tensor, index)
            tensors[f"{stacked[1]}.{index}{stacked[2]}"] = LazyTensor.computed(
                tensor.type, tensor.shape[1:], layer
            )
    return tensors


def _layer(tensor: Tensor, index: int) -> np.ndarray:
    return tensor.rows(index, index + 1).array()[0]


def _zarr(path: Path, members: Members, name: str) -> Tensor:
    """A Zarr array of uncompressed chunks, which are joined when it is read."""
    folder, label = f"model_weights/{name}/", f"{path}: array {name}"
    errors = (ValueError, KeyError, TypeError, RecursionError)
    with refusing(f"{label} is described in a way unknown here", *errors):
        described = json.loads(bytes(members[folder + ".zarray"][:65_536]))
        shape, chunk = tuple(described["shape"]), tuple(described["chunks"])
        type, packed = ZARR_TYPES[described["dtype"]], described["compressor"] or described.get("filters")
    plain = not packed and described.get("order", "C") == "C"
    if not plain or len(shape) != len(chunk) or not possible_shape(shape) or not possible_shape(chunk):
        raise damaged(f"{label} is compressed or has the impossible shape {shape} in chunks of {chunk}")
    grid = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    if math.prod(grid) > MAX_MEMBERS:
        raise damaged(f"{label} has {math.prod(grid):,} chunks")
    size = math.prod(chunk) * BLOCKS[type][1]
    dot = described.get("dimension_separator", ".")
    chunks = {index: members.get(folder + dot.join(map(str, index))) for index in np.ndindex(*grid)}
    complete = {index: raw for index, raw in chunks.items() if raw is not None and raw.size == size}
    if lacking := len(chunks) - len(complete):
        raise damaged(f"{label} lacks {lacking} of its {len(chunks)} chunks")
    pieces: list[tuple[tuple[int, ...], Tensor]] = [
        (tuple(np.multiply(index, chunk)), ArrayTensor.view(type, chunk, raw))
        for index, raw in complete.items()
    ]
    return _assembled(type, shape, pieces)


def _assembled(type: str, shape: tuple[int, ...], pieces: list[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """A tensor of pieces, each from an offset on; what reaches beyond the shape is left out."""

    def rows(first: int, last: int) -> np.ndarray:
        out = np.zeros((last - first, *shape[1:]), ELEMENTS[type])
        for offset, piece in pieces:
            low, high = max(offset[0], first), min(offset[0] + piece.shape[0], last)
            if low >= high:
                continue
            values = piece.rows(low - offset[0], high - offset[0]).array()
            if values.shape == out.shape:  # all that is asked for is in this piece
                return values
            columns = (
                slice(start, start + size) for start, size in zip(offset[1:], piece.shape[1:], strict=True)
            )
            target = out[(slice(low - first, high - first), *columns)]
            target[...] = values[tuple(slice(length) for length in target.shape)]
        return out

    return LazyTensor(type, shape, rows)


def _distributed(path: Path, members: Members) -> Iterator[tuple[str, Tensor]]:
    """The tensors of PyTorch's distributed checkpoint, in pieces: archives inside .distcp files."""
    metadata = torch.unpickle(f"{path}: .metadata", bytes(members["model_weights/.metadata"]))
    locations: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, location in metadata.field("storage_data").items():
        offset = getattr(index.field("offset"), "args", [()])[0] if index.field("offset") is not None else ()
        locations.setdefault(index.field("fqn"), []).append((tuple(offset), location))
    for name, entry in metadata.field("state_dict_metadata").items():
        if "size" not in getattr(entry, "state", {}):
            continue  # bytes: _extra_state
        shape = tuple(entry.field("size").args[0])
        pieces = [
            (offset or (0,) * len(shape), _piece(path, members, name, location))
            for offset, location in locations.get(name, [])
        ]
        if not pieces or sum(math.prod(piece.shape) for _, piece in pieces) != math.prod(shape):
            raise damaged(f"{path}: the pieces of {name} do not make its shape {list(shape)}")
        type = pieces[0][1].type
        if not all(piece.type == type and _fits(offset, piece.shape, shape) for offset, piece in pieces):
            raise damaged(f"{path}: the pieces of tensor {name} do not fit its shape {list(shape)}")
        yield name, pieces[0][1] if len(pieces) == 1 else _assembled(type, shape, pieces)


def _fits(offset: tuple[int, ...], piece: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(offset) == len(piece) == len(shape) and all(
        start + size <= length for start, size, length in zip(offset, piece, shape, strict=True)
    )


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
    """The architecture that a model_config.yaml describes. Raises ValueError on one that is no Gemma 1."""
    for key, value in table.written_fields("nemo_required").items():
        if fields.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {fields[key]!r}, but Gemma has {value!r}: choose a Gemma")
    values = table.config_values("nemo", "gemma", fields)
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    with naming(path):
        return ModelConfig("gemma", **values, vocab=vocab)


def read_config(path: Path, members: Members) -> dict[str, Any]:
    """The model_config.yaml of an archive. Raises ValueError without one, or on a suspicious one."""
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
    """Opens an archive, or the directory of an unpacked one."""
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
    return Checkpoint(path, model, tensors, fields, build)


def config_yaml(config: ModelConfig, tokenizer: str | None, **more: Any) -> bytes:
    """A model_config.yaml as NeMo's converter writes it; `tokenizer` names a member of the archive."""
    fields = table.written_fields("nemo_required") | table.written_fields("nemo_config")
    fields |= table.config_keys("nemo", config) | more | {"max_position_embeddings": config.context}
    model = f"nemo:{tokenizer}" if tokenizer else None
    fields["tokenizer"] = table.written_fields("nemo_tokenizer") | {"model": model}
    return bytes(require("yaml", "NeMo archives", "formats").safe_dump(fields).encode())


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a .nemo with the Zarr checkpoint of NeMo 1.23: layers stacked, one chunk a layer."""
    model = checkpoint.tokenizer.model if checkpoint.tokenizer else None
    name = f"{hashlib.md5(model, usedforsecurity=False).hexdigest()}_tokenizer.model" if model else None
    stacks: dict[str, list[Tensor]] = {}
    for stored, tensor in table.to_format("nemo", checkpoint.config, checkpoint.tensors).items():
        stacks.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", stored), []).append(tensor)
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        add_member(archive, "model_config.yaml", config_yaml(checkpoint.config, name))
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
    described = table.written_fields("zarr_array") | {
        "chunks": [1, *shape] if stacked else shape,
        "dtype": next(dtype for dtype, type in ZARR_TYPES.items() if type == layers[0].type),
        "shape": [len(layers), *shape] if stacked else shape,
    }
    add_member(archive, folder + ".zarray", json.dumps(described, indent=4).encode())
    out: Any = archive.fileobj
    for layer, tensor in enumerate(layers):
        index = [layer, *[0] * len(shape)] if stacked else [0] * len(shape)
        archive.addfile(_info(folder + ".".join(map(str, index)), tensor.nbytes))
        tensor.write_to(out)
        padding = -tensor.nbytes % tarfile.BLOCKSIZE
        out.write(bytes(padding))
        archive.offset += tensor.nbytes + padding


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to an archive that is being written."""
    archive.addfile(_info(name, len(data)), io.BytesIO(data))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return info
