"""Packs examples into rows of one length, in segments that attention does not cross; writes and reads rows.

A segment is what attention sees: <bos> and the examples of one group of files of a repository. A row holds
whole segments and padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.data.fim import Example
from codegemma.data.folder import BuildFolder, write_array, write_table

EXAMPLE_FIELDS = {  # columns of the table of examples, with their Arrow types
    **dict.fromkeys(("row", "segment", "start", "end"), "int32"),
    **dict.fromkeys(("repository", "path", "commit", "licence", "language", "kind", "source"), "string"),
    # "via" is ExampleGroup.placed_by.
    **{"via": "string", "order": "int32", "layout": "string", "boundary": "string"},
    **dict.fromkeys(("offset", "size", "split_start", "split_end"), "int32"),
}
CONTEXT_FIELDS = {"context": "strings"}  # paths of the files in front; in rows that may have some


@dataclass(frozen=True)
class ExampleGroup:
    """Examples in their packed order, and the rule that placed their files together (see show.PLACED_BY)."""

    examples: list[Example]
    placed_by: str


@dataclass(frozen=True)
class Packed:
    """R rows of T tokens, and a record of each example (EXAMPLE_FIELDS)."""

    tokens_RT: np.ndarray  # int32
    loss_RT: np.ndarray  # bool
    segments_RT: np.ndarray  # uint16; 0 is padding, a row's first segment is 1
    examples: list[dict[str, Any]]


def segments(groups: Iterable[ExampleGroup], length: int) -> Iterator[ExampleGroup]:
    """The groups, cut between examples so that each fits, with <bos>, a row of `length` tokens."""
    for group in groups:
        run: list[Example] = []
        size = 1
        for example in group.examples:
            tokens = len(example.ids_T)
            if run and size + tokens > length:
                yield ExampleGroup(run, group.placed_by)
                run, size = [], 1
            run.append(example)
            size += tokens
        if run:
            yield ExampleGroup(run, group.placed_by)


def fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """The items of each row: best fit, largest first. Raises ValueError for an item longer than a row."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > length:
            raise ValueError(
                f"segment {item} has {sizes[item]:,} tokens but a row {length:,}: cut it before packing"
            )
        best = bisect.bisect_left(free, (sizes[item], -1))
        room, row = free.pop(best) if best < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (room - sizes[item], row))
    return rows


def places(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> Iterator[tuple[int, int, int, slice]]:
    """(row, segment from 1, item, its tokens in the row) of each item, for rows as `fit` returns them."""
    for row, items in enumerate(rows):
        start = 0
        for segment, item in enumerate(sorted(items), 1):
            yield row, segment, item, slice(start, start + sizes[item])
            start += sizes[item]


def pack(kinds: Iterable[Iterable[ExampleGroup]], length: int, bos: int | None, pad: int) -> Packed:
    """Rows of `length` tokens; groups of different kinds never share a row."""
    prefix = [] if bos is None else [bos]
    parts: list[ExampleGroup] = []
    sizes: list[int] = []
    rows: list[list[int]] = []
    for groups in kinds:
        of_kind = list(segments(groups, length))
        lengths = [len(prefix) + sum(len(example.ids_T) for example in part.examples) for part in of_kind]
        rows += [[len(parts) + item for item in items] for items in fit(lengths, length)]
        parts += of_kind
        sizes += lengths
    shape = len(rows), length
    packed = Packed(np.full(shape, pad, np.int32), np.zeros(shape, bool), np.zeros(shape, np.uint16), [])
    for row, segment, item, span in places(rows, sizes):
        packed.segments_RT[row, span] = segment
        start = span.start + len(prefix)
        packed.tokens_RT[row, span.start : start] = prefix
        for example in parts[item].examples:
            end = start + len(example.ids_T)
            packed.tokens_RT[row, start:end] = example.ids_T
            packed.loss_RT[row, start:end] = example.loss_T
            position = {
                "row": row,
                "segment": segment,
                "start": start,
                "end": end,
                "via": parts[item].placed_by,
            }
            packed.examples.append(position | _record(example))
            start = end
    return packed


def _record(example: Example) -> dict[str, Any]:
    document, hole = example.document, example.split
    names = ("repository", "path", "commit", "licence", "language", "kind", "source")
    return {name: getattr(document, name) for name in names} | {
        "order": example.order,
        "layout": example.layout,
        "boundary": hole.kind,
        "offset": example.offset,
        "size": example.size,
        "split_start": hole.start,
        "split_end": hole.end,
        "context": list(example.context),
    }


def save(packed: Packed, folder: BuildFolder, part: int, has_context: bool = False) -> None:
    """Writes the files of a part: an array each of tokens, loss and segments, and the table of examples."""
    fields = EXAMPLE_FIELDS | (CONTEXT_FIELDS if has_context else {})
    for name in ("tokens", "loss", "segments"):
        write_array(folder.rows(part, f"{name}.npy"), getattr(packed, f"{name}_RT"))
    write_table(folder.rows(part, "examples.parquet"), packed.examples, fields, row_group_size=4096)


class Rows:
    """The rows of a built folder, in the order of its index, memory-mapped.

    `rows[i]` is a dict of arrays of T tokens: "tokens" int32, "loss" bool, "segments" uint16 (0: padding) and
    "positions" int32, which restart at 0 in each segment. Training order is up to the reader: any permutation
    of range(len(rows)). Raises ValueError where the folder holds no finished rows, or they are damaged.
    """

    def __init__(self, folder: str | Path):
        self.files = BuildFolder(folder)
        self.folder = self.files.path
        if not self.files.index.exists():
            raise ValueError(
                f"{folder} has no finished rows: run `codegemma data build ... --out {folder}`, with "
                "--resume if it was interrupted"
            )
        self._arrays: dict[Path, np.ndarray] = {}
        self.index_R2 = self._array(self.files.index)

    def __len__(self) -> int:
        return len(self.index_R2)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        part, row = self.place(number)
        arrays = {name: self._row(part, name, row) for name in ("tokens", "loss", "segments")}
        return arrays | {"positions": positions(arrays["segments"])}

    def place(self, number: int) -> tuple[int, int]:
        """(part, row in it) of a row of the index. Raises IndexError outside it."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} is not one of the {len(self):,} rows")
        part, row = self.index_R2[number]
        return int(part), int(row)

    def examples(self, number: int) -> list[dict[str, Any]]:
        """The source, position, layout and split of each example of a row."""
        import pyarrow.parquet as pq

        part, row = self.place(number)
        file = self.files.rows(part, "examples.parquet")
        return pq.read_table(file, filters=[("row", "=", row)]).to_pylist()

    def _row(self, part: int, name: str, row: int) -> np.ndarray:
        file = self.files.rows(part, f"{name}.npy")
        array = self._array(file)
        if not 0 <= row < len(array):
            rows = f"{len(array):,} rows, but the index names row {row:,}"
            raise ValueError(f"{file}: is damaged ({rows}): build the rows again")
        return np.array(array[row])

    def _array(self, file: Path) -> np.ndarray:
        if file not in self._arrays:
            try:
                self._arrays[file] = np.load(file, mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise ValueError(f"{file}: is damaged ({error}): build the rows again") from None
        return self._arrays[file]


def positions(segments_T: np.ndarray) -> np.ndarray:
    """Each token's position in its segment, from 0; the padding counts as a segment."""
    index_T = np.arange(len(segments_T), dtype=np.int32)
    is_start_T = np.concatenate([[True], segments_T[1:] != segments_T[:-1]])
    return index_T - np.maximum.accumulate(np.where(is_start_T, index_T, 0))
