"""The corpus of the default model's adapter: pinned packages -> archives -> the rows of each phase of the curriculum.

    python tools/adapter_data.py pin [pypi|npm] NAME[==VERSION]...   # fetches, hashes, appends to adapter_packages.txt
    python tools/adapter_data.py fetch                               # what the list names, checked by hash
    python tools/adapter_data.py rows all --data BENCHMARKS          # or some phases; benchmark texts are kept out

All lies under --cache (~/.cache/codegemma/adapter): archives/, rows/PHASE; the file READY gains a line per phase.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
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
from codegemma.data.documents import CODE, Document, Source, read
from codegemma.data.fim import Draw
from codegemma.data.pack import Packed, Rows, fit, places, save
from codegemma.data.stages import Recipe
from codegemma.files import replacing

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "codegemma" / "adapter"
LIST = Path(__file__).with_name("adapter_packages.txt")
LARGEST = 40_000_000  # bytes of an archive that is worth its share of the corpus

# The curriculum: short windows first, suffixes growing. After a short start the suffix comes first for long, for then prefix
# and middle stand together, and what is new is to read the suffix and to stop at it. Each phase draws other holes.
_FIRST = Recipe(
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
    # the prefix is learned too where it is said behind the suffix: four times as many targets that the suffix can help
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
# Small functions with a docstring, as people ask for them and as a library seldom has them.
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
# More of the same kind, from more hands: what stands behind this line of the list. The phases before K do not see them.
_FROM_K = "# for phases K and L:"
_MORE = {line.split()[1] for line in LIST.read_text().partition(_FROM_K)[2].splitlines() if line}
ONLY = dict.fromkeys("deh", _SMALL) | dict.fromkeys("kl", _MORE)


@dataclass(frozen=True)
class Choice:
    """Rows of other phases' segments of at most `most` tokens: a share of each phase's times a share of each layout's."""

    phases: dict[str, float]
    layouts: dict[str, float]
    most: int


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
    return [Package(*line.split()) for line in LIST.read_text().splitlines() if line and line[0] != "#"]


# --------------------------------------------------------------------------------------------------- archives
def from_pypi(name: str, version: str, folder: Path) -> Path:
    """The source distribution, unbuilt: pip would run its build to learn its metadata."""
    from pip._internal.models.index import PyPI
    from unearth import PackageFinder
    from unearth.preparer import download_link

    index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url)
    finder = PackageFinder(index_urls=[index], no_binary=[":all:"], ignore_compatibility=True)
    found = finder.find_best_match(f"{name}=={version}" if version else name).best
    if found is None:
        raise ValueError(f"{name} {version} has no source distribution: drop it from the list")
    return download_link(finder.session, found.link, folder)


def from_npm(name: str, version: str, folder: Path) -> Path:
    wanted = f"{name}@{version}" if version else name
    told = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", folder, wanted],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    return folder / told.stdout.split()[-1]


REGISTRIES = {"pypi": from_pypi, "npm": from_npm}


def fetch(package: Package, folder: Path) -> Path:
    """The archive, from the cache or the registry. Raises ValueError where it is not the one of the list."""
    file = folder / package.file
    if not file.exists():
        REGISTRIES[package.registry](package.name, package.version, folder)
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != package.sha256:
        file.unlink()
        raise ValueError(
            f"{file.name} has sha256 {found}, the list says {package.sha256}: fetch again or pin it anew"
        )
    return file


def pin(registry: str, wanted: str, folder: Path) -> tuple[Package, Counter[str]]:
    """A line for the list, and how many characters of each language the archive holds."""
    name, _, version = wanted.partition("==")
    file = REGISTRIES[registry](name, version, folder)
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, more than {LARGEST:,}")
    sizes, licences = Counter[str](), Counter[str]()
    for each in read(Source(file, "zip" if file.suffix == ".zip" else "tar")):
        if isinstance(each, Document) and each.language in CODE:
            sizes[each.language] += len(each.text)
            licences[each.licence] += len(each.text)
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
    there = {(package.registry, package.name) for package in packages()}
    wanted = [name for name in names if (registry, name.partition("==")[0]) not in there]

    def one(name: str) -> tuple[Package, Counter[str]] | str:
        try:
            return pin(registry, name, folder)
        except Exception as error:  # of a client or an archive: the rest of the names goes on
            return f"{name}: {type(error).__name__}: {error}"

    with ThreadPoolExecutor(4) as pool, LIST.open("a") as out:
        for found in pool.map(one, wanted):
            if isinstance(found, str):
                print("left out", found, file=sys.stderr)
                continue
            out.write(" ".join(astuple(found[0])) + "\n")
            out.flush()
            print(found[0].name, found[0].licence, dict(found[1].most_common(3)))


