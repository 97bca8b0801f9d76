"""Examples -> rows of one length, and rows on disk that training reads at random without parsing.

A segment is what attention sees: <bos> and the examples of one group of files of a repository. A row holds whole
segments, the fullest row that still has room taken first, and padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.data.fim import Example
from codegemma.files import replacing

EXAMPLE_FIELDS = (
    "row",
    "segment",
    "start",
    "end",
    "repository",
    "path",
    "commit",
    "licence",
    "language",
    "kind",
    "source",
    "via",
    "order",
    "layout",
    "boundary",
    "offset",
    "size",
    "split_start",
    "split_end",
)
NUMBERS = ("row", "segment", "start", "end", "order", "offset", "size", "split_start", "split_end")


@dataclass(frozen=True)
class Group:
    """Examples in their packed order, and by which rule they stand together ("graph", "beside tests", "alone")."""

    examples: list[Example]
    via: str


@dataclass(frozen=True)
class Packed:
    """Rows: tokens_RT int32, loss_RT bool, segments_RT uint16 (0 is padding, a row's first segment is 1), and what is
    where (EXAMPLE_FIELDS)."""

    tokens_RT: np.ndarray
    loss_RT: np.ndarray
    segments_RT: np.ndarray
    examples: list[dict[str, Any]]


def segments(groups: Iterable[Group], length: int) -> Iterator[Group]:
    """Groups that fit a row, whole where they fit, else cut between examples."""
    for group in groups:
        run: list[Example] = []
        size = 1
        for example in group.examples:
            more = len(example.ids_T)
            if run and size + more > length:
                yield Group(run, group.via)
                run, size = [], 1
            run.append(example)
            size += more
        if run:
            yield Group(run, group.via)


def fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best fit, largest first: the items of each row. Raises ValueError for an item that is longer than a row."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > length:
            raise ValueError(
                f"segment {item} has {sizes[item]:,} tokens but a row {length:,}: cut it before packing"
            )
        at = bisect.bisect_left(free, (sizes[item], -1))
        room, row = free.pop(at) if at < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (room - sizes[item], row))
    return rows


def places(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> Iterator[tuple[int, int, int, slice]]:
    """(row, segment, item, place in the row) of each item that `fit` gave a row: in their order, segments from 1."""
    for row, items in enumerate(rows):
        at = 0
        for segment, item in enumerate(sorted(items), 1):
            yield row, segment, item, slice(at, at + sizes[item])
            at += sizes[item]


def pack(groups: Iterable[Group], length: int, bos: int | None, pad: int) -> Packed:
    """Rows of `length` tokens."""
    parts = list(segments(groups, length))
    start = [] if bos is None else [bos]
    sizes = [len(start) + sum(len(example.ids_T) for example in part.examples) for part in parts]
    rows = fit(sizes, length)
    shape = (len(rows), length)
    tokens_RT, loss_RT, segments_RT = (
        np.full(shape, pad, np.int32),
        np.zeros(shape, bool),
        np.zeros(shape, np.uint16),
    )
    found = []
    for row, segment, item, here in places(rows, sizes):
        segments_RT[row, here] = segment
        at = here.start + len(start)
        tokens_RT[row, here.start : at] = start
        for example in parts[item].examples:
            end = at + len(example.ids_T)
            tokens_RT[row, at:end], loss_RT[row, at:end] = example.ids_T, example.loss_T
            found.append(_record(example, parts[item].via, row, segment, at))
            at = end
    return Packed(tokens_RT, loss_RT, segments_RT, found)


def _record(example: Example, via: str, row: int, segment: int, start: int) -> dict[str, Any]:
    doc, split = example.document, example.split
    values = (
        row,
        segment,
        start,
        start + len(example.ids_T),
        doc.repository,
        doc.path,
        doc.commit,
        doc.licence,
        doc.language,
        doc.kind,
        doc.source,
        via,
        example.order,
        example.layout,
        split.kind,
        example.offset,
        example.size,
        split.start,
        split.end,
    )
    return dict(zip(EXAMPLE_FIELDS, values, strict=True))


def join(parts: Sequence[Packed], length: int) -> Packed:
    """Rows after rows; a part's examples count on from the rows before it."""
    before = np.cumsum([0, *(len(part.tokens_RT) for part in parts)]).tolist()

    def joined(name: str, kind: Any) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts] or [np.empty((0, length), kind)])

    return Packed(
        joined("tokens_RT", np.int32),
        joined("loss_RT", bool),
        joined("segments_RT", np.uint16),
        [
            {**example, "row": example["row"] + start}
            for part, start in zip(parts, before, strict=False)
            for example in part.examples
        ],
    )


def save(packed: Packed, stem: Path) -> None:
    """`stem`.tokens.npy, .loss.npy, .segments.npy and .examples.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("tokens", "loss", "segments"):
        with replacing(stem.with_suffix(f".{name}.npy")) as file:
            np.save(file, getattr(packed, f"{name}_RT"))
    schema = pa.schema([(name, pa.int32() if name in NUMBERS else pa.string()) for name in EXAMPLE_FIELDS])
    with replacing(stem.with_suffix(".examples.parquet")) as file:
        pq.write_table(
            pa.Table.from_pylist(packed.examples, schema), file, row_group_size=4096, compression="zstd"
        )


class Rows:
    """The rows of a built directory, in the order of its index. Arrays are memory-mapped; reading a row parses nothing.

    `rows[i]` gives tokens_T int32, loss_T bool, segments_T uint16 (0: padding) and positions_T int32, which restart at
    0 in each segment. Training order is up to the reader: any permutation of range(len(rows)).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "index.npy").exists():
            raise ValueError(
                f"{folder} has no finished rows: run `codegemma data build ... --out {folder}`, with "
                "--resume if it was interrupted"
            )
        self.index_N2 = _load(self.folder / "index.npy")
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.index_N2)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        part, row = self.place(number)
        segments_T = self._row(part, "segments", row)
        return {
            "tokens": self._row(part, "tokens", row),
            "loss": self._row(part, "loss", row),
            "segments": segments_T,
            "positions": positions(segments_T),
        }

    def place(self, number: int) -> tuple[int, int]:
        """(part, row in it) of a row of the index. Raises IndexError outside it."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self):,}")
        part, row = self.index_N2[number]
        return int(part), int(row)

    def examples(self, number: int) -> list[dict[str, Any]]:
        """What stands in a row: provenance, tokens, layout and split of each example."""
        import pyarrow.parquet as pq

        part, row = self.place(number)
        return pq.read_table(
            self.stem(part).with_suffix(".examples.parquet"), filters=[("row", "=", row)]
        ).to_pylist()

    def stem(self, part: int) -> Path:
        return self.folder / "rows" / f"part-{part:05d}"

    def _row(self, part: int, name: str, row: int) -> np.ndarray:
        file = self.stem(part).with_suffix(f".{name}.npy")
        if (part, name) not in self._open:
            self._open[part, name] = _load(file)
        found = self._open[part, name]
        if not 0 <= row < len(found):
            raise ValueError(
                f"{file}: is damaged ({len(found):,} rows, but the index names row {row:,}): build the rows again"
            )
        return np.array(found[row])


def _load(file: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(file, mmap_mode="r")
        return found
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: is damaged ({error}): build the rows again") from None


def positions(segments_T: np.ndarray) -> np.ndarray:
    """Places in the segment, from 0; padding counts on as a segment of its own."""
    at = np.arange(len(segments_T), dtype=np.int32)
    starts = np.concatenate([[True], segments_T[1:] != segments_T[:-1]])
    return at - np.maximum.accumulate(np.where(starts, at, 0))
