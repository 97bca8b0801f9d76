"""Chooses each matrix's block type by llama.cpp's rules, quantises it, and measures the error.

The blocks equal those of ggml's reference quantisers bit for bit (native/src/quantise.cpp). Norms stay F32.
Where a row is not a whole number of blocks, the next larger type is used; where none fits, the matrix is not
quantised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor, Tensor, row_bytes
from codegemma.checkpoints.untrusted import naming
from codegemma.config import ModelConfig
from codegemma.native import QUANTISERS, dequantize, quantize_rows, usable_cpus

# The next larger type, for rows that the blocks of a type do not fill.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1"} | dict.fromkeys(("Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), "Q8_0")
MIXES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}  # attn_v and ffn_down get Q6_K in half of the layers
QUANTISED = tuple(type for type, (weights, _) in BLOCKS.items() if weights > 1)
CHUNK = 1 << 20  # weights that one thread holds as float32

Importance = Mapping[str, np.ndarray]  # by tensor name: float32 [columns], the weight of each column's error


@dataclass(frozen=True)
class Cost:
    """The types of a matrix before and after, and the norm of the error over the norm of the weights."""

    name: str
    before: str
    after: str
    error: float


def relative_error(squared_error: float, squared_norm: float) -> float:
    """The norm of an error over the norm of the weights; 0 where all weights are 0."""
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def bits(type: str) -> float:
    """Bits per weight of a type."""
    weights, size = BLOCKS[type]
    return 8 * size / weights


def choose_types(type: str, checkpoint: Checkpoint, weighted: bool = False) -> dict[str, str]:
    """The new type of each tensor for a type or mix ("q8_0", "q4_k_m"): never one of more bits.

    `weighted` says whether importances weigh the errors. Raises ValueError on a type that is unknown, or read
    but not written.
    """
    name, names = type.upper(), (*QUANTISERS, *MIXES)
    if name not in names:
        rule = "is read but not written" if name in QUANTISED else "is no type of blocks"
        raise ValueError(
            f"cannot quantize to {type!r}, which {rule}: choose {', '.join(map(str.lower, names))}"
        )
    return {
        key: _fitting(_mix_type(name, key, checkpoint.config, weighted), tensor)
        for key, tensor in checkpoint.tensors.items()
    }


def _mix_type(mix: str, name: str, config: ModelConfig, weighted: bool) -> str:
    """The type of a matrix by llama.cpp's rule.

    The embedding, which is also the output layer, gets Q6_K (Q8_0 where the type is Q8_0). In mixes, and for
    IQ4_NL, some v and down matrices get a type of more bits.
    """
    type = MIXES.get(mix, mix)
    if name == "embed":
        return "Q8_0" if type == "Q8_0" else "Q6_K"
    if match := re.fullmatch(r"layers\.(\d+)\.(v|down)", name):
        layer, eighth = int(match[1]), config.layers // 8
        if mix in MIXES and (layer < eighth or layer >= 7 * config.layers // 8 or (layer - eighth) % 3 == 2):
            return "Q6_K"
        many_share_v = match[2] == "v" and config.heads >= 4 * config.kv_heads
        if mix == "IQ4_NL" and (many_share_v or match[2] == "down" and layer < eighth and not weighted):
            return "Q5_K"
    return type


def _fitting(type: str, tensor: Tensor) -> str:
    """The type, or its first fallback whose blocks fill a row; the tensor's own if that has no more bits."""
    if len(tensor.shape) == 1:
        return tensor.type
    while tensor.shape[-1] % BLOCKS[type][0]:
        if type not in FALLBACK:
            return tensor.type
        type = FALLBACK[type]
    return type if bits(type) < bits(tensor.type) else tensor.type


def quantize_matrix(
    tensor: Tensor, type: str, importance: np.ndarray | None = None, threads: int | None = None
) -> tuple[np.ndarray, float, float]:
    """A matrix as blocks, with the squared norms of the error and of the weights.

    The blocks are uint8 [rows, bytes of a row]. `importance` [columns] weighs the rounding errors. Raises
    ValueError on NaN or infinite weights, where blocks do not fill a row, and on types without a quantiser.
    """
    rows, columns = tensor.shape
    tensor = ArrayTensor(tensor.type, tensor.shape, tensor.data)  # so that a lazy one is read once
    blocks, step = np.empty((rows, row_bytes(type, columns)), np.uint8), max(1, CHUNK // columns)

    def quantize_chunk(start: int) -> tuple[float, float]:
        stop = min(rows, start + step)
        values = dequantize(tensor.rows(start, stop))
        blocks[start:stop] = quantize_rows(values, type, importance)
        squared_norm = float(np.vdot(values, values))
        values -= dequantize(ArrayTensor(type, values.shape, blocks[start:stop]))
        return float(np.vdot(values, values)), squared_norm

    with ThreadPoolExecutor(threads or usable_cpus()) as pool:
        sums = list(pool.map(quantize_chunk, range(0, rows, step)))
    squared_error, squared_norm = (math.fsum(part) for part in zip(*sums, strict=True))
    return blocks, squared_error, squared_norm


def quantize_checkpoint(checkpoint: Checkpoint, type: str) -> Checkpoint:
    """The same model with its matrices quantised, in memory.

    Raises ValueError on an unknown type, and on a matrix with NaN or infinite weights.
    """
    tensors = dict(checkpoint.tensors)
    for name, new_type in choose_types(type, checkpoint).items():
        tensor = tensors[name]
        if new_type != tensor.type:
            with naming(f"{checkpoint.path}: tensor {name}"):
                blocks, *_ = quantize_matrix(tensor, new_type)
            tensors[name] = ArrayTensor(new_type, tensor.shape, blocks)
    return replace(checkpoint, tensors=tensors)


def summary(costs: list[Cost]) -> Iterator[str]:
    """A line for each pair of types, with the number of matrices and the largest error."""
    by_types: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        by_types.setdefault((cost.before, cost.after), []).append(cost)
    for (before, after), group in sorted(by_types.items()):
        worst = max(group, key=lambda cost: cost.error)
        yield f"{len(group)} matrices {before} -> {after}: error at most {worst.error:.2%} ({worst.name})"
