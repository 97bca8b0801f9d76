"""Builds rows from sources, stage by stage: processes on this machine and Ray give the same bytes.

An interrupted build continues where it was: a task that is done is not run again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.config import DataEngine
from codegemma.data import clean, dedup, stages
from codegemma.data.copies import CopyFinder
from codegemma.data.documents import RULES
from codegemma.data.draw import Draw
from codegemma.data.engines import ENGINES, Engine
from codegemma.data.folder import BuildFolder, read_table, write_array, write_json
from codegemma.data.imports import TOP_LINES
from codegemma.data.recipe import BuildRecipe, even_strides
from codegemma.data.sources import Source, expand
from codegemma.data.stages import Task, TaskResult, total
from codegemma.files import atomic_write, expect_only, sole_writer
from codegemma.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # stage, tasks done, all tasks
# Decides how many LinkTasks a build has: each takes a range of band keys over all documents.
DOCUMENTS_PER_LINK_TASK = 500_000


@dataclass
class Summary:
    """What a finished build holds."""

    out: Path
    rows: int
    tokens: int
    documents: int  # with the inputs that were dropped when they were read
    kept: int
    seconds: float
    manifests: dict[str, Any] = field(default_factory=dict)


def summary(out: str | Path) -> Summary:
    """Reads the summary of a finished folder."""
    folder = BuildFolder(out)
    manifests = {file.stem: json.loads(file.read_text()) for file in sorted(folder.manifests.glob("*.json"))}
    documents, rows = manifests["documents"], manifests["rows"]
    timing = json.loads(folder.timing.read_text()) if folder.timing.exists() else {}
    return Summary(
        folder.path,
        rows["rows_in_index"],
        rows["tokens"],
        documents["documents"] + sum(documents["counts"].values()),
        manifests["order"]["counts"].get("kept", 0),
        timing.get("total", {}).get("seconds", 0.0),
        manifests,
    )


def build(
    sources: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    recipe: BuildRecipe | None = None,
    *,
    benchmarks: Sequence[str | Path] = (),
    unsafe_rules: str | Path | None = None,
    engine: DataEngine = "local",
    workers: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Builds rows from `[KIND=]PATH` sources into the folder `out`.

    Raises ValueError for a source that does not exist, sources without a document, a folder that is not
    empty or that another process is building, a recipe that contradicts itself, or a resume with other
    sources or another recipe. What cannot be read in a source is reported in the ledger instead.
    """
    start = time.perf_counter()
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    expanded = {source for text in sources for source in expand(text)}
    inputs = _Inputs(
        sorted(expanded, key=lambda source: (source.name, source.kind, str(source.path))),
        tokenizer,
        Path(unsafe_rules or RULES / "unsafe.toml"),
        [Path(file) for file in benchmarks],
    )
    recipe = inputs.complete(recipe or BuildRecipe())
    folder = BuildFolder(Path(out).resolve())
    with sole_writer(folder.path):
        is_new = not folder.state.exists()
        if _prepare(folder, recipe, inputs, resume):
            try:
                with ENGINES[engine](workers) as run_tasks:
                    runner = _StageRunner(folder, recipe, run_tasks, workers, progress)
                    _run_stages(runner, inputs.sources)
            except (ImportError, ValueError):
                if is_new and not folder.manifest("clean").exists():  # another try needs an empty folder
                    _clear(folder)
                raise
            timing = runner.timing | {"total": {"seconds": time.perf_counter() - start}}
            with atomic_write(folder.timing) as file:
                file.write(json.dumps(timing, indent=1).encode())
            shutil.rmtree(folder.work)
    return summary(folder.path)


def _clear(folder: BuildFolder) -> None:
    """Removes all that a build has written before its first stage was complete."""
    for path in (folder.work, folder.manifests):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.recipe, folder.tokenizer):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- begin or resume
