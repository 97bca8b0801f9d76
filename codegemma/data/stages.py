"""The stages of a build as tasks: functions of files and the recipe that any engine may run in any order.

A task writes files that appear complete or not at all; its result is kept beside them as JSON, so that no
task is run twice. Documents are sorted by the hash of their repository when they are read: later stages
read one contiguous range of every shard, and only bands of signatures are compared across all shards.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from codegemma.data import clean, dedup, fim, folder, graph, pack, tests_beside
from codegemma.data.documents import Document, Outcome
from codegemma.data.draw import Draw
from codegemma.data.folder import BuildFolder, StoredDocument, read_documents
from codegemma.data.recipe import BuildRecipe
from codegemma.data.sources import Source, read
from codegemma.tokenizer import Tokenizer


@dataclass(kw_only=True)
class TaskResult:
    """What a task reports: counts, its wall time, and the peak memory of its process."""

    counts: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


Result = TypeVar("Result", bound=TaskResult)


@dataclass(frozen=True)
class Task(ABC, Generic[Result]):
    """One unit of work of a stage: a number, what it reads, and the folder and recipe that it belongs to."""

    stage: ClassVar[str]
    result_type: ClassVar[type[TaskResult]]
    folder: BuildFolder
    recipe: BuildRecipe
    number: int

    @abstractmethod
    def run(self) -> Result:
        """Writes the task's files and returns its result."""

    @property
    def is_done(self) -> bool:
        return self.folder.result(self.stage, self.number).exists()

    def result(self) -> Result:
        """The result of a task that is done."""
        values = json.loads(self.folder.result(self.stage, self.number).read_text())
        return self.result_type(**values)  # type: ignore[return-value]


def run_task(task: Task[Result]) -> Result:
    """Runs a task unless its result is there already, and returns the result."""
    if task.is_done:
        return task.result()
    start = time.perf_counter()
    result = task.run()
    result.seconds = time.perf_counter() - start
    result.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    folder.write_json(task.folder.result(task.stage, task.number), asdict(result))
    return result


