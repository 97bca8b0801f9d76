"""Models that other programs keep on this machine: Hugging Face's cache, Ollama and LM Studio."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from codegemma.checkpoints import gguf, gguf_files, orbax, table
from codegemma.checkpoints.untrusted import read_json
from codegemma.files import cache_dir

WEIGHTS = ("*.safetensors", "*.h5", "*.bin", "*.ckpt")  # beside a config.json
OLLAMA_HOST = "registry.ollama.ai"
_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
Store = Literal["huggingface", "ollama", "lmstudio"]


@dataclass(frozen=True)
class StoredModel:
    """A model in another program's store, by the name that `hub.resolve` takes for it."""

    name: str
    path: Path
    store: Store

    @property
    def size(self) -> int:
        """Bytes of weights."""
        return weight_bytes(self.path)


def weight_bytes(path: Path) -> int:
    """The size of a model's weights: of all parts of a file, or of the weight files in a directory."""
    files = (
        [file for pattern in WEIGHTS for file in path.glob(pattern)]
        if path.is_dir()
        else gguf_files.parts(path)
    )
    return sum(file.stat().st_size for file in files if file.exists())


def disk_bytes(path: Path) -> int:
    """The size of a file (of a link, its target's), or of all files in a folder without its links."""
    files = (
        [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
        if path.is_dir()
        else [path]
    )
    return sum(file.stat().st_size for file in files)


def model_in(directory: Path, quantisation: str | None = None) -> Path | None:
    """The model in a directory; None if there is none, or several .nemo.

    It is the first of these: the directory, if it holds config.json and weights; its GGUF file; its only
    .nemo; the directory, if it is an Orbax checkpoint. With a `quantisation`, it is that GGUF file. Raises
    ValueError where several GGUF models are there.
    """
    has_weights = any(next(directory.glob(pattern), None) for pattern in WEIGHTS)
    if quantisation is None and (directory / "config.json").exists() and has_weights:
        return directory
    if file := gguf_files.in_folder(directory, quantisation, deep=True):
        return file
    files = list(directory.glob("*.nemo"))
    if len(files) == 1:
        return files[0]
    return directory if orbax.find_checkpoint(directory) else None


# ------------------------------------------------------------------------------------- Hugging Face's cache
def hub_cache_dir() -> Path:
    """huggingface_hub's cache: HF_HUB_CACHE, else $HF_HOME/hub, else huggingface/hub in ~/.cache."""
    home = os.environ.get("HF_HOME") or cache_dir().parent / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def hub_folder(repository: str) -> Path | None:
    """Where huggingface_hub keeps a repository; None if this is no repository's name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return None
    return hub_cache_dir() / f"models--{repository.replace('/', '--')}"


def in_hub_cache(repository: str, quantisation: str | None = None) -> Path | None:
    """The model of a downloaded repository: from the snapshot of its main branch, or from its only snapshot
    where no main branch is recorded.
    """
    folder = hub_folder(repository)
    snapshot = _snapshot(folder) if folder else None
    return model_in(snapshot, quantisation) if snapshot else None


def _snapshot(folder: Path) -> Path | None:
    """The snapshot of the main branch, or the only one where no main branch is recorded."""
    revision = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        revision = (folder / "refs" / "main").read_text().strip()
    if not revision:
        snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
        return snapshots[0] if len(snapshots) == 1 else None
    return folder / "snapshots" / revision if revision.isalnum() else None


def _hub_cache_models() -> Iterator[StoredModel]:
    for folder in sorted(hub_cache_dir().glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        if snapshot := _snapshot(folder):
            yield from _models_in_folder(repository, snapshot, "huggingface")


def _models_in_folder(name: str, folder: Path, store: Store) -> Iterator[StoredModel]:
    """The models in a folder that we can run: each quantisation of its GGUF files, and the folder itself.

    The folder is a model if it holds config.json and weights.
    """
    files = [
        file for file in sorted([*folder.glob("*.gguf"), *folder.glob("*/*.gguf")]) if _is_supported(file)
    ]
    firsts = {gguf_files.parts(file)[0]: None for file in files}
    for file in firsts:
        name_in_folder = gguf_files.stem(str(file.relative_to(folder)))
        quantisation = gguf_files.tag(name_in_folder) or gguf_files.stem(file.name)
        yield StoredModel(f"{name}:{quantisation}", file, store)
    has_weights = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    if has_weights and (folder / "config.json").exists() and _is_supported(folder):
        yield StoredModel(name, folder, store)


def _is_supported(path: Path) -> bool:
    """Whether a model's architecture, by its header or config.json, is one that we can run."""
    try:
        if path.is_dir():
            kind = str(read_json(path / "config.json").get("model_type")).removesuffix("_text")
            return kind in table.format_table("hf")["defaults"]
        kind = str(gguf.read_general(path).get("general.architecture"))
        return gguf_files.role(path) == "model" and kind in table.format_table("gguf")["defaults"]
    except (ValueError, OSError):
        return False


# ----------------------------------------------------------------------------------------------- Ollama
def _home(*parts: str) -> list[Path]:
    """A path in the user's home; [] for a user without one."""
    try:
        return [Path.home().joinpath(*parts)]
    except RuntimeError:
        return []


def ollama_dirs() -> list[Path]:
    """OLLAMA_MODELS, or the folders of Ollama started by the user and as Linux's service."""
    if folder := os.environ.get("OLLAMA_MODELS"):
        return [Path(folder).expanduser()]
    return [*_home(".ollama", "models"), Path("/usr/share/ollama/.ollama/models")]


def _manifests() -> Iterator[tuple[tuple[str, ...], Path]]:
    """(host, namespace, model, tag) and the manifest of each of Ollama's models."""
    for folder in ollama_dirs():
        for file in sorted(folder.glob("manifests/*/*/*/*")):
            yield file.relative_to(folder / "manifests").parts, file


def _layers(manifest: Path) -> Iterator[tuple[str, Path]]:
    """The kind and the file of each layer of a manifest. Raises ValueError on a damaged one."""
    layers = read_json(manifest).get("layers")
    for layer in layers if isinstance(layers, list) else []:
        fields: dict[str, Any] = layer if isinstance(layer, dict) else {}
        kind, digest = str(fields.get("mediaType")), _DIGEST.fullmatch(str(fields.get("digest")))
        if kind.startswith(_LAYER) and digest:
            blobs = manifest.parents[4] / "blobs"
            names = (f"sha256-{digest[1]}", f"sha256:{digest[1]}")  # older versions wrote a colon
            existing = filter(Path.exists, map(blobs.joinpath, names))
            yield kind.removeprefix(_LAYER), next(existing, blobs / names[0])


def _model_layer(manifest: Path) -> Path | None:
    return next((blob for kind, blob in _layers(manifest) if kind == "model"), None)


def _ollama_name(parts: tuple[str, ...]) -> str:
    """The name as `ollama list` shows it: without the default host, namespace and tag."""
    host, namespace, model, tag = parts
    owner = "" if (host, namespace) == (OLLAMA_HOST, "library") else f"{namespace}/"
    return f"{'' if host == OLLAMA_HOST else f'{host}/'}{owner}{model}{'' if tag == 'latest' else f':{tag}'}"


def in_ollama(name: str) -> Path:
    """The GGUF file of one of Ollama's models, such as "codegemma:2b" or "hf.co/owner/name:tag".

    Raises ValueError naming the models that are there; warns of an adapter, which is not applied.
    """
    wanted = name.lower().removeprefix(f"{OLLAMA_HOST}/").removeprefix("library/").removesuffix(":latest")
    manifests = {_ollama_name(parts): file for parts, file in _manifests()}
    manifest = next((file for full, file in manifests.items() if full.lower() == wanted), None)
    if manifest is None:
        folders = " and ".join(map(str, ollama_dirs()))
        listed = ", ".join(sorted(manifests)) or "none"
        raise ValueError(f"Ollama has no model {name!r} in {folders} (there: {listed}): `ollama pull {name}`")
    blob = _model_layer(manifest)
    if blob is None or not blob.exists():
        raise ValueError(f"{manifest}: names no model file that is there: `ollama pull {name}`")
    for kind, adapter in _layers(manifest):
        if kind == "adapter":
            warnings.warn(
                f"ollama:{name} has an adapter, not applied: pass --adapter {adapter}", stacklevel=3
            )
    return blob


def _ollama_models() -> Iterator[StoredModel]:
    for parts, file in _manifests():
        try:
            blob = _model_layer(file)
        except (ValueError, OSError):
            continue
        if blob and _is_supported(blob):
            yield StoredModel(f"ollama:{_ollama_name(parts)}", blob, "ollama")


# -------------------------------------------------------------------------------------------- LM Studio
def lmstudio_dirs() -> list[Path]:
    """LM Studio's folders of models: in the home that its pointer file names, and the usual ones."""
    homes = _home(".lmstudio") + _home(".cache", "lm-studio")
    for pointer in _home(".lmstudio-home-pointer"):
        if pointer.is_file():
            homes.insert(0, Path(pointer.read_text("utf-8", "replace").strip()))
    return [folder / "models" for folder in dict.fromkeys(homes)]


def _repositories() -> Iterator[tuple[str, Path]]:
    for folder in lmstudio_dirs():
        for repository in sorted(folder.glob("*/*/")):
            yield "/".join(repository.relative_to(folder).parts), repository


def in_lmstudio(name: str, quantisation: str | None = None) -> Path | None:
    """The model in LM Studio's folder "publisher/repository"; capitals make no difference."""
    folders = (folder for full, folder in _repositories() if full.lower() == name.lower())
    return next(filter(None, (model_in(folder, quantisation) for folder in folders)), None)


def _lmstudio_models() -> Iterator[StoredModel]:
    for name, folder in _repositories():
        yield from _models_in_folder(f"lmstudio:{name}", folder, "lmstudio")


# -------------------------------------------------------------------------------------------- all of them
def stored_models() -> list[StoredModel]:
    """The models in other programs' stores that this program runs; reads headers, downloads nothing."""
    return [*_hub_cache_models(), *_ollama_models(), *_lmstudio_models()]


def names_of(path: Path) -> list[str]:
    """The names that a model's path gives it, the surest first: its repositories, then file and folder."""
    path = Path(os.path.abspath(path))
    repositories = [part for part in path.parts if part.startswith("models--")]  # in huggingface_hub's cache
    names = [part.removeprefix("models--").replace("--", "/", 1) for part in repositories]
    file = gguf_files.stem(path.name)
    file = path.stem if path.suffix in (".nemo", ".safetensors", ".ckpt", ".bin") else file
    return [*names, *ollama_names(path), file, path.parent.name]


def ollama_names(path: Path) -> list[str]:
    """The names of Ollama's models whose file this is, spelled like repositories ("name-tag")."""
    names = []
    for (_, namespace, model, tag), manifest in _manifests() if path.name.startswith("sha256") else ():
        with contextlib.suppress(ValueError, OSError):
            if _model_layer(manifest) == path:
                is_published = (namespace, model) == ("library", "codegemma")
                name = _codegemma_name(tag) if is_published else f"{model}-{tag}".removesuffix("-latest")
                names.append(name)
    return names


def _codegemma_name(tag: str) -> str:
    """The repository of a tag of Ollama's `codegemma`: a 7B follows instructions unless the tag says code."""
    size = "2b" if "2b" in tag else "7b"
    is_instruct = size == "7b" and "code" not in tag
    return f"codegemma-{'1.1-' if 'v1.1' in tag else ''}{size}{'-it' if is_instruct else ''}"