@dataclass(frozen=True)
class _Inputs:
    """All that a build reads besides its recipe."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    unsafe_rules: Path
    benchmarks: Sequence[Path]

    def complete(self, recipe: BuildRecipe) -> BuildRecipe:
        """The recipe with the hashes of the inputs. Raises ValueError for inputs that cannot be used."""
        if self.tokenizer.control.fim is None:
            raise ValueError(
                "the tokenizer has no FIM tokens, so no FIM rows can be made: use CodeGemma's or Gemma's"
            )
        if not self.sources:
            raise ValueError("no sources: give at least one checkout, archive, Parquet or JSON-lines file")
        clean.Unsafe(self.unsafe_rules)  # raises for a malformed file, and so does the next line
        dedup.Benchmarks(self.benchmarks)
        kinds, named = {source.kind for source in self.sources}, {kind for kind, _ in recipe.mix}
        if recipe.mix and kinds != named:
            raise ValueError(
                f"mix names {', '.join(sorted(named))} but the sources are {', '.join(sorted(kinds))}: "
                "write a source that is not code as KIND=PATH, such as text=articles.jsonl"
            )
        return replace(
            recipe,
            tokenizer=self.tokenizer.fingerprint,
            unsafe_rules=_file_hash(self.unsafe_rules),
            benchmarks=tuple(sorted(map(_file_hash, self.benchmarks))),
        )

    def copy(self, folder: BuildFolder) -> None:
        """Copies what the tasks need into the build folder.

        The rules and benchmarks go into its work folder, which is removed at the end; the tokenizer stays.
        """
        folder.benchmarks.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder.tokenizer) as file:
            file.write(self.tokenizer.model)
        shutil.copyfile(self.unsafe_rules, folder.unsafe_rules)
        for path in self.benchmarks:  # two sets may both have a test.jsonl
            shutil.copyfile(path, folder.benchmarks / f"{_file_hash(path)[:8]}-{path.name}")


def _prepare(folder: BuildFolder, recipe: BuildRecipe, inputs: _Inputs, resume: bool) -> bool:
    """Prepares the folder, or checks that its build can be resumed; False if the build is complete."""
    sources = [[each.name, each.kind, str(each.path), _stamp(each.path)] for each in inputs.sources]
    state = {"recipe": asdict(recipe), "code": code_version(), "sources": sources}
    state = json.loads(json.dumps(state))  # lists for tuples, as in the files it is compared with
    out = folder.path
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: pass --resume to continue it, or another --out")
    if out.exists() and not (folder.index.exists() or folder.state.exists()):
        begun = {path.name for path in (folder.work, folder.tokenizer, folder.recipe)}
        expect_only(out, begun, "a build")  # what a build leaves that is killed at its start
    if folder.index.exists():
        defaults = json.loads(
            json.dumps(asdict(BuildRecipe()))
        )  # of fields that the folder is too old to have
        before = defaults | json.loads(folder.recipe.read_text())
        if before != state["recipe"]:
            raise ValueError(
                f"{out} was built with another recipe: {_difference(before, state['recipe'])}; "
                "build into another folder"
            )
        if folder.timing.exists():
            shutil.rmtree(folder.work, ignore_errors=True)
            return False
    for part in out.rglob(".*.part"):
        part.unlink()  # left by a process that was killed while it wrote
    if folder.state.exists():
        before = json.loads(folder.state.read_text())
        if before != state:
            raise ValueError(
                f"--resume: {_difference(before, state)} changed since {out} was begun: "
                "build into another folder, or undo that change"
            )
        return True
    inputs.copy(folder)
    write_json(folder.recipe, state["recipe"], indent=1)
    write_json(folder.state, state)
    return True


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = sorted(before.keys() | after.keys())
    return ", ".join(name for name in names if before.get(name) != after.get(name))


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stamp(path: Path) -> str:
    """A hash of the names, sizes and times of a source's files, to notice changes without reading them."""
    inside = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    digest = hashlib.sha256()
    for file in inside if path.is_dir() else [path]:
        status = file.lstat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@cache
