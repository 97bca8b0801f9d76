"""The files of a build: their names, and how they are written and read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from codegemma.data.documents import Document, Outcome
from codegemma.files import atomic_write
from codegemma.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

ShardFile = Literal[
    "clean", "origins", "order", "signatures", "bands", "band_rows", "alive", "edges", "edge_similarity"
]


class BuildFolder:
    """The path of each file of a build: its products in `path`, intermediate files in `path`/work."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.index = self.path / "index.npy"  # int64 [rows, 2]: part, row in the part
        self.ledger = self.path / "ledger.parquet"  # an Outcome for every input
        self.recipe = self.path / "recipe.json"
        self.timing = self.path / "timing.json"  # the only file that depends on the machine
        self.tokenizer = self.path / "tokenizer.model"
        self.manifests = self.path / "manifests"
        self.work = self.path / "work"  # removed when the build is complete
        self.state = self.work / "build.json"
        self.unsafe_rules = self.work / "unsafe.toml"
        self.benchmarks = self.work / "benchmarks"

    def manifest(self, stage: str) -> Path:
        return self.manifests / f"{stage}.json"

    def rows(self, part: int, file: str) -> Path:
        """`file` is "tokens.npy", "loss.npy", "segments.npy" or "examples.parquet"."""
        return self.path / "rows" / f"part-{part:05d}.{file}"

    def graph(self, part: int) -> Path:
        return self.path / "graph" / f"part-{part:05d}.parquet"

    def held_out(self, part: int) -> Path:
        return self.path / "held-out" / f"part-{part:05d}.parquet"

    def result(self, stage: str, task: int) -> Path:
        return self.work / "done" / f"{stage}-{task:06d}.json"

    def outcomes(self, stage: str, task: int) -> Path:
        return self.work / "ledger" / f"{stage}-{task:06d}.parquet"

    def all_outcomes(self, stage: str) -> list[Path]:
        return sorted((self.work / "ledger").glob(f"{stage}-*.parquet"))

    def documents(self, source: int, shard: int) -> Path:
        return self.work / "documents" / f"{source:06d}-{shard:04d}.parquet"

    def shard(self, file: ShardFile, number: int) -> Path:
        """A file of a shard or, for edges and order, of a task."""
        ending = "parquet" if file in ("clean", "origins", "order") else "npy"
        return self.work / file / f"{number:06d}.{ending}"

    def array(self, file: ShardFile, number: int) -> np.ndarray:
        """An array of a shard, memory-mapped."""
        array: np.ndarray = np.load(self.shard(file, number), mmap_mode="r")
        return array

    def verdicts(self, shard: int) -> Path:
        return self.work / "verdicts" / f"{shard:06d}.json"


@cache
def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, read once per process."""
    return Tokenizer(model.read_bytes())


# --------------------------------------------------------------------------------------- writing and reading
def write_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """JSON with sorted keys."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=indent, sort_keys=True).encode())
        file.write(b"\n" if indent else b"")


def write_table(path: Path, rows: Sequence[dict[str, Any]], fields: dict[str, str], **options: Any) -> None:
    """Rows as a Parquet table. `fields` gives each column's Arrow type; "strings" is a list of strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {"strings": pa.list_(pa.string())}
    schema = pa.schema([(name, lists.get(kind) or pa.type_for_alias(kind)) for name, kind in fields.items()])
    with atomic_write(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd", **options)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet table, or some of its columns, without pandas, which pyarrow's own read_table imports."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(columns, use_threads=False)


@dataclass(frozen=True)
class StoredDocument:
    """A document in a file, its row there and, once ordered, its group and the rule that made the group."""

    document: Document
    row: int = 0
    group: int | None = None
    placed_by: str | None = None  # in files, the column "via"


DOCUMENT_FIELDS = {
    **{"key": "int64", "repository": "string", "path": "string", "text": "large_string"},
    **dict.fromkeys(("language", "licence", "source", "commit", "encoding", "kind"), "string"),
    **{"imports": "strings", "group": "int32", "via": "string"},
}


def write_documents(path: Path, documents: Iterable[StoredDocument]) -> None:
    rows = [
        {**vars(stored.document), "key": stored.document.key, "group": stored.group, "via": stored.placed_by}
        for stored in documents
    ]
    write_table(path, rows, DOCUMENT_FIELDS, row_group_size=256, compression_level=1)


def read_documents(path: Path, keys: range | None = None) -> Iterator[StoredDocument]:
    """The documents of a file in their order; with `keys`, only those whose key lies in that range."""
    import pyarrow.parquet as pq

    first = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            bounds = group.column(0).statistics
            if keys is None or (bounds is not None and bounds.max >= keys.start and bounds.min < keys.stop):
                values = file.read_row_group(number, use_threads=False).to_pylist()
                for row, fields in enumerate(values, first):
                    key, file_group, placed_by = (fields.pop(name) for name in ("key", "group", "via"))
                    if keys is None or key in keys:
                        imports = None if fields["imports"] is None else tuple(fields["imports"])
                        yield StoredDocument(
                            Document(**fields | {"imports": imports}), row, file_group, placed_by
                        )
            first += group.num_rows


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    fields = {name: "int64" if name == "size" else "string" for name in Outcome.__dataclass_fields__}
    by_path = sorted(outcomes, key=lambda o: (o.repository, o.path, o.reason, o.detail, o.size))
    write_table(path, [vars(outcome) for outcome in by_path], fields, compression_level=1)
