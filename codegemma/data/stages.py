"""The stages of a build as tasks: pure functions of files and the recipe that any engine may run in any order.

A task writes files that appear whole or not at all; its result is a small JSON document, kept beside them. Documents
are sorted by the hash of their repository when they come in, so that later stages read one contiguous range of every
shard, and only bands of signatures are compared across all of them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codegemma.data import clean, dedup, fim, graph, licences, pack, tests_beside
from codegemma.data.documents import CODE, Document, Outcome, Source, dropped, read
from codegemma.files import replacing
from codegemma.prompts import Label
from codegemma.tokenizer import Tokenizer

SHARD_BYTES = 8_000_000  # of text: a shard of documents, and about what a partition holds


@dataclass(frozen=True)
class Recipe(fim.Recipe):
    """All that decides the output, beside the sources. Lists are sorted; files are named by their hash."""

    loss: tuple[Label, ...] = tuple(sorted(fim.PARTS))
    languages: tuple[str, ...] = ()  # empty: all that are code
    # auto: any for checkouts, else permissive
    licences: tuple[str, ...] | Literal["any", "permissive", "auto"] = "auto"
    threshold: float = dedup.THRESHOLD
    mix: tuple[tuple[str, float], ...] = ()
    unsafe_rules: str = ""
    benchmarks: tuple[str, ...] = ()
    tokenizer: str = ""
    shard_bytes: int = SHARD_BYTES
    hold_out: float = 0.0  # share of the repositories that stay documents, for evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.languages) - CODE):
            raise ValueError(
                f"languages: {', '.join(unknown)} not known; known are {', '.join(sorted(CODE))}"
            )
        if self.mix and (
            min(share for _, share in self.mix) <= 0 or abs(sum(share for _, share in self.mix) - 1) > 1e-6
        ):
            raise ValueError(f"mix: shares must be above 0 and add up to 1, got {dict(self.mix)}")
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"hold-out must lie from 0 to below 1, got {self.hold_out}: the rest are rows")
        if not 0.5 <= self.threshold <= 1:
            raise ValueError(
                f"threshold of near copies must lie from 0.5 to 1, got {self.threshold}: below 0.5 "
                "the bands find only some of the pairs"
            )

    def quality(self, redistributed: bool) -> clean.Quality:
        allowed = (
            licences.permissive()
            if self.licences == "permissive" or (self.licences == "auto" and redistributed)
            else None
            if isinstance(self.licences, str)
            else frozenset(self.licences)
        )
        return clean.Quality(languages=frozenset(self.languages) or CODE, licences=allowed)


# ------------------------------------------------------------------------------------------- reading and writing
def _schema() -> Any:
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            ("key", pa.int64()),
            ("repository", text),
            ("path", text),
            ("text", pa.large_string()),
            ("language", text),
            ("licence", text),
            ("source", text),
            ("commit", text),
            ("encoding", text),
            ("kind", text),
            ("imports", pa.list_(text)),
            ("group", pa.int32()),
            ("via", text),
        ]
    )


def _write_documents(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        replacing(path) as file,
        pq.ParquetWriter(file, _schema(), compression="zstd", compression_level=1) as writer,
    ):
        for start in range(0, max(1, len(rows)), 256):
            writer.write_table(pa.Table.from_pylist(rows[start : start + 256], _schema()))


def _row(document: Document) -> dict[str, Any]:
    return {**vars(document), "key": document.key}


def _document(row: dict[str, Any]) -> Document:
    return Document(
        **{name: row[name] for name in Document.__dataclass_fields__ if name != "imports"},
        imports=None if row["imports"] is None else tuple(row["imports"]),
    )


def _read_rows(path: Path, low: int | None = None, high: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a shard in their order, with `at`, their place in it; with `low`, only keys in [low, high)."""
    import pyarrow.parquet as pq

    at = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            keys = group.column(0).statistics
            if low is None or high is None or (keys is not None and keys.max >= low and keys.min < high):
                for place, row in enumerate(file.read_row_group(number, use_threads=False).to_pylist(), at):
                    if low is None or high is None or low <= row["key"] < high:
                        yield {**row, "at": place}
            at += group.num_rows


def _write_outcomes(outcomes: list[Outcome], path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [(name, pa.int64() if name == "size" else pa.string()) for name in Outcome.__dataclass_fields__]
    )
    rows = [
        vars(outcome)
        for outcome in sorted(outcomes, key=lambda o: (o.repository, o.path, o.reason, o.detail, o.size))
    ]
    with replacing(path) as file:
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd", compression_level=1)


