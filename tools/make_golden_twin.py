"""Writes tests/golden/twin.npz: what the float64 twin of the default model predicts for code_1000.py.txt.

    PYTHONPATH=.:tests .venv/bin/python tools/make_golden_twin.py

Holds `top_ids` int32 and `top_logprobs` float32 [1000, 64] (best first) after each token of `ids` of
llamacpp.npz, and `model_sha256`. KL(twin || ours) at a position is at least, and nearly, the sum over the top
64 of p * (log p - log q), plus the same term for all other tokens taken as one outcome.

Takes 10 GB of memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import ArrayLike
from reference import logits

import codegemma
from codegemma.checkpoints.table import tensor_locations
from codegemma.config import GEMMA3_270M

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
TOP = 64


def log_softmax(scores_TV: np.ndarray) -> np.ndarray:
    """float64 [T, V]."""
    wide_TV = scores_TV.astype(np.float64, copy=False)
    for row_V in wide_TV:  # row by row and in place, as the array has 2 GB
        row_V -= row_V.max()
        row_V -= np.log(np.exp(row_V).sum())
    return wide_TV


def twin_log_probabilities(model: Path, ids: ArrayLike) -> np.ndarray:
    """float64 [T, V]: the values of the file as gguf's Python reader decodes them, in reference.py."""
    tensors = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(model).tensors
    }
    params = {
        location.name: tensors[location.stored].reshape(location.shape)
        for location in tensor_locations(GEMMA3_270M, "gguf")
    }
    return log_softmax(logits(GEMMA3_270M, params, ids))


def main() -> None:
    model = codegemma.load().path
    log_TV = twin_log_probabilities(model, np.load(GOLDEN / "llamacpp.npz")["ids"])
    best_T64 = np.array([np.argsort(-log_V, kind="stable")[:TOP] for log_V in log_TV], np.int32)
    np.savez_compressed(
        GOLDEN / "twin.npz",
        top_ids=best_T64,
        top_logprobs=np.take_along_axis(log_TV, best_T64, -1).astype(np.float32),
        model_sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
    )


if __name__ == "__main__":
    main()
