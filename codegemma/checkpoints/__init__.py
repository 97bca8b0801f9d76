"""Opens checkpoints: recognises the format of a file or directory and calls its loader."""

from __future__ import annotations

from pathlib import Path

from codegemma.checkpoints import gguf, gguf_files, gguf_model, huggingface, keras, nemo, orbax, torch
from codegemma.checkpoints.checkpoint import FIM_ORDERS_KEY, Checkpoint
from codegemma.files import PLACEHOLDER_BYTES, refuse_placeholder

__all__ = ["FIM_ORDERS_KEY", "Checkpoint", "format_of", "open_checkpoint"]

LOADERS = {
    "gguf": gguf_model.load,
    "safetensors": huggingface.load,
    "torch": torch.load,
    "keras": keras.load,
    "nemo": nemo.load,
    "orbax": orbax.load,
}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a .gguf, .safetensors, .nemo, .ckpt or .bin file, or the directory of a model.

    A directory holds one of these files, a Hugging Face model, a Keras preset, an Orbax checkpoint or an
    unpacked .nemo. The format is recognised by its contents. Raises ValueError naming file, tensor and rule
    on anything else, FileNotFoundError on a wrong path.
    """
    path = Path(path)
    is_adapter = path.is_dir() and (path / "adapter_config.json").exists()
    if path.name.startswith("adapter_model.") or is_adapter and not (path / "config.json").exists():
        raise ValueError(f"{path}: is an adapter, not a model: pass it by --adapter, and its model by -m")
    path = _model_in(path) if path.is_dir() else gguf.pieces(path)[0]
    return LOADERS[format_of(path)](path)


def _model_in(directory: Path) -> Path:
    """The model in a directory: its only model file (of several quantisations, one), or the directory itself.

    Raises ValueError where it holds no model, or several.
    """
    has_config = any((directory / name).exists() for name in ("config.json", "model_config.yaml"))
    weights = ("*.safetensors", "*.bin", "*.h5", "*.ckpt", "model_weights*")
    if has_config and any(next(directory.glob(pattern), None) for pattern in weights):
        return directory
    if file := gguf_files.in_folder(directory):
        return file
    files = sorted([*directory.glob("*.nemo"), *directory.glob("*.ckpt")])
    if len(files) == 1:
        return files[0]
    if not has_config and orbax.find_checkpoint(directory) is None:
        rule = f"no Orbax checkpoint, no .gguf and {len(files)} .nemo or .ckpt files"
        raise ValueError(f"{directory}: holds no config.json, {rule}: pass a model's directory, or one file")
    return directory


def format_of(path: Path) -> str:
    """The format of a checkpoint, a key of LOADERS.

    A directory of no other format counts as "safetensors". Raises ValueError on a file of no known format.
    """
    if path.is_dir():
        if (path / "model_config.yaml").exists():
            return "nemo"
        if any(path.glob("model.weights.*")):
            return "keras"
        if orbax.find_checkpoint(path):
            return "orbax"
        has_torch = any(path.glob("pytorch_model*.bin")) or any(path.glob("*.ckpt"))
        return "torch" if has_torch and not any(path.glob("*.safetensors")) else "safetensors"
    with open(path, "rb") as file:
        start = file.read(PLACEHOLDER_BYTES)
    refuse_placeholder(path, start)
    if start[:4] == b"GGUF":
        return "gguf"
    if start[:2] == b"PK":
        return "torch"
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return "nemo"
    if start[8:9] == b"{":
        return "safetensors"
    if path.suffix in (".json", ".h5", ".model", ".jinja", ".index"):
        raise ValueError(f"{path}: is a part of a model: pass its folder, {path.parent}")
    remedy = "pass such a file, a Hugging Face directory with config.json, a Keras preset or Orbax checkpoint"
    raise ValueError(f"{path}: is neither GGUF, safetensors, a PyTorch archive nor a .nemo: {remedy}")
