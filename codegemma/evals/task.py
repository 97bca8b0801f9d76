"""What an evaluation is: the items of a task, how a model answers them, how answers become verdicts and a
score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from codegemma.evals.records import Records
from codegemma.prompts import Layout, fim, plain
from codegemma.tokenizer import Tokenizer

StopReason = Literal["stop", "token", "length"]
Choice = tuple[str, str]  # context, continuation
Z_95 = 1.959964  # the normal distribution's 97.5 % point: 95 % intervals


@dataclass(frozen=True)
class ModelOutput:
    """One answer. `text` ends before the stop text ("stop") or control id ("token") that ended it."""

    text: str
    ids: list[int]
    stop_reason: StopReason
    seconds: float


@dataclass(frozen=True)
class Score:
    """Of one continuation: the log-probability of each of its tokens, and whether each was the likeliest
    token."""

    logprobs: list[float]
    greedy: bool


@dataclass(frozen=True)
class Decoding:
    """How answers are sampled: `samples` of each prompt, ended by `stop` texts, `stop_ids` or
    `max_tokens`."""

    max_tokens: int
    stop_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1


class EvaluatedModel(Protocol):
    """A model that answers. Its randomness depends on (seed, prompt ids, sample number) alone, so that runs
    resume."""

    name: str
    tokenizer: Tokenizer

    def sample(self, prompts: list[list[int]], decoding: Decoding) -> Iterable[tuple[int, int, ModelOutput]]:
        """(index of the prompt, number of the sample, output), in the order in which they end."""

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """One score for each (context, continuation)."""


@dataclass(frozen=True)
class Item:
    """One question. With `suffix`, fill in between `prompt` and it. With `choices`, rank these instead of
    generating."""

    id: str
    prompt: str = ""
    suffix: str | None = None
    choices: tuple[Choice, ...] = ()
    target: Any = None


@dataclass(frozen=True)
class Verdict:
    """`exact` says whether the answer equals the reference; None for sets that do not ask this."""

    passed: bool
    outcome: str
    program: str = ""
    output: str = ""
    exact: bool | None = None


Program = Callable[[Item, ModelOutput], str]
Judge = Callable[[Sequence[Item], Sequence[ModelOutput]], Iterator[tuple[int, Verdict]]]
Items = Callable[[Records], tuple[list[Item], str]]  # the questions, and a note for the report


@dataclass(frozen=True)
class GenerationTask:
    """A task whose answers are text. `runs_on` gives the version of what ran the programs."""

    name: str
    title: str
    items: Items
    judge: Judge
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    layout: Layout = "psm"
    group: str = "code"
    runs_on: Callable[[], str] | None = None

    def prompt(self, tokenizer: Tokenizer, item: Item) -> list[int]:
        if item.suffix is None:
            return plain(tokenizer, item.prompt).ids
        return fim(tokenizer, item.prompt, item.suffix, layout=self.layout).ids


@dataclass(frozen=True)
class ChoiceTask:
    """A task whose answer is the likeliest choice: by log-probability ("raw"), or by that divided by the
    choice's length in characters ("normalised")."""

    name: str
    title: str
    items: Items
    by: Literal["raw", "normalised"] = "raw"
    group: str = "language"


Task = GenerationTask | ChoiceTask


def cut(output: ModelOutput, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of `stops`, and whether a stop text ended it."""
    offsets = [offset for stop in stops if (offset := output.text.find(stop)) >= 0]
    return output.text[: min(offsets, default=None)], bool(offsets) or output.stop_reason == "stop"


def encode_choice(tokenizer: Tokenizer, choice: Choice) -> tuple[list[int], list[int]]:
    """(context, continuation) ids of both texts encoded as one; a token across the seam belongs to the
    continuation."""
    context, continuation = choice
    context_ids = plain(tokenizer, context).ids
    ids = plain(tokenizer, context + continuation).ids
    differences = (i for i, (a, b) in enumerate(zip(context_ids, ids, strict=False)) if a != b)
    shared = min(next(differences, len(context_ids)), len(ids) - 1)
    return ids[:shared], ids[shared:]


def rank(item: Item, scores: Sequence[Score]) -> dict[str, int]:
    """The index of the chosen answer by each rule ("raw", "normalised")."""
    totals = [sum(score.logprobs) for score in scores]
    lengths = [max(len(continuation.strip()), 1) for _, continuation in item.choices]
    normalised = [total / length for total, length in zip(totals, lengths, strict=True)]
    return {"raw": totals.index(max(totals)), "normalised": normalised.index(max(normalised))}


def subset(items: list[Item], limit: int | None) -> list[Item]:
    """The same `limit` items on every machine, spread over the set by a hash of their ids, in the set's
    order."""
    if limit is None or limit >= len(items):
        return items
    chosen = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())[:limit]
    ids = {item.id for item in chosen}
    return [item for item in items if item.id in ids]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, eq. 1).

    Raises ValueError where the counts are impossible.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got {correct=} {samples=} {k=}"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(values: Sequence[float], z: float = Z_95) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's where all values are 0 or 1, else the normal one (shares stay in 0
    to 1)."""
    n, mean = len(values), sum(values) / len(values)
    if all(value in (0.0, 1.0) for value in values):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    half = z * math.sqrt(sum((value - mean) ** 2 for value in values) / max(n - 1, 1) / n)
    low, high = (0.0, 1.0) if all(0 <= value <= 1 for value in values) else (-math.inf, math.inf)
    return max(low, mean - half), min(high, mean + half)


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two runs on the same items, after - before; `p` of the exact sign (McNemar)
    test."""

    items: int
    difference: float
    low: float
    high: float
    p: float
    gained: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def compare(before: dict[str, float], after: dict[str, float]) -> Comparison:
    """Compares scores by item id, on the items that both have. Raises ValueError where there are none."""
    ids = [id for id in before if id in after]
    if not ids:
        raise ValueError("the two runs share no item: compare runs of the same benchmark")
    deltas = [after[id] - before[id] for id in ids]
    mean = sum(deltas) / len(ids)
    half = Z_95 * math.sqrt(sum((d - mean) ** 2 for d in deltas) / max(len(ids) - 1, 1) / len(ids))
    gained, lost = ([id for id, d in zip(ids, deltas, strict=True) if d * sign > 0] for sign in (1, -1))
    changed = len(gained) + len(lost)
    tail = sum(math.comb(changed, i) for i in range(min(len(gained), len(lost)) + 1)) / 2**changed
    p = min(1.0, 2 * tail) if changed else 1.0
    return Comparison(len(ids), mean, mean - half, mean + half, p, gained, lost)
