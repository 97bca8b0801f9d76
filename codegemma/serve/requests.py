"""What every dialect makes of an HTTP body and every CompletionService answers: a Request becomes a Job of Steps."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from codegemma.generate.engine import Step
from codegemma.generate.request import Infill, Request
from codegemma.generate.trim import Trimmer
from codegemma.prompts import Layout
from codegemma.tokenizer import Tokenizer

PROMPT_TIMEOUT_FACTOR = 2.0  # a prompt that is not read after so many times its time budget is given up


class Busy(Exception):
    """Too many wait already; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Job:
    """A Request being answered: `steps` in the event loop that made it; `cancel` from any thread.

    `resolved` is the request as the engine takes it, with its prompt as token ids.
    """

    def __init__(self, request: Request, resolved: Request) -> None:
        self.request, self.resolved = request, resolved
        self.prompt_ids: list[int] = list(resolved.prompt)  # type: ignore[arg-type]
        self.prompt_tokens, self.cached_tokens, self.predicted_tokens = len(self.prompt_ids), 0, 0
        # Of each token of the prompt but the first, where asked for: its log-probability and the likeliest tokens.
        self.scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self.queued, self.started, self.first, self.ended = time.perf_counter(), 0.0, 0.0, 0.0
        self.stop: str | None = None
        self.has_line = False  # whether a line of the answer is complete
        self.cancelled = threading.Event()
        self.on_cancel: Callable[[], object] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._steps: deque[Step | BaseException] = deque()
        self._arrived = asyncio.Event()
        self._trimmer = Trimmer(request, resolved.layout)

    def take(self, step: Step) -> Step:
        """What a client is shown of a step. The last one has `stop`."""
        now = time.perf_counter()
        step = self._trimmer.push(step)
        self.first = self.first or now
        self.predicted_tokens += step.token is not None
        self.has_line = self.has_line or "\n" in step.text
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
        if self.stop is None and not self.cancelled.is_set():
            self.cancelled.set()
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
        request = self.request
        if not self.first:
            seconds = prompt_timeout(request)
            return seconds is not None and now - self.started > seconds
        return (
            request.predict_seconds is not None
            and self.has_line
            and now - self.first > request.predict_seconds
        )

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
            "mode": self.resolved.layout,
            "adapter": None if self.resolved.adapter == "none" else self.resolved.adapter,
            "stop": self.stop,
        }


def prompt_timeout(request: Request) -> float | None:
    """Seconds after which a prompt that is not read is given up; None: never, as where it only warms the cache."""
    if request.prompt_seconds is None or not request.max_tokens:
        return None
    return PROMPT_TIMEOUT_FACTOR * request.prompt_seconds


def supersedes(new: Job, old: Job) -> bool:
    """Whether one editor session asked for both Infills: the older one is for a text that has changed since."""
    return (
        new.request.session is not None
        and isinstance(new.request.prompt, Infill)
        and isinstance(old.request.prompt, Infill)
        and (new.request.client, new.request.session) == (old.request.client, old.request.session)
    )


class CompletionService(Protocol):
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
    async def submit(self, requests: Sequence[Request]) -> list[Job]: ...
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
