"""The corpus of the default model's adapter: pinned packages -> archives -> rows for each phase.

    python tools/adapter_data.py pin pypi|npm NAME[==VERSION]...     # fetches, hashes, extends the list
    python tools/adapter_data.py pin debian NAME==VERSION...         # sources of Go and Rust, of Debian 12
    python tools/adapter_data.py fetch                               # fetches the list, checks the hashes
    python tools/adapter_data.py rows all --data BENCHMARKS          # rows of the first edition's phases
    python tools/adapter_data.py rows second --data BENCHMARKS       # rows of the second edition

Files are written under --cache (~/.cache/codegemma/adapter), to archives/ and rows/PHASE. READY there lists
the finished phases.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from codegemma.cli.data import load_tokenizer
from codegemma.data.build import Summary, build
from codegemma.data.documents import CODE_LANGUAGES, Document
from codegemma.data.draw import Draw
from codegemma.data.folder import BuildFolder
from codegemma.data.pack import Packed, Rows, fit, places, save
from codegemma.data.recipe import BuildRecipe, named_recipe
from codegemma.data.sources import Source, read
from codegemma.data.syntax import GRAMMARS
from codegemma.files import atomic_write, cache_dir

CACHE = cache_dir() / "adapter"
LIST = Path(__file__).with_name("adapter_packages.txt")
MAX_ARCHIVE_BYTES = 40_000_000

# The curriculum: short windows first, then longer suffixes. After a short start, most examples have the
# suffix first: prefix and middle are then adjacent, and the model only has to learn to read the suffix and to
# stop before it. Each phase draws other holes.
_FIRST = BuildRecipe(
    fim_rate=0.87,
    spm_rate=0.7,
    length=256,
    epoch=1,
    loss=("middle", "terminator"),
    window=(64, 160),
    stride=5000,
    suffix_limit=32,
    path_rate=0.5,
    hold_out=0.03,
)
PHASES = {
    "a1": _FIRST,
    "a2": replace(_FIRST, spm_rate=0.5, epoch=2, stride=2100, suffix_limit=None),
    "b": replace(_FIRST, spm_rate=0.5, epoch=3, stride=3000, suffix_limit=None, window=(160, 255)),
    "d": replace(_FIRST, spm_rate=1.0, epoch=5, stride=400, suffix_limit=None, window=(48, 160)),
    "e": replace(_FIRST, spm_rate=0.0, epoch=6, stride=400, suffix_limit=None, window=(48, 255)),
    # The loss also covers a prefix that follows the suffix: four times as many targets that the suffix helps
    # to predict.
    "f": replace(
        _FIRST,
        spm_rate=1.0,
        epoch=7,
        stride=16_000,
        suffix_limit=None,
        window=(64, 255),
        loss=("prefix", "middle", "terminator"),
    ),
    "g": replace(_FIRST, spm_rate=0.0, epoch=8, stride=32_000, suffix_limit=None, window=(64, 255)),
}
PHASES |= {
    "h": replace(PHASES["f"], epoch=9, stride=600),
    "i": replace(PHASES["f"], epoch=12),
    "j": replace(PHASES["g"], epoch=13),
    "k": replace(PHASES["f"], epoch=14, stride=3000),
    "l": replace(PHASES["g"], epoch=15, stride=3000),
}
_FIRST_EDITION = tuple(PHASES)
# The second edition: the editor's recipe over all packages, in languages that have a grammar. With the seed
# and share of the phases above, it holds out the same repositories as they.
PHASES |= {
    "second": replace(
        named_recipe("editor"),
        epoch=20,
        stride=500,
        loss=("middle", "prefix", "terminator"),
        languages=tuple(sorted(GRAMMARS)),
        hold_out=0.03,
    )
}
# Packages of small functions with docstrings, such as people ask for; libraries have few.
_SMALL = {
    "algorithms",
    "boltons",
    "funcy",
    "labmath",
    "more-itertools",
    "primefac",
    "pyalgos",
    "pygorithm",
    "python-algorithms",
    "python-leetcode",
    "textdistance",
    "toolz",
}
# More packages of that kind: those after this line of the list. Phases before K do not use them.
_FROM_K = "# for phases K and L:"
# The packages after the next such line, most of them for other languages, are the second edition's alone.
_FROM_SECOND = "# for the second edition:"
_OF_K, _, _OF_SECOND = LIST.read_text().partition(_FROM_K)[2].partition(_FROM_SECOND)
_MORE = {line.split()[1] for line in _OF_K.splitlines() if line}
_OTHERS = {tuple(line.split()[:2]) for line in _OF_SECOND.splitlines() if line}
ONLY = dict.fromkeys("deh", _SMALL) | dict.fromkeys("kl", _MORE)


@dataclass(frozen=True)
class Choice:
    """A random choice of other phases' segments, of at most `max_tokens` tokens.

    A segment is taken with the share of its phase times the share of its layout.
    """

    phases: dict[str, float]
    layouts: dict[str, float]
    max_tokens: int


CHOICES = {
    "s": Choice({"a2": 1.0}, {"spm": 1.0, "prefix": 0.4}, 128),
    "t": Choice({"a2": 0.4, "d": 1.0}, {"spm": 1.0, "prefix": 0.4}, 160),
    "p": Choice({"a1": 1.0, "a2": 0.25}, {"psm": 1.0, "spm": 0.15, "prefix": 0.4}, 112),
    "q": Choice({"a2": 0.08, "b": 0.12, "d": 0.25}, {"psm": 1.0, "spm": 1.0, "prefix": 0.4}, 255),
    "r": Choice({"a2": 0.03, "b": 0.015, "d": 0.05, "e": 0.15}, {"psm": 1.0, "spm": 0.5, "prefix": 0.4}, 255),
    "u": Choice({"f": 0.3, "g": 1.0, "h": 0.35, "e": 0.5}, {"psm": 1.0, "spm": 1.0, "prefix": 0.4}, 255),
    "v": Choice({"f": 0.5, "g": 0.5, "h": 1.0, "e": 0.7}, {"psm": 1.0, "spm": 1.0, "prefix": 0.4}, 255),
    "x": Choice({"i": 0.35, "j": 0.5, "k": 0.45, "l": 0.5}, {"psm": 1.0, "spm": 1.0, "prefix": 0.4}, 255),
}


@dataclass(frozen=True)
class Package:
    """One line of the list. `licence` and `language` are those of most of its code."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    language: str


