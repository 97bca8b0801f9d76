"""Downloads models (Hugging Face Hub, Kaggle, NGC, URLs), and packs them for machines without a network.

config.PRESETS has the repositories of each name on the Hub and Kaggle, `NGC` those on NGC. The Gemma terms
are shown once and the acceptance is recorded. Downloads are resumed, checked against the hashes that the
source states, and stored where `hub.resolve` looks.
"""

from __future__ import annotations

import datetime
import errno
import filecmp
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, get_args

from codegemma import hub
from codegemma.checkpoints import gguf_files
from codegemma.config import PRESETS, DownloadSource, Preset
from codegemma.extras import require
from codegemma.files import atomic_directory, atomic_write, cache_dir, open_locked
from codegemma.hub import stores

Progress = Callable[[str, int, int | None], None]  # file, bytes so far, bytes in all
TERMS = "https://ai.google.dev/gemma/terms"
TERMS_NOTICE = (
    f"Gemma models are provided under the Gemma Terms of Use ({TERMS}), which bind whoever uses them and "
    "whoever gets them from you, and forbid the uses listed in the Prohibited Use Policy "
    "(https://ai.google.dev/gemma/prohibited_use_policy)."
)
HF_FILES = ["*.json", "tokenizer.model", "*.jinja", "*.md", "LICENSE*"]  # beside the weights
NGC = {"2b": "codegemma_2b_base", "7b": "codegemma_7b_base"}  # in nvidia/nemo, version 1.0
ATTEMPTS = 5
BLOCK = 1 << 20  # bytes copied at once
REMEDIES = {
    401: "a token is needed: NGC_API_KEY for NGC",
    403: "accept the model's terms on its page with your account, then pass its token",
    **dict.fromkeys((404, 410), "check the address"),
}
PACK_MANIFEST = "codegemma-pack.json"


def accept_terms(ask: Callable[[str], bool]) -> None:
    """Asks once and records the acceptance. Raises ValueError where the answer is no."""
    record = cache_dir() / "gemma-terms.json"
    if record.exists():
        return
    if not ask(TERMS_NOTICE):
        rule = "the Gemma terms were not accepted, so nothing was downloaded"
        raise ValueError(f"{rule}: pass --accept-terms if you accept them")
    with atomic_write(record) as out:
        today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        out.write(json.dumps({"terms": TERMS, "accepted": today}).encode())