def packages_of(phase: str) -> list[Package]:
    return [
        package
        for package in packages()
        if (package.name in ONLY[phase] if phase in ONLY else package.name not in _MORE)
    ]


def fetched(folder: Path, wanted: list[Package]) -> Iterator[Path]:
    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(lambda package: fetch(package, folder), wanted)


def rows(phase: str, cache: Path, data: Path, workers: int) -> Summary:
    """Builds, or goes on with, the rows of a phase."""
    benchmarks = sorted(file for file in data.rglob("*.json*") if file.is_file())
    if not benchmarks:
        raise ValueError(f"{data} has no benchmark files (*.jsonl.gz and the like) to keep out of the rows")
    sources = [str(file) for file in fetched(cache / "archives", packages_of(phase))]
    made = build(
        sources,
        cache / "rows" / phase,
        load_tokenizer("gemma-3-270m"),
        PHASES[phase],
        benchmarks=benchmarks,
        workers=workers,
        resume=True,
        progress=lambda *told: print(phase, *told) if told[1] == told[2] else None,
    )
    with (cache / "READY").open("a") as out:
        out.write(f"{phase}\n")
    return made


def _chosen(
    phase: str, choice: Choice, rows: Rows, part_of: float
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """The tokens and targets of each segment that was chosen, and its examples."""
    for part in sorted({int(part) for part in rows.index_N2[:, 0]}):
        stem = rows.stem(part)
        arrays = {name: np.load(stem.with_suffix(f".{name}.npy")) for name in ("tokens", "loss")}
        whose: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for example in pq.read_table(stem.with_suffix(".examples.parquet")).to_pylist():
            whose.setdefault((example["row"], example["segment"]), []).append(example)
        segments = np.load(stem.with_suffix(".segments.npy"))
        for (row, segment), examples in sorted(whose.items()):
            layouts = {example["layout"] for example in examples}
            where = np.flatnonzero(segments[row] == segment)
            share = choice.layouts.get(layouts.pop(), 0.0) if len(layouts) == 1 else 0.0
            if len(where) <= choice.most and Draw(phase, part, row, segment).uniform() < part_of * share:
                yield (
                    {name: array[row, where] for name, array in arrays.items()},
                    [
                        each | {"start": each["start"] - where[0], "end": each["end"] - where[0]}
                        for each in examples
                    ],
                )


def choose(phase: str, cache: Path) -> int:
    """Writes the rows of a choice and gives how many there are; its manifest names the rows that they were chosen from."""
    choice, out = CHOICES[phase], cache / "rows" / phase
    rows = {name: Rows(cache / "rows" / name) for name in choice.phases}
    found = [
        each for name, share in choice.phases.items() for each in _chosen(phase, choice, rows[name], share)
    ]
    length = len(next(iter(rows.values()))[0]["tokens"])
    sizes = [len(cut["tokens"]) for cut, _ in found]
    packed = fit(sizes, length)
    shape = (len(packed), length)
    made = Packed(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.uint16), [])
    for row, segment, item, here in places(packed, sizes):
        cut, examples = found[item]
        made.tokens_RT[row, here], made.loss_RT[row, here], made.segments_RT[row, here] = (
            cut["tokens"],
            cut["loss"],
            segment,
        )
        made.examples.extend(
            each
            | {
                "row": row,
                "segment": segment,
                "start": here.start + each["start"],
                "end": here.start + each["end"],
            }
            for each in examples
        )
    (out / "rows").mkdir(parents=True, exist_ok=True)
    (out / "manifests").mkdir(exist_ok=True)
    save(made, out / "rows" / "part-00000")
    told = {
        "chosen": asdict(choice),
        "examples": len(made.examples),
        "tokens": sum(sizes),
        "layouts": Counter(each["layout"] for each in made.examples),
        "learned": int(made.loss_RT.sum()),
        "of": {
            name: json.loads((each.folder / "manifests" / "rows.json").read_text())
            for name, each in rows.items()
        },
    }
    (out / "manifests" / "rows.json").write_text(json.dumps(told, indent=1))
    with replacing(out / "index.npy") as file:  # last, as a build's: where it is, the rows are finished
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
        for phase in [*PHASES, *CHOICES] if "all" in args.phases else args.phases:
            if phase in CHOICES:
                print(phase, choose(phase, args.cache), "rows")
                continue
            made = rows(phase, args.cache, args.data, args.workers)
            print(
                phase,
                made.manifests["rows"]["examples"],
                "examples",
                made.tokens,
                "tokens",
                made.kept,
                "of",
                made.documents,
                "documents",
            )
    else:
        print(f"{sum(1 for _ in fetched(archives, packages()))} archives in {archives}")


if __name__ == "__main__":
    main()
