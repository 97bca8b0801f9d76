"""Finds near-duplicates among documents by MinHash, and documents that contain the problem of a benchmark.

Words are runs of letters, digits, "_" and bytes above 127, in lower case; a shingle is a run of five words,
or all words of a shorter document. 126 permutations in 21 bands of 6 find a pair of Jaccard similarity
0.8 with probability 0.998. The bands only find candidates; whether a pair is similar is decided by the full
signatures.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

BANDS, ROWS = 21, 6
PERMUTATIONS = BANDS * ROWS
SHINGLE = 5
THRESHOLD = 0.8
BENCHMARK_NGRAM = 10
# In a bucket (the documents of one key), each is compared with the MAX_PAIRS before it, and with the first
# MAX_PAIRS.
MAX_PAIRS = 64

Node = TypeVar("Node", bound=Hashable)

_BASE = 0x9E3779B97F4A7C15
_MAX_WORD = 1 << 16  # bytes; a longer word counts as several
_POWERS = np.cumprod(np.insert(np.full(_MAX_WORD - 1, _BASE, np.uint64), 0, 1))
_IS_WORD = np.array([chr(byte).isalnum() or byte == 95 or byte > 127 for byte in range(256)])
_LETTER = np.array([ord(chr(byte).lower()) + 1 if byte < 128 else byte + 1 for byte in range(256)], np.uint64)
_LETTER[~_IS_WORD] = 0


def words(text: str) -> np.ndarray:
    """A 64-bit hash of each word, in order; the same on every machine and in every process.

    It is the sum of letter[i] * _BASE**i modulo 2**64, scrambled by `_mix`.
    """
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    is_word, index = _IS_WORD[data], np.arange(len(data), dtype=np.int32)
    gap = np.maximum.accumulate(np.where(is_word, np.int32(-1), index))  # the last byte outside a word
    offset = (index - gap - 1) & (_MAX_WORD - 1)  # of each byte in its word
    starts = np.flatnonzero(is_word & (offset == 0))
    terms = _LETTER[data] * _POWERS[offset]
    return _mix(np.add.reduceat(terms, starts)) if len(starts) else np.empty(0, np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


def ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """A hash of each run of `size` words; of all words together where there are fewer."""
    size = min(size, len(hashes))
    count = len(hashes) - size + 1 if size else 0
    total = np.zeros(count, np.uint64)
    for i in range(size):
        total = total * np.uint64(0x100000001B3) + hashes[i : i + count]
    return _mix(total)


def signatures(shingles: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash of each set of shingles: uint32 [documents, PERMUTATIONS]. The empty set has one too."""
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
    for i in range(ROWS):
        keys = _mix(keys * np.uint64(0x100000001B3) + rows[:, :, i])
    return _mix(keys + np.arange(BANDS, dtype=np.uint64))


