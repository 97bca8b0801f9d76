"""Checkpoints: what the bytes on disk mean, whichever format they came in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from codegemma.config import ModelConfig
from codegemma.formats import gguf, safetensors
from codegemma.tokenizer import Tokenizer
from codegemma.weights import Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model: `tensors` by our names (weights.py), `metadata` as the file states it (header, config.json)."""

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    build_tokenizer: Callable[[], Tokenizer] | None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Built when first asked for; None where the checkpoint has none, and then ids work but text does not."""
        return self.build_tokenizer() if self.build_tokenizer else None

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a .gguf file, a .safetensors file or a Hugging Face directory, by looking into it.

    Raises ValueError naming file, tensor and rule on anything damaged or foreign, FileNotFoundError on a wrong path.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ValueError(f"{path}: holds no config.json and {len(found)} .gguf files: pass a Hugging Face "
                             "directory or one .gguf file")
        path = found[0]
    if path.is_dir():
        return Checkpoint(path, *safetensors.load(path))
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:4] == b"GGUF":
        return Checkpoint(path, *gguf.load(path))
    if start[8:] == b"{":
        return Checkpoint(path, *safetensors.load(path))
    raise ValueError(f"{path}: is neither GGUF nor safetensors: pass a .gguf file or a Hugging Face directory with "
                     "config.json and *.safetensors")
