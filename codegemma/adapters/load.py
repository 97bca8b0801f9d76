"""Opening an adapter of any format: PEFT's folder, NeMo's archive, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from codegemma.adapters import gguf, nemo, peft
from codegemma.adapters.adapter import Adapter
from codegemma.files import PLACEHOLDER_BYTES, refuse_placeholder

FORMS = "pass PEFT's folder, NeMo's .nemo archive or a GGUF adapter"


def load(path: Path | str) -> Adapter:
    """An adapter from PEFT's folder (or its weights file), NeMo's .nemo archive, or a GGUF file.

    Raises ValueError on damaged files, on adapters that are more than plain LoRA, and on what is a model.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: does not exist: {FORMS}")
    if path.is_dir():
        return _load_folder(path)
    with open(path, "rb") as file:
        start = file.read(PLACEHOLDER_BYTES)
    refuse_placeholder(path, start)
    if path.name in peft.WEIGHTS:
        return peft.load(path)
    if start[:4] == b"GGUF" and gguf.is_adapter(path):
        return gguf.load(path)
    if start[:4] == b"GGUF" or start[8:9] == b"{":
        kind = (
            "a GGUF file of a model" if start[:4] == b"GGUF" else f"a safetensors file, not {peft.WEIGHTS[0]}"
        )
        raise ValueError(f"{path}: is {kind}, and no adapter: {FORMS}; a model is passed by -m")
    return nemo.load(path)


def _load_folder(folder: Path) -> Adapter:
    if (folder / "adapter_config.json").exists():
        return peft.load(folder)
    if (folder / "model_config.yaml").is_file():
        return nemo.load(folder)
    files = [file for file in sorted(folder.glob("*.gguf")) if gguf.is_adapter(file)]
    if len(files) == 1:
        return gguf.load(files[0])
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a model, not an adapter: {FORMS}; a model is passed by -m")
    return peft.load(folder)  # which says what is missing


def is_adapter(path: Path | str) -> bool:
    """Whether a path holds an adapter, and not a model."""
    path = Path(path)
    if path.is_file() and path.suffix == ".nemo":
        return nemo.is_adapter(path)
    if path.is_file() and path.name not in peft.WEIGHTS:
        return gguf.is_adapter(path)
    return (path / "adapter_config.json").is_file() or path.name in peft.WEIGHTS
