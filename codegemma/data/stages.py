"""The tasks of each stage of a build. What a task writes depends on its inputs and the recipe alone.

A task writes files that appear complete or not at all; its result is kept beside them as JSON, so that no
task is run twice. The documents of a shard are sorted by the hash of their repository. So a task of `order`
finds all files of its repositories in one range of every shard; only copies are looked for across all ranges.

A partition (`part` in the names of files) is the repositories of one range of Document.key. The packed order
is the order in which OrderTask lists their files and RowsTask packs them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from codegemma.data import clean, dedup, fim, folder, pack
from codegemma.data.context import related_files
from codegemma.data.documents import Decision, Document, Outcome
from codegemma.data.draw import Draw
from codegemma.data.folder import BuildFolder, StoredDocument, load_tokenizer, read_documents, read_table
from codegemma.data.holes import begins_with, ends_with
from codegemma.data.recipe import BuildRecipe
from codegemma.data.sources import Source, read
from codegemma.data.tests_beside import group_files
from codegemma.prompts import File


@dataclass(kw_only=True)
class TaskResult:
    """What a task reports; a field that its stage does not fill keeps its default."""

    counts: dict[str, int] = field(default_factory=dict)  # inputs by outcome and reason, or examples by split
    documents: int = 0
    seconds: float = 0.0  # wall time
    peak_bytes: int = 0  # of the memory of the process
    # documents
    source: str = ""
    shards: int = 0
    sha256: str = ""  # of the documents, in any order
    # clean
    redacted: dict[str, int] = field(default_factory=dict)  # replacements by kind
    characters: int = 0
    # order
    files: dict[str, int] = field(default_factory=dict)  # by the rule that placed them
    edges: int = 0
    characters_of: dict[str, int] = field(default_factory=dict)  # of code, by language
    # rows
    examples: int = 0
    segments: int = 0
    learned: int = 0  # tokens
    kinds: list[str] = field(default_factory=list)  # of each row
    filled: list[int] = field(default_factory=list)  # tokens of each row that are not padding


def total(results: Sequence[TaskResult]) -> TaskResult:
    """The counts of several results, added up; the other fields keep their defaults."""
    sums = TaskResult()
    for name in ("documents", "characters", "edges", "examples", "segments", "learned"):
        setattr(sums, name, sum(getattr(result, name) for result in results))
    for name in ("counts", "redacted", "files", "characters_of"):
        entries = Counter[str]()
        for result in results:
            entries.update(getattr(result, name))
        setattr(sums, name, dict(sorted(entries.items())))
    return sums


@dataclass(frozen=True)
class Task(ABC):
    """One unit of work of a stage: a number, what it reads, and the folder and recipe that it belongs to."""

    stage: ClassVar[str]
    folder: BuildFolder
    recipe: BuildRecipe
    number: int

    @abstractmethod
    def run(self) -> TaskResult:
        """Writes the task's files and returns its result."""

    @property
    def is_done(self) -> bool:
        return self.folder.result(self.stage, self.number).exists()

    def result(self) -> TaskResult:
        """The result of a task that is done."""
        return TaskResult(**json.loads(self.folder.result(self.stage, self.number).read_text()))

    def write_outcomes(self, outcomes: Sequence[Outcome]) -> dict[str, int]:
        """Writes the task's part of the ledger; returns how many inputs had each outcome and reason."""
        folder.write_outcomes(self.folder.outcomes(self.stage, self.number), outcomes)
        return count(f"{each.outcome}: {each.reason}" if each.reason else each.outcome for each in outcomes)


def run_task(task: Task) -> None:
    """Runs a task and writes its result, unless that exists already."""
    if task.is_done:
        return
    start = time.perf_counter()
    result = task.run()
    result.seconds = time.perf_counter() - start
    result.peak_bytes = peak_bytes()
    folder.write_json(task.folder.result(task.stage, task.number), asdict(result))


def peak_bytes() -> int:
    """The most memory that this process has had at once."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, sorted by name."""
    return dict(sorted(Counter(names).items()))


