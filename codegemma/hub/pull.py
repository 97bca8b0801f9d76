"""Getting models: from the Hugging Face Hub, Kaggle, NGC, a URL or a path; and packs for machines without a network.

The Gemma terms are shown once and the acceptance is recorded. What was downloaded is resumed, checked against the
hashes that the source states, and laid where `hub.resolve` looks.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from codegemma import hub
from codegemma.config import PRESETS, Preset
from codegemma.files import building, missing, replacing

Source = Literal["hf", "kaggle", "ngc", "url", "path"]
Progress = Callable[[str, int, int | None], None]  # file, bytes so far, bytes in all
TERMS = "https://ai.google.dev/gemma/terms"
ASK = (
    f"Gemma models are provided under the Gemma Terms of Use ({TERMS}), which bind whoever uses them and whoever gets "
    "them from you, and forbid the uses listed in the Prohibited Use Policy "
    "(https://ai.google.dev/gemma/prohibited_use_policy)."
)
HF_FILES = ["*.json", "*.safetensors", "*.gguf", "tokenizer.model", "*.jinja", "*.md", "LICENSE*"]
NGC = {"2b": "codegemma_2b_base", "7b": "codegemma_7b_base"}  # in nvidia/nemo, version 1.0
ATTEMPTS, BLOCK = 5, 1 << 20


def accepted() -> Path | None:
    """The record of the acceptance, if there is one."""
    file = hub.cache_dir() / "gemma-terms.json"
    return file if file.exists() else None


def accept_terms(ask: Callable[[str], bool]) -> None:
    """Asks once. Raises ValueError where the answer is no."""
    if accepted():
        return
    if not ask(ASK):
        raise ValueError(
            "the Gemma terms were not accepted, so nothing was downloaded: pass --accept-terms if you do"
        )
    with replacing(hub.cache_dir() / "gemma-terms.json") as out:
        today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        out.write(json.dumps({"terms": TERMS, "accepted": today}).encode())


def pull(
    name: str,
    source: Source = "hf",
    *,
    ask: Callable[[str], bool],
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Gets a model and says where it is. `name` is a preset, a repository (hf), a URL or a path.

    Raises ValueError with the remedy: gated, no token, no network, no space, a wrong hash.
    """
    if source not in get_args(Source):
        raise ValueError(f"no source {source!r}: choose {', '.join(get_args(Source))}")
    known = hub.preset(name)
    if known is None and source in ("kaggle", "ngc"):
        raise ValueError(f"no model {name!r} on {source}: choose {', '.join(PRESETS)}")
    accept_terms(ask)
    try:
        if source == "hf":
            return _hugging_face(known.hub if known else name)
        if source == "kaggle":
            return _kaggle(known)
        if source == "ngc":
            return _ngc(known, progress)
        if source == "url":
            file = (
                hub.cache_dir()
                / "models"
                / "urls"
                / re.sub(r"[^\w.-]", "_", name.rpartition("/")[2].split("?")[0])
            )
            return fetch(name, file, sha256=sha256, progress=progress)
        return _copied(Path(name))
    except OSError as error:
        if error.errno == 28:
            raise ValueError(
                f"the disk of {hub.cache_dir()} is full: make room, or set XDG_CACHE_HOME (HF_HOME for the "
                "Hub) to another disk; what was downloaded is kept and resumed"
            ) from None
        raise


def _hugging_face(repository: str) -> Path:
    library = missing("huggingface_hub", "Downloads from the Hub", "hub")
    errors = missing("huggingface_hub.errors", "Downloads from the Hub", "hub")
    page = f"https://huggingface.co/{repository}"
    try:
        path = Path(library.snapshot_download(repository, allow_patterns=HF_FILES))
    except errors.GatedRepoError:
        raise ValueError(
            f"{repository} is gated: accept the terms at {page} with your account, then pass its token "
            "(`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{repository} does not exist or your token may not see it: check the name at {page} and the "
            "token (`hf auth whoami`)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        answer = next(
            (
                found
                for one in (error, error.__cause__)
                if (found := getattr(one, "response", None)) is not None
            ),
            None,
        )
        if answer is None:
            raise ValueError(
                f"{repository} is not in the cache and the Hub cannot be reached ({_short(error)}): connect, "
                "unset HF_HUB_OFFLINE, check HF_ENDPOINT, or carry a pack here (codegemma pull --pack, "
                "codegemma install)"
            ) from None
        remedy = {
            401: "pass a valid token (`hf auth login`, or HF_TOKEN)",
            403: f"ask for access at {page}",
            429: "too many requests: wait some minutes and try again",
        }.get(answer.status_code, "try again later")
        raise ValueError(f"{repository}: the Hub answered {answer.status_code}: {remedy}") from None
    for file in sorted(path.rglob("*")):
        _check_blob(file.resolve())
    return path


