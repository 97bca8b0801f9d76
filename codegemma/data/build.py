"""Sources -> rows: the visible list of stages, run by a pool of processes here or by Ray, with the same bytes either
way.

An interrupted build goes on where it was: what a task has finished is not done again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codegemma.data import clean, dedup, fim, graph
from codegemma.data.documents import Source, expand
from codegemma.data.stages import Recipe, Task, run_task
from codegemma.files import replacing
from codegemma.tokenizer import Tokenizer

Engine = Literal["local", "ray"]
Progress = Callable[[str, int, int], None]  # stage, tasks done, tasks in all
Run = Callable[[Sequence[Task]], Iterator[dict[str, Any]]]  # results of independent tasks, as they come
LINK_DOCUMENTS = 500_000  # per task that compares bands


@dataclass
class Summary:
    """What `build` made."""

    out: Path
    rows: int
    tokens: int
    documents: int
    kept: int
    seconds: float
    manifests: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- the engines
@contextmanager
def local(workers: int) -> Iterator[Run]:
    """A pool of processes; one worker needs none."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    if workers == 1:
        yield lambda tasks: map(run_task, tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:

        def run(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
            try:
                for future in as_completed([pool.submit(run_task, task) for task in tasks]):
                    yield future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"a worker of stage {tasks[0].stage} died (out of memory?): go on with --resume and "
                    "fewer --workers"
                ) from error

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def ray(workers: int) -> Iterator[Run]:
    """Ray Data, one block a task. The output folder must be on storage that every node shares."""
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address, log_to_driver=False, include_dashboard=False, num_cpus=None if address else workers)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        items = [{"task": json.dumps(asdict(task))} for task in tasks]
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        yield from (
            json.loads(row["result"]) for row in blocks.map(_run_item, concurrency=workers).iter_rows()
        )

    yield run


def _run_item(item: dict[str, Any]) -> dict[str, str]:
    return {"result": json.dumps(run_task(Task(**json.loads(item["task"]))))}


ENGINES: dict[str, Callable[[int], AbstractContextManager[Run]]] = {"local": local, "ray": ray}


