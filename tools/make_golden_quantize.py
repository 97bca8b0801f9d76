"""Writes tests/golden/quantize.npz: blocks by llama.cpp's quantisers, with and without importance.

    PYTHONPATH=. .venv-bench/bin/python tools/make_golden_quantize.py

Holds `values` float32 [24, 512] (normal, bfloat16, on a grid, heavy-tailed, constant, zero rows),
`importance` float32 [512], and for each type uint8 `Q4_0` and `Q4_0_weighted`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from codegemma.checkpoints.gguf import TYPES
from codegemma.checkpoints.tensors import row_bytes

WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "quantize.npz"


def values() -> np.ndarray:
    """float32 [24, 512]; see the top of this file."""
    rng = np.random.default_rng(7)
    normal = rng.normal(0, 0.05, (8, 512)).astype(np.float32)
    bf16 = (rng.normal(0, 0.05, (4, 512)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    grid = np.round(rng.normal(0, 10, (4, 512))).astype(np.float32) / 100
    heavy = rng.normal(0, 1, (8, 512)).astype(np.float32) ** 5
    heavy[0], heavy[1, :200], heavy[2], heavy[3] = 0, 0, 1, -np.abs(heavy[3])
    heavy[4, ::2], heavy[4, 1::2], heavy[5] = 0.5, -0.5, 1e-20
    return np.concatenate([normal, bf16, grid, heavy])


def main() -> None:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    llama_cpp.llama_backend_init()
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    x, importance = values(), np.random.default_rng(8).gamma(1, 1, 512).astype(np.float32)
    rows, columns = (ctypes.c_int64(size) for size in x.shape)
    arrays: dict[str, Any] = {"values": x, "importance": importance}
    for code, type in TYPES.items():
        if type not in WRITTEN:
            continue
        for suffix, weight in (("", None), ("_weighted", importance.ctypes.data_as(ctypes.c_void_p))):
            out = np.zeros((len(x), row_bytes(type, x.shape[1])), np.uint8)
            library.ggml_quantize_chunk(
                code,
                x.ctypes.data_as(ctypes.c_void_p),
                out.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_int64(0),
                rows,
                columns,
                weight,
            )
            arrays[type + suffix] = out
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