def _check_blob(blob: Path) -> None:
    """The Hub's cache names large files by their SHA-256."""
    if blob.is_file() and re.fullmatch(r"[0-9a-f]{64}", blob.name) and _sha256(blob) != blob.name:
        blob.unlink()
        raise ValueError(
            f"{blob}: is not what the Hub says it is (wrong SHA-256), and was removed: pull again"
        )


def _kaggle(known: Preset | None) -> Path:
    library = missing("kagglehub", "Downloads from Kaggle", "hub")
    if known is None or known.kaggle is None:
        raise ValueError(f"{known.title if known else 'this model'} is not on Kaggle: use --source hf")
    try:
        return Path(library.model_download(f"google/codegemma/flax/{known.kaggle}"))
    except Exception as error:  # noqa: BLE001  the library raises many kinds
        raise ValueError(
            f"Kaggle refused {known.title} ({_short(error)}): accept the terms at "
            "https://www.kaggle.com/models/google/codegemma, and pass KAGGLE_USERNAME and KAGGLE_KEY, or "
            "~/.kaggle/kaggle.json"
        ) from None


def _ngc(known: Preset | None, progress: Progress | None) -> Path:
    if known is None or known.name not in NGC:
        raise ValueError(f"NGC has {', '.join(NGC)} alone: use --source hf")
    base = os.environ.get("CODEGEMMA_NGC", "https://api.ngc.nvidia.com/v2/models/nvidia/nemo")
    at, token = f"{base}/{NGC[known.name]}/versions/1.0/files", os.environ.get("NGC_API_KEY")
    with _opened(at, {}, token) as answer:
        files = json.loads(answer.read(1 << 20)).get("modelFiles", [])
    names = [str(file.get("path")) for file in files if str(file.get("path", "")).endswith(".nemo")]
    if not names or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise ValueError(f"NGC lists no .nemo file for {known.title}: use --source hf")
    return [
        fetch(f"{at}/{name}", hub.cache_dir() / "models" / known.name / name, token=token, progress=progress)
        for name in names
    ][0]