# ---------------------------------------------------------------------------------------------------- the build
class Build:
    """A build in progress: its folders, its recipe, and how to run a stage."""

    def __init__(self, out: Path, recipe: Recipe, workers: int, progress: Progress | None):
        self.out, self.work, self.recipe = out, out / "work", recipe
        self.engine: Run = lambda tasks: map(run_task, tasks)
        self.workers, self.progress = workers, progress
        self.text = json.dumps(asdict(recipe), sort_keys=True)
        self.timing: dict[str, Any] = {}

    def run(self, stage: str, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results of a stage in the order of its inputs."""
        tasks = [Task(stage, number, each, str(self.work), self.text) for number, each in enumerate(inputs)]
        start = time.perf_counter()
        waiting = [task for task in tasks if not task.done.exists()]
        for done, _ in enumerate(self.engine(waiting) if waiting else (), len(tasks) - len(waiting)):
            if self.progress:
                self.progress(stage, done + 1, len(tasks))
        results = [json.loads(task.done.read_text()) for task in tasks]
        self.timing[stage] = {
            "seconds": time.perf_counter() - start,
            "tasks": len(tasks),
            "workers": self.workers,
            "cpu_seconds": sum(result["seconds"] for result in results),
            "peak_bytes": max((result["peak_bytes"] for result in results), default=0),
        }
        return results

    def manifest(self, stage: str, **content: Any) -> None:
        """One per stage: what it read, by which code and parameters, how many, and why."""
        document = {"stage": stage, "code": code_version(), "recipe": json.loads(self.text), **content}
        with replacing(self.out / "manifests" / f"{stage}.json") as file:
            file.write(json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


@cache
def code_version() -> dict[str, str]:
    """The hash of this package's data code and rules, and the versions of what decides bytes beside them."""
    folder = Path(__file__).parent
    files = sorted(
        [
            *folder.glob("*.py"),
            *folder.glob("rules/*"),
            folder.parent / "prompts.py",
            folder.parent / "tokenizer.py",
        ]
    )
    whole = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    libraries = ("rensa", "tree-sitter", "identify", "pyarrow", "sentencepiece", "numpy")
    return {"codegemma": whole, **{name: importlib.metadata.version(name) for name in libraries}}


def build(
    sources: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    recipe: Recipe | None = None,
    *,
    benchmarks: Sequence[str | Path] = (),
    unsafe_rules: str | Path | None = None,
    engine: Engine = "local",
    workers: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Builds rows from `[KIND=]PATH` sources into the folder `out`.

    Raises ValueError for a source that is not there, a folder that is in use, a recipe that contradicts itself, or a
    resume with other sources or another recipe. What cannot be read in a source is reported in the ledger instead.
    """
    start, out = time.perf_counter(), Path(out).resolve()
    if tokenizer.control.fim is None:
        raise ValueError(
            "the tokenizer has no FIM tokens, so no FIM rows can be made: use CodeGemma's or Gemma's"
        )
    found = sorted(
        {each for text in sources for each in expand(text)}, key=lambda s: (s.name, s.kind, str(s.path))
    )
    if not found:
        raise ValueError("no sources: give at least one checkout, archive, Parquet or JSON-lines file")
    rules = Path(unsafe_rules) if unsafe_rules else clean.RULES / "unsafe.toml"
    clean.Unsafe(rules), dedup.Benchmarks(benchmarks)
    recipe = replace(
        recipe or Recipe(),
        tokenizer=tokenizer.fingerprint,
        unsafe_rules=_file_hash(rules),
        benchmarks=tuple(sorted(_file_hash(Path(file)) for file in benchmarks)),
    )
    _check_kinds(recipe, found)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    run = Build(out, recipe, workers, progress)
    if not _begin(run, found, tokenizer, rules, benchmarks, resume):
        return summary(out)
    with ENGINES[engine](workers) as run.engine:
        _stages(run, found)
    run.timing["total"] = {"seconds": time.perf_counter() - start}
    with replacing(out / "timing.json") as file:
        file.write(json.dumps(run.timing, indent=1).encode())
    shutil.rmtree(run.work)
    return summary(out)


def _check_kinds(recipe: Recipe, sources: Sequence[Source]) -> None:
    kinds, named = {source.kind for source in sources}, {kind for kind, _ in recipe.mix}
    if recipe.mix and kinds != named:
        raise ValueError(
            f"mix names {', '.join(sorted(named))} but the sources are {', '.join(sorted(kinds))}: "
            "write a source that is not code as KIND=PATH, such as text=articles.jsonl"
        )


def _begin(
    run: Build,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    rules: Path,
    benchmarks: Sequence[str | Path],
    resume: bool,
) -> bool:
    """Lays out the folder; False where the build is complete already."""
    state = {
        "recipe": json.loads(run.text),
        "code": code_version(),
        "sources": [[source.name, source.kind, str(source.path), _stamp(source.path)] for source in sources],
    }
    file = run.work / "build.json"
    if (run.out / "index.npy").exists() and resume:
        if (recipe := json.loads((run.out / "recipe.json").read_text())) != state["recipe"]:
            raise ValueError(
                f"{run.out} was built with another recipe: {_difference(recipe, state['recipe'])}"
            )
        complete = (run.out / "timing.json").exists()
        if complete:
            shutil.rmtree(run.work, ignore_errors=True)
            return False
    for part in run.out.rglob(".*.part") if resume else ():
        part.unlink()  # of a process that was killed while it wrote
    if file.exists() and resume:
        before = json.loads(file.read_text())
        if before != (now := json.loads(json.dumps(state))):
            raise ValueError(
                f"--resume: {_difference(before, now)} changed since {run.out} was begun: "
                "build into another folder, or restore it"
            )
        return True
    if not resume and run.out.exists() and any(run.out.iterdir()):
        raise ValueError(f"{run.out} is not empty: pass --resume to go on with it, or another --out")
    (run.work / "benchmarks").mkdir(parents=True, exist_ok=True)
    with replacing(run.out / "tokenizer.model") as out:
        out.write(tokenizer.__reduce__()[1][0])
    shutil.copyfile(rules, run.work / "unsafe.toml")
    for name in map(Path, benchmarks):  # two sets may both have a test.jsonl
        shutil.copyfile(name, run.work / "benchmarks" / f"{_file_hash(name)[:8]}-{name.name}")
    with replacing(run.out / "recipe.json") as out:
        out.write((json.dumps(state["recipe"], indent=1, sort_keys=True) + "\n").encode())
    with replacing(file) as out:
        out.write(json.dumps(state).encode())
    return True


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    return ", ".join(
        name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    )


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stamp(path: Path) -> str:
    """What changes when a source does, without reading it: names, sizes and times."""
    files = (
        sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        if path.is_dir()
        else [path]
    )
    whole = hashlib.sha256()
    for file in files:
        status = file.lstat()
        whole.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


def _stages(run: Build, sources: Sequence[Source]) -> None:
    """documents -> clean -> sign, link -> order -> rows -> index: each line a stage."""
    read_ = run.run("documents", [{"path": str(s.path), "form": s.form, "kind": s.kind} for s in sources])
    shards = [shard for result in read_ for shard in result["shards"]]
    run.manifest(
        "documents",
        inputs=sorted([result["input"], result["sha256"]] for result in read_),
        counts=_sum(read_, "counts"),
        documents=sum(result["documents"] for result in read_),
    )
    cleaned = run.run("clean", shards)
    files = [Path(result["file"]) for result in cleaned]
    run.manifest(
        "clean",
        documents=sum(result["documents"] for result in cleaned),
        counts=_sum(cleaned, "counts"),
        redacted=_sum(cleaned, "redacted"),
    )
    signed = run.run("sign", [{"file": str(file)} for file in files])
    counts, groups = Dedup(run, len(files)).verdicts(sum(result["documents"] for result in signed))
    run.manifest(
        "dedup",
        counts=counts,
        threshold=run.recipe.threshold,
        permutations=dedup.PERMUTATIONS,
        repositories=groups,
    )
    parts = max(1, -(-sum(result["bytes"] for result in cleaned) // run.recipe.shard_bytes))
    edges = [(1 << 63) * part // parts for part in range(parts + 1)]
    placed = run.run(
        "order",
        [
            {"shards": [str(file) for file in files], "low": low, "high": high}
            for low, high in zip(edges, edges[1:], strict=False)
        ],
    )
    run.manifest(
        "order",
        counts=_sum(placed, "counts"),
        files=_sum(placed, "files"),
        edges=sum(p["edges"] for p in placed),
        top_lines=graph.TOP_LINES,
    )
    rows = run.run("rows", [{"file": result["file"]} for result in placed])
    ledger(run)
    index, mixed = mix(rows, run.recipe)
    total = sum(result["rows"] for result in rows)
    tokens = sum(result["tokens"] for result in rows)
    run.manifest(
        "rows",
        counts=_sum(rows, "counts"),
        rows=total,
        rows_in_index=len(index),
        tokens=tokens,
        mix=mixed,
        **{name: sum(result[name] for result in rows) for name in ("examples", "segments", "learned")},
        padding=1 - tokens / max(1, total * run.recipe.length),
    )
    with replacing(run.out / "index.npy") as file:
        np.save(file, index)


def _sum(results: Iterable[dict[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result[name])
    return dict(sorted(total.items()))


def mix(rows: Sequence[dict[str, Any]], recipe: Recipe) -> tuple[np.ndarray, dict[str, Any]]:
    """The index of rows [N, 2] (part, row), and each kind's tokens. With a mix, whichever kind is in excess is thinned
    by hash to its share of the tokens; the rows stay in their files."""
    places: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for part, result in enumerate(rows):
        for row, (kind, filled) in enumerate(zip(result["kinds"], result["filled"], strict=True)):
            places[kind].append((part, row, filled))
    there = {kind: sum(filled for *_, filled in found) for kind, found in places.items()}
    shares = dict(recipe.mix)
    whole = min((there.get(kind, 0) / share for kind, share in shares.items()), default=0)
    taken, report = [], {}
    for kind, found in sorted(places.items()):
        goal = shares[kind] * whole if shares else there[kind]
        used = 0
        for part, row, filled in sorted(
            found, key=lambda p: fim.Draw("mix", recipe.seed, kind, p[0], p[1]).uniform()
        ):
            if used + filled / 2 <= goal or not shares:
                taken.append((part, row))
                used += filled
        report[kind] = {"tokens": there[kind], "tokens_in_index": used}
    return np.array(sorted(taken), np.int64).reshape(-1, 2), report


class Dedup:
    """What the driver decides over all shards: benchmark hits, copied repositories, exact copies, near copies."""

    def __init__(self, run: Build, shards: int):
        self.run, self.shards = run, shards
        self.said: list[dict[int, tuple[str, str]]] = [{} for _ in range(shards)]  # row -> (how, of what)
        self.places: dict[int, tuple[str, str, bytes]] = {}  # node -> (repository, path, digest)
        self.same: dict[int, list[int]] = {}  # node -> its exact copies

    def names(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(
            self.run.work / "names" / f"{shard:06d}.parquet"
        ) as file:  # read_table imports pandas
            return file.read(list(columns), use_threads=False).to_pydict()

    def verdicts(self, documents: int) -> tuple[dict[str, int], int]:
        """Writes which rows of each shard are dropped; returns the counts, and the number of repositories compared."""
        for shard in range(self.shards):
            self.said[shard] = {
                at: ("benchmark", task) for at, task in enumerate(self.names(shard, ["task"])["task"]) if task
            }
        repositories = self.repositories()
        self.exact()
        for shard in range(self.shards):
            size = len(np.load(self.run.work / "signatures" / f"{shard:06d}.npy", mmap_mode="r"))
            alive = np.ones(size, bool)
            alive[list(self.said[shard])] = False
            with replacing(self.run.work / "alive" / f"{shard:06d}.npy") as file:
                np.save(file, alive)
        self.near(documents)
        for shard, said in enumerate(self.said):
            with replacing(self.run.work / "verdicts" / f"{shard:06d}.json") as file:
                file.write(json.dumps([[at, how, of] for at, (how, of) in sorted(said.items())]).encode())
        return dict(
            sorted(Counter(how for said in self.said for how, _ in said.values()).items())
        ), repositories

    def repositories(self) -> int:
        """A repository's signature is the least of its files': the MinHash of all their shingles together."""
        whole: dict[str, np.ndarray] = {}
        files: Counter[str] = Counter()
        for shard in range(self.shards):
            names = self.names(shard, ["repository", "kind"])
            matrix = np.load(self.run.work / "signatures" / f"{shard:06d}.npy", mmap_mode="r")
            members: dict[str, list[int]] = defaultdict(list)
            for at, (repository, kind) in enumerate(zip(names["repository"], names["kind"], strict=True)):
                if kind == "code" and at not in self.said[shard]:
                    members[repository].append(at)
            for repository, ats in members.items():
                least = matrix[ats].min(0)
                whole[repository] = np.minimum(whole[repository], least) if repository in whole else least
                files[repository] += len(ats)
        order = sorted(whole)
        pairs = (
            dedup.similar(np.stack([whole[name] for name in order]), self.run.recipe.threshold)
            if order
            else []
        )
        of = dedup.resolve(((order[a], order[b], s) for a, b, s in pairs), lambda name: (-files[name], name))
        for shard in range(self.shards if of else 0):
            names = self.names(shard, ["repository", "kind"])
            for at, (repository, kind) in enumerate(zip(names["repository"], names["kind"], strict=True)):
                if kind == "code" and repository in of:
                    self.said[shard].setdefault(at, ("copy of a repository", of[repository][0]))
        return len(order)

    def exact(self) -> None:
        """Equal digests; of each set the first by repository and path is kept."""
        digests, nodes = [], []
        for shard in range(self.shards):
            found = self.names(shard, ["digest"])["digest"]
            kept = [at for at in range(len(found)) if at not in self.said[shard]]
            digests.append(np.array([int.from_bytes(found[at][:8], "big") for at in kept], np.uint64))
            nodes.append((np.int64(shard) << np.int64(32)) + np.array(kept, np.int64))
        flat, where = (
            np.concatenate([*digests, np.empty(0, np.uint64)]),
            np.concatenate([*nodes, np.empty(0, np.int64)]),
        )
        order = np.argsort(flat, kind="stable")
        flat, where = flat[order], where[order]
        starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        sets = [part for part in np.split(where, starts) if len(part) > 1]
        self.name_nodes(node for part in sets for node in part.tolist())
        for part in sets:
            first, *rest = sorted(part.tolist(), key=self.places.__getitem__)
            for node in rest:
                self.said[node >> 32][node & 0xFFFFFFFF] = ("exact copy", ":".join(self.places[first][:2]))
                self.same.setdefault(first, []).append(node)

    def near(self, documents: int) -> None:
        """Edges from all ranges of band keys, resolved in the order of names."""
        tasks = max(1, -(-documents // LINK_DOCUMENTS))
        cuts = [(1 << 64) * at // tasks for at in range(tasks + 1)]
        self.run.run(
            "link",
            [
                {"low": low, "high": min(high, (1 << 64) - 1), "last": int(high >> 64), "shards": self.shards}
                for low, high in zip(cuts, cuts[1:], strict=False)
            ]
            if self.shards
            else [],
        )
        edges = []
        for number in range(tasks if self.shards else 0):
            pairs, similarity = (
                np.load(self.run.work / what / f"{number:06d}.npy") for what in ("edges", "edge_similarity")
            )
            edges += [(a, b, s) for (a, b), s in zip(pairs.tolist(), similarity.tolist(), strict=True)]
        self.name_nodes(node for a, b, _ in edges for node in (a, b))
        for node, (kept, _) in dedup.resolve(edges, self.places.__getitem__).items():
            name = ":".join(self.places[kept][:2])
            self.said[node >> 32][node & 0xFFFFFFFF] = ("near copy", name)
            for copy in self.same.get(node, ()):
                self.said[copy >> 32][copy & 0xFFFFFFFF] = ("exact copy", name)

    def name_nodes(self, nodes: Iterable[int]) -> None:
        """Looks up the places of the documents that some edge touches, shard by shard; digests tell versions apart."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for node in nodes:
            wanted[node >> 32].add(node & 0xFFFFFFFF)
        for shard, ats in sorted(wanted.items()):
            names = self.names(shard, ["repository", "path", "digest"])
            self.places.update(
                {
                    (shard << 32) + at: (names["repository"][at], names["path"][at], names["digest"][at])
                    for at in ats
                }
            )


def ledger(run: Build) -> None:
    """One file of all outcomes: what the first stages dropped, sorted, as shards follow the order of the input; then what
    became of the rest, partition by partition."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def tables(stage: str) -> Iterator[pa.Table]:
        for file in sorted((run.work / "ledger").glob(f"{stage}-*.parquet")):
            with pq.ParquetFile(file) as source:
                yield source.read(use_threads=False)

    early = pa.concat_tables([*tables("clean"), *tables("documents")])
    with (
        replacing(run.out / "ledger.parquet") as out,
        pq.ParquetWriter(out, early.schema, compression="zstd") as writer,
    ):
        for table in (early.sort_by([(name, "ascending") for name in early.schema.names]), *tables("order")):
            if len(table):
                writer.write_table(table)


def summary(out: str | Path) -> Summary:
    """What a finished folder holds."""
    out = Path(out)
    manifests = {
        file.stem: json.loads(file.read_text()) for file in sorted((out / "manifests").glob("*.json"))
    }
    read_, order = manifests["documents"], manifests["order"]
    timing = json.loads((out / "timing.json").read_text()) if (out / "timing.json").exists() else {}
    return Summary(
        out,
        manifests["rows"]["rows_in_index"],
        manifests["rows"]["tokens"],
        read_["documents"] + sum(read_["counts"].values()),
        order["counts"].get("kept", 0),
        timing.get("total", {}).get("seconds", 0.0),
        manifests,
    )
