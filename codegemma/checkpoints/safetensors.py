"""safetensors, the file format of Hugging Face: read by memory map, written tensor by tensor.

Layout: u64 length of the header, JSON header {name: {dtype, shape, data_offsets}}, data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints.tensors import BLOCKS, ELEMENTS, ArrayTensor, Tensor, possible_shape
from codegemma.checkpoints.untrusted import MAX_JSON, damaged, parse_json
from codegemma.files import atomic_write, map_file

TYPES = tuple(ELEMENTS)
NAMES = ", ".join(TYPES)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file under their own names, as views of its memory map.

    Raises ValueError naming file, tensor and rule where the header does not fit the file.
    """
    data = map_file(path)
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_JSON, len(data) - 8):
        raise damaged(f"{path}: its header of {size:,} bytes must fit the file and {MAX_JSON:,} bytes")
    infos = parse_json(path, data[8 : 8 + size])
    infos.pop("__metadata__", None)
    raw = np.frombuffer(data, np.uint8)[8 + size :]
    spans = {name: _span(path, name, info, raw.size) for name, info in infos.items()}
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: (item[1], item[0])):
        if start < end:
            raise damaged(f"{path}: tensor {name} overlaps the one before it")
        end = stop
    return {name: _tensor(infos[name], raw[start:stop]) for name, (start, stop) in spans.items()}


def _span(path: Path, name: str, info: Any, size: int) -> tuple[int, int]:
    """First and last byte of a tensor, if dtype, shape and offsets agree with each other and the file."""
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise damaged(f"{path}: tensor {name} lacks dtype, shape or data_offsets")
    if dtype not in TYPES:
        raise ValueError(
            f"{path}: tensor {name} is {dtype}, but this program reads {NAMES}: choose a GGUF file"
        )
    if len(shape) > 4 or not possible_shape(shape):
        raise damaged(f"{path}: tensor {name} has the impossible shape {shape}")
    needed = math.prod(shape) * BLOCKS[dtype][1]
    if not 0 <= start <= stop <= size or stop - start != needed:
        raise damaged(f"{path}: tensor {name} of {needed:,} bytes lies at {start:,} to {stop:,} in {size:,}")
    return start, stop


def _tensor(info: Mapping[str, Any], raw: np.ndarray) -> Tensor:
    if (
        raw.ctypes.data % BLOCKS[info["dtype"]][1]
    ):  # a header of odd length, which is rare, leaves data unaligned
        raw = raw.copy()
    return ArrayTensor.view(info["dtype"], tuple(info["shape"]), raw)


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes unquantised tensors into a file that appears only when complete. Raises ValueError on blocks."""
    infos, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.type not in TYPES:
            raise ValueError(
                f"{path}: tensor {name} is {tensor.type}, but safetensors holds {NAMES}: write GGUF"
            )
        span = (offset, offset := offset + tensor.nbytes)
        infos[name] = {"dtype": tensor.type, "shape": tensor.shape, "data_offsets": span}
    header = json.dumps({"__metadata__": {"format": "pt"}, **infos}).encode()
    header += b" " * (-len(header) % 64 + 56)
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            tensor.write_to(file)
