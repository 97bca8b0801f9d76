"""Which documents say the same: exact copies, near copies by MinHash, and files that hold a benchmark's problem.

Words are runs of letters, digits, "_" and bytes above 127, in lower case; a shingle is five of them in a row, a
document of fewer is one shingle. 126 permutations in 21 bands of 6 find a pair of Jaccard similarity 0.8 with
probability 0.998; each candidate is then compared by its whole signature, so that banding decides what is looked at,
not what is dropped.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from codegemma.data.documents import Document, Outcome, dropped

BANDS, ROWS = 21, 6
PERMUTATIONS = BANDS * ROWS
SHINGLE = 5
THRESHOLD = 0.8
BENCHMARK_NGRAM = 10
MOST_PAIRS = 64  # of one bucket, each document is compared with this many of its first ones

Node = TypeVar("Node", bound=Hashable)

# Rolling hash of the prefix: sum of letter[i] * BASE**i modulo 2**64. A word: a difference of two, times BASE**-start.
_BASE = 0x9E3779B97F4A7C15
_STEP = 1 << 16
_IS_WORD = np.array([chr(byte).isalnum() or byte == 95 or byte > 127 for byte in range(256)])
_LETTER = np.array(
    [ord(chr(byte).lower()) if byte < 128 else byte for byte in range(256)], np.uint64
) + np.uint64(1)


def _powers(base: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(_STEP - 1, base, np.uint64))])


_POWER, _INVERSE = _powers(_BASE), _powers(pow(_BASE, -1, 1 << 64))


def words(text: str) -> np.ndarray:
    """A 64-bit hash of each word, in order; the same on every machine and in every process."""
    letters = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    return (
        np.concatenate([_words(part) for part in _blocks(letters)])
        if len(letters)
        else np.empty(0, np.uint64)
    )


def _blocks(letters: np.ndarray) -> Iterator[np.ndarray]:
    """Pieces of at most _STEP bytes that end between words (a longer word is cut)."""
    start = 0
    while start < len(letters):
        end = min(start + _STEP, len(letters))
        if end < len(letters):
            gap = np.flatnonzero(~_IS_WORD[letters[start:end]])
            end = start + int(gap[-1]) + 1 if len(gap) else end
        yield letters[start:end]
        start = end


def _words(letters: np.ndarray) -> np.ndarray:
    inside = np.concatenate([[False], _IS_WORD[letters], [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    with np.errstate(over="ignore"):
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_LETTER[letters] * _POWER[: len(letters)])])
        return _mix((sums[ends] - sums[starts]) * _INVERSE[starts])


def _mix(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        return values ^ (values >> np.uint64(32))


def ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """A hash of each `size` words in a row; of all words where there are fewer."""
    size = min(size, len(hashes))
    count = len(hashes) - size + 1 if size else 0
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for at in range(size):
            total = total * np.uint64(0x100000001B3) + hashes[at : at + count]
    return _mix(total)


def signatures(shingles: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash of each set of shingles: uint32 [documents, PERMUTATIONS]. An empty set has a signature of its own."""
    from rensa import RMinHash

    if not shingles:
        return np.empty((0, PERMUTATIONS), np.uint32)
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate([*shingles, np.empty(0, np.uint64)])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, 42)
    return np.array(matrix.to_rows(), np.uint32)


def band_keys(signature: np.ndarray) -> np.ndarray:
    """uint64 [documents, BANDS]: documents that share a key are candidates."""
    rows = signature.reshape(len(signature), BANDS, ROWS).astype(np.uint64)
    keys = np.zeros(rows.shape[:2], np.uint64)
    with np.errstate(over="ignore"):
        for at in range(ROWS):
            keys = _mix(keys * np.uint64(0x100000001B3) + rows[:, :, at])
        return _mix(keys + np.arange(BANDS, dtype=np.uint64))


