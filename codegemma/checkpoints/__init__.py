"""Checkpoints: what the bytes on disk mean, whichever format they came in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from codegemma.checkpoints import gguf, keras, nemo, orbax, torch
from codegemma.checkpoints import huggingface as safetensors
from codegemma.checkpoints.table import Tensor
from codegemma.config import ModelConfig
from codegemma.tokenizer import Tokenizer

TAUGHT = "codegemma.fim"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model: `tensors` by our names (weights.py), `metadata` as the file states it (header, config.json).

    metadata[TAUGHT], where there is any, are the orders ("psm,spm", or "") that weights changed here were taught to fill in the
    middle in: no adapter of the model that they were made of belongs to them any more.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    build_tokenizer: Callable[[], Tokenizer] | None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Built when first asked for; None where the checkpoint has none, and then ids work but text does not."""
        return self.build_tokenizer() if self.build_tokenizer else None

    @property
    def taught(self) -> frozenset[str] | None:
        orders = self.metadata.get(TAUGHT)
        return None if orders is None else frozenset({"psm", "spm"} & set(str(orders).split(",")))

    def teach(self, orders: Iterable[str], tensors: dict[str, Tensor]) -> Checkpoint:
        """With other weights, which fill in the middle in these orders."""
        return replace(self, tensors=tensors, metadata={**self.metadata, TAUGHT: ",".join(sorted(orders))})

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a checkpoint by looking into it: a .gguf, .safetensors, .nemo, .ckpt or .bin file, or the directory of a
    Hugging Face model, a Keras preset or an Orbax checkpoint.

    Raises ValueError naming file, tensor and rule on anything damaged or foreign, FileNotFoundError on a wrong path.
    """
    path = Path(path)
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", "model_config.yaml")):
        found = sorted([*path.glob("*.gguf"), *path.glob("*.nemo"), *path.glob("*.ckpt")])
        if len(found) == 1:
            path = found[0]
        elif orbax.home(path) is None:
            raise ValueError(
                f"{path}: holds no config.json, no Orbax checkpoint, and {len(found)} .gguf, .nemo or "
                ".ckpt files: pass the directory of a model, or one file"
            )
    return Checkpoint(path, *_LOADERS[format_of(path)](path))


_LOADERS = {
    "gguf": gguf.load,
    "safetensors": safetensors.load,
    "torch": torch.load,
    "keras": keras.load,
    "nemo": nemo.load,
    "orbax": orbax.load,
}


def format_of(path: Path) -> str:
    """Which of the formats lies at a path. Raises ValueError on anything else."""
    if path.is_dir():
        if (path / "model_config.yaml").exists():
            return "nemo"
        if any(path.glob("model.weights.*")):
            return "keras"
        if orbax.home(path):
            return "orbax"
        torches = any(path.glob("pytorch_model*.bin")) or any(path.glob("*.ckpt"))
        return "torch" if torches and not any(path.glob("*.safetensors")) else "safetensors"
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:4] == b"GGUF":
        return "gguf"
    if start[:2] == b"PK":
        return "torch"
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return "nemo"
    if start[8:9] == b"{":
        return "safetensors"
    raise ValueError(
        f"{path}: is neither GGUF, safetensors, a PyTorch archive nor a .nemo: pass a file of these, a "
        "Hugging Face directory with config.json, a Keras preset or an Orbax checkpoint"
    )