# ---------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True)
class ReadTask(Task):
    """One source -> shards of documents, each sorted by the hash of their repository."""

    stage = "documents"
    source: Source

    def run(self) -> TaskResult:
        outcomes: list[Outcome] = []
        documents: list[Document] = []
        hashes, size, shards = [], 0, 0
        for item in read(self.source):
            if isinstance(item, Outcome):
                outcomes.append(item)
                continue
            documents.append(item)
            hashes.append(hashlib.sha256(item.name.encode() + item.digest).digest())
            size += len(item.text)
            if size >= self.recipe.shard_bytes:
                self._write_shard(documents, shards)
                documents, size, shards = [], 0, shards + 1
        if documents:
            self._write_shard(documents, shards)
            shards += 1
        return TaskResult(
            source=self.source.name,
            shards=shards,
            counts=self.write_outcomes(outcomes),
            documents=len(hashes),
            sha256=hashlib.sha256(b"".join(sorted(hashes))).hexdigest(),
        )

    def _write_shard(self, documents: list[Document], shard: int) -> None:
        by_key = sorted(documents, key=lambda document: (document.key, document.repository, document.path))
        folder.write_documents(self.folder.documents(self.number, shard), map(StoredDocument, by_key))


@dataclass(frozen=True)
class CleanTask(Task):
    """A shard of documents -> the cleaned shard."""

    stage = "clean"
    source: int  # number of the ReadTask that wrote it
    shard: int
    redistributed: bool

    def run(self) -> TaskResult:
        cleaner = clean.Cleaner(
            self.recipe.quality(self.redistributed),
            clean.Unsafe(self.folder.unsafe_rules),
            load_tokenizer(self.folder.tokenizer),
        )
        documents = read_documents(self.folder.documents(self.source, self.shard))
        results = [cleaner.clean(stored.document) for stored in documents]
        kept = [result for result in results if isinstance(result, Document)]
        folder.write_documents(self.folder.shard("clean", self.number), map(StoredDocument, kept))
        return TaskResult(
            documents=len(kept),
            counts=self.write_outcomes([result for result in results if isinstance(result, Outcome)]),
            redacted=dict(cleaner.redacted),
            characters=sum(len(document.text) for document in kept),
        )


@dataclass(frozen=True)
class MinHashTask(Task):
    """A cleaned shard -> MinHash signatures, band keys in order, and a table of origins.

    An origin is the repository, path, kind and digest of a document, and the benchmark problem in it, if any.
    """

    stage = "minhash"

    def run(self) -> TaskResult:
        benchmarks = _benchmarks(self.folder.benchmarks)
        origins: list[dict[str, Any]] = []
        shingles = []
        for stored in read_documents(self.folder.shard("clean", self.number)):
            document = stored.document
            hashes = dedup.words(document.text)
            fields = {name: getattr(document, name) for name in ("repository", "path", "kind", "digest")}
            origins.append(fields | {"problem": benchmarks(hashes)})
            shingles.append(np.unique(dedup.ngrams(hashes, dedup.SHINGLE)))
        signatures = dedup.signatures(shingles)
        keys = dedup.band_keys(signatures).ravel()
        rows = np.repeat(np.arange(len(origins), dtype=np.int64), dedup.BANDS)
        order = np.lexsort((rows, keys))
        folder.write_array(self.folder.shard("signatures", self.number), signatures)
        folder.write_array(self.folder.shard("bands", self.number), keys[order])
        folder.write_array(self.folder.shard("band_rows", self.number), rows[order])
        types = dict.fromkeys(("repository", "path", "kind", "problem"), "string") | {"digest": "binary"}
        folder.write_table(self.folder.shard("origins", self.number), origins, types)
        return TaskResult(documents=len(origins))


@cache
def _benchmarks(path: Path) -> dedup.Benchmarks:
    return dedup.Benchmarks(sorted(path.glob("*")))