def candidates(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pairs [n, 2], smaller first, of the rows that share a key, sorted and each once. `keys` and `rows` are
    parallel."""
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    starts = (
        np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        if len(keys)
        else np.empty(0, np.int64)
    )
    first = np.repeat(starts, np.diff(np.concatenate([starts, [len(keys)]])))
    pairs = []
    for back in range(1, int((np.arange(len(keys)) - first).max(initial=0)) + 1):
        left = np.arange(back, len(keys)) - back
        near = keys[left] == keys[left + back]
        if back > MOST_PAIRS:  # a huge bucket: compare with its first ones only
            break
        pairs.append(np.stack([rows[left[near]], rows[left[near] + back]], 1))
        firsts = np.minimum(first[left[near] + back] + back - 1, left[near])
        pairs.append(np.stack([rows[firsts], rows[left[near] + back]], 1))
    found = np.concatenate([*pairs, np.empty((0, 2), rows.dtype)])
    return np.unique(found[found[:, 0] < found[:, 1]], axis=0)


def resolve(
    edges: Iterable[tuple[Node, Node, float]], rank: Callable[[Node], Any]
) -> dict[Node, tuple[Node, float]]:
    """duplicate -> (the one kept, similarity). In the order of `rank`, a node is kept unless it is like one kept
    before.

    So whatever is dropped is itself like the one named, no chain of small steps joins unlike texts, and the order in
    which edges come does not matter.
    """
    near: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for left, right, similarity in edges:
        near[left].append((right, similarity))
        near[right].append((left, similarity))
    ranks = {node: rank(node) for node in near}
    of: dict[Node, tuple[Node, float]] = {}
    kept: set[Node] = set()
    for node in sorted(near, key=ranks.__getitem__):
        options = [(-similarity, ranks[other], other) for other, similarity in near[node] if other in kept]
        if options:
            similarity, _, other = min(options, key=lambda option: option[:2])
            of[node] = (other, -similarity)
        else:
            kept.add(node)
    return of


# --------------------------------------------------------------------------------------------- decontamination
class Benchmarks:
    """N-grams of benchmark problems. A text that holds half of those of one field of a problem holds the problem.

    `files` are JSON lines or arrays (also .gz): every string field of a record of at least BENCHMARK_NGRAM words counts, named by
    its task_id, or by the file and line.
    """

    def __init__(self, files: Iterable[str | Path]):
        grams: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        self.names: list[str] = []
        sizes: list[int] = []
        for file in sorted(Path(name) for name in files):
            for name, field in _fields(file):
                hashes = words(field)
                if len(hashes) >= BENCHMARK_NGRAM:
                    unique = np.unique(ngrams(hashes, BENCHMARK_NGRAM))
                    grams.append(unique)
                    owners.append(np.full(len(unique), len(self.names)))
                    self.names.append(name)
                    sizes.append(len(unique))
        flat = np.concatenate([*grams, np.empty(0, np.uint64)])
        order = np.argsort(flat, kind="stable")
        self.grams, self.owners = (
            flat[order],
            np.concatenate([*owners, np.empty(0, np.int64)])[order].astype(np.int64),
        )
        self.sizes = np.array(sizes, np.int64)

    def __call__(self, hashes: np.ndarray) -> str:
        """The name of the first problem that a text, given as the hashes of its words, holds; "" for none."""
        if not len(self.grams) or len(hashes) < BENCHMARK_NGRAM:
            return ""
        grams = np.unique(ngrams(hashes, BENCHMARK_NGRAM))
        low, high = np.searchsorted(self.grams, grams, "left"), np.searchsorted(self.grams, grams, "right")
        if not (high > low).any():
            return ""
        hits = np.concatenate([self.owners[a:b] for a, b in zip(low, high, strict=True) if b > a])
        counts = np.bincount(hits, minlength=len(self.sizes))
        full = np.flatnonzero(counts * 2 >= self.sizes)
        return self.names[full[0]] if len(full) else ""


def _fields(file: Path) -> Iterator[tuple[str, str]]:
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            array = lines.read(1) == "["
            lines.seek(0)
            records = (
                json.load(lines) if array else (json.loads(line) if line.strip() else {} for line in lines)
            )
            for number, record in enumerate(records):
                name = str(record.get("task_id", f"{file.name}:{number}"))
                name = name if "/" in name else f"{file.name.split('.')[0]}/{name}"
                yield from (
                    (name, field) for key, field in record.items() if isinstance(field, str) and key != "test"
                )
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"benchmark file {file} is not JSON lines ({error}): give files such as HumanEval.jsonl.gz"
        ) from error


# ------------------------------------------------------------------------------------------------ the step
def similar(matrix: np.ndarray, threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """Pairs of rows of a matrix of signatures whose estimated similarity reaches the threshold."""
    pairs = candidates(band_keys(matrix).ravel(), np.repeat(np.arange(len(matrix)), BANDS))
    alike = (matrix[pairs[:, 0]] == matrix[pairs[:, 1]]).mean(1)
    return [(a, b, s) for (a, b), s in zip(pairs.tolist(), alike.tolist(), strict=True) if s >= threshold]


def dedup(
    documents: Iterable[Document], benchmarks: Benchmarks | None = None, threshold: float = THRESHOLD
) -> Iterator[Document | Outcome]:
    """The step in memory: contaminated files, then copied repositories, then copied files; the rest in its order."""
    everything = list(documents)
    hashes = [words(doc.text) for doc in everything]
    tasks = [benchmarks(each) if benchmarks else "" for each in hashes]
    alive = [at for at, task in enumerate(tasks) if not task]
    grams = {at: np.unique(ngrams(hashes[at], SHINGLE)) for at in alive}
    members: dict[str, list[int]] = defaultdict(list)
    for at in alive:
        if everything[at].kind == "code":
            members[everything[at].repository].append(at)
    whole = {
        name: np.unique(np.concatenate([grams[at] for at in ats])) for name, ats in sorted(members.items())
    }
    copies = resolve(_near(whole, threshold), lambda name: (-len(members[name]), name))
    alive = [at for at in alive if everything[at].kind != "code" or everything[at].repository not in copies]
    exact: dict[bytes, int] = {}
    same: dict[int, tuple[int, float]] = {}
    for at in sorted(alive, key=lambda at: place(everything[at])):
        if exact.setdefault(everything[at].digest, at) != at:
            same[at] = (exact[everything[at].digest], 2.0)
    near = resolve(
        _near({at: grams[at] for at in alive if at not in same}, threshold), lambda at: place(everything[at])
    )
    for at, document in enumerate(everything):
        if tasks[at]:
            yield dropped(document, "benchmark", tasks[at])
        elif at not in same and at not in near and document.repository in copies and document.kind == "code":
            yield dropped(document, "copy of a repository", copies[document.repository][0], duplicate=True)
        elif at in same or at in near:
            kept, similarity = same.get(at) or near[at]
            kept = near[kept][0] if kept in near else kept
            yield dropped(
                document,
                "exact copy" if similarity == 2 else "near copy",
                everything[kept].name,
                duplicate=True,
            )
        else:
            yield document


def _near(shingles: Mapping[Node, np.ndarray], threshold: float) -> list[tuple[Node, Node, float]]:
    names = list(shingles)
    return [
        (names[a], names[b], s)
        for a, b, s in similar(signatures([shingles[name] for name in names]), threshold)
    ]


def place(document: Document) -> tuple[str, str]:
    """The order that decides which copy is kept."""
    return document.repository, document.path