def code_version() -> dict[str, str]:
    """What a build's result depends on besides its inputs: a hash of the code and rules in codegemma.data, of
    prompts.py and tokenizer.py; and the versions of libraries.
    """
    folder = Path(__file__).parent
    beside = [folder.parent / "prompts.py", folder.parent / "tokenizer.py"]
    files = sorted([*folder.glob("*.py"), *folder.glob("rules/*"), *beside])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    libraries = (
        "rensa",
        "tree-sitter",
        "identify",
        "charset-normalizer",
        "pyarrow",
        "sentencepiece",
        "numpy",
    )
    return {"codegemma": code, **{name: importlib.metadata.version(name) for name in libraries}}


# ------------------------------------------------------------------------------------------------ the stages
@dataclass
class _StageRunner:
    """Runs the stages of a build, and writes their manifests."""

    folder: BuildFolder
    recipe: BuildRecipe
    run_tasks: Engine
    workers: int
    progress: Progress | None
    timing: dict[str, Any] = field(default_factory=dict)

    def run(self, task_type: type[Task], arguments: Iterable[tuple[Any, ...]]) -> list[TaskResult]:
        """Runs one task for each tuple of arguments, except those that are done; returns all results."""
        start = time.perf_counter()
        tasks = [task_type(self.folder, self.recipe, n, *values) for n, values in enumerate(arguments)]
        waiting = [task for task in tasks if not task.is_done]
        for done, _ in enumerate(self.run_tasks(waiting) if waiting else (), len(tasks) - len(waiting) + 1):
            if self.progress:
                self.progress(task_type.stage, done, len(tasks))
        results = [task.result() for task in tasks]
        self.timing[task_type.stage] = {
            "seconds": time.perf_counter() - start,
            "tasks": len(tasks),
            "workers": self.workers,
            "cpu_seconds": sum(result.seconds for result in results),
            "peak_bytes": max((result.peak_bytes for result in results), default=0),
        }
        return results

    def manifest(self, stage: str, **content: Any) -> None:
        """Writes a stage's manifest: the version of the code, the recipe, and `content` such as counts."""
        document = {"stage": stage, "code": code_version(), "recipe": asdict(self.recipe), **content}
        write_json(self.folder.manifest(stage), document, indent=1)


