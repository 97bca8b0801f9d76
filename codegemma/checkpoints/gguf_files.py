"""Which files of a folder or repository are one model: quantisations, parts, image projectors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Literal

from codegemma.checkpoints import gguf

DEFAULT = "Q4_K_M"  # the choice among several quantisations, as in Ollama and llama.cpp
# The other types in the order of preference: small and exact enough first, then floats.
PREFERRED = (
    DEFAULT,
    "Q4_K_S",
    "Q4_0",
    "Q4_1",
    "IQ4_NL",
    "IQ4_XS",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_0",
    "Q5_1",
    "Q6_K",
    "Q8_0",
    "MXFP4",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
    "BF16",
    "F16",
    "F32",
)
_TAG = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d(?:_[0-9A-Z]+)*|TQ\d_\d|B?F16|FP16|F(?:P)?32|MXFP4)(?![A-Za-z0-9])",
    re.I,
)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.I)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.I)


def choose(names: Iterable[str], quantisation: str | None = None) -> list[str]:
    """Picks one model's GGUF files (its parts, in order) from the file names in a folder; [] if it has none.

    Of several quantisations it picks `quantisation` ("q8_0"), or by default the first of PREFERRED. Raises
    ValueError where the one named is not there, and where the files are of different models.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if re.search(r"\.gguf(\.part\d+)?$", name, re.I) and not _NO_MODEL.search(PurePath(name).name):
            models.setdefault(stem(name), []).append(name)
    if quantisation is not None:
        wanted = {key: files for key, files in models.items() if _has_quantisation(key, quantisation)}
        if not wanted:
            listed = ", ".join(sorted({tag(key) or key for key in models})) or "no GGUF file"
            raise ValueError(f"no quantisation {quantisation!r}: there is {listed}")
        models = wanted
    if len({_TAG.sub("", PurePath(key).name).strip("-._") for key in models}) > 1:
        raise ValueError(f"holds {len(models)} models ({', '.join(models)}): name one of the files")
    order = {name: place for place, name in enumerate(PREFERRED)}
    best = min(models, key=lambda key: (order.get(tag(key), len(order)), key), default="")
    return models.get(best, [])


def tag(name: str) -> str:
    """The quantisation that a file's name, or its folder's, ends with, in capitals; "" where none does."""
    for part in reversed(PurePath(name).parts):
        if tags := _TAG.findall(part):
            return str(tags[-1]).upper().replace("FP", "F")
    return ""


def _has_quantisation(name: str, quantisation: str) -> bool:
    wanted, file = quantisation.upper(), PurePath(name).name.upper()
    return tag(name).removeprefix("UD-") == wanted.replace("FP", "F") or file == wanted.removesuffix(".GGUF")


def stem(name: str) -> str:
    """The name without .gguf and, for a part or piece of a file, without its number."""
    part = _PART.fullmatch(name)
    return part[1] if part else re.sub(r"\.gguf(\.part\d+)?$", "", name, flags=re.I)


def parts(path: Path) -> list[Path]:
    """The paths of all parts or pieces of a file, in order, from that of any; else `path` alone."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return gguf.pieces(path)
    count = int(match[3])
    return [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def role(path: Path) -> Literal["model", "image projector", "adapter", "importance matrix"]:
    """What a GGUF file is for, by its header; a damaged one is taken for a model, whose loader says why."""
    try:
        general = gguf.read_general(path)
    except (ValueError, OSError):
        return "model"
    if general.get("general.architecture") == "clip" or general.get("general.type") == "mmproj":
        return "image projector"
    kinds = {"adapter": "adapter", "imatrix": "importance matrix"}
    return kinds.get(str(general.get("general.type")), "model")  # type: ignore[return-value]


def in_folder(folder: Path, quantisation: str | None = None, deep: bool = False) -> Path | None:
    """The GGUF file of a folder; for a file in parts or pieces, its first; None if the folder has none.

    With `deep`, a folder that has none itself is searched one level deeper, but not for pieces. Raises
    ValueError as `choose` does, naming the folder.
    """
    paths = [*folder.glob("*.gguf"), *folder.glob("*.gguf.part*")]
    if deep and not paths:
        paths = list(folder.glob("*/*.gguf"))
    files = {str(file.relative_to(folder)): file for file in paths}
    if len(files) > 1:
        files = {name: file for name, file in files.items() if role(file) == "model"}
    try:
        names = choose(files, quantisation)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return files[names[0]] if names else None
