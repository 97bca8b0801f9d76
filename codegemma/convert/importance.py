"""How much each column of a matrix counts in quantisation: the mean square of the inputs it multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from codegemma.checkpoints import Checkpoint, gguf
from codegemma.checkpoints.table import tensor_locations
from codegemma.config import ModelConfig
from codegemma.convert.quantize import Importance
from codegemma.native import PAGE, Native, Slice

ROW_TOKENS = 512  # ids in each row that the model is run on
MAX_ROWS = 32
MAX_TEXT_BYTES = 1 << 24


def importance_of(path: Path, checkpoint: Checkpoint) -> Importance:
    """The importance of each column, from a file of llama-imatrix or measured on a file or folder of texts.

    Raises ValueError on a file of another model, and where there is no such path, no text or no tokenizer.
    """
    if not path.exists():
        raise ValueError(
            f"{path}: does not exist: pass a file of llama-imatrix, or a file or folder of texts"
        )
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return _read_imatrix(path, checkpoint.config)
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(f"{checkpoint.path} has no tokenizer to read {path} with: add its tokenizer.model")
    rows = []
    for text in _texts(path):
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), ROW_TOKENS - 1):
            rows.append([tokenizer.control.bos or 0, *ids[start : start + ROW_TOKENS - 1]])
    if not rows:
        rule = "holds no UTF-8 text and is no file of llama-imatrix"
        raise ValueError(f"{path}: {rule}: pass code like what the model will write")
    return _measure(checkpoint, rows[:: -(-len(rows) // MAX_ROWS)])


def _texts(path: Path) -> Iterator[str]:
    """The UTF-8 texts of a file or folder, up to MAX_TEXT_BYTES in all."""
    budget = MAX_TEXT_BYTES
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and 0 < file.stat().st_size <= budget:
            with contextlib.suppress(UnicodeDecodeError):
                yield file.read_text("utf-8")
                budget -= file.stat().st_size


def _measure(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> Importance:
    """The mean square of each matrix's input [columns] over all tokens in rows of ids."""
    squares: dict[str, np.ndarray] = {}
    native = Native(checkpoint, observed=squares)
    for ids in rows:
        native.run([Slice(ids, 0, [native.new_page() for _ in range(0, len(ids), PAGE)], 1)])
    tokens = sum(map(len, rows))
    return {name: (total / tokens).astype(np.float32) for name, total in squares.items()}


def _read_imatrix(path: Path, config: ModelConfig) -> Importance:
    """The importance in the GGUF file of llama.cpp's `llama-imatrix`, by our tensor names."""
    stored, importance = gguf.read(path).tensors, {}
    for location in tensor_locations(config, "gguf"):
        sums, counts = (stored.get(f"{location.stored}.{part}") for part in ("in_sum2", "counts"))
        if sums is None or counts is None:
            continue
        values = sums.float32().reshape(-1) / max(1.0, float(counts.float32().reshape(-1)[0]))
        if values.size != location.shape[-1] or not (np.isfinite(values).all() and (values >= 0).all()):
            rule = f"there must be {location.shape[-1]}, one for each column, all finite and at least 0"
            fault = f"{location.stored} has {values.size} importances, but {rule}"
            raise ValueError(f"{path}: {fault}: measure it again with this model")
        importance[location.name] = np.ascontiguousarray(values, np.float32)
    if not importance:
        rule = "holds no importances (NAME.in_sum2, NAME.counts)"
        raise ValueError(f"{path}: {rule}: pass a file of llama-imatrix")
    return importance
