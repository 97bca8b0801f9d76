"""What every dialect is parsed into, and what every backend answers with: an Ask becomes a Job, a stream of Steps.

A dialect makes Asks and folds Steps; a backend makes Steps of Asks. Neither knows the other.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from codegemma import prompts
from codegemma.generate import completion
from codegemma.generate.completion import Hole, Mode, Trim
from codegemma.generate.engine import Step
from codegemma.generate.model import truncate_left
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File, Layout, Message
from codegemma.tokenizer import Tokenizer

LATE = 2.0  # a prompt unread after so many times its budget is given up


@dataclass(frozen=True)
class Fill:
    """A hole in a file."""

    prefix: str
    suffix: str = ""
    path: str | None = None
    files: tuple[File, ...] = ()
    mode: Mode = "auto"
    trim: Trim = "none"


@dataclass(frozen=True)
class Text:
    """Text or ids to go on from. `raw` reads control tokens spelled in it; `score` wants each prompt token's
    log-probability; `truncate` drops the oldest tokens of too long a prompt."""

    prompt: str | tuple[int, ...]
    raw: bool = False
    score: bool = False
    truncate: bool = False


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Ask:
    """One answer that a client wants. `session` names an editor, whose newest Fill cancels its older ones; `client` is
    whom fairness counts. max_tokens 0 only reads the prompt."""

    what: Fill | Text | Chat
    max_tokens: int = 128
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()  # beside those that end every prompt of its kind
    top: int = 0
    adapter: str | None = None  # None: the model's own choice; "none": the base
    client: str = ""
    session: str | None = None
    prompt_seconds: float | None = None  # to the first token: sizes a Fill's context
    predict_seconds: float | None = None  # after it: ends at the next look once a line is complete
    indent: int = 0  # a line indented less ends a Fill

    def __post_init__(self) -> None:
        for name, value in (("time budget", self.prompt_seconds), ("t_max_predict_ms", self.predict_seconds)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"the {name} must be above 0 ms, got {value * 1000:g}")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, got {self.max_tokens}")


class Busy(Exception):
    """Too many wait already; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Desk(Protocol):
    """What prompts are made with; `engine.Engine` is one."""

    prefill_rate: float

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def context(self) -> int: ...
    def cached(self, ids: Sequence[int], adapter: str | None = None) -> int: ...


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    stops: frozenset[int]
    layout: Layout | None = None  # of a Fill