def packages() -> list[Package]:
    """All packages of the list."""
    return [Package(*line.split()) for line in LIST.read_text().splitlines() if line and line[0] != "#"]


# --------------------------------------------------------------------------------------------------- archives
def from_pypi(name: str, version: str, folder: Path) -> Path:
    """Downloads the source distribution. pip is not used, as it would build the package for its metadata."""
    from pip._internal.models.index import PyPI
    from unearth import PackageFinder
    from unearth.preparer import download_link

    index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url)
    finder = PackageFinder(index_urls=[index], no_binary=[":all:"], ignore_compatibility=True)
    match = finder.find_best_match(f"{name}=={version}" if version else name).best
    if match is None:
        raise ValueError(f"{name} {version} has no source distribution: drop it from the list")
    return download_link(finder.session, match.link, folder)


def from_npm(name: str, version: str, folder: Path) -> Path:
    """Downloads the package by `npm pack`."""
    requested = f"{name}@{version}" if version else name
    packed = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", folder, requested],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    return folder / packed.stdout.split()[-1]


def from_debian(name: str, version: str, folder: Path) -> Path:
    """Packs the sources in a package of Go or Rust as a tar, whose bytes depend on the package alone."""
    out = folder / f"{name}_{version}.tar"
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(
            ["apt-get", "download", "-q", f"{name}={version}"], cwd=temporary, check=True, capture_output=True
        )
        tree = Path(temporary) / "tree"
        subprocess.run(["dpkg-deb", "-x", next(Path(temporary).glob("*.deb")), tree], check=True)
        licence = tree / "LICENSE"
        licence.write_text(debian_licence((tree / "usr/share/doc" / name / "copyright").read_text()))
        files = {Path("LICENSE"): licence}
        for root in (tree / "usr/share/gocode/src", tree / "usr/share/cargo/registry"):
            files |= {file.relative_to(root): file for file in root.rglob("*") if file.is_file()}
        with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
            for path, file in sorted(files.items()):
                if not file.is_symlink():
                    entry = tarfile.TarInfo(f"{name}/{path}")
                    entry.size = file.stat().st_size
                    with file.open("rb") as data:
                        archive.addfile(entry, data)
    return out


