"""Which documents of a build are dropped as copies, decided over all shards at once.

A node is a document: shard << 32 | row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from codegemma.data import dedup
from codegemma.data.folder import BuildFolder, read_table, write_array, write_json


class CopyFinder:
    """Finds benchmark problems, copied repositories, exact copies and near-duplicates, in this order.

    First `find_exact` is called, then the link tasks compare the documents that are left, then `find_near`.
    """

    def __init__(self, folder: BuildFolder, shards: int, threshold: float):
        self.folder, self.shards, self.threshold = folder, range(shards), threshold
        # For each shard, row -> (reason, the original or the benchmark problem).
        self.verdicts: list[dict[int, tuple[str, str]]] = [{} for _ in self.shards]
        self.names: dict[int, tuple[str, str, bytes]] = {}  # node -> (repository, path, digest)
        self.exact_copies: dict[int, list[int]] = defaultdict(list)  # node -> its exact copies

    def find_exact(self) -> int:
        """Finds benchmark problems, copied repositories and exact copies; writes which rows remain.

        Returns the number of repositories that were compared.
        """
        for shard in self.shards:
            problems = enumerate(self._column(shard, "problem"))
            self.verdicts[shard] = {row: ("benchmark", problem) for row, problem in problems if problem}
        repositories = self._find_repositories()
        self._find_exact()
        for shard in self.shards:
            alive = np.ones(len(self.folder.array("signatures", shard)), bool)
            alive[list(self.verdicts[shard])] = False
            write_array(self.folder.shard("alive", shard), alive)
        return repositories

    def find_near(self, tasks: int) -> Counter[str]:
        """Finds near-duplicates from the edges of all link tasks; writes all verdicts, returns counts."""
        edges: list[tuple[int, int, float]] = []
        for task in range(tasks):
            pairs = self.folder.array("edges", task).tolist()
            similarity = self.folder.array("edge_similarity", task).tolist()
            edges += [(left, right, s) for (left, right), s in zip(pairs, similarity, strict=True)]
        self._look_up(node for left, right, _ in edges for node in (left, right))
        for node, (kept, _) in dedup.choose_kept(edges, self.names.__getitem__).items():
            self._mark(node, "near copy", kept)
            for copy in self.exact_copies.get(node, ()):
                self._mark(copy, "exact copy", kept)
        for shard, verdicts in enumerate(self.verdicts):
            rows = [[row, *verdict] for row, verdict in sorted(verdicts.items())]
            write_json(self.folder.verdicts(shard), rows)
        return Counter(reason for verdicts in self.verdicts for reason, _ in verdicts.values())

    def _mark(self, node: int, reason: str, original: int) -> None:
        repository, path, _ = self.names[original]
        self.verdicts[node >> 32][node & 0xFFFFFFFF] = (reason, f"{repository}:{path}")

    def _column(self, shard: int, name: str) -> list[Any]:
        column: list[Any] = read_table(self.folder.shard("origins", shard), [name])[name].to_pylist()
        return column

    def _code_files(self, shard: int) -> list[tuple[int, str]]:
        """(row, repository) of each file of code."""
        repositories = enumerate(self._column(shard, "repository"))
        kinds = self._column(shard, "kind")
        return [(row, repository) for row, repository in repositories if kinds[row] == "code"]

    def _find_repositories(self) -> int:
        """Marks the copies of whole repositories; returns the number of repositories compared.

        The element-wise minimum of the files' signatures is the MinHash of all shingles of a repository.
        """
        signatures: dict[str, np.ndarray] = {}
        files: Counter[str] = Counter()
        for shard in self.shards:
            matrix = self.folder.array("signatures", shard)
            members: dict[str, list[int]] = defaultdict(list)
            for row, repository in self._code_files(shard):
                if row not in self.verdicts[shard]:
                    members[repository].append(row)
            for repository, rows in members.items():
                least = matrix[rows].min(0)
                signatures[repository] = np.minimum(signatures.get(repository, least), least)
                files[repository] += len(rows)
        names = sorted(signatures)
        pairs = dedup.similar([signatures[name] for name in names], self.threshold)
        edges = [(names[left], names[right], similarity) for left, right, similarity in pairs]
        copies = dedup.choose_kept(edges, lambda name: (-files[name], name))
        for shard in self.shards if copies else ():
            for row, repository in self._code_files(shard):
                if repository in copies:
                    verdict = ("copy of a repository", copies[repository][0])
                    self.verdicts[shard].setdefault(row, verdict)
        return len(names)

    def _find_exact(self) -> None:
        """Marks the documents with equal digests, except the first of each set by repository and path."""
        digests, nodes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for shard in self.shards:
            column = self._column(shard, "digest")
            rows = [row for row in range(len(column)) if row not in self.verdicts[shard]]
            digests.append(np.array([int.from_bytes(column[row][:8], "big") for row in rows], np.uint64))
            nodes.append((np.int64(shard) << np.int64(32)) + np.array(rows, np.int64))
        keys, flat = np.concatenate(digests), np.concatenate(nodes)
        order = np.argsort(keys, kind="stable")
        keys, flat = keys[order], flat[order]
        sets = np.split(flat, np.flatnonzero(keys[1:] != keys[:-1]) + 1)
        equal: Sequence[list[int]] = [part.tolist() for part in sets if len(part) > 1]
        self._look_up(node for part in equal for node in part)
        for part in equal:
            first, *rest = sorted(part, key=self.names.__getitem__)
            for node in rest:
                self._mark(node, "exact copy", first)
            self.exact_copies[first] += rest

    def _look_up(self, nodes: Iterable[int]) -> None:
        """Adds documents to `names`. The digest makes a name unique where one path has several versions."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for node in nodes:
            wanted[node >> 32].add(node & 0xFFFFFFFF)
        for shard, rows in sorted(wanted.items()):
            columns = [self._column(shard, name) for name in ("repository", "path", "digest")]
            for row in rows:
                repository, path, digest = (column[row] for column in columns)
                self.names[shard << 32 | row] = (repository, path, digest)