@dataclass(frozen=True)
class LinkTask(Task):
    """One range of band keys over all shards -> pairs of documents whose signatures are similar.

    A document is a node, shard << 32 | row. `high` is None for the last range.
    """

    stage = "link"
    low: int
    high: int | None
    shards: int

    def run(self) -> TaskResult:
        keys, nodes, matrices = [], [], []
        for shard in range(self.shards):
            bands, rows = self.folder.array("bands", shard), self.folder.array("band_rows", shard)
            start = np.searchsorted(bands, np.uint64(self.low))
            end = len(bands) if self.high is None else np.searchsorted(bands, np.uint64(self.high))
            alive = self.folder.array("alive", shard)[rows[start:end]]
            keys.append(np.array(bands[start:end])[alive])
            nodes.append((np.int64(shard) << np.int64(32)) + np.array(rows[start:end])[alive])
            matrices.append(self.folder.array("signatures", shard))
        pairs = dedup.candidates(np.concatenate(keys), np.concatenate(nodes))
        similarity = np.empty(len(pairs))
        for number, (left, right) in enumerate(pairs.tolist()):
            signatures = (matrices[node >> 32][node & 0xFFFFFFFF] for node in (left, right))
            similarity[number] = np.mean(np.equal(*signatures))
        similar = similarity >= self.recipe.threshold
        folder.write_array(self.folder.shard("edges", self.number), pairs[similar])
        folder.write_array(self.folder.shard("edge_similarity", self.number), similarity[similar])
        return TaskResult()


@dataclass(frozen=True)
class OrderTask(Task):
    """One range of repositories -> their documents in packed order, without duplicates; some are held out."""

    stage = "order"
    keys: range
    shards: int

    def run(self) -> TaskResult:
        outcomes: list[Outcome] = []
        ordered: list[StoredDocument] = []
        held_out: list[StoredDocument] = []
        edges: list[dict[str, Any]] = []
        repositories = self._repositories(outcomes)
        for key, repository in sorted(repositories):
            documents = _unique_paths(repositories.pop((key, repository)), outcomes)
            is_held_out = Draw(self.recipe.seed, "held out", key).uniform() < self.recipe.hold_out
            reason = "held out" if is_held_out else ""
            outcomes += [document.outcome("kept", reason) for document in documents]
            if is_held_out:
                held_out += map(StoredDocument, documents)
                continue
            groups, kept = group_files(documents)
            for group, (placed_by, members) in enumerate(groups):
                ordered += [StoredDocument(document, 0, group, placed_by) for document in members]
            for edge in kept:
                ends = {"source": documents[edge.source].path, "target": documents[edge.target].path}
                edges.append({"repository": repository, **ends, "importance": edge.importance})
        folder.write_documents(self.folder.shard("order", self.number), ordered)
        if self.recipe.hold_out:
            folder.write_documents(self.folder.held_out(self.number), held_out)
        types = dict.fromkeys(("repository", "source", "target"), "string") | {"importance": "float64"}
        folder.write_table(self.folder.graph(self.number), edges, types)
        return TaskResult(
            counts=self.write_outcomes(outcomes),
            files=count(stored.placed_by or "" for stored in ordered),
            edges=len(edges),
            characters_of=_code_characters(ordered),
            documents=len(ordered),
        )

    def _repositories(self, outcomes: list[Outcome]) -> dict[tuple[int, str], list[Document]]:
        """The documents to keep, by key and repository; the duplicates are added to `outcomes`."""
        documents = defaultdict(list)
        for shard in range(self.shards):
            verdicts = _verdicts(self.folder.verdicts(shard))
            for stored in read_documents(self.folder.shard("clean", shard), self.keys):
                document = stored.document
                if verdict := verdicts.get(stored.row):
                    decision: Decision = "dropped" if verdict[0] == "benchmark" else "duplicate"
                    outcomes.append(document.outcome(decision, *verdict))
                else:
                    documents[document.key, document.repository].append(document)
        return documents


def _code_characters(stored: Iterable[StoredDocument]) -> dict[str, int]:
    """The characters of code in each language."""
    sizes = Counter[str]()
    for document in (each.document for each in stored):
        if document.kind == "code":
            sizes[document.language] += len(document.text)
    return dict(sorted(sizes.items()))