def count_outcomes(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many inputs had each outcome and reason."""
    return count(f"{each.outcome}: {each.reason}" if each.reason else each.outcome for each in outcomes)


def count(names: Iterable[str]) -> dict[str, int]:
    """How often each name comes, sorted by name."""
    return dict(sorted(Counter(names).items()))


@cache
def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model.read_bytes())


@cache
def _benchmarks(path: Path) -> dedup.Benchmarks:
    return dedup.Benchmarks(sorted(path.glob("*")))


# ---------------------------------------------------------------------------------------------------- stages
@dataclass(kw_only=True)
class ReadResult(TaskResult):
    source: str
    shards: int
    sha256: str  # of the documents, in any order


@dataclass(frozen=True)
class ReadTask(Task[ReadResult]):
    """One source -> shards of documents, each sorted by the hash of their repository."""

    stage = "documents"
    result_type = ReadResult
    source: Source

    def run(self) -> ReadResult:
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
        folder.write_outcomes(self.folder.outcomes(self.stage, self.number), outcomes)
        return ReadResult(
            source=self.source.name,
            shards=shards,
            counts=count_outcomes(outcomes),
            documents=len(hashes),
            sha256=hashlib.sha256(b"".join(sorted(hashes))).hexdigest(),
        )

    def _write_shard(self, documents: list[Document], shard: int) -> None:
        by_key = sorted(documents, key=lambda document: (document.key, document.repository, document.path))
        folder.write_documents(self.folder.documents(self.number, shard), map(StoredDocument, by_key))


@dataclass(kw_only=True)
class CleanResult(TaskResult):
    redacted: dict[str, int]
    characters: int


@dataclass(frozen=True)
class CleanTask(Task[CleanResult]):
    """A shard of documents -> the cleaned shard."""

    stage = "clean"
    result_type = CleanResult
    source: int  # the task that read it
    shard: int
    redistributed: bool

    def run(self) -> CleanResult:
        documents = read_documents(self.folder.documents(self.source, self.shard))
        cleaner = clean.Cleaner(
            self.recipe.quality(self.redistributed),
            clean.Unsafe(self.folder.unsafe_rules),
            _tokenizer(self.folder.tokenizer),
        )
        results = [cleaner.clean(stored.document) for stored in documents]
        kept = [result for result in results if isinstance(result, Document)]
        outcomes = [result for result in results if isinstance(result, Outcome)]
        folder.write_documents(self.folder.shard("clean", self.number), map(StoredDocument, kept))
        folder.write_outcomes(self.folder.outcomes(self.stage, self.number), outcomes)
        return CleanResult(
            documents=len(kept),
            counts=count_outcomes(outcomes),
            redacted=dict(cleaner.redacted),
            characters=sum(len(document.text) for document in kept),
        )


@dataclass(frozen=True)
class SignTask(Task[TaskResult]):
    """A cleaned shard -> MinHash signatures, bands sorted by key, and names with the benchmark they hold."""

    stage = "sign"
    result_type = TaskResult

    def run(self) -> TaskResult:
        benchmarks = _benchmarks(self.folder.benchmarks)
        names: list[dict[str, Any]] = []
        shingles = []
        for stored in read_documents(self.folder.shard("clean", self.number)):
            document = stored.document
            hashes = dedup.words(document.text)
            fields = {name: getattr(document, name) for name in ("repository", "path", "kind", "digest")}
            names.append(fields | {"task": benchmarks(hashes)})
            shingles.append(np.unique(dedup.ngrams(hashes, dedup.SHINGLE)))
        signatures = dedup.signatures(shingles)
        keys = dedup.band_keys(signatures).ravel()
        rows = np.repeat(np.arange(len(names), dtype=np.int64), dedup.BANDS)
        order = np.lexsort((rows, keys))
        folder.write_array(self.folder.shard("signatures", self.number), signatures)
        folder.write_array(self.folder.shard("bands", self.number), keys[order])
        folder.write_array(self.folder.shard("band_rows", self.number), rows[order])
        types = dict.fromkeys(("repository", "path", "kind", "task"), "string") | {"digest": "binary"}
        folder.write_table(self.folder.shard("names", self.number), names, types)
        return TaskResult(documents=len(names))


@dataclass(frozen=True)
class LinkTask(Task[TaskResult]):
    """One range of band keys over all shards -> pairs of documents whose signatures agree.

    A node is shard << 32 | row. `high` is None for the last range.
    """

    stage = "link"
    result_type = TaskResult
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


@dataclass(kw_only=True)
class OrderResult(TaskResult):
    files: dict[str, int]  # by the rule that placed them
    edges: int


@dataclass(frozen=True)
class OrderTask(Task[OrderResult]):
    """One range of repositories -> their documents in packed order, without duplicates; some are held out."""

    stage = "order"
    result_type = OrderResult
    keys: range
    shards: int

    def run(self) -> OrderResult:
        outcomes: list[Outcome] = []
        ordered: list[StoredDocument] = []
        held_out: list[StoredDocument] = []
        edges: list[dict[str, Any]] = []
        repositories = self._repositories(outcomes)
        for key, repository in sorted(repositories):
            documents = _unique_paths(repositories.pop((key, repository)), outcomes)
            if Draw(self.recipe.seed, "held out", key).uniform() < self.recipe.hold_out:
                held_out += map(StoredDocument, documents)
                outcomes += [document.outcome("kept", "held out") for document in documents]
                continue
            groups, kept = group_files(documents)
            for group, (via, members) in enumerate(groups):
                ordered += [StoredDocument(document, 0, group, via) for document in members]
            outcomes += [document.outcome("kept") for document in documents]
            for edge in kept:
                ends = {"source": documents[edge.source].path, "target": documents[edge.target].path}
                edges.append({"repository": repository, **ends, "importance": edge.importance})
        folder.write_documents(self.folder.shard("order", self.number), ordered)
        if self.recipe.hold_out:
            folder.write_documents(self.folder.held_out(self.number), held_out)
        folder.write_outcomes(self.folder.outcomes(self.stage, self.number), outcomes)
        types = dict.fromkeys(("repository", "source", "target"), "string") | {"importance": "float64"}
        folder.write_table(self.folder.graph(self.number), edges, types)
        return OrderResult(
            counts=count_outcomes(outcomes),
            files=count(stored.via or "" for stored in ordered),
            edges=len(edges),
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
                    decision = "dropped" if verdict[0] == "benchmark" else "duplicate"
                    outcomes.append(document.outcome(decision, *verdict))  # type: ignore[arg-type]
                else:
                    documents[document.key, document.repository].append(document)
        return documents


@cache
def _verdicts(path: Path) -> dict[int, tuple[str, str]]:
    return {int(row): (reason, of) for row, reason, of in json.loads(path.read_text())}


def _unique_paths(documents: Iterable[Document], outcomes: list[Outcome]) -> list[Document]:
    """Documents sorted by path; of several at one path the first by its hash is kept."""
    unique: list[Document] = []
    for document in sorted(documents, key=lambda document: (document.path, document.digest)):
        if unique and unique[-1].path == document.path:
            detail = "another version stands at this path of the repository"
            outcomes.append(document.outcome("dropped", "same path", detail))
        else:
            unique.append(document)
    return unique


def group_files(
    documents: Sequence[Document],
) -> tuple[list[tuple[str, list[Document]]], list[graph.Edge]]:
    """(rule, files) of each group of a repository whose documents are sorted by path; and the graph's edges.

    Each connected part of the graph is a group, then the files left over, tests beside what they test. A
    test outside the graph whose implementation is in it joins that part.
    """
    if not documents or documents[0].kind != "code":
        return [("alone", [document]) for document in documents], []
    parts, kept = graph.order(documents[0].repository, documents)
    tests = tests_beside.implementations({document.path: document.language for document in documents})
    by_path = {document.path: document for document in documents}
    covered = {documents[node].path for part in parts for node in part}
    groups = []
    for part in parts:
        paths = [documents[node].path for node in part]
        inside = set(paths)
        guests = sorted(test for test, target in tests.items() if target in inside and test not in covered)
        order = tests_beside.beside(paths + guests, {guest: tests[guest] for guest in guests})
        groups.append(("graph", [by_path[path] for path in order]))
        covered.update(guests)
    rest = tests_beside.beside([path for path in by_path if path not in covered], tests)
    return groups + ([("beside tests", [by_path[path] for path in rest])] if rest else []), kept


@dataclass(kw_only=True)
class RowsResult(TaskResult):
    learned: int
    examples: int
    segments: int
    kinds: list[str]  # of each row
    filled: list[int]  # tokens of each row that are no padding


@dataclass(frozen=True)
class RowsTask(Task[RowsResult]):
    """One partition in packed order -> rows; kinds of the mix never share a row."""

    stage = "rows"
    result_type = RowsResult

    def run(self) -> RowsResult:
        recipe, control = self.recipe, _tokenizer(self.folder.tokenizer).control
        groups = self._groups()
        kinds = sorted(groups, key=lambda kind: (kind != "code", kind))
        packed = [pack.pack(groups.pop(kind), recipe.length, control.bos, control.pad or 0) for kind in kinds]
        rows = pack.join(packed, recipe.length)
        pack.save(rows, self.folder.rows(self.number))
        kind_of = {example["row"]: example["kind"] for example in rows.examples}
        labels = [f"{name} {example[name]}" for example in rows.examples for name in ("layout", "boundary")]
        filled = (rows.segments_RT > 0).sum(1)
        return RowsResult(
            learned=int(rows.loss_RT.sum()),
            examples=len(rows.examples),
            segments=int(rows.segments_RT.max(1, initial=0).sum()),
            counts=count(labels),
            kinds=[kind_of[row] for row in range(len(rows.tokens_RT))],
            filled=filled.tolist(),
        )

    def _groups(self) -> dict[str, list[pack.RowGroup]]:
        """The examples by kind, in the groups that a segment may hold."""
        groups: dict[str, list[pack.RowGroup]] = defaultdict(list)
        current: tuple[Any, ...] = ()
        for stored in read_documents(self.folder.shard("order", self.number)):
            document, via = stored.document, stored.via or ""
            of_kind = groups[document.kind]
            place = (document.repository, stored.group, via)
            if place != current or via == "alone":
                of_kind.append(pack.RowGroup([], via))
                current = place
            for example in fim.fim([document], _tokenizer(self.folder.tokenizer), self.recipe):
                example = replace(example, order=stored.row)
                if self.recipe.window and document.kind == "code":  # no window is the context of another
                    of_kind.append(pack.RowGroup([example], via))
                else:
                    of_kind[-1].examples.append(example)
        return groups
