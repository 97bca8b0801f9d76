"""Orbax checkpoints: those of DeepMind's Flax models (as on Kaggle) read and written, those of MaxText read.

Flax models are read in the flat, the nested and Kauldron's layout, and written in the flat one. tensorstore
reads and writes array by array, without JAX or Orbax. A checkpoint is a directory of Zarr arrays, each under
the path of its key, in files or in an OCDBT database.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import huggingface, table
from codegemma.checkpoints.checkpoint import Checkpoint
from codegemma.checkpoints.tensors import (
    DTYPES,
    ELEMENTS,
    PIECE,
    TYPES_BY_DTYPE,
    LazyTensor,
    Tensor,
    possible_shape,
)
from codegemma.checkpoints.untrusted import damaged, refusing
from codegemma.config import LIMITS
from codegemma.extras import require

MAX_ARRAYS = 65_536
FLAX_ROWS = {256_000: 256_128}  # the embedding's rows in DeepMind's checkpoints of Gemma 1 and 2


def find_checkpoint(path: Path) -> Path | None:
    """The directory of a checkpoint: `path`, or one below it ("2b-pt", "0/items"); else None."""
    for directory in (path, *sorted(path.glob("*/")), *sorted(path.glob("*/*/"))):
        marked = any((directory / name).exists() for name in ("manifest.ocdbt", "_METADATA"))
        if marked or next(directory.glob("*/.zarray"), None):
            return directory
    return None


def read(path: Path) -> dict[str, Tensor]:
    """The arrays by their keys ("a/b/c"), each read when it is used; stacked layers of MaxText separated.

    Raises ValueError where the directory holds no such checkpoint, or an array cannot be opened.
    """
    ts = require("tensorstore", "Orbax checkpoints", "formats")
    base = {"driver": "file", "path": f"{path.resolve()}/"}
    store = {"driver": "ocdbt", "base": base} if (path / "manifest.ocdbt").exists() else base
    with refusing(f"{path}: is no readable Orbax checkpoint", ValueError, OSError):
        names = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    arrays = [name.removesuffix("/.zarray") for name in names if name.endswith("/.zarray")]
    if not arrays or len(arrays) > MAX_ARRAYS:
        raise ValueError(f"{path}: holds {len(arrays)} Zarr arrays: pass an Orbax checkpoint")
    stored: dict[str, Tensor] = {}
    for name in arrays:
        spec = {"driver": "zarr", "kvstore": {**store, "path": f"{store.get('path', '')}{name}/"}}
        with refusing(f"{path}: array {name} cannot be opened", ValueError, OSError):
            array = ts.open(spec, open=True).result()
        stored |= _tensors(f"{path}: array {name}", _flat_key(name), array)
    return stored


def _flat_key(name: str) -> str:
    """The key in the flat layout; other layouts add "params/" or omit "transformer/" and "/w"."""
    key = re.sub(r"^(params/)+", "", name.replace(".", "/"))
    if re.match(r"(layer_\d+|embedder|final_norm)/", key):
        key = f"transformer/{key}"
    return f"{key}/w" if re.search(r"/mlp/(gating_einsum|linear)$", key) else key


def _tensors(label: str, key: str, array: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor of an array, or one for each layer where MaxText stacked the layers on axis 1."""
    type, shape = TYPES_BY_DTYPE.get(array.dtype.name), tuple(array.shape)
    chunk = array.chunk_layout.read_chunk.shape
    if type is None or not shape:  # a step counter
        return
    if not possible_shape(shape) or math.prod(chunk) > 2 * math.prod(shape) + 1024:
        raise damaged(f"{label} has the impossible shape {list(shape)} in chunks of {list(chunk)}")
    stacked = re.fullmatch(r"decoder/layers/(\D.*)", key)
    if stacked is None or len(shape) < 2:
        yield key, _lazy(label, type, array)
        return
    for layer in range(min(shape[1], LIMITS["layers"])):
        yield f"decoder/layers/{layer}/{stacked[1]}", _lazy(label, type, array[:, layer])


def _lazy(label: str, type: str, array: Any) -> Tensor:
    """A tensor that reads an array, or a view of one, from tensorstore."""

    def rows(first: int, last: int) -> np.ndarray:
        step = max(1, PIECE // math.prod(array.shape[1:]))
        out = np.empty((last - first, *array.shape[1:]), ELEMENTS[type])
        with refusing(f"{label} cannot be read", ValueError, OSError):
            for start in range(first, last, step):  # all at once would hold every chunk twice
                part = np.ascontiguousarray(array[start : min(start + step, last)].read().result())
                out[start - first : start - first + step] = part.view(out.dtype)
        return out

    return LazyTensor(type, tuple(array.shape), rows)


def load(path: Path) -> Checkpoint:
    """Opens a directory that is or contains a checkpoint; config.json and tokenizer may lie beside it."""
    directory = find_checkpoint(path)
    if directory is None:
        raise ValueError(f"{path}: holds no Orbax checkpoint (manifest.ocdbt, _METADATA or Zarr arrays)")
    stored = read(directory)
    is_maxtext = any(name.startswith("decoder/") for name in stored)
    prefixes = ("token_embedder/", "decoder/") if is_maxtext else ("transformer/",)
    stored = {name: tensor for name, tensor in stored.items() if name.startswith(prefixes)}
    directories = [path, directory, directory.parent]
    return huggingface.checkpoint_of(path, directories, "maxtext" if is_maxtext else "flax", stored)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint in the flat layout of published files, with config.json and tokenizer beside it."""
    ts = require("tensorstore", "Orbax checkpoints", "formats")
    directory = path / "checkpoint"
    directory.mkdir()
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory.resolve()}/"}}
    tree = {}
    for name, tensor in table.to_format("flax", checkpoint.config, checkpoint.tensors).items():
        group, key = name.rsplit("/", 1)
        rows = tensor.shape[0]
        if key == "input_embedding":
            rows = FLAX_ROWS.get(rows, rows)
        _write(ts, {**store, "path": f"{group}.{key}/"}, tensor, rows)
        tree[str((group, key))] = {
            "key_metadata": [{"key": group, "key_type": 2}, {"key": key, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    metadata = table.written_fields("orbax_metadata") | {"tree_metadata": tree}
    (directory / "_METADATA").write_text(json.dumps(metadata))
    huggingface.write_companions(path, checkpoint)


def _write(ts: Any, store: dict[str, Any], tensor: Tensor, rows: int) -> None:
    """Writes a tensor as an array of `rows` rows, with rows of 0 after its own; a chunk holds one piece."""
    shape, dtype = (rows, *tensor.shape[1:]), DTYPES[tensor.type]
    chunk_rows = max(1, PIECE // max(1, math.prod(shape[1:])))
    metadata = {
        "shape": shape,
        "chunks": [min(chunk_rows, rows), *shape[1:]],
        "compressor": {"id": "zstd", "level": 1},
        "dtype": dtype if dtype == "bfloat16" else np.dtype(dtype).str,
    }
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    array, start = ts.open(spec, create=True).result(), 0
    for piece in tensor.pieces():
        values = piece.array().view(array.dtype.numpy_dtype)
        if start + len(values) == tensor.shape[0] < rows:
            padding = np.zeros((rows - tensor.shape[0], *shape[1:]), values.dtype)
            values = np.concatenate([values, padding])
        array[start : start + len(values)].write(values).result()
        start += len(values)
