"""Opens an adapter of any format (PEFT's folder, NeMo's archive, GGUF), or one that comes with codegemma."""

from __future__ import annotations

from pathlib import Path

from codegemma import hub
from codegemma.adapters import gguf, nemo, peft
from codegemma.adapters.adapter import Adapter
from codegemma.checkpoints import Checkpoint, gguf_files
from codegemma.config import Preset
from codegemma.files import PLACEHOLDER_BYTES, refuse_placeholder

PACKAGED = Path(__file__).parent  # has a folder for each packaged adapter, named MODEL-fim
FORMS = "pass PEFT's folder, NeMo's .nemo archive or a GGUF adapter"


def load(path: Path | str) -> Adapter:
    """An adapter from PEFT's folder (or its weights file), NeMo's .nemo archive, or a GGUF file.

    Raises ValueError on damaged files, on adapters that are more than plain LoRA, and on models.
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
        weights = f"a safetensors file that is not named {peft.WEIGHTS[0]}"
        kind = "a GGUF file of a model" if start[:4] == b"GGUF" else weights
        raise ValueError(f"{path}: is {kind}, not an adapter: {FORMS}; a model is passed by -m")
    return nemo.load(path)


def _load_folder(folder: Path) -> Adapter:
    if (folder / "adapter_config.json").exists():
        return peft.load(folder)
    if (folder / "model_config.yaml").is_file():
        return nemo.load(folder)
    if file := _gguf_adapter_in(folder):
        return gguf.load(file)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a model, not an adapter: {FORMS}; a model is passed by -m")
    return peft.load(folder)  # raises ValueError, which says what is missing


def _gguf_adapter_in(folder: Path) -> Path | None:
    """The GGUF adapter in a folder; None if it has none, or several."""
    files = [file for file in sorted(folder.glob("*.gguf")) if gguf.is_adapter(file)]
    return files[0] if len(files) == 1 else None


def is_adapter(path: Path | str) -> bool:
    """Whether a path is an adapter that `load` takes, and not a model.

    A folder that holds a model counts as a model, even if a GGUF adapter lies beside it.
    """
    path = Path(path)
    if path.name in peft.WEIGHTS or (path / "adapter_config.json").is_file():
        return True
    if path.is_file():
        return nemo.is_adapter(path) if path.suffix == ".nemo" else gguf.is_adapter(path)
    if (path / "model_config.yaml").is_file():
        return nemo.is_adapter(path)
    return _gguf_adapter_in(path) is not None and not _holds_model(path)


def _holds_model(folder: Path) -> bool:
    """Whether a folder with a GGUF adapter holds a model too."""
    return (folder / "config.json").exists() or "model" in map(gguf_files.role, folder.glob("*.gguf"))


def packaged_adapter(checkpoint: Checkpoint, preset: Preset | None) -> tuple[str, Adapter] | None:
    """The name of a published model's packaged adapter, and the adapter, which fills in the middle.

    None where there is none, where it does not fit this checkpoint, or where codegemma changed the
    checkpoint's weights (it may be merged already).
    """
    name = f"{preset.name}-fim" if preset else ""
    if not name or not (PACKAGED / name).is_dir() or checkpoint.fim_orders is not None:
        return None
    adapter = load(PACKAGED / name)
    try:
        adapter.check(checkpoint.config)
    except ValueError:  # the checkpoint has the preset's name, but other shapes
        return None
    return name, adapter


def named_adapter(name: str, checkpoint: Checkpoint) -> Adapter:
    """The adapter at a path, the packaged adapter of this name or, for "auto", the model's packaged adapter.

    Raises ValueError where there is none.
    """
    if name == "auto":
        packaged = packaged_adapter(checkpoint, hub.preset_of(checkpoint))
        if packaged is None:
            rule = 'has no packaged adapter, or it is merged already: pass an adapter\'s path, or "none"'
            raise ValueError(f"{checkpoint.path} {rule}")
        return packaged[1]
    is_packaged = (PACKAGED / name / "adapter_config.json").is_file() and not Path(name).exists()
    return load(PACKAGED / name if is_packaged else Path(name).expanduser())
