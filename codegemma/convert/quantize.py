"""Floats to blocks and what that costs: the types of GGUF, the mixes of llama.cpp, and the error of each tensor.

The blocks are those of ggml's reference quantisers, bit for bit (native/src/quantise.cpp). Norms stay F32. Where a
row is no whole number of blocks the next larger type takes its place, and where none fits the matrix stays as it is.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codegemma.checkpoints import Checkpoint, gguf
from codegemma.checkpoints.table import BLOCKS, Tensor, places, row_bytes
from codegemma.config import ModelConfig
from codegemma.native import PAGE, Native, Slice, _native, usable_cpus

FALLBACK = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q4_0": "Q8_0",
    "Q4_1": "Q8_0",
    "Q5_0": "Q8_0",
    "Q5_1": "Q8_0",
}
MIXES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}  # attn_v and ffn_down get Q6_K in half of the layers
QUANTISED = tuple(type for type, (weights, _) in BLOCKS.items() if weights > 1)
CHUNK = 1 << 20  # weights that one thread holds as float32

ROW, ROWS, MOST_TEXT = (
    512,
    32,
    1 << 24,
)  # tokens of a row, rows, and bytes of text that importance is measured on

Importance = Mapping[str, np.ndarray]  # by tensor name: float32, one number for each column


@dataclass(frozen=True)
class Cost:
    """What became of a tensor; `error` is the norm of the difference over the norm of the weights."""

    name: str
    before: str
    after: str
    error: float


def bits(type: str) -> float:
    """Bits per weight."""
    weights, size = BLOCKS[type]
    return 8 * size / weights


def chosen(type: str, checkpoint: Checkpoint) -> dict[str, str]:
    """The type that each tensor gets for a type or mix ("q8_0", "q4_k_m"): never one with more bits than it has.

    Raises ValueError on an unknown type.
    """
    name = type.upper()
    if name not in (*QUANTISED, *MIXES):
        raise ValueError(
            f"cannot quantize to {type!r}: choose {', '.join(map(str.lower, (*QUANTISED, *MIXES)))}"
        )
    wanted = {key: _mixed(name, key, checkpoint.config.layers) for key in checkpoint.tensors}
    return {key: _fitting(wanted[key], tensor) for key, tensor in checkpoint.tensors.items()}


def _mixed(mix: str, name: str, layers: int) -> str:
    """llama.cpp's rule: the embedding, which is the output layer too, and the matrices that suffer most get Q6_K."""
    type = MIXES.get(mix, mix)
    if name == "embed":
        return "Q8_0" if type == "Q8_0" else "Q6_K"
    if mix in MIXES and (found := re.fullmatch(r"layers\.(\d+)\.(v|down)", name)):
        layer, eighth = int(found[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
    return type


def _fitting(type: str, tensor: Tensor) -> str:
    while len(tensor.shape) == 2 and type in BLOCKS and tensor.shape[-1] % BLOCKS[type][0]:
        type = FALLBACK.get(type, tensor.type)
        if type == tensor.type:
            break
    return type if len(tensor.shape) == 2 and bits(type) < bits(tensor.type) else tensor.type


def rows_float32(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """float32 [stop - start, columns] of a matrix of any type."""
    out = np.empty((stop - start, tensor.shape[-1]), np.float32)
    data = np.ascontiguousarray(tensor.rows(start, stop).data)
    _native.dequantise(_native.level("auto"), _native.Weight(tensor.type, data, *out.shape), out)
    return out


def blocks(
    tensor: Tensor, type: str, importance: np.ndarray | None = None, threads: int | None = None
) -> tuple[np.ndarray, float, float]:
    """The blocks of some rows; the squared norms of the error and of the weights. `importance` weighs the columns.

    Raises ValueError on NaN or infinite weights and on rows that are no whole number of blocks.
    """
    rows, columns = tensor.shape
    out = np.empty((rows, row_bytes(type, columns)), np.uint8)
    level, step = _native.level("auto"), max(1, CHUNK // columns)

    def chunk(start: int) -> tuple[float, float]:
        stop = min(rows, start + step)
        values = rows_float32(tensor, start, stop)
        _native.quantise(level, type, values, out[start:stop], importance)
        size = float(np.vdot(values, values))
        values -= rows_float32(Tensor(type, (rows, columns), out), start, stop)
        return float(np.vdot(values, values)), size

    with ThreadPoolExecutor(threads or usable_cpus()) as pool:
        sums = list(pool.map(chunk, range(0, rows, step)))
    wrong, size = (math.fsum(part) for part in zip(*sums, strict=True))
    return out, wrong, size


def quantize(
    tensor: Tensor, type: str, importance: np.ndarray | None = None, threads: int | None = None
) -> tuple[Tensor, float]:
    """A matrix as blocks of `type`, and its error; arguments and errors as of `blocks`."""
    whole = Tensor(tensor.type, tensor.shape, tensor.data)  # a deferred one is made once
    out, wrong, size = blocks(whole, type, importance, threads)
    return Tensor(type, tensor.shape, out), math.sqrt(wrong / size) if size else 0.0


def quantize_checkpoint(
    checkpoint: Checkpoint,
    type: str,
    importance: Importance | None = None,
    report: Callable[[Cost], None] | None = None,
    threads: int | None = None,
) -> Checkpoint:
    """The same model with its matrices in blocks, in memory. `report` hears of every matrix, also one left as it is."""
    tensors = dict(checkpoint.tensors)
    for name, after in chosen(type, checkpoint).items():
        tensor, error = checkpoint.tensors[name], 0.0
        if after != tensor.type:
            try:
                tensors[name], error = quantize(tensor, after, (importance or {}).get(name), threads)
            except ValueError as fault:
                raise ValueError(f"{checkpoint.path}: tensor {name} {fault}") from None
        if report and len(tensor.shape) == 2:
            report(Cost(name, tensor.type, after, error))
    return replace(checkpoint, tensors=tensors)


def summary(costs: list[Cost]) -> Iterator[str]:
    """What was done, one line for each change of type."""
    kinds = Counter((cost.before, cost.after) for cost in costs)
    for (before, after), count in sorted(kinds.items()):
        alike = [cost for cost in costs if (cost.before, cost.after) == (before, after)]
        worst = max(alike, key=lambda cost: cost.error)
        yield (
            f"{count} matrices left {before}"
            if before == after
            else f"{count} matrices {before} -> {after}: error at most {worst.error:.2%} ({worst.name})"
        )


# ------------------------------------------------------------------------------------------------------ importance
def importance_of(path: Path, checkpoint: Checkpoint) -> Importance:
    """The importance in llama-imatrix's file, or what the model gives each column on a text, or on a folder's texts."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return read_importance(path, checkpoint.config)
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer to read {path} with: put its tokenizer.model beside it"
        )
    bos, rows = checkpoint.tokenizer.control.bos or 0, []
    for text in _texts(path):
        ids = checkpoint.tokenizer.encode(text)
        rows += [[bos, *ids[at : at + ROW - 1]] for at in range(0, len(ids), ROW - 1)]
    if not rows:
        raise ValueError(
            f"{path}: holds no UTF-8 text and is no file of llama-imatrix: pass code like that which the model "
            "is for"
        )
    return measure_importance(checkpoint, rows[:: -(-len(rows) // ROWS)])


def _texts(path: Path) -> Iterator[str]:
    left = MOST_TEXT
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and 0 < file.stat().st_size <= left:
            with contextlib.suppress(UnicodeDecodeError):
                yield file.read_text("utf-8")
                left -= file.stat().st_size


def measure_importance(
    checkpoint: Checkpoint, rows: Sequence[Sequence[int]], threads: int | None = None
) -> Importance:
    """The mean square of what each column of each matrix is multiplied with, over the tokens of `rows` (ids)."""
    sums: dict[str, np.ndarray] = {}
    native = Native(checkpoint, threads, observed=sums)
    for ids in rows:
        native.run([Slice(ids, 0, [native.new_page() for _ in range(0, len(ids), PAGE)], 1)])
    tokens = sum(map(len, rows))
    return {name: (total / tokens).astype(np.float32) for name, total in sums.items()}


def read_importance(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The importance that llama.cpp's `llama-imatrix` measured (its GGUF form), by our names.

    It is the mean square of what each column is multiplied with. Raises ValueError on another file or another model.
    """
    stored = gguf.read(path).tensors
    found = {}
    for place in places(config, "gguf"):
        sums, counts = (stored.get(f"{place.stored}.{part}") for part in ("in_sum2", "counts"))
        if sums is None or counts is None:
            continue
        values = sums.float32().reshape(-1) / max(1.0, float(counts.float32().reshape(-1)[0]))
        if values.size != place.shape[-1] or not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(
                f"{path}: {place.stored} has {values.size} importances, some of them no numbers, but the "
                f"model has {place.shape[-1]} columns: measure it again with this model"
            )
        found[place.name] = np.ascontiguousarray(values, np.float32)
    if not found:
        raise ValueError(
            f"{path}: holds no importances (NAME.in_sum2, NAME.counts): pass what llama-imatrix wrote"
        )
    return found
