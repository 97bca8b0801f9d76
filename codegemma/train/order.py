"""Which rows a step reads: a pure function of (seed, step), so that the loader's state is the step number.

`Order` is what the loop calls. The law it keeps: any number of hosts and any resumption see the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class Microbatch(NamedTuple):
    """Rows of one length. Targets are gathered: `index_CM` says where in a part's flattened [B / C * T] positions the
    state stands that predicts `targets_CM`; of each part only the first `count_C` are real. C: parts of the batch, one for
    each place that holds a share of it."""

    tokens_BT: Any  # int32, of NumPy, and of JAX once placed
    positions_BT: Any
    segments_BT: Any
    index_CM: Any
    targets_CM: Any
    count_C: Any


class Sample(NamedTuple):
    """Tokens that stand for the vocabulary in the normaliser: each counts `weights_S` times, those that were certain to be
    drawn once, the others by the inverse of their chance, so that the sum is right on average (Horvitz and Thompson). All
    targets are certain."""

    numbers_S: Any  # int32
    weights_S: Any


@dataclass(frozen=True)
class Order:
    """Folders of rows, one after the other (a curriculum), each `epochs` times in an order drawn from the seed.

    A step takes rows of about `batch_tokens` tokens in all. Raises ValueError where a folder has less than one batch.
    """

    folders: Sequence[Any]  # data.pack.Rows, or sequences of the same dicts
    batch_tokens: int
    seed: int = 0
    epochs: float = 1.0
    multiple: int = 1  # rows of a step: a whole number of these

    def __post_init__(self) -> None:
        if not (0 < self.epochs < 1e9 and self.batch_tokens > 0):
            raise ValueError(
                f"epochs and batch_tokens must be finite and above 0, got {self.epochs} and {self.batch_tokens}"
            )
        for rows in self.folders:
            if len(rows) * self.epochs < self.batch(rows):
                raise ValueError(
                    f"{getattr(rows, 'folder', 'rows')}: {len(rows):,} rows in {self.epochs:g} epochs do not fill one "
                    f"step of {self.batch(rows):,} rows: lower --batch-tokens, take fewer devices, raise --epochs, or "
                    "build more rows"
                )

    def length(self, rows: Any) -> int:
        return len(rows[0]["tokens"])

    def told(self, rows: Any) -> list[Any]:
        """What tells a folder's rows from others: how many, how long, and a hash of some from all over it."""
        some = hashlib.sha256()
        for i in np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int):
            some.update(rows[int(i)]["tokens"].tobytes() + rows[int(i)]["loss"].tobytes())
        return [len(rows), self.length(rows), some.hexdigest()[:16]]

    def batch(self, rows: Any) -> int:
        each = max(1, self.batch_tokens // self.length(rows))
        return -(-each // self.multiple) * self.multiple

    @property
    def steps(self) -> int:
        return sum(self._steps(rows) for rows in self.folders)

    def _steps(self, rows: Any) -> int:
        return int(len(rows) * self.epochs) // self.batch(rows)

    def rows(self, step: int) -> list[dict[str, np.ndarray]]:
        """The rows of a step, from 0. Raises IndexError after the last."""
        for number, rows in enumerate(self.folders):
            steps, batch = self._steps(rows), self.batch(rows)
            if step < steps:
                places = range(step * batch, (step + 1) * batch)
                n = len(rows)
                return [rows[int(_shuffled(n, self.seed, number, place // n)[place % n])] for place in places]
            step -= steps
        raise IndexError(f"step beyond the last, {self.steps:,}")

    def sampler(self, size: int, vocab: int) -> Callable[[int, Sequence[Microbatch]], Sample]:
        """Draws `size` of `vocab` tokens for a step and its microbatches: half of them what these rows hold most of, with the
        step's targets, and the others by chance."""
        tokens = [
            rows[i]["tokens"]
            for rows in self.folders
            for i in np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)
        ]
        seen = np.bincount(np.concatenate(tokens), minlength=vocab)[:vocab]
        frequent = np.argsort(-seen, kind="stable")[: size // 2]

        def draw(step: int, batches: Sequence[Microbatch]) -> Sample:
            certain = np.union1d(
                frequent, np.concatenate([batch.targets_CM.reshape(-1) for batch in batches])
            )
            others = np.setdiff1d(np.arange(vocab), certain, assume_unique=True)
            if (room := size - len(certain)) < 1:
                raise ValueError(
                    f"the step's targets and the frequent tokens are {len(certain):,}, above {size:,}: take more "
                    "of the vocabulary, or fewer tokens a step"
                )
            chance = np.random.Generator(np.random.PCG64([self.seed, 1 << 20, step]))
            drawn = chance.choice(others, room, replace=False)
            weights = np.repeat(np.array([1, len(others) / room], np.float32), [len(certain), room])
            return Sample(np.concatenate([certain, drawn]).astype(np.int32), weights)

        return draw


@lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, folder: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, folder, epoch])).permutation(n)


def microbatches(
    rows: Sequence[dict[str, np.ndarray]], size: int, parts: int = 1, block: int = 1
) -> Iterator[Microbatch]:
    """Rows in microbatches of `size` (a multiple of `parts`), the last one filled up with padding."""
    length = len(rows[0]["tokens"])
    for at in range(0, len(rows), size):
        some = rows[at : at + size]
        tokens_BT, positions_BT, segments_BT = (np.zeros((size, length), np.int32) for _ in range(3))
        loss_BT = np.zeros((size, length), bool)
        for b, row in enumerate(some):
            tokens_BT[b], positions_BT[b] = row["tokens"], row["positions"]
            segments_BT[b], loss_BT[b] = row["segments"], row["loss"]
        loss_BT[:, 0] = False  # nothing stands before the first token
        loss_BT[:, 1:] &= segments_BT[:, 1:] == segments_BT[:, :-1]
        room = -(-size // parts * length // block) * block
        index_CM, targets_CM = np.zeros((parts, room), np.int32), np.zeros((parts, room), np.int32)
        count_C = np.zeros(parts, np.int32)
        for part, (loss, tokens) in enumerate(
            zip(np.split(loss_BT, parts), np.split(tokens_BT, parts), strict=True)
        ):
            found = np.flatnonzero(loss)
            count_C[part] = len(found)
            index_CM[part, : len(found)], targets_CM[part, : len(found)] = (
                found - 1,
                tokens.reshape(-1)[found],
            )
        yield Microbatch(tokens_BT, positions_BT, segments_BT, index_CM, targets_CM, count_C)
