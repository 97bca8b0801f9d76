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

NAMES = ", ".join(ELEMENTS)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by its names, as views of the memory map.

    Raises ValueError naming file, tensor and rule where the header does not fit the file.
    """
    data = map_file(path)
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_JSON, len(data) - 8):
        raise damaged(
            f"{path}: its header of {size:,} bytes is longer than the file, or than {MAX_JSON:,} bytes"
        )
    infos = parse_json(path, data[8 : 8 + size])
    infos.pop("__metadata__", None)
    raw = np.frombuffer(data, np.uint8)[8 + size :]
    spans = {name: _span(path, name, info, raw.size) for name, info in infos.items()}
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: (item[1], item[0])):
        if start < end:
            raise damaged(f"{path}: tensor {name} overlaps the one before it")
        end = stop
    tensors: dict[str, Tensor] = {}
    for name, (start, stop) in spans.items():
        type, stored = infos[name]["dtype"], raw[start:stop]
        if stored.ctypes.data % BLOCKS[type][1]:  # unaligned after a header of odd length, which is rare
            stored = stored.copy()
        tensors[name] = ArrayTensor.view(type, tuple(infos[name]["shape"]), stored)
    return tensors


def _span(path: Path, name: str, info: Any, size: int) -> tuple[int, int]:
    """Where the data of a tensor begin and end, in bytes. Raises ValueError where its entry is wrong."""
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise damaged(f"{path}: tensor {name} lacks dtype, shape or data_offsets")
    if dtype not in ELEMENTS:
        raise ValueError(f"{path}: tensor {name} is {dtype}, but this program reads {NAMES}: choose GGUF")
    if len(shape) > 4 or not possible_shape(shape):
        raise damaged(f"{path}: tensor {name} has the impossible shape {shape}")
    needed = math.prod(shape) * BLOCKS[dtype][1]
    if not 0 <= start <= stop <= size or stop - start != needed:
        place = f"its data_offsets are {start:,} to {stop:,}, in {size:,} bytes of data"
        raise damaged(f"{path}: tensor {name} takes {needed:,} bytes, but {place}")
    return start, stop


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that appears only when complete. Raises ValueError on quantised tensors."""
    infos, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.type not in ELEMENTS:
            rule = f"but safetensors holds {NAMES}: write GGUF"
            raise ValueError(f"{path}: tensor {name} is {tensor.type}, {rule}")
        span = (offset, offset := offset + tensor.nbytes)
        infos[name] = {"dtype": tensor.type, "shape": tensor.shape, "data_offsets": span}
    header = json.dumps({"__metadata__": {"format": "pt"}, **infos}).encode()
    # With the 8 bytes of its length the header ends at a multiple of 64, so that the data are aligned.
    header += b" " * (-len(header) % 64 + 56)
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            tensor.write_to(file)