def pull(
    name: str,
    source: DownloadSource = "hf",
    *,
    ask: Callable[[str], bool],
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Downloads or copies a model into the cache and returns its path.

    `name` is a preset, a repository (hf), a URL or a path. From a repository of GGUF files, one quantisation
    is fetched, with all its parts: Q8_0 for NAME:Q8_0, else the one that `gguf_files.choose` prefers.
    `sha256` is the hash expected of a URL's file, and is refused with other sources. Raises ValueError with
    the remedy where the source refuses, the network or the disk fails, or the hash is wrong.
    """
    if source not in get_args(DownloadSource):
        raise ValueError(f"no source {source!r}: choose {', '.join(get_args(DownloadSource))}")
    if sha256 is not None and source != "url":
        raise ValueError(f"sha256 is the hash of a URL's file, but the source is {source}: leave it out")
    base, _, quantisation = name.partition(":") if source == "hf" else (name, "", "")
    model = hub.preset(base)
    if model is None and source in ("kaggle", "ngc"):
        raise ValueError(f"no model {name!r} on {source}: choose {', '.join(PRESETS)}")
    accept_terms(ask)
    with _full_disk_explained("" if source == "path" else "; the part that was downloaded is kept"):
        if source == "hf":
            repository = f"{model.hub}-GGUF" if model and quantisation else model.hub if model else base
            return _from_hugging_face(repository, quantisation or None)
        if source == "kaggle":
            return _from_kaggle(model)
        if source == "ngc":
            return _from_ngc(model, progress)
        if source == "path":
            return _from_path(Path(name))
        file_name = re.sub(r"[^\w.-]", "_", name.rpartition("/")[2].split("?")[0])
        return fetch(name, cache_dir() / "models" / "urls" / file_name, sha256=sha256, progress=progress)


@contextmanager
def _full_disk_explained(result: str = "") -> Iterator[None]:
    """Raises ValueError with the remedy where the block meets a full disk; `result` ends its message."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        remedy = "make room, or set XDG_CACHE_HOME (HF_HOME for the Hub) to another disk"
        raise ValueError(f"the disk of {cache_dir()} is full: {remedy}{result}") from None


# -------------------------------------------------------------------------------- the sources
def _from_hugging_face(repository: str, quantisation: str | None = None) -> Path:
    library = require("huggingface_hub", "Downloads from the Hub", "hub")
    errors = require("huggingface_hub.errors", "Downloads from the Hub", "hub")
    page = f"https://huggingface.co/{repository}"
    try:
        patterns = HF_FILES + _weight_files(library, errors, repository, quantisation)
        path = Path(library.snapshot_download(repository, allow_patterns=patterns))
    except errors.GatedRepoError:
        remedy = f"accept the terms at {page}, then pass your token (`hf auth login`, or HF_TOKEN)"
        raise ValueError(f"{repository} is gated: {remedy}") from None
    except errors.RepositoryNotFoundError:
        remedy = f"check the name at {page} and the token (`hf auth whoami`)"
        raise ValueError(f"{repository} does not exist or your token may not see it: {remedy}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        if _answer(error) is None and (cached := stores.in_hub_cache(repository, quantisation)):
            return cached
        raise _hub_refusal(repository, page, error) from None
    for file in sorted(path.rglob("*")):
        blob = file.resolve()  # the Hub's cache names large files by their SHA-256
        if blob.is_file() and re.fullmatch(r"[0-9a-f]{64}", blob.name) and _sha256(blob) != blob.name:
            blob.unlink()
            raise ValueError(f"{blob}: wrong SHA-256, not that of the Hub; it was removed: pull again")
    return stores.model_in(path, quantisation) or path


def _weight_files(library: Any, errors: Any, repository: str, quantisation: str | None) -> list[str]:
    """Patterns of the weight files to fetch: one quantisation's GGUF files, or all safetensors."""
    try:
        names = library.HfApi().list_repo_files(repository)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise
    except Exception:  # no network: the download says so, or returns what is in the cache
        return [f"*{quantisation}*.gguf"] if quantisation else ["*.safetensors", "*.gguf"]
    if quantisation is None and any(name.endswith(".safetensors") for name in names):
        return ["*.safetensors"]
    try:
        return gguf_files.choose(names, quantisation)
    except ValueError as error:
        raise ValueError(f"{repository}: {error}: name one as {repository}:NAME") from None


def _answer(error: Exception) -> Any:
    """The Hub's HTTP answer that an error is about; None where the Hub was not reached."""
    answers = [getattr(cause, "response", None) for cause in (error, error.__cause__)]
    return next((answer for answer in answers if answer is not None), None)


def _hub_refusal(repository: str, page: str, error: Exception) -> ValueError:
    """The error to raise where the Hub refused, or could not be reached."""
    answer = _answer(error)
    if answer is None:
        rule = f"is not in the cache and the Hub cannot be reached ({_one_line(error)})"
        remedy = "connect, unset HF_HUB_OFFLINE, check HF_ENDPOINT, or install a pack from another machine"
        return ValueError(f"{repository} {rule}: {remedy} (codegemma pull --pack, codegemma install)")
    remedies = {
        401: "pass a valid token (`hf auth login`, or HF_TOKEN)",
        403: f"ask for access at {page}",
        429: "too many requests: wait some minutes and try again",
    }
    remedy = remedies.get(answer.status_code, "try again later")
    return ValueError(f"{repository}: the Hub answered {answer.status_code}: {remedy}")


def _from_kaggle(model: Preset | None) -> Path:
    library = require("kagglehub", "Downloads from Kaggle", "hub")
    if model is None or model.kaggle is None:
        raise ValueError(f"{model.title if model else 'this model'} is not on Kaggle: use --source hf")
    try:
        return Path(library.model_download(f"google/codegemma/flax/{model.kaggle}"))
    except Exception as error:  # noqa: BLE001  the library raises many kinds
        remedy = "accept the terms at https://www.kaggle.com/models/google/codegemma, and set"
        remedy += " KAGGLE_USERNAME and KAGGLE_KEY, or write ~/.kaggle/kaggle.json"
        raise ValueError(f"Kaggle refused {model.title} ({_one_line(error)}): {remedy}") from None


def _from_ngc(model: Preset | None, progress: Progress | None) -> Path:
    if model is None or model.name not in NGC:
        raise ValueError(f"NGC has only {', '.join(NGC)}: use --source hf")
    base = os.environ.get("CODEGEMMA_NGC", "https://api.ngc.nvidia.com/v2/models/nvidia/nemo")
    url, token = f"{base}/{NGC[model.name]}/versions/1.0/files", os.environ.get("NGC_API_KEY")
    folder = cache_dir() / "models" / model.name
    with tempfile.TemporaryDirectory() as temporary:
        listing = json.loads(fetch(url, Path(temporary, "files.json"), token=token).read_bytes())
    names = [str(file.get("path", "")) for file in listing.get("modelFiles", [])]
    names = [name for name in names if name.endswith(".nemo")]
    if not names or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise ValueError(f"NGC lists no .nemo file for {model.title}: use --source hf")
    return [fetch(f"{url}/{name}", folder / name, token=token, progress=progress) for name in names][0]


def _from_path(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path")
    target = cache_dir() / "models" / "local" / path.name
    walk = os.walk(path, followlinks=True)
    inside = sorted(Path(folder, name).relative_to(path) for folder, _, files in walk for name in files)
    names = inside if path.is_dir() else [Path()]  # Path() is the file itself

    def is_copied() -> bool:
        """Whether the copy is there already. Raises ValueError where the target is another model."""
        if not target.exists() or target.is_dir() and not any(target.iterdir()):
            return False
        pairs = [(path / name, target / name) for name in names]
        if not all(copy.is_file() and filecmp.cmp(original, copy, False) for original, copy in pairs):
            raise ValueError(f"{_name_is_taken(target)}, or rename {path}")
        return True

    if is_copied():
        return target
    try:
        if path.is_dir():
            _copy_folder(path, names, target)
        else:
            with atomic_write(target, replace=False) as out:
                _copy(path, out)
    except FileExistsError:  # another process wrote it meanwhile
        if not is_copied():
            raise
    return target


def _copy_folder(path: Path, names: Sequence[Path], target: Path) -> None:
    """Copies these files. Not by shutil.copytree, whose errors do not say that the disk is full."""
    with atomic_directory(target) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as out:
                _copy(path / name, out)


def _name_is_taken(target: Path) -> str:
    """What is wrong, and the remedy, where the cache holds another model at `target`."""
    return f"{target} holds another model of this name: run `codegemma models --remove {target.name}` first"


def _copy(path: Path, out: BinaryIO) -> None:
    with open(path, "rb") as source:
        shutil.copyfileobj(source, out, BLOCK)


# -------------------------------------------------------------------------------- downloads
class _Interrupted(Exception):
    """An attempt failed, but another may succeed. Arguments: the fault, and the remedy if all fail."""


def fetch(
    url: str,
    file: Path,
    *,
    sha256: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Downloads a file, which appears only when it is complete and checked.

    An interrupted download is continued if the server's ETag says that the file is still the same. The token
    goes to the host of the URL alone, not to one that it redirects to. Raises ValueError where the
    server refuses, the connection is cut too often, the disk is full, the hash is wrong, or another process
    is downloading the same file.
    """
    if not re.match(r"https?://", url):
        raise ValueError(f"{url}: only http and https addresses can be pulled")
    if file.exists() and (sha256 is None or _sha256(file) == sha256):
        return file
    part, tag = (file.with_name(f".{file.name}.{suffix}") for suffix in ("part", "etag"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_locked(tag, file, os.O_CREAT):
        try:
            _download(url, part, tag, token, partial(progress, file.name) if progress else None)
            digest = _sha256(part) if sha256 else sha256
            if digest != sha256:
                part.unlink()
                rule = f"has the SHA-256 {digest}, but {sha256} was expected"
                raise ValueError(f"{url}: {rule}; the file was removed: check the hash, and pull again")
            os.replace(part, file)
        finally:
            if not part.exists():  # nothing to continue
                tag.unlink()
    return file


def _download(
    url: str, part: Path, tag: Path, token: str | None, progress: Callable[[int, int | None], None] | None
) -> None:
    """Downloads `part`, in at most ATTEMPTS attempts. Raises ValueError as `fetch` does."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _try_to_download(url, part, tag, token, progress)
            return
        except _Interrupted as error:
            fault, remedy = error.args
            if attempt == ATTEMPTS:
                raise ValueError(f"{url}: {fault} {ATTEMPTS} times{remedy}") from None


def _try_to_download(
    url: str, part: Path, tag: Path, token: str | None, progress: Callable[[int, int | None], None] | None
) -> None:
    """One attempt, which continues `part` if it can. Raises _Interrupted, or ValueError as `fetch` does."""
    etag = tag.read_text() if tag.exists() else ""  # without one, the server's file may be another by now
    done = part.stat().st_size if part.exists() and etag else 0
    headers = {"User-Agent": "codegemma", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={done}-", "If-Range": etag} if done else {}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    httpx = require("httpx", "Downloads", "hub")
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=60) as answer:
            _check_status(url, answer)
            if answer.status_code == 416:  # the part is complete, or of another file
                part.unlink(missing_ok=True)
                raise _cut("it has no such bytes")
            if answer.status_code != 206:
                done = 0
            length = answer.headers.get("Content-Length", "")
            total = done + int(length) if length.isdigit() else None
            tag.write_text(answer.headers.get("ETag", ""))
            _expect_room(url, (total or done) - done, part.parent)
            with open(part, "ab" if done else "wb") as out:
                for block in answer.iter_raw():
                    out.write(block)
                    done += len(block)
                    if progress:
                        progress(done, total)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r}: {_one_line(error)}: check the address") from None
    except httpx.HTTPError as error:
        raise _cut(_one_line(error)) from None
    if total not in (None, done):
        raise _cut(f"{done:,} of {total:,} bytes")


def _expect_room(name: object, size: int, folder: Path) -> None:
    """Raises ValueError where the disk of a folder has less than `size` bytes free."""
    if shutil.disk_usage(folder).free < size:
        rule = f"takes {size / 1e9:.1f} GB, more than {folder} has free"
        raise ValueError(f"{name}: {rule}: make room, or set XDG_CACHE_HOME to another disk")


def _check_status(url: str, answer: Any) -> None:
    """Raises ValueError where the server refuses, _Interrupted where another attempt may succeed."""
    status = answer.status_code
    if remedy := REMEDIES.get(status):
        raise ValueError(f"{url}: the server answered {status}: {remedy}")
    if status >= 400 and status != 416:
        pause = answer.headers.get("Retry-After", "1")
        time.sleep(min(30.0, float(pause)) if pause.isdigit() else 1.0)
        raise _Interrupted(f"the server answered {status}", ": try again later")


def _cut(reason: str) -> _Interrupted:
    remedy = "check the network and pull again; the received part is kept"
    return _Interrupted("the connection was cut", f" ({reason}): {remedy}")


def _sha256(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# -------------------------------------------------------------------------------- packs
def pack(path: Path, target: Path, name: str = "") -> Path:
    """Writes a model and the hash of each of its files into one file, for `install` on another machine.

    There the model is called by its preset's name, or else by its file's.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) or gguf_files.parts(path)
    root = path.parent if path.is_file() else path
    model = hub.preset(name)
    manifest = {
        "name": model.name if model else re.sub(r"[^\w.-]", "-", path.stem),
        "files": {str(file.relative_to(root)): _sha256(file) for file in files},
    }
    mark = PACK_MANIFEST.encode()  # the first member's name begins a tar: files without it are not replaced
    with atomic_write(target, mark) as out, tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(PACK_MANIFEST)
        raw = json.dumps(manifest).encode()
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
        for file in files:
            archive.add(file.resolve(), str(file.relative_to(root)), recursive=False)
    return target


def install(file: Path) -> Path:
    """Copies the model in a pack into the cache, checks each file, and returns its path.

    A second time, it finds the copy there. Raises ValueError on a damaged pack, where the cache holds another
    model of its name, or where the disk is full.
    """
    with _full_disk_explained():
        try:
            with tarfile.open(file, mode="r:") as archive:
                target = _unpack(file, archive)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{file}: is no readable pack ({_one_line(error)}): copy it again") from None
    return stores.model_in(target) or target


def _unpack(file: Path, archive: tarfile.TarFile) -> Path:
    name, hashes = _read_manifest(file, archive)
    target = cache_dir() / "models" / name

    def is_installed() -> bool:
        """Whether the model is there already. Raises ValueError where the target is another one."""
        if not target.exists() or target.is_dir() and not any(target.iterdir()):
            return False
        copies = {target / path: hash for path, hash in hashes.items()}
        if not copies or not all(copy.is_file() and _sha256(copy) == hash for copy, hash in copies.items()):
            raise ValueError(f"{file}: {_name_is_taken(target)}")
        return True

    if is_installed():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _expect_room(file, file.stat().st_size, target.parent)
    try:
        with atomic_directory(target) as folder:
            _extract(file, archive, hashes, folder)
    except FileExistsError:  # another process wrote it meanwhile
        if not is_installed():
            raise
    return target


def _extract(file: Path, archive: tarfile.TarFile, hashes: Mapping[str, str], folder: Path) -> None:
    """Writes the members that follow the manifest. Raises ValueError unless they are those of `hashes`."""
    missing = set(hashes)
    while info := archive.next():
        path = Path(info.name)
        if not info.isreg() or info.name not in missing or ".." in path.parts or path.is_absolute():
            raise ValueError(f"{file}: its member {info.name} is not in its list: it may be an attack")
        source = archive.extractfile(info)
        assert source is not None
        with atomic_write(folder / path) as out:
            shutil.copyfileobj(source, out, BLOCK)
        missing.remove(info.name)
        if _sha256(folder / path) != hashes[info.name]:
            rule = "has another SHA-256 than the pack states"
            raise ValueError(f"{file}: its member {info.name} {rule}: copy it again")
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(sorted(missing)[:3])}: copy it again")


def _read_manifest(file: Path, archive: tarfile.TarFile) -> tuple[str, dict[str, str]]:
    """The name of a pack's model, and the hash of each of its files."""
    first = archive.next()
    member = archive.extractfile(first) if first and first.name == PACK_MANIFEST else None
    if first is None or member is None or first.size > 1 << 20:
        raise ValueError(f"{file}: was not written by codegemma pull --pack: pass such a file")
    try:
        manifest = json.loads(member.read())
        name, hashes = (
            str(manifest["name"]),
            {str(path): str(hash) for path, hash in manifest["files"].items()},
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: is no readable pack ({_one_line(error)}): copy it again") from None
    if not re.fullmatch(r"\w[\w.-]*", name) or name in hub.PULLED_FOLDERS:
        remedy = "rename the model that was packed, and pack it again"
        raise ValueError(f"{file}: {name!r} is no name of a model: {remedy}")
    return name, hashes