def _counted(outcomes: Iterable[Outcome]) -> dict[str, int]:
    return dict(
        sorted(
            Counter(
                f"{each.outcome}: {each.reason}" if each.reason else each.outcome for each in outcomes
            ).items()
        )
    )


# -------------------------------------------------------------------------------------------------- the stages
@dataclass(frozen=True)
class Task:
    """One unit of work: a stage, a number, what it reads, and the folder and recipe it belongs to."""

    stage: str
    number: int
    inputs: dict[str, Any]
    work: str
    recipe: str  # JSON of the Recipe

    @property
    def folder(self) -> Path:
        return Path(self.work)

    @property
    def done(self) -> Path:
        return self.folder / "done" / f"{self.stage}-{self.number:06d}.json"

    def file(self, what: str, ending: str = "parquet") -> Path:
        return self.folder / what / f"{self.number:06d}.{ending}"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger" / f"{self.stage}-{self.number:06d}.parquet"


@cache
def _recipe(text: str) -> Recipe:
    values = json.loads(text)
    tuples = {
        name: tuple(tuple(each) if isinstance(each, list) else each for each in value)
        for name, value in values.items()
        if isinstance(value, list)
    }
    return Recipe(**{**values, **tuples})


@cache
def _tokenizer(work: str) -> Tokenizer:
    return Tokenizer((Path(work).parent / "tokenizer.model").read_bytes())


def run_task(task: Task) -> dict[str, Any]:
    """Does a task unless its result is there, and returns the result."""
    if task.done.exists():
        return json.loads(task.done.read_text())
    start = time.perf_counter()
    result = TASKS[task.stage](task)
    result["seconds"] = time.perf_counter() - start
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with replacing(task.done) as file:
        file.write(json.dumps(result).encode())
    return result


def _documents(task: Task) -> dict[str, Any]:
    """One source -> shards of documents sorted by the hash of their repository."""
    source = Source(Path(task.inputs["path"]), task.inputs["form"], task.inputs["kind"])
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    outcomes, size, hashes = [], 0, []

    def flush() -> None:
        nonlocal rows, size
        rows.sort(key=lambda row: (row["key"], row["repository"], row["path"]))
        path = task.folder / "documents" / f"{task.number:06d}-{len(shards):04d}.parquet"
        _write_documents(rows, path)
        shards.append({"file": str(path), "redistributed": source.redistributed})
        rows, size = [], 0

    for each in read(source):
        if isinstance(each, Outcome):
            outcomes.append(each)
            continue
        rows.append(_row(each))
        hashes.append(hashlib.sha256(each.name.encode() + each.digest).digest())
        size += len(each.text)
        if size >= _recipe(task.recipe).shard_bytes:
            flush()
    if rows:
        flush()
    _write_outcomes(outcomes, task.ledger)
    return {
        "shards": shards,
        "counts": _counted(outcomes),
        "input": source.name,
        "documents": len(hashes),
        "sha256": hashlib.sha256(b"".join(sorted(hashes))).hexdigest(),
    }


def _clean(task: Task) -> dict[str, Any]:
    """A shard of documents -> the cleaned shard."""
    recipe, tokenizer = _recipe(task.recipe), _tokenizer(task.work)
    unsafe = clean.Unsafe(task.folder / "unsafe.toml")
    redacted: Counter[str] = Counter()
    kept, outcomes = [], []
    documents = (_document(row) for row in _read_rows(Path(task.inputs["file"])))
    quality = recipe.quality(task.inputs["redistributed"])
    for each in clean.clean(documents, quality, unsafe, lambda text: fertility(text, tokenizer), redacted):
        if isinstance(each, Outcome):
            outcomes.append(each)
        else:
            kept.append(_row(each))
    _write_documents(kept, task.file("clean"))
    _write_outcomes(outcomes, task.ledger)
    return {
        "file": str(task.file("clean")),
        "documents": len(kept),
        "counts": _counted(outcomes),
        "redacted": dict(redacted),
        "bytes": sum(len(row["text"]) for row in kept),
    }