@cache
def _verdicts(path: Path) -> dict[int, tuple[str, str]]:
    return {int(row): (reason, detail) for row, reason, detail in json.loads(path.read_text())}


def _unique_paths(documents: Iterable[Document], outcomes: list[Outcome]) -> list[Document]:
    """Documents sorted by path; of several with one path, the one with the smallest hash is kept."""
    unique: dict[str, Document] = {}
    for document in sorted(documents, key=lambda document: (document.path, document.digest)):
        if unique.setdefault(document.path, document) is not document:
            detail = "another version stands at this path of the repository"
            outcomes.append(document.outcome("dropped", "same path", detail))
    return list(unique.values())


@dataclass(frozen=True)
class RowsTask(Task):
    """One partition in packed order -> rows; different kinds never share a row.

    `strides` are those of languages whose windows are not drawn with the recipe's stride.
    """

    stage = "rows"
    strides: Mapping[str, int]

    def run(self) -> TaskResult:
        control = load_tokenizer(self.folder.tokenizer).control
        groups = self._groups()
        kinds = [groups[kind] for kind in sorted(groups, key=lambda kind: (kind != "code", kind))]
        labels = [label for of_kind in kinds for group in of_kind for label in _labels(group)]
        rows = pack.pack(kinds, self.recipe.length, control.bos, control.pad or 0)
        pack.save(rows, self.folder, self.number, bool(self.recipe.context_rate))
        kind_of = {example["row"]: example["kind"] for example in rows.examples}
        return TaskResult(
            learned=int(rows.loss_RT.sum()),
            examples=len(rows.examples),
            segments=int(rows.segments_RT.max(1, initial=0).sum()),
            counts=count(labels),
            kinds=[kind_of[row] for row in range(len(rows.tokens_RT))],
            filled=(rows.segments_RT > 0).sum(1).tolist(),
        )

    def _groups(self) -> dict[str, list[pack.ExampleGroup]]:
        """The examples by kind, in groups: the examples of a segment are all of one group."""
        groups: dict[str, list[pack.ExampleGroup]] = defaultdict(list)
        current: tuple[Any, ...] = ()
        related, tokenizer = self._related(), load_tokenizer(self.folder.tokenizer)
        for stored in read_documents(self.folder.shard("order", self.number)):
            document, placed_by = stored.document, stored.placed_by or ""
            of_kind = groups[document.kind]
            group = (document.repository, stored.group, placed_by)
            if group != current or placed_by == "alone":
                of_kind.append(pack.ExampleGroup([], placed_by))
                current = group
            stride = self.strides.get(document.language, self.recipe.stride)
            recipe = replace(self.recipe, stride=stride)
            for example in fim.fim([document], tokenizer, recipe, related):
                example = replace(example, order=stored.row)
                if self.recipe.window and document.kind == "code":  # windows do not see each other
                    of_kind.append(pack.ExampleGroup([example], placed_by))
                else:
                    of_kind[-1].examples.append(example)
        return groups

    def _related(self) -> Mapping[str, Sequence[File]]:
        """The files that may stand in front of each document's windows, by Document.name."""
        if not self.recipe.context_rate:
            return {}
        edges: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
        for edge in read_table(self.folder.graph(self.number)).to_pylist():
            edges[edge["repository"]][edge["source"], edge["target"]] = edge["importance"]
        stored = read_documents(self.folder.shard("order", self.number))
        return related_files([each for each in stored if each.document.kind == "code"], edges)


def _labels(group: pack.ExampleGroup) -> Iterator[str]:
    """What is counted of each example: "layout psm", "boundary node", "begins line break", ..."""
    for example in group.examples:
        yield f"layout {example.layout}"
        yield f"boundary {example.split.kind}"
        if example.document.kind != "code":
            continue
        yield f"language {example.document.language}"
        yield f"context {len(example.context)}"
        if example.layout != "prefix":
            hole = example.split
            text = example.document.text[example.offset : example.offset + example.size]
            yield f"begins {begins_with(text[: hole.start], text[hole.start : hole.end])}"
            yield f"ends {ends_with(text[hole.start : hole.end], text[hole.end :])}"