def debian_licence(copyright: str) -> str:
    """The licence of a package's own files in Debian's statement of the copyright: that of "Files: *".

    Raises ValueError where the statement has no such part, as old ones do.
    """
    paragraphs = [paragraph.lstrip("\n") for paragraph in copyright.split("\n\n")]
    names = [
        match[1]
        for each in paragraphs
        if re.match(r"Files:\s*\*\s*$", each, re.M) and (match := re.search(r"^License:[ ]*(.+)", each, re.M))
    ]
    texts = [
        match[1]
        for each in paragraphs
        if names and (match := re.search(rf"^License:[ ]*{re.escape(names[0])}\n((?:\s.+\n?)+)", each, re.M))
    ]
    if not texts:
        raise ValueError('its statement of the copyright has no licence of "Files: *"')
    return texts[0]


REGISTRIES = {"pypi": from_pypi, "npm": from_npm, "debian": from_debian}


def fetch(package: Package, folder: Path) -> Path:
    """The archive, from the cache or the registry. Raises ValueError if its hash is not the list's."""
    file = folder / package.file
    if not file.exists():
        REGISTRIES[package.registry](package.name, package.version, folder)
    if (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != package.sha256:
        file.unlink()
        raise ValueError(
            f"{file.name} has sha256 {digest}, the list says {package.sha256}: fetch again or pin it anew"
        )
    return file


def pin(registry: str, requirement: str, folder: Path) -> tuple[Package, Counter[str]]:
    """A line for the list, and the number of characters of each language in the archive."""
    name, _, version = requirement.partition("==")
    file = REGISTRIES[registry](name, version, folder)
    if file.stat().st_size > MAX_ARCHIVE_BYTES:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, more than {MAX_ARCHIVE_BYTES:,}")
    sizes, licences = Counter[str](), Counter[str]()
    for document in read(Source(file, "zip" if file.suffix == ".zip" else "tar")):
        if isinstance(document, Document) and document.language in CODE_LANGUAGES:
            sizes[document.language] += len(document.text)
            licences[document.licence] += len(document.text)
    if not sizes:
        raise ValueError(f"{file.name} holds no code")
    version = (
        version
        or file.name.removesuffix(".tgz").removesuffix(".tar.gz").removesuffix(".zip").rpartition("-")[2]
    )
    licence = licences.most_common(1)[0][0].replace(" ", "_") or "none"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Package(registry, name, version, file.name, digest, licence, sizes.most_common(1)[0][0]), sizes


def _pin_all(registry: str, names: list[str], folder: Path) -> None:
    pinned = {(package.registry, package.name) for package in packages()}
    new = [name for name in names if (registry, name.partition("==")[0]) not in pinned]

    def pin_or_error(name: str) -> tuple[Package, Counter[str]] | str:
        try:
            return pin(registry, name, folder)
        except Exception as error:  # whatever fails for one package, the others are still pinned
            return f"{name}: {type(error).__name__}: {error}"

    with ThreadPoolExecutor(4) as pool, LIST.open("a") as out:
        for result in pool.map(pin_or_error, new):
            if isinstance(result, str):
                print("left out", result, file=sys.stderr)
                continue
            out.write(" ".join(astuple(result[0])) + "\n")
            out.flush()
            print(result[0].name, result[0].licence, dict(result[1].most_common(3)))


def packages_of(phase: str) -> list[Package]:
    """The packages that a phase draws its rows from."""
    if phase not in _FIRST_EDITION:
        return packages()
    return [
        package
        for package in packages()
        if (package.registry, package.name) not in _OTHERS
        and (package.name in ONLY[phase] if phase in ONLY else package.name not in _MORE)
    ]


def fetch_all(folder: Path, needed: list[Package]) -> Iterator[Path]:
    """The archives of packages, in order."""
    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(lambda package: fetch(package, folder), needed)


def rows(phase: str, cache: Path, data: Path, workers: int) -> Summary:
    """Builds the rows of a phase, or resumes an interrupted build."""
    benchmarks = sorted(file for file in data.rglob("*.json*") if file.is_file())
    if not benchmarks:
        raise ValueError(f"{data} has no benchmark files (*.jsonl.gz and the like) to keep out of the rows")
    sources = [str(file) for file in fetch_all(cache / "archives", packages_of(phase))]
    summary = build(
        sources,
        cache / "rows" / phase,
        load_tokenizer("gemma-3-270m"),
        PHASES[phase],
        benchmarks=benchmarks,
        workers=workers,
        resume=True,
        progress=lambda stage, done, total: print(phase, stage, done, total) if done == total else None,
    )
    with (cache / "READY").open("a") as out:
        out.write(f"{phase}\n")
    return summary


def _chosen(
    phase: str, choice: Choice, rows: Rows, phase_share: float
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """The tokens, targets and examples of each chosen segment."""
    for part in sorted({int(part) for part in rows.index_R2[:, 0]}):
        arrays = {name: np.load(rows.files.rows(part, f"{name}.npy")) for name in ("tokens", "loss")}
        by_segment: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for example in pq.read_table(rows.files.rows(part, "examples.parquet")).to_pylist():
            by_segment.setdefault((example["row"], example["segment"]), []).append(example)
        segments = np.load(rows.files.rows(part, "segments.npy"))
        for (row, segment), examples in sorted(by_segment.items()):
            layouts = {example["layout"] for example in examples}
            columns = np.flatnonzero(segments[row] == segment)
            share = choice.layouts.get(layouts.pop(), 0.0) if len(layouts) == 1 else 0.0
            if (
                len(columns) <= choice.max_tokens
                and Draw(phase, part, row, segment).uniform() < phase_share * share
            ):
                yield (
                    {name: array[row, columns] for name, array in arrays.items()},
                    [_moved(example, -columns[0]) for example in examples],
                )


def _moved(example: dict[str, Any], offset: int, **fields: int) -> dict[str, Any]:
    """An example moved by `offset` tokens, with other fields set."""
    return example | fields | {"start": example["start"] + offset, "end": example["end"] + offset}


def choose(phase: str, cache: Path) -> int:
    """Writes the rows of a choice and returns their number; their manifest holds those of its phases."""
    choice, out = CHOICES[phase], BuildFolder(cache / "rows" / phase)
    rows = {name: Rows(cache / "rows" / name) for name in choice.phases}
    segments = [
        chosen
        for name, share in choice.phases.items()
        for chosen in _chosen(phase, choice, rows[name], share)
    ]
    length = len(next(iter(rows.values()))[0]["tokens"])
    sizes = [len(arrays["tokens"]) for arrays, _ in segments]
    packed = fit(sizes, length)
    shape = (len(packed), length)
    result = Packed(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.uint16), [])
    for row, segment, item, columns in places(packed, sizes):
        arrays, examples = segments[item]
        result.tokens_RT[row, columns] = arrays["tokens"]
        result.loss_RT[row, columns] = arrays["loss"]
        result.segments_RT[row, columns] = segment
        result.examples.extend(
            _moved(example, columns.start, row=row, segment=segment) for example in examples
        )
    for path in (out.index, out.manifest("rows")):
        path.parent.mkdir(parents=True, exist_ok=True)
    save(result, out, 0)
    manifest = {
        "chosen": {"most" if key == "max_tokens" else key: value for key, value in asdict(choice).items()},
        "examples": len(result.examples),
        "tokens": sum(sizes),
        "layouts": Counter(example["layout"] for example in result.examples),
        "learned": int(result.loss_RT.sum()),
        "of": {name: json.loads(source.files.manifest("rows").read_text()) for name, source in rows.items()},
    }
    out.manifest("rows").write_text(json.dumps(manifest, indent=1))
    with atomic_write(out.index) as file:  # last, as in a build: it marks the rows as finished
        np.save(file, np.stack([np.zeros(len(packed), np.int64), np.arange(len(packed))], 1))
    return len(packed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    verbs = parser.add_subparsers(dest="verb", required=True)
    pinning = verbs.add_parser("pin")
    pinning.add_argument("registry", choices=REGISTRIES)
    pinning.add_argument("names", nargs="+")
    verbs.add_parser("fetch")
    building = verbs.add_parser("rows")
    building.add_argument("phases", nargs="+", choices=["all", *PHASES, *CHOICES])
    building.add_argument("--data", type=Path, required=True, help="folder of benchmark files to keep out")
    building.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    archives = args.cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    if args.verb == "pin":
        _pin_all(args.registry, args.names, archives)
    elif args.verb == "rows":
        for phase in [*_FIRST_EDITION, *CHOICES] if "all" in args.phases else args.phases:
            if phase in CHOICES:
                print(phase, choose(phase, args.cache), "rows")
                continue
            summary = rows(phase, args.cache, args.data, args.workers)
            examples = summary.manifests["rows"]["examples"]
            documents = f"{summary.kept} of {summary.documents} documents"
            print(phase, examples, "examples", summary.tokens, "tokens", documents)
    else:
        print(f"{sum(1 for _ in fetch_all(archives, packages()))} archives in {archives}")


if __name__ == "__main__":
    main()
