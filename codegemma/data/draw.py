"""Random numbers that depend only on a key, such as the seed and the path of a file."""

from __future__ import annotations

import hashlib


class Draw:
    """A stream of random numbers hashed from a key and a counter: no worker, order or restart changes it."""

    def __init__(self, *key: object):
        self._hash = hashlib.blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=8)
        self._count = 0

    def uniform(self) -> float:
        """In [0, 1), 53 bits."""
        self._count += 1
        state = self._hash.copy()
        state.update(self._count.to_bytes(8, "big"))
        return (int.from_bytes(state.digest(), "big") >> 11) / (1 << 53)

    def below(self, count: int) -> int:
        """In range(count)."""
        return int(self.uniform() * count)