def fertility(text: str, tokenizer: Tokenizer) -> float:
    """Bytes per token of 512 characters in the middle; a text with the white space of source code is not looked at."""
    middle = text[max(0, len(text) // 2 - 256) :][:512]
    if sum(map(str.isspace, middle)) > len(middle) * 0.12:
        return float("inf")
    return len(middle.encode()) / max(1, len(tokenizer.encode(middle)))


def _sign(task: Task) -> dict[str, Any]:
    """A cleaned shard -> MinHash signatures, bands sorted by key, names; contaminated documents are marked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    benchmarks = _benchmarks(task.work)
    names: list[dict[str, Any]] = []
    shingles = []
    for row in _read_rows(Path(task.inputs["file"])):
        document = _document(row)
        hashes = dedup.words(document.text)
        names.append(
            {
                "repository": document.repository,
                "path": document.path,
                "kind": document.kind,
                "key": document.key,
                "digest": document.digest,
                "task": benchmarks(hashes),
            }
        )
        shingles.append(np.unique(dedup.ngrams(hashes, dedup.SHINGLE)))
    matrix = dedup.signatures(shingles)
    keys = dedup.band_keys(matrix).ravel()
    rows = np.repeat(np.arange(len(names), dtype=np.int64), dedup.BANDS)
    order = np.lexsort((rows, keys))
    for what, array in (("signatures", matrix), ("bands", keys[order]), ("band_rows", rows[order])):
        with replacing(task.file(what, "npy")) as file:
            np.save(file, array)
    schema = pa.schema(
        [
            (name, pa.binary() if name == "digest" else pa.int64() if name == "key" else pa.string())
            for name in ("repository", "path", "kind", "key", "digest", "task")
        ]
    )
    with replacing(task.file("names")) as file:
        pq.write_table(pa.Table.from_pylist(names, schema), file)
    return {"documents": len(names), "benchmarks": sum(bool(name["task"]) for name in names)}


@cache
def _benchmarks(work: str) -> dedup.Benchmarks:
    return dedup.Benchmarks(sorted((Path(work) / "benchmarks").glob("*")))


def _link(task: Task) -> dict[str, Any]:
    """One range of band keys over all shards -> edges between documents whose signatures agree."""
    low, high, last = (np.uint64(task.inputs[name]) for name in ("low", "high", "last"))
    keys, nodes, matrices = [], [], []
    for number in range(task.inputs["shards"]):
        bands, rows, alive, matrix = (
            np.load(task.folder / what / f"{number:06d}.npy", mmap_mode="r")
            for what in ("bands", "band_rows", "alive", "signatures")
        )
        matrices.append(matrix)
        start, end = np.searchsorted(bands, low), len(bands) if last else np.searchsorted(bands, high)
        taken = alive[rows[start:end]]
        keys.append(np.array(bands[start:end])[taken])
        nodes.append((np.int64(number) << np.int64(32)) + np.array(rows[start:end])[taken])
    pairs = dedup.candidates(np.concatenate(keys), np.concatenate(nodes))
    similar = np.empty(len(pairs))
    for at, (left, right) in enumerate(pairs.tolist()):
        similar[at] = np.mean(
            matrices[left >> 32][left & 0xFFFFFFFF] == matrices[right >> 32][right & 0xFFFFFFFF]
        )
    good = similar >= _recipe(task.recipe).threshold
    for what, array in (("edges", pairs[good]), ("edge_similarity", similar[good])):
        with replacing(task.file(what, "npy")) as file:
            np.save(file, array)
    return {"candidates": len(pairs), "edges": int(good.sum())}


def _order(task: Task) -> dict[str, Any]:
    """One partition of repositories -> its documents in packed order, without the duplicates; what is held out goes to
    files of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    recipe = _recipe(task.recipe)
    held: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    found: dict[tuple[int, str], list[Document]] = defaultdict(list)
    for number, shard in enumerate(task.inputs["shards"]):
        verdicts = _verdicts(task.folder / "verdicts" / f"{number:06d}.json")
        for row in _read_rows(Path(shard), task.inputs["low"], task.inputs["high"]):
            document = _document(row)
            if verdict := verdicts.get(row["at"]):
                outcomes.append(
                    dropped(document, verdict[0], verdict[1], duplicate=verdict[0] != "benchmark")
                )
            else:
                found[document.key, document.repository].append(document)
    rows: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    vias: Counter[str] = Counter()
    for key in sorted(found):
        documents: list[Document] = []
        for document in sorted(found.pop(key), key=lambda each: (each.path, each.digest)):
            if documents and documents[-1].path == document.path:
                outcomes.append(
                    dropped(document, "same path", "another version stands at this path of the repository")
                )
            else:
                documents.append(document)
        if fim.Draw(recipe.seed, "held out", key[0]).uniform() < recipe.hold_out:
            held += map(_row, documents)
            outcomes += [replace(dropped(each, "held out"), outcome="kept") for each in documents]
            continue
        groups, kept = ordered(documents)
        for group, (via, members) in enumerate(groups):
            vias[via] += len(members)
            rows += [{**_row(each), "group": group, "via": via} for each in members]
            outcomes += [replace(dropped(each, ""), outcome="kept") for each in members]
        edges += [
            {
                "repository": key[1],
                "source": documents[e.source].path,
                "target": documents[e.target].path,
                "importance": e.importance,
            }
            for e in kept
        ]
    _write_documents(rows, task.file("order"))
    if recipe.hold_out:
        _write_documents(held, task.folder.parent / "held-out" / f"part-{task.number:05d}.parquet")
    _write_outcomes(outcomes, task.ledger)
    schema = pa.schema(
        [
            (name, pa.float64() if name == "importance" else pa.string())
            for name in ("repository", "source", "target", "importance")
        ]
    )
    with replacing(task.folder.parent / "graph" / f"part-{task.number:05d}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(edges, schema), file, compression="zstd")
    return {
        "file": str(task.file("order")),
        "counts": _counted(outcomes),
        "files": dict(sorted(vias.items())),
        "edges": len(edges),
        "documents": len(rows),
    }


def ordered(documents: Sequence[Document]) -> tuple[list[tuple[str, list[Document]]], list[graph.Edge]]:
    """The groups of a repository, given sorted by path: each part of its graph, then the files left over, tests beside.

    A test outside the graph whose implementation is in it goes there too.
    """
    if not documents or documents[0].kind != "code":
        return [("alone", [document]) for document in documents], []
    parts, kept = graph.order(documents[0].repository, documents)
    tests = tests_beside.implementations({doc.path: doc.language for doc in documents})
    by_path = {doc.path: doc for doc in documents}
    covered = {documents[at].path for part in parts for at in part}
    groups = []
    for part in parts:
        inside = {documents[at].path for at in part}
        guests = sorted(test for test, target in tests.items() if target in inside and test not in covered)
        around = [documents[at].path for at in part] + guests
        beside = tests_beside.beside(around, {guest: tests[guest] for guest in guests})
        groups.append(("graph", [by_path[path] for path in beside]))
        covered.update(guests)
    rest = tests_beside.beside([doc.path for doc in documents if doc.path not in covered], tests)
    return groups + ([("beside tests", [by_path[path] for path in rest])] if rest else []), kept


@cache
def _verdicts(path: Path) -> dict[int, tuple[str, str]]:
    return {int(at): (how, of) for at, how, of in json.loads(path.read_text())} if path.exists() else {}


def _rows(task: Task) -> dict[str, Any]:
    """One partition in packed order -> rows; kinds of the mix never share a row."""
    recipe, tokenizer = _recipe(task.recipe), _tokenizer(task.work)
    groups: dict[str, list[pack.Group]] = defaultdict(list)
    current: tuple[Any, ...] = ()
    for row in _read_rows(Path(task.inputs["file"])):
        document = _document(row)
        place = (document.repository, row["group"], row["via"])
        if place != current or row["via"] == "alone":
            groups[document.kind].append(pack.Group([], row["via"]))
            current = place
        made = fim.fim([document], tokenizer, recipe)
        for one in (replace(each, order=row["at"]) for each in made):
            if recipe.window and document.kind == "code":  # each on its own: no other window is its context
                groups[document.kind].append(pack.Group([one], row["via"]))
            else:
                groups[document.kind][-1].examples.append(one)
    packed = [
        pack.pack(groups.pop(kind), recipe.length, tokenizer.control.bos, tokenizer.control.pad or 0)
        for kind in sorted(groups, key=lambda kind: (kind != "code", kind))
    ]
    joined = pack.join(packed, recipe.length)
    pack.save(joined, task.folder.parent / "rows" / f"part-{task.number:05d}")
    counts: Counter[str] = Counter()
    for example in joined.examples:
        counts[f"layout {example['layout']}"] += 1
        counts[f"boundary {example['boundary']}"] += 1
    kinds = {example["row"]: example["kind"] for example in joined.examples}
    return {
        "rows": len(joined.tokens_RT),
        "tokens": int((joined.segments_RT > 0).sum()),
        "learned": int(joined.loss_RT.sum()),
        "examples": len(joined.examples),
        "segments": int(joined.segments_RT.max(1, initial=0).sum()),
        "counts": dict(sorted(counts.items())),
        "kinds": [kinds[row] for row in range(len(joined.tokens_RT))],
        "filled": (joined.segments_RT > 0).sum(1).tolist(),
    }


TASKS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "documents": _documents,
    "clean": _clean,
    "sign": _sign,
    "link": _link,
    "order": _order,
    "rows": _rows,
}