def prompt_of(desk: Desk, ask: Ask, orders: Collection[str], adapter: str | None = None) -> Prompt:
    """The ids that an Ask means to a model, with its adapter, that was trained to fill holes in `orders` ("psm", "spm").
    Raises ValueError where it makes no prompt."""
    tokenizer, what = desk.tokenizer, ask.what
    if tokenizer is None:
        if isinstance(what, Text) and not isinstance(what.prompt, str):
            return Prompt(list(what.prompt), frozenset())
        raise ValueError("this model came without a tokenizer, so text cannot be read: send token ids")
    most = desk.context - min(ask.max_tokens, desk.context // 2)
    if isinstance(what, Fill):
        layout = completion.layout_for(what.mode, bool(orders), "spm" in orders)
        budget = ask.prompt_seconds if ask.max_tokens else None  # what only warms the cache is not waited for
        affordable = None if budget is None else max(16, int(min(budget * desk.prefill_rate, desk.context)))
        hole = Hole(what.prefix, what.suffix, what.path, what.files)
        ids = completion.prompt_within(desk, hole, layout, most, affordable, adapter)  # type: ignore[arg-type]
        return Prompt(ids, prompts.fim_stops(tokenizer), layout)
    if isinstance(what, Chat):
        made = prompts.chat(tokenizer, what.messages)
        return Prompt(made.ids, made.stops)
    if isinstance(what.prompt, str):
        ids = (prompts.raw if what.raw else prompts.plain)(tokenizer, what.prompt).ids
    else:
        ids = list(what.prompt)
    return Prompt(truncate_left(ids, most) if what.truncate else ids, prompts.fim_stops(tokenizer))


class Job:
    """An Ask on its way: an async iterator of Steps, made in the loop that reads them; `cancel` from any thread."""

    def __init__(self, ask: Ask, prompt: Prompt, adapter: str | None = None) -> None:
        self.ask, self.prompt, self.adapter = ask, prompt, adapter
        self.prompt_tokens, self.cached_tokens, self.predicted_tokens = len(prompt.ids), 0, 0
        self.scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []  # of prompt[1:], where asked for
        self.queued, self.started, self.first, self.ended = time.perf_counter(), 0.0, 0.0, 0.0
        self.stop: str | None = None
        self.lines = False  # whether a line is complete
        self.gone = threading.Event()  # nobody reads it any more
        self.on_cancel: Callable[[], object] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._steps: deque[Step | BaseException] = deque()
        self._arrived = asyncio.Event()
        self._show = _shown(ask, prompt.layout)

    def take(self, step: Step) -> Step:
        """What a client is shown of a step. The last one has `stop`."""
        now = time.perf_counter()
        step = self._show(step)
        self.first = self.first or now
        self.predicted_tokens += step.token is not None
        self.lines = self.lines or "\n" in step.text
        if step.stop is not None:
            self.stop, self.ended = step.stop, now
        return step

    def put(self, steps: Iterable[Step | BaseException]) -> None:
        """To be called in the reader's loop."""
        self._steps.extend(steps)
        self._arrived.set()

    def post(self, steps: Iterable[Step | BaseException]) -> None:
        """From any thread; a loop that has ended needs no answers."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.put, steps)

    def cancel(self) -> None:
        if self.stop is None and not self.gone.is_set():
            self.gone.set()
            self.on_cancel()

    async def steps(self) -> AsyncIterator[Step]:
        while True:
            while not self._steps:
                self._arrived.clear()
                await self._arrived.wait()
            step = self._steps.popleft()
            if isinstance(step, BaseException):
                raise step
            yield step
            if step.stop is not None:
                return

    def overdue(self, now: float) -> bool:
        """Past a deadline of its own: the prompt's, or the answer's once it has a whole line."""
        ask = self.ask
        if not self.first:
            return (
                ask.prompt_seconds is not None
                and ask.max_tokens > 0
                and now - self.started > LATE * ask.prompt_seconds
            )
        return ask.predict_seconds is not None and self.lines and now - self.first > ask.predict_seconds

    def timings(self) -> dict[str, Any]:
        ended = self.ended or time.perf_counter()
        started = self.started or ended
        first = self.first or ended
        read, predicted = self.prompt_tokens - self.cached_tokens, self.predicted_tokens
        prompt_ms, predicted_ms = 1000 * (first - started), 1000 * (ended - first)
        return {
            "prompt_n": read,
            "cache_n": self.cached_tokens,
            "prompt_ms": _round(prompt_ms),
            "prompt_per_token_ms": _round(prompt_ms / max(read, 1)),
            "prompt_per_second": _round(1000 * read / max(prompt_ms, 1e-3)),
            "predicted_n": predicted,
            "predicted_ms": _round(predicted_ms),
            "predicted_per_token_ms": _round(predicted_ms / max(predicted, 1)),
            "predicted_per_second": _round(1000 * predicted / max(predicted_ms, 1e-3)),
            "queue_ms": _round(1000 * (started - self.queued)),
            "mode": self.prompt.layout,
            "adapter": self.adapter,
            "stop": self.stop,
        }


def supersedes(new: Job, old: Job) -> bool:
    """Whether one editor asked for both: it goes on typing, and the older one is for a text that was."""
    return (
        new.ask.session is not None
        and isinstance(new.ask.what, Fill)
        and isinstance(old.ask.what, Fill)
        and (new.ask.client, new.ask.session) == (old.ask.client, old.ask.session)
    )


class Backend(Protocol):
    """What answers: this machine's model, or another server. `slots` jobs run at once; `size` is the model's, in bytes."""

    name: str
    title: str
    tokenizer: Tokenizer
    context: int
    slots: int
    size: int
    metrics: Metrics

    @property
    def fim_trained(self) -> bool: ...
    @property
    def mode(self) -> Layout: ...
    @property
    def chats(self) -> bool: ...
    @property
    def adapters(self) -> list[str]: ...
    async def submit(self, asks: Sequence[Ask]) -> list[Job]: ...
    async def close(self) -> None: ...


@dataclass
class Metrics:
    """Totals since the start; `running` and `waiting` are jobs now."""

    counts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "requests",
                "rejected",
                "cancelled",
                "prompt_tokens",
                "cached_tokens",
                "predicted_tokens",
                "prompt_seconds",
                "predicted_seconds",
            ),
            0.0,
        )
    )
    buckets: dict[float, int] = field(
        default_factory=lambda: dict.fromkeys(
            (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf), 0
        )
    )
    waited: float = 0.0  # seconds from the queue to the first token, summed
    running: int = 0
    waiting: int = 0

    def finished(self, job: Job) -> None:
        counts, started = self.counts, job.started or job.ended
        first = job.first or job.ended
        counts["requests"] += 1
        counts["cancelled"] += job.stop == "cancelled"
        counts["prompt_tokens"] += job.prompt_tokens
        counts["cached_tokens"] += job.cached_tokens
        counts["predicted_tokens"] += job.predicted_tokens
        counts["prompt_seconds"] += first - started
        counts["predicted_seconds"] += job.ended - first
        if job.predicted_tokens:
            self.waited += first - job.queued
            for bound in self.buckets:
                self.buckets[bound] += first - job.queued <= bound


def _round(value: float) -> float:
    return round(value, 3)


def _shown(ask: Ask, layout: Layout | None) -> Callable[[Step], Step]:
    """What is left of each step of a Fill after trimming; one step in, one step out."""
    what = ask.what
    shown: Callable[[Step], Step] = _Indented(ask.indent).push if ask.indent else lambda step: step
    if not isinstance(what, Fill) or (what.trim == "none" and layout != "prefix"):
        return shown
    fed: deque[Step] = deque()
    trimmed = completion.trimmed(iter(fed.popleft, None), what.prefix, what.suffix, what.trim)  # type: ignore[arg-type]

    def push(step: Step) -> Step:
        fed.append(step)
        return shown(next(trimmed))

    return push


class _Indented:
    """Ends where a line after the first one is indented by fewer than `least` blanks, before that line."""

    def __init__(self, least: int) -> None:
        self.least, self.held, self.inside = least, "", True

    def push(self, step: Step) -> Step:
        out = ""
        for character in step.text:
            if (
                not self.inside
                and not character.isspace()
                and len(self.held.rpartition("\n")[2]) < self.least
            ):
                return replace(step, text=out, stop=step.stop or "end")
            if character == "\n":
                self.inside = False
            if self.inside:
                out += character
            else:
                self.held += character
                if not character.isspace() or len(self.held.rpartition("\n")[2]) >= self.least:
                    out, self.held, self.inside = out + self.held, "", True
        return replace(step, text=out + self.held * (step.stop is not None))
