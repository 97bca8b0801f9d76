"""Which rows a step reads, shuffled: a pure function of (seed, step), so that only the step number is saved.

A session calls `Order.rows`. The law it keeps: a run reads the same rows on any number of hosts, and however
often it is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from codegemma.train.horizon import NO_SHARE, Middles, shares


class Microbatch(NamedTuple):
    """Rows of one length, and their targets in C parts, the parts into which a mesh divides the batch.

    `targets_CM` are predicted by the hidden states at `index_CM` of a part's flattened [B / C * T] positions.
    Only the first `count_C` targets of each part are real; the others are padding.
    """

    tokens_BT: Any  # int32, as the next five; all are arrays of NumPy or, on the device, of JAX
    positions_BT: Any
    segments_BT: Any
    index_CM: Any
    targets_CM: Any
    count_C: Any
    shares_CM: Any = None  # float32, see horizon.shares; None without a horizon head
    pairs: Pairs | None = None  # of rows of preference.rows


class Pairs(NamedTuple):
    """The pairs of answers of a microbatch, up to P in each of its C parts; see preference.rows."""

    pair_CM: Any  # int32: the pair that a target belongs to, counted within the part
    sign_CM: Any  # float32: 1 for a target of the chosen answer, -1 of the rejected one, 0 for padding
    reference_CP: Any  # float32: log p(chosen) - log p(rejected) before training; NaN where there is no pair


class Sample(NamedTuple):
    """U tokens that stand for the vocabulary in the normaliser; each counts `weights_U` times.

    The weight is the inverse of the probability that the token is drawn, which makes the sum right on average
    (Horvitz and Thompson, 1952). It is 1 for tokens that are always drawn, such as the targets.
    """

    tokens_U: Any  # int32
    weights_U: Any


@dataclass(frozen=True)
class Order:
    """Folders of rows, read one after the other (a curriculum), each `epochs` times in a random order.

    A step reads rows of about `batch_tokens` tokens in all. Raises ValueError where a folder has too few rows
    for one step.
    """

    folders: Sequence[Any]  # each a data.pack.Rows, or a sequence of such rows
    batch_tokens: int
    seed: int = 0
    epochs: float = 1.0
    multiple: int = 1  # the number of rows of a step is a multiple of this

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
        """How many of a folder's rows one step reads."""
        count = max(1, self.batch_tokens // row_length(rows))
        return -(-count // self.multiple) * self.multiple

    @property
    def steps(self) -> int:
        """Steps over all folders."""
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
        raise IndexError(f"the step is beyond the last of {self.steps:,}")

    def sampler(self, size: int, vocab: int) -> Callable[[int, Sequence[Microbatch]], Sample]:
        """A function that draws `size` of `vocab` tokens for a step and its microbatches.

        It always takes the step's targets and the size / 2 tokens that are most frequent in up to 1,024 rows
        of each folder, and draws the rest at random. The function raises ValueError where nothing is left to
        draw.
        """
        tokens = [row["tokens"] for rows in self.folders for row in _spread(rows, 1024)]
        counts = np.bincount(np.concatenate(tokens), minlength=vocab)[:vocab]
        frequent = np.argsort(-counts, kind="stable")[: size // 2]

        def draw(step: int, batches: Sequence[Microbatch]) -> Sample:
            targets = np.concatenate([batch.targets_CM.reshape(-1) for batch in batches])
            certain = np.union1d(frequent, targets)
            others = np.setdiff1d(np.arange(vocab), certain, assume_unique=True)
            if (room := size - len(certain)) < 1:
                fault = f"the step's targets and the frequent tokens are {len(certain):,}, not below {size:,}"
                raise ValueError(f"{fault}: take more of the vocabulary, or fewer tokens per step")
            random = np.random.Generator(np.random.PCG64([self.seed, 1 << 20, step]))
            drawn = random.choice(others, room, replace=False)
            weights = np.repeat(np.array([1, len(others) / room], np.float32), [len(certain), room])
            return Sample(np.concatenate([certain, drawn]).astype(np.int32), weights)

        return draw


def row_length(rows: Any) -> int:
    """How many tokens each of these rows has."""
    return len(rows[0]["tokens"])


def _spread(rows: Any, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Up to `count` of the rows, evenly spaced."""
    for i in np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int):
        yield rows[int(i)]


@lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, folder: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, folder, epoch])).permutation(n)


def microbatches(
    rows: Sequence[dict[str, np.ndarray]],
    size: int,
    parts: int = 1,
    block: int = 1,
    middles: Middles | None = None,
) -> Iterator[Microbatch]:
    """Rows in microbatches of `size` rows (a multiple of `parts`); the last is filled up with padding.

    The targets of each part are padded to its number of tokens, rounded up to a multiple of `block`. With
    `middles`, which says where middles begin and end, targets have their shares.
    """
    length = row_length(rows)
    for start in range(0, len(rows), size):
        tokens_BT, positions_BT, segments_BT = (np.zeros((size, length), np.int32) for _ in range(3))
        loss_BT, shares_BT = np.zeros((size, length), bool), np.full((size, length), NO_SHARE, np.float32)
        for b, row in enumerate(rows[start : start + size]):
            tokens_BT[b], positions_BT[b] = row["tokens"], row["positions"]
            segments_BT[b], loss_BT[b] = row["segments"], row["loss"]
            if middles:
                shares_BT[b] = shares(row["tokens"], row["segments"], middles)
        loss_BT[:, 0] = False  # nothing precedes the first token
        loss_BT[:, 1:] &= segments_BT[:, 1:] == segments_BT[:, :-1]
        room = -(-size // parts * length // block) * block
        index_CM, targets_CM = np.zeros((parts, room), np.int32), np.zeros((parts, room), np.int32)
        count_C, shares_CM = np.zeros(parts, np.int32), np.full((parts, room), NO_SHARE, np.float32)
        tokens_CP, loss_CP = tokens_BT.reshape(parts, -1), loss_BT.reshape(parts, -1)
        for part in range(parts):
            positions = np.flatnonzero(loss_CP[part])
            count_C[part] = count = len(positions)
            index_CM[part, :count], targets_CM[part, :count] = positions - 1, tokens_CP[part, positions]
            shares_CM[part, :count] = shares_BT.reshape(parts, -1)[part, positions]
        batch = Microbatch(tokens_BT, positions_BT, segments_BT, index_CM, targets_CM, count_C)
        if "reference" in rows[0]:
            batch = batch._replace(
                pairs=_pairs(batch, [row["reference"] for row in rows[start : start + size]])
            )
        yield batch._replace(shares_CM=shares_CM) if middles else batch


def _pairs(batch: Microbatch, references: Sequence[np.ndarray]) -> Pairs:
    """The pairs of a microbatch, from its rows' segments and references."""
    (parts, room), (size, length) = batch.index_CM.shape, batch.tokens_BT.shape
    max_pairs = len(references[0])
    reference_BP = np.full((size, max_pairs), np.nan, np.float32)
    reference_BP[: len(references)] = references
    segment_CM = np.take_along_axis(batch.segments_BT.reshape(parts, -1), batch.index_CM, 1)
    is_real_CM = np.arange(room) < batch.count_C[:, None]
    pair_CM = np.where(is_real_CM, batch.index_CM // length * max_pairs + (segment_CM - 1) // 2, 0)
    sign_CM = np.where(is_real_CM, np.where(segment_CM % 2, 1, -1), 0)
    reference_CP = reference_BP.reshape(parts, -1)
    return Pairs(pair_CM.astype(np.int32), sign_CM.astype(np.float32), reference_CP)
