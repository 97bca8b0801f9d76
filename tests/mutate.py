"""Fuzzing of file readers: copies of a file with random damage, from one seed."""

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

EXTREMES = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutants(raw: bytes, header: int, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` copies with one to three damages each, in the first `header` bytes."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        data = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            offset = int(rng.integers(0, header))
            match index % 6:
                case 0:
                    data[offset] ^= 1 << int(rng.integers(8))
                case 1:
                    data[offset] = int(rng.integers(256))
                case 2:
                    data[offset : offset + 8] = EXTREMES[rng.integers(len(EXTREMES))].to_bytes(8, "little")
                case 3:
                    extreme = EXTREMES[rng.integers(len(EXTREMES))] % 2**32
                    data[offset : offset + 4] = extreme.to_bytes(4, "little")
                case 4:
                    del data[offset : offset + int(rng.integers(1, 40))]
                case 5:
                    data = data[: int(rng.integers(len(data)))] or bytearray(b"G")
                    break
        yield bytes(data)


def fuzz(read: Callable[[], object], path: Path, raw: bytes, header: int, count: int) -> Counter[str]:
    """Runs `read` on damaged copies of `raw` at `path`: any error but ValueError and OSError fails the test.

    On every eighth copy, Python and NumPy may allocate only a few times the size of the file.
    """
    outcomes: Counter[str] = Counter()
    for index, mutant in enumerate(mutants(raw, header, count)):
        path.write_bytes(mutant)
        if index % 8 == 0:
            tracemalloc.start()
        try:
            read()
            outcomes["loaded"] += 1
        except (ValueError, OSError):
            outcomes["refused"] += 1
        if tracemalloc.is_tracing():
            assert tracemalloc.get_traced_memory()[1] < 4 * len(raw) + 1_000_000
            tracemalloc.stop()
    path.write_bytes(raw)
    return outcomes