def _run_stages(runner: _StageRunner, sources: Sequence[Source]) -> None:
    """documents -> clean -> minhash, link -> order -> rows -> index."""
    shards, characters = _read_and_clean(runner, sources)
    _find_copies(runner, shards)
    parts = max(1, -(-characters // runner.recipe.shard_bytes))
    cuts = [(1 << 63) * part // parts for part in range(parts + 1)]  # Document.key has 63 bits
    key_ranges = map(range, cuts, cuts[1:])
    ordered = total(runner.run(stages.OrderTask, ((keys, shards) for keys in key_ranges)))
    runner.manifest(
        "order", counts=ordered.counts, files=ordered.files, edges=ordered.edges, top_lines=TOP_LINES
    )
    languages = ordered.characters_of if runner.recipe.even_languages else {}
    strides = even_strides(languages, runner.recipe.stride)
    rows = runner.run(stages.RowsTask, [(strides,)] * parts)
    write_ledger(runner.folder)
    index, mix = mix_rows(rows, runner.recipe)
    packed = total(rows)
    filled = [tokens for result in rows for tokens in result.filled]
    runner.manifest(
        "rows",
        counts=packed.counts,
        strides=strides,
        rows=len(filled),
        rows_in_index=len(index),
        tokens=sum(filled),
        mix=mix,
        examples=packed.examples,
        segments=packed.segments,
        learned=packed.learned,
        padding=1 - sum(filled) / max(1, len(filled) * runner.recipe.length),
    )
    write_array(runner.folder.index, index)


def _read_and_clean(runner: _StageRunner, sources: Sequence[Source]) -> tuple[int, int]:
    """Returns the number of cleaned shards, and the characters in them."""
    results = runner.run(stages.ReadTask, ((source,) for source in sources))
    documents = total(results)
    inputs = sorted([result.source, result.sha256] for result in results)
    if not documents.documents:
        shown = ", ".join(str(source.path) for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(documents.counts.items()))
        fault = f"{shown}: no document was found" + (f" ({reasons})" if reasons else "")
        raise ValueError(f"{fault}: name folders, archives or tables that hold source code")
    runner.manifest("documents", inputs=inputs, counts=documents.counts, documents=documents.documents)
    shards = [
        (task, shard, source.redistributed)
        for task, (source, result) in enumerate(zip(sources, results, strict=True))
        for shard in range(result.shards)
    ]
    cleaned = total(runner.run(stages.CleanTask, shards))
    runner.manifest("clean", documents=cleaned.documents, counts=cleaned.counts, redacted=cleaned.redacted)
    return len(shards), cleaned.characters


def _find_copies(runner: _StageRunner, shards: int) -> None:
    documents = total(runner.run(stages.MinHashTask, [()] * shards)).documents
    copies = CopyFinder(runner.folder, shards, runner.recipe.threshold)
    repositories = copies.find_exact()
    ranges = max(1, -(-documents // DOCUMENTS_PER_LINK_TASK)) if shards else 0
    cuts = [(1 << 64) * number // ranges for number in range(ranges)]
    runner.run(stages.LinkTask, ((*cut, shards) for cut in zip(cuts, [*cuts[1:], None], strict=False)))
    runner.manifest(
        "dedup",
        counts=copies.find_near(ranges),
        threshold=runner.recipe.threshold,
        permutations=dedup.PERMUTATIONS,
        repositories=repositories,
    )


def mix_rows(results: Sequence[TaskResult], recipe: BuildRecipe) -> tuple[np.ndarray, dict[str, Any]]:
    """The index of rows, int64 [rows, 2] (part, row), and each kind's tokens.

    With a mix, each kind has its share of the tokens: rows above it, chosen by hash, are left out of the
    index, but stay in their files.
    """
    rows_of: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for part, result in enumerate(results):
        for row, (kind, filled) in enumerate(zip(result.kinds, result.filled, strict=True)):
            rows_of[kind].append((part, row, filled))
    tokens = {kind: sum(filled for *_, filled in rows) for kind, rows in rows_of.items()}
    shares = dict(recipe.mix)
    total_tokens = min((tokens.get(kind, 0) / share for kind, share in shares.items()), default=0)
    index, report = [], {}
    for kind, rows in sorted(rows_of.items()):
        goal = shares[kind] * total_tokens if shares else tokens[kind]
        used = 0
        for part, row, filled in sorted(
            rows, key=lambda row: Draw("mix", recipe.seed, kind, *row[:2]).uniform()
        ):
            if used + filled / 2 <= goal or not shares:
                index.append((part, row))
                used += filled
        report[kind] = {"tokens": tokens[kind], "tokens_in_index": used}
    return np.array(sorted(index), np.int64).reshape(-1, 2), report


def write_ledger(folder: BuildFolder) -> None:
    """Joins the outcomes of all tasks in one table.

    Those of `documents` and `clean` are sorted, since their tasks depend on the order of the sources. Those
    of `order` follow, one partition after another.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    early = pa.concat_tables(map(read_table, folder.all_outcomes("clean") + folder.all_outcomes("documents")))
    by_all_columns = early.sort_by([(name, "ascending") for name in early.schema.names])
    with (
        atomic_write(folder.ledger) as file,
        pq.ParquetWriter(file, early.schema, compression="zstd") as writer,
    ):
        for table in (by_all_columns, *map(read_table, folder.all_outcomes("order"))):
            if len(table):
                writer.write_table(table)