def _copied(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path")
    target = hub.cache_dir() / "models" / "local" / path.name
    if path.is_dir():
        with building(target) as folder:
            shutil.copytree(path, folder, dirs_exist_ok=True)
    else:
        with replacing(target) as out, open(path, "rb") as source:
            shutil.copyfileobj(source, out, BLOCK)
    return target


def fetch(
    url: str,
    file: Path,
    *,
    sha256: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Downloads a file, going on where an earlier attempt was cut; it appears only when complete and checked.

    A part is continued only where the server says, by its ETag, that it is the same file still.
    """
    if file.exists() and (sha256 is None or _sha256(file) == sha256):
        return file
    part, tag = file.with_name(f".{file.name}.part"), file.with_name(f".{file.name}.etag")
    file.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        if _download(url, file.name, part, tag, token, progress, last=attempt == ATTEMPTS - 1):
            break
    if sha256 and (found := _sha256(part)) != sha256:
        part.unlink()
        tag.unlink(missing_ok=True)
        raise ValueError(
            f"{url}: has the SHA-256 {found}, but {sha256} was expected: the file is damaged or another; "
            "it was removed"
        )
    os.replace(part, file)
    tag.unlink(missing_ok=True)
    return file


def _download(
    url: str, name: str, part: Path, tag: Path, token: str | None, progress: Progress | None, last: bool
) -> bool:
    """One attempt: True when complete, False where the connection was cut and another may go on."""
    done = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={done}-", "If-Range": tag.read_text()} if done else {}
    try:
        with _opened(url, headers, token, last) as answer:
            if answer.status != 206:
                done = 0
            length = answer.headers.get("Content-Length")
            total = done + int(length) if length and length.isdigit() else None
            tag.write_text(answer.headers.get("ETag", ""))
            if total and shutil.disk_usage(part.parent).free < total - done:
                raise ValueError(
                    f"{name} takes {total / 1e9:.1f} GB, more than {part.parent} has free: make room, or set "
                    "XDG_CACHE_HOME to another disk"
                )
            with open(part, "ab" if done else "wb") as out:
                while block := answer.read(BLOCK):
                    out.write(block)
                    done += len(block)
                    if progress:
                        progress(name, done, total)
            if total is None or done == total:
                return True
            fault: Any = f"{done:,} of {total:,} bytes"
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is whole, or of another file
            part.unlink(missing_ok=True)
            return False
        raise
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        fault = error
    if last:
        raise ValueError(
            f"{url}: the connection was cut {ATTEMPTS} times ({_short(fault)}): check the network and pull "
            "again; what came is kept"
        )
    return False


@contextlib.contextmanager
def _opened(url: str, headers: dict[str, str], token: str | None, last: bool = True) -> Iterator[Any]:
    """An HTTP answer. The token goes to this host alone, not to where it redirects; refusals become ValueErrors."""
    if not re.match(r"https?://", url):
        raise ValueError(f"{url}: only http and https addresses can be pulled")
    request = urllib.request.Request(url, headers={"User-Agent": "codegemma", **headers})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        error.close()
        remedies = {
            401: "a token is needed: NGC_API_KEY for NGC",
            403: "accept the model's terms on its page with your account, then pass its token",
            404: "check the address",
            410: "check the address",
        }
        if error.code in remedies:
            raise ValueError(f"{url}: the server answered {error.code}: {remedies[error.code]}") from None
        if error.code == 416:
            raise
        if last:
            raise ValueError(
                f"{url}: the server answered {error.code} {ATTEMPTS} times: try again later"
            ) from None
        pause = error.headers.get("Retry-After", "1")
        time.sleep(min(30.0, float(pause)) if pause.isdigit() else 1.0)
        raise ConnectionError(f"the server answered {error.code}") from None
    with answer:
        yield answer


def _sha256(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _short(error: Any) -> str:
    return " ".join(str(error).split())[:200]


# ------------------------------------------------------------------------------------------------------------ packs
def pack(path: Path, target: Path, name: str = "") -> Path:
    """One file of a model that is on this machine, with the hash of each of its files, for `install` elsewhere, where it
    is known by the preset's name, or else its file's."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    root = path.parent if path.is_file() else path
    known = hub.preset(name)
    manifest = {
        "name": known.name if known else re.sub(r"[^\w.-]", "-", path.stem),
        "files": {str(file.relative_to(root)): _sha256(file) for file in files},
    }
    with replacing(target) as out, tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("codegemma-pack.json")
        raw = json.dumps(manifest).encode()
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
        for file in files:
            archive.add(file.resolve(), str(file.relative_to(root)), recursive=False)
    return target


def install(file: Path) -> Path:
    """Lays a pack's model into the cache, each file checked. Raises ValueError on a pack that is damaged or unsafe."""
    try:
        with tarfile.open(file, mode="r:") as archive:
            first = archive.next()
            described = archive.extractfile(first) if first and first.name == "codegemma-pack.json" else None
            if first is None or described is None or first.size > 1 << 20:
                raise ValueError(f"{file}: is no pack of codegemma pull --pack")
            manifest = json.loads(described.read())
            name, hashes = str(manifest["name"]), dict(manifest["files"])
            target = hub.cache_dir() / "models" / name
            if not re.fullmatch(r"\w[\w.-]*", name) or target.exists():
                raise ValueError(
                    f"{file}: {target} exists already, or is no name of a model: remove it first"
                )
            with building(target) as folder:
                while info := archive.next():
                    parts = Path(info.name).parts
                    if (
                        not info.isreg()
                        or info.name not in hashes
                        or ".." in parts
                        or Path(info.name).is_absolute()
                    ):
                        raise ValueError(
                            f"{file}: its member {info.name} is not in its list: it may be an attack"
                        )
                    source = archive.extractfile(info)
                    assert source is not None
                    with replacing(folder / info.name) as out:
                        shutil.copyfileobj(source, out, BLOCK)
                    if _sha256(folder / info.name) != hashes.pop(info.name):
                        raise ValueError(
                            f"{file}: its member {info.name} has another SHA-256 than it states: copy it again"
                        )
                if hashes:
                    raise ValueError(f"{file}: lacks {', '.join(sorted(hashes)[:3])}: copy it again")
    except (tarfile.TarError, KeyError, TypeError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(f"{file}: is no readable pack ({_short(error)}): copy it again") from None
    return next(target.glob("*.gguf"), target) if not (target / "config.json").exists() else target
