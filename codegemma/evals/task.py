"""What an evaluation is made of (items, answers, verdicts, tasks), and its statistics: pass@k, intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from codegemma.evals.records import Records
from codegemma.generate.request import Request
from codegemma.generate.sampling import Sampling
from codegemma.prompts import Layout, fim, plain
from codegemma.tokenizer import Tokenizer

StopReason = Literal["stop", "token", "length"]
Choice = tuple[str, str]  # (context, continuation)
IdPair = tuple[list[int], list[int]]  # the token ids of a context and of its continuation
Z_95 = 1.959964  # the normal distribution's 97.5 % point, for 95 % intervals


@dataclass(frozen=True)
class ModelOutput:
    """One generated answer, without the stop text ("stop") or the control id ("token") that ended it."""

    text: str
    ids: list[int]
    stop_reason: StopReason
    seconds: float


@dataclass(frozen=True)
class Score:
    """The likelihood of one continuation: the log-probability of each token, in nats."""

    logprobs: list[float]
    greedy: bool  # whether every token was the likeliest one


@dataclass(frozen=True)
class Decoding:
    """How to sample `samples` answers to each prompt; `stop` texts, `stop_ids` or `max_tokens` end them."""

    max_tokens: int
    stop_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1

    def request(self, prompt: list[int], seed: int, adapter: str = "auto") -> Request:
        """The engine's request for one sample."""
        sampling = Sampling(self.temperature, top_p=self.top_p, seed=seed)
        return Request(prompt, self.max_tokens, sampling, self.stop_ids, self.stop, adapter=adapter)


class EvaluatedModel(Protocol):
    """A model under evaluation. A sample depends only on the seed, the prompt and the sample's number, so
    that an interrupted run can resume.
    """

    name: str
    tokenizer: Tokenizer

    def sample(self, prompts: list[list[int]], decoding: Decoding) -> Iterable[tuple[int, int, ModelOutput]]:
        """Yields (index of the prompt, number of the sample, output) in the order in which samples end."""

    def score(self, pairs: list[IdPair]) -> list[Score]:
        """The likelihood of each continuation after its context."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str
    prompt: str = ""
    suffix: str | None = None  # with it, the answer is the text between prompt and suffix
    choices: tuple[Choice, ...] = ()  # with them, the likeliest one is the answer
    target: Any = None  # what the verdict needs: the right answer, its index or the whole record


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and why."""

    passed: bool
    outcome: str
    program: str = ""  # the program that was run, if one was
    output: str = ""  # what it printed, or the answer that was expected
    exact: bool | None = None  # whether the answer equals the reference; None where that is not measured


ProgramBuilder = Callable[[Item, ModelOutput], str]
Judge = Callable[[Sequence[Item], Sequence[ModelOutput]], Iterator[tuple[int, Verdict]]]
ItemLoader = Callable[[Records], tuple[list[Item], str]]  # the questions, and a note for the report


@dataclass(frozen=True)
class GenerationTask:
    """A benchmark whose answers are generated.

    `toolchain_version` returns the version of the compiler or interpreter that runs the answers; it raises
    LookupError where that does not work. `layout` is the order of the prompt of an item with a suffix. None:
    the model's own, which `run.run` fills in before it asks for prompts; without that, psm.
    """

    name: str
    title: str
    load_items: ItemLoader
    judge: Judge
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    layout: Layout | None = None
    group: str = "code"
    toolchain_version: Callable[[], str] | None = None

    def prompt(self, tokenizer: Tokenizer, item: Item) -> list[int]:
        """The token ids of the item's prompt."""
        if item.suffix is None:
            return plain(tokenizer, item.prompt).ids
        return fim(tokenizer, item.prompt, item.suffix, layout=self.layout or "psm").ids


@dataclass(frozen=True)
class ChoiceTask:
    """A benchmark whose answer is the likeliest choice by one of the rules of `rank`."""

    name: str
    title: str
    load_items: ItemLoader
    rule: Literal["raw", "normalised"] = "raw"
    group: str = "language"


Task = GenerationTask | ChoiceTask


def cut(output: ModelOutput, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of `stops`, and whether a stop text ended the answer."""
    offsets = [offset for stop in stops if (offset := output.text.find(stop)) >= 0]
    return output.text[: min(offsets, default=None)], bool(offsets) or output.stop_reason == "stop"


def encode_choice(tokenizer: Tokenizer, choice: Choice) -> IdPair:
    """Encodes both texts as one; a token with characters of both belongs to the continuation."""
    context, continuation = choice
    context_ids = plain(tokenizer, context).ids
    ids = plain(tokenizer, context + continuation).ids
    differences = (i for i, (a, b) in enumerate(zip(context_ids, ids, strict=False)) if a != b)
    shared = min(next(differences, len(context_ids)), len(ids) - 1)
    return ids[:shared], ids[shared:]


def rank(item: Item, scores: Sequence[Score]) -> dict[str, int]:
    """The index of the likeliest choice by two rules: "raw" compares the log-probabilities, "normalised"
    divides each by the choice's length in characters.
    """
    totals = [sum(score.logprobs) for score in scores]
    lengths = [max(len(continuation.strip()), 1) for _, continuation in item.choices]
    normalised = [total / length for total, length in zip(totals, lengths, strict=True)]
    return {"raw": totals.index(max(totals)), "normalised": normalised.index(max(normalised))}


def subset(items: list[Item], limit: int | None) -> list[Item]:
    """The `limit` items with the smallest hashes of their ids, in the set's order; all without a limit."""
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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's where all values are 0 or 1, otherwise the normal distribution's,
    clipped to [0, 1] where all values lie in it.
    """
    n, mean, z = len(values), sum(values) / len(values), Z_95
    if all(value in (0.0, 1.0) for value in values):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    half = _half_width(values)
    low, high = (0.0, 1.0) if all(0 <= value <= 1 for value in values) else (-math.inf, math.inf)
    return max(low, mean - half), min(high, mean + half)


def _half_width(values: Sequence[float]) -> float:
    """Half the width of the normal distribution's 95 % interval of the mean."""
    n, mean = len(values), sum(values) / len(values)
    return Z_95 * math.sqrt(sum((value - mean) ** 2 for value in values) / max(n - 1, 1) / n)


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two runs on the same items, after - before, with its 95 % interval."""

    items: int
    difference: float
    low: float
    high: float
    p: float  # of the exact sign test (McNemar's) on the items that changed
    gained: list[str] = field(default_factory=list)  # ids of the items whose score rose
    lost: list[str] = field(default_factory=list)


def compare(before: dict[str, float], after: dict[str, float]) -> Comparison:
    """Compares scores by item id, on the items that both have. Raises ValueError where there are none."""
    ids = [id for id in before if id in after]
    if not ids:
        raise ValueError("the two runs share no item: compare runs of the same benchmark")
    deltas = [after[id] - before[id] for id in ids]
    mean = sum(deltas) / len(ids)
    half = _half_width(deltas)
    gained, lost = ([id for id, d in zip(ids, deltas, strict=True) if d * sign > 0] for sign in (1, -1))
    changed = len(gained) + len(lost)
    tail = sum(math.comb(changed, i) for i in range(min(len(gained), len(lost)) + 1)) / 2**changed
    p = min(1.0, 2 * tail) if changed else 1.0
    return Comparison(len(ids), mean, mean - half, mean + half, p, gained, lost)
