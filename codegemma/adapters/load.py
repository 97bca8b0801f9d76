"""Opening an adapter of either format: PEFT's folder, or NeMo's archive."""

from __future__ import annotations

from pathlib import Path

from codegemma.adapters import nemo, peft
from codegemma.adapters.adapter import Adapter


def load(path: Path | str) -> Adapter:
    """An adapter from PEFT's folder (or its weights file), or from NeMo's .nemo archive.

    Raises ValueError on damaged files, and on adapters that are more than plain LoRA.
    """
    path = Path(path)
    is_archive = path.is_file() and path.name not in peft.WEIGHTS
    return nemo.load(path) if is_archive or (path / "model_config.yaml").is_file() else peft.load(path)


def is_adapter(path: Path | str) -> bool:
    """Whether a path holds an adapter, and not a model."""
    path = Path(path)
    if path.is_file() and path.suffix == ".nemo":
        return nemo.is_adapter(path)
    return (path / "adapter_config.json").is_file() or path.name in peft.WEIGHTS
