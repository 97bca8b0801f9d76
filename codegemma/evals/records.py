"""Reads the records of benchmarks from a folder with the official files, or from the Hugging Face Hub.

No benchmark is stored in this repository. A record is a line of the official file, as a dict.
"""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from codegemma.extras import install_command

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


@dataclass(frozen=True)
class RecordSet:
    """One entry of benchmarks.toml, which explains the fields."""

    files: tuple[str, ...]
    hub: str
    splits: tuple[str, ...]


@cache
def record_sets() -> dict[str, RecordSet]:
    """The entries of benchmarks.toml by name, such as gsm8k-train."""
    table = tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text("utf-8"))
    return {
        name: RecordSet(tuple(entry["files"]), entry["hub"], tuple(entry["splits"]))
        for name, entry in table.items()
    }


@dataclass
class Records:
    """The records of benchmarks, from `folder`; where it lacks them, from the Hub, unless `offline`."""

    folder: Path | None = None
    offline: bool = False
    _by_name: dict[str, list[Record]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError where `folder` is no folder, before the Hub is asked for what it would lack."""
        if self.folder is not None and not self.folder.is_dir():
            fault = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise ValueError(
                f"--data {self.folder} {fault}: name the folder with the benchmarks' files, or leave --data "
                "out to get them from the Hugging Face Hub"
            )

    def __call__(self, name: str) -> list[Record]:
        """The records of a set, such as gsm8k-train. Raises LookupError that says where to get them."""
        if name not in self._by_name:
            path = self._find(record_sets()[name])
            records = _read(path) if path else self._fetch(name)
            if not records:
                raise LookupError(f"{path or name} has no records: download the file again")
            self._by_name[name] = records
        return self._by_name[name]

    def maybe(self, name: str) -> list[Record]:
        """The records of a set, or [] where neither the folder nor the Hub has them."""
        try:
            return self(name)
        except LookupError:
            return []

    def _find(self, record_set: RecordSet) -> Path | None:
        """The first of the set's files that is in the folder or in a folder in it."""
        if not self.folder:
            return None
        for name in record_set.files:
            for suffix in SUFFIXES:
                for path in (self.folder / (name + suffix), *sorted(self.folder.glob(f"*/{name}{suffix}"))):
                    if path.is_file():
                        return path
        return None

    def _fetch(self, name: str) -> list[Record]:
        record_set = record_sets()[name]
        try:
            if self.offline:
                raise LookupError("offline, so it was not asked")
            from huggingface_hub import hf_hub_download

            revision = "refs/convert/parquet"
            files = [f"{split}/0000.parquet" for split in record_set.splits]
            paths = [
                hf_hub_download(record_set.hub, file, repo_type="dataset", revision=revision)
                for file in files
            ]
        except Exception as error:  # whatever the client raises, there are no records
            missing = f"{record_set.files[0]}.jsonl[.gz] is not in {self.folder}"
            client = install_command("eval") if isinstance(error, ImportError) else "go online"
            raise LookupError(
                f"{name}: {missing if self.folder else 'no --data folder was given'}, and the Hub gave "
                f"nothing ({type(error).__name__}: {error}). Get it from "
                f"https://huggingface.co/datasets/{record_set.hub} and pass --data DIR, or {client}"
            ) from error
        return [record for path in paths for record in _read(Path(path))]


def _read(path: Path) -> list[Record]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        records = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
        records = json.loads(text) if text[:1] == "[" else list(_lines(text, path))
    labels = path.parent / f"{path.name.split('.')[0]}-labels.lst"  # PIQA keeps its labels in a second file
    if labels.is_file():
        values = labels.read_text().split()
        records = [record | {"label": int(value)} for record, value in zip(records, values, strict=True)]
    # BabelCode keeps a part of its fields in an object of their own.
    return [record | (record.get("question_info") or {}) for record in records]


def _lines(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                fault = f"{path}, line {number} is not JSON ({error})"
                raise ValueError(f"{fault}: download the file again") from error
