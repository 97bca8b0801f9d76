"""Which rows a step reads: a pure function of (seed, step), so that the loader's state is the step number.

A session calls `Order.rows`. The law it keeps: any number of hosts and any resumption read the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class Microbatch(NamedTuple):
    """Rows of one length, and their targets in C parts, one for each place on a mesh that holds a share.

    `targets_CM` are predicted by the hidden states at `index_CM` of a part's flattened [B / C * T] positions;
    only the first `count_C` of each part are real.
    """

    tokens_BT: Any  # int32, of NumPy, and of JAX once placed
    positions_BT: Any
    segments_BT: Any
    index_CM: Any
    targets_CM: Any
    count_C: Any


class Sample(NamedTuple):
    """Tokens that stand for the vocabulary in the normaliser; each counts `weights_S` times.

    Those that were certain to be drawn, all targets among them, count once; the others by the inverse of
    their chance. So the sum is right on average (Horvitz and Thompson, 1952).
    """

    numbers_S: Any  # int32
    weights_S: Any


@dataclass(frozen=True)
class Order:
    """Folders of rows, one after the other (a curriculum), each `epochs` times in a random order.

    A step takes rows of about `batch_tokens` tokens in all. Raises ValueError where a folder does not fill
    one.
    """

    folders: Sequence[Any]  # data.pack.Rows, or sequences of the same dicts
    batch_tokens: int
    seed: int = 0
    epochs: float = 1.0
    multiple: int = 1  # the rows of a step are a multiple of this

    def __post_init__(self) -> None:
        if not (0 < self.epochs < 1e9 and self.batch_tokens > 0):
            given = f"got {self.epochs} and {self.batch_tokens}"
            raise ValueError(f"epochs and batch_tokens must be finite and above 0, {given}")
        for rows in self.folders:
            if len(rows) * self.epochs < (needed := self.rows_per_step(rows)):
                name = getattr(rows, "folder", "rows")
                fault = (
                    f"{len(rows):,} rows in {self.epochs:g} epochs do not fill one step of {needed:,} rows"
                )
                remedy = "lower --batch-tokens, take fewer devices, raise --epochs, or build more rows"
                raise ValueError(f"{name}: {fault}: {remedy}")

    def fingerprint(self, rows: Any) -> list[Any]:
        """What identifies a folder's rows: how many, how long, and a hash of a sample of them."""
        digest = hashlib.sha256()
        for row in _spread(rows, 64):
            digest.update(row["tokens"].tobytes() + row["loss"].tobytes())
        return [len(rows), row_length(rows), digest.hexdigest()[:16]]

    def rows_per_step(self, rows: Any) -> int:
        """How many of a folder's rows one step takes."""
        count = max(1, self.batch_tokens // row_length(rows))
        return -(-count // self.multiple) * self.multiple

    @property
    def steps(self) -> int:
        """Steps that all folders give."""
        return sum(self._steps(rows) for rows in self.folders)

    def _steps(self, rows: Any) -> int:
        return int(len(rows) * self.epochs) // self.rows_per_step(rows)

    def rows(self, step: int) -> list[dict[str, np.ndarray]]:
        """The rows of a step, from 0. Raises IndexError after the last."""
        for number, rows in enumerate(self.folders):
            steps, batch = self._steps(rows), self.rows_per_step(rows)
            if step < steps:
                n, indices = len(rows), range(step * batch, (step + 1) * batch)
                return [rows[int(_shuffled(n, self.seed, number, i // n)[i % n])] for i in indices]
            step -= steps
        raise IndexError(f"step beyond the last, {self.steps:,}")

    def sampler(self, size: int, vocab: int) -> Callable[[int, Sequence[Microbatch]], Sample]:
        """A function that draws `size` of `vocab` tokens for a step and its microbatches.

        Certain are the tokens that these rows hold most of, half of the size, and the step's targets; the
        others are drawn at random. The function raises ValueError where the certain ones fill the size.
        """
        tokens = [row["tokens"] for rows in self.folders for row in _spread(rows, 1024)]
        counts = np.bincount(np.concatenate(tokens), minlength=vocab)[:vocab]
        frequent = np.argsort(-counts, kind="stable")[: size // 2]

        def draw(step: int, batches: Sequence[Microbatch]) -> Sample:
            targets = np.concatenate([batch.targets_CM.reshape(-1) for batch in batches])
            certain = np.union1d(frequent, targets)
            others = np.setdiff1d(np.arange(vocab), certain, assume_unique=True)
            if (room := size - len(certain)) < 1:
                fault = f"the step's targets and the frequent tokens are {len(certain):,}, above {size:,}"
                raise ValueError(f"{fault}: take more of the vocabulary, or fewer tokens a step")
            random = np.random.Generator(np.random.PCG64([self.seed, 1 << 20, step]))
            drawn = random.choice(others, room, replace=False)
            weights = np.repeat(np.array([1, len(others) / room], np.float32), [len(certain), room])
            return Sample(np.concatenate([certain, drawn]).astype(np.int32), weights)

        return draw


def row_length(rows: Any) -> int:
    """Tokens of each of these rows."""
    return len(rows[0]["tokens"])


def _spread(rows: Any, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Up to `count` rows, evenly spread."""
    for i in np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int):
        yield rows[int(i)]


@lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, folder: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, folder, epoch])).permutation(n)


def microbatches(
    rows: Sequence[dict[str, np.ndarray]], size: int, parts: int = 1, block: int = 1
) -> Iterator[Microbatch]:
    """Rows in microbatches of `size` (a multiple of `parts`), the last one filled up with padding.

    Targets take room for a multiple of `block` in each part.
    """
    length = row_length(rows)
    for start in range(0, len(rows), size):
        tokens_BT, positions_BT, segments_BT = (np.zeros((size, length), np.int32) for _ in range(3))
        loss_BT = np.zeros((size, length), bool)
        for b, row in enumerate(rows[start : start + size]):
            tokens_BT[b], positions_BT[b] = row["tokens"], row["positions"]
            segments_BT[b], loss_BT[b] = row["segments"], row["loss"]
        loss_BT[:, 0] = False  # nothing precedes the first token
        loss_BT[:, 1:] &= segments_BT[:, 1:] == segments_BT[:, :-1]
        room = -(-size // parts * length // block) * block
        index_CM, targets_CM = np.zeros((parts, room), np.int32), np.zeros((parts, room), np.int32)
        count_C = np.zeros(parts, np.int32)
        for part, (loss, tokens) in enumerate(
            zip(loss_BT.reshape(parts, -1), tokens_BT.reshape(parts, -1), strict=True)
        ):
            places = np.flatnonzero(loss)
            count_C[part] = count = len(places)
            index_CM[part, :count], targets_CM[part, :count] = places - 1, tokens[places]
        yield Microbatch(tokens_BT, positions_BT, segments_BT, index_CM, targets_CM, count_C)
