"""Orbax checkpoints: DeepMind's Flax (nested, flat, Kauldron), as on Kaggle, and MaxText's; read and written by
tensorstore, one array at a time, without JAX or Orbax.

A checkpoint is a directory of Zarr arrays, each under the path of its key, in files or in an OCDBT database.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import huggingface as safetensors
from codegemma.checkpoints import table as weights
from codegemma.checkpoints.table import Deferred, Tensor
from codegemma.config import ModelConfig
from codegemma.files import missing
from codegemma.tokenizer import Tokenizer

TYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
MOST_ARRAYS = 65_536
FLAX_ROWS = {256_000: 256_128}  # the embedding's rows in DeepMind's checkpoints of Gemma 1 and 2


def home(path: Path) -> Path | None:
    """The checkpoint itself, at `path` or a directory or two further down ("2b-pt", "0/items"), or None."""
    for directory in (path, *sorted(path.glob("*/")), *sorted(path.glob("*/*/"))):
        if any((directory / name).exists() for name in ("manifest.ocdbt", "_METADATA")) or next(
            directory.glob("*/.zarray"), None
        ):
            return directory
    return None


def read(path: Path) -> dict[str, Tensor]:
    """The arrays under their keys joined with "/"; each is read when it is looked at."""
    ts = missing("tensorstore", "Orbax checkpoints", "formats")
    database = (path / "manifest.ocdbt").exists()
    base = {"driver": "file", "path": f"{path.resolve()}/"}
    store = {"driver": "ocdbt", "base": base} if database else base
    try:
        names = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: is no readable Orbax checkpoint ({str(error)[:200]}): download it again"
        ) from None
    arrays = [name.removesuffix("/.zarray") for name in names if name.endswith("/.zarray")]
    if not arrays or len(arrays) > MOST_ARRAYS:
        raise ValueError(
            f"{path}: holds {len(arrays)} Zarr arrays: pass the directory of an Orbax checkpoint"
        )
    return {_key(name): tensor for name in arrays if (tensor := _array(path, ts, store, name)) is not None}


def _key(name: str) -> str:
    """The key as in the flat layout: "params/", a missing "transformer/" and a missing "/w" are made up for."""
    key = re.sub(r"^(params/)+", "", name.replace(".", "/"))
    if re.match(r"(layer_\d+|embedder|final_norm)/", key):
        key = f"transformer/{key}"
    return f"{key}/w" if re.search(r"/mlp/(gating_einsum|linear)$", key) else key


def _array(path: Path, ts: Any, store: dict[str, Any], name: str) -> Tensor | None:
    spec = {"driver": "zarr", "kvstore": {**store, "path": f"{store.get('path', '')}{name}/"}}
    try:
        array = ts.open(spec, open=True).result()
        type, shape, chunk = (
            TYPES.get(array.dtype.name),
            tuple(array.shape),
            array.chunk_layout.read_chunk.shape,
        )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: array {name} cannot be opened ({str(error)[:200]}): download it again"
        ) from None
    if type is None or not shape:  # a step counter
        return None
    if not all(0 < size <= 1 << 31 for size in shape) or math.prod(chunk) > 2 * math.prod(shape) + 1024:
        raise ValueError(
            f"{path}: array {name} has the impossible shape {list(shape)} in chunks of {list(chunk)}: "
            "download it again"
        )

    def values(view: Any, first: int, last: int) -> np.ndarray:
        rows = max(1, weights.PIECE // math.prod(view.shape[1:]))
        whole = np.empty((last - first, *view.shape[1:]), weights.ELEMENTS[type])
        try:
            for start in range(first, last, rows):  # all at once would hold every chunk twice
                part = np.ascontiguousarray(view[start : min(start + rows, last)].read().result())
                whole[start - first : start - first + rows] = part.view(whole.dtype)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path}: array {name} cannot be read ({str(error)[:200]}): download it again"
            ) from None
        return whole

    return Deferred(
        type,
        shape,
        part=lambda first, last: values(array, first, last),
        layer=lambda index: values(array[:, index], 0, shape[0]),
    )


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], Callable[[], Tokenizer] | None]:
    """Config (from config.json beside it, or as the published model of these shapes), our tensors, and tokenizer."""
    directory = home(path)
    if directory is None:
        raise ValueError(f"{path}: holds no Orbax checkpoint (manifest.ocdbt, _METADATA or Zarr arrays)")
    stored = read(directory)
    format: weights.Format = "maxtext" if any(name.startswith("decoder/") for name in stored) else "flax"
    prefix = "transformer/" if format == "flax" else ("token_embedder/", "decoder/")
    stored = weights.unstacked(
        {name: tensor for name, tensor in stored.items() if name.startswith(prefix)},
        1,
        r"(decoder/layers)(/\D.*)",
    )  # MaxText's lie so
    places = [place for place in (path, directory, directory.parent) if (place / "config.json").exists()] or [
        path
    ]
    model, fields = safetensors.described(places[0], format, stored)
    tokenizers = (safetensors.tokenizer(place) for place in (path, directory, directory.parent))
    return model, weights.read(format, path, model, stored), fields, next(filter(None, tokenizers), None)


def save(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes `checkpoint` in the flat layout of the published files."""
    ts = missing("tensorstore", "Orbax checkpoints", "formats")
    directory = path / "checkpoint"
    directory.mkdir()
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory.resolve()}/"}}
    described = {}
    for name, tensor in weights.write("flax", config, tensors).items():
        group, key = name.rsplit("/", 1)
        rows = (
            FLAX_ROWS.get(tensor.shape[0], tensor.shape[0]) if key == "input_embedding" else tensor.shape[0]
        )
        _write(ts, {**store, "path": f"{group}.{key}/"}, tensor, (rows, *tensor.shape[1:]))
        described[str((group, key))] = {
            "key_metadata": [{"key": group, "key_type": 2}, {"key": key, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    (directory / "_METADATA").write_text(
        json.dumps(
            {
                "tree_metadata": described,
                "use_ocdbt": True,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
            }
        )
    )


def _write(ts: Any, store: dict[str, Any], tensor: Tensor, shape: tuple[int, ...]) -> None:
    rows = max(
        1, weights.PIECE // max(1, math.prod(shape[1:]))
    )  # as many as a piece has: each chunk is written once
    name = next(name for name, type in TYPES.items() if type == tensor.type)
    spec = {
        "driver": "zarr",
        "kvstore": store,
        "metadata": {
            "shape": shape,
            "chunks": [min(rows, shape[0]), *shape[1:]],
            "compressor": {"id": "zstd", "level": 1},
            "dtype": "bfloat16" if name == "bfloat16" else np.dtype(name).str,
        },
    }
    array, start = ts.open(spec, create=True).result(), 0
    for piece in tensor.pieces():
        values = piece.array().view(array.dtype.numpy_dtype)
        if start + len(values) == tensor.shape[0] < shape[0]:  # rows past the vocabulary
            values = np.concatenate(
                [values, np.zeros((shape[0] - tensor.shape[0], *shape[1:]), values.dtype)]
            )
        array[start : start + len(values)].write(values).result()
        start += len(values)