def candidates(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Pairs [n, 2] of documents that share a key, smaller first, sorted, unique.

    keys[i] is a key of documents[i].
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    count = len(keys)
    is_first = np.concatenate([np.ones(min(count, 1), bool), keys[1:] != keys[:-1]])
    first = np.maximum.accumulate(np.where(is_first, np.arange(count), 0))  # where each bucket begins
    largest = int((np.arange(count) - first).max(initial=0))
    pairs = [np.empty((0, 2), documents.dtype)]
    for back in range(1, min(largest, MAX_PAIRS) + 1):
        left = np.flatnonzero(keys[:-back] == keys[back:])
        right = left + back
        pairs.append(np.stack([documents[left], documents[right]], 1))
        early = np.minimum(first[right] + back - 1, left)  # a huge bucket: compare with its first ones
        pairs.append(np.stack([documents[early], documents[right]], 1))
    every = np.concatenate(pairs)
    return np.unique(every[every[:, 0] < every[:, 1]], axis=0)


def similar(signatures: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """Pairs of signatures whose estimated similarity reaches the threshold."""
    matrix = np.stack(signatures) if len(signatures) else np.empty((0, PERMUTATIONS), np.uint32)
    pairs = candidates(band_keys(matrix).ravel(), np.repeat(np.arange(len(matrix)), BANDS))
    agreement = (matrix[pairs[:, 0]] == matrix[pairs[:, 1]]).mean(1)
    scored = zip(pairs.tolist(), agreement.tolist(), strict=True)
    return [(left, right, similarity) for (left, right), similarity in scored if similarity >= threshold]


def choose_kept(
    edges: Iterable[tuple[Node, Node, float]], rank: Callable[[Node], Any]
) -> dict[Node, tuple[Node, float]]:
    """duplicate -> (the node kept for it, similarity), given the pairs that are similar.

    In the order of `rank`, a node is kept unless it is similar to one that is kept. So each duplicate is
    similar to the node kept for it (there are no chains of small steps), and the order of the edges does not
    matter.
    """
    near: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for left, right, similarity in edges:
        near[left].append((right, similarity))
        near[right].append((left, similarity))
    ranks = {node: rank(node) for node in near}
    kept_for: dict[Node, tuple[Node, float]] = {}
    kept: set[Node] = set()
    for node in sorted(near, key=ranks.__getitem__):
        options = [(-similarity, ranks[other], other) for other, similarity in near[node] if other in kept]
        if options:
            similarity, _, other = min(options, key=lambda option: option[:2])
            kept_for[node] = (other, -similarity)
        else:
            kept.add(node)
    return kept_for


# ------------------------------------------------------------------------------------------ decontamination
class Benchmarks:
    """Finds the benchmark problems that a text contains: at least half of the n-grams of one of their fields.

    `files` are JSON lines or arrays (also .gz), and each record is a problem, named by its task_id, or by the
    file and line. Its fields are the strings of at least BENCHMARK_NGRAM words, except "test". Raises
    ValueError for other files.
    """

    def __init__(self, files: Iterable[str | Path]):
        self.fields: list[tuple[str, int]] = []  # (name of the problem, number of n-grams)
        self.fields_with: dict[int, list[int]] = defaultdict(list)  # n-gram -> indices into `fields`
        for file in sorted(Path(name) for name in files):
            for name, text in _fields(file):
                hashes = words(text)
                if len(hashes) >= BENCHMARK_NGRAM:
                    grams = set(ngrams(hashes, BENCHMARK_NGRAM).tolist())
                    for gram in grams:
                        self.fields_with[gram].append(len(self.fields))
                    self.fields.append((name, len(grams)))

    def __call__(self, hashes: np.ndarray) -> str:
        """The name of the first problem that a text contains, given the hashes of its words; "" for none."""
        if not self.fields or len(hashes) < BENCHMARK_NGRAM:
            return ""
        grams = self.fields_with.keys() & ngrams(hashes, BENCHMARK_NGRAM).tolist()
        counts = Counter(field for gram in grams for field in self.fields_with[gram])
        contained = [field for field, count in counts.items() if 2 * count >= self.fields[field][1]]
        return self.fields[min(contained)][0] if contained else ""


def _fields(file: Path) -> Iterator[tuple[str, str]]:
    """(name of the problem, text) of each string field in a benchmark file."""
    open_file: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with open_file(file, "rt", encoding="utf-8") as lines:
            is_array = lines.read(1) == "["
            lines.seek(0)
            records = (
                json.load(lines) if is_array else map(json.loads, (line.strip() or "{}" for line in lines))
            )
            for number, record in enumerate(records):
                name = str(record.get("task_id", f"{file.name}:{number}"))
                name = name if "/" in name else f"{file.name.split('.')[0]}/{name}"
                for key, field in record.items():
                    if isinstance(field, str) and key != "test":
                        yield name, field
    except (OSError, ValueError, AttributeError, EOFError, zlib.error) as error:  # the last two: a cut .gz
        raise ValueError(
            f"benchmark file {file} is neither JSON lines nor a JSON array ({error}): "
            "give files such as HumanEval.jsonl.gz"
        ) from error
