"""A Job is a Request that is being answered; a CompletionService, such as the scheduler, answers it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from codegemma import hub
from codegemma.config import Preset
from codegemma.generate.completion import Trimmer
from codegemma.generate.request import Infill, Request
from codegemma.generate.running import Step
from codegemma.prompts import Layout
from codegemma.serve.metrics import Metrics
from codegemma.tokenizer import Tokenizer

PROMPT_TIMEOUT_FACTOR = 2.0  # a job without a token after this many time budgets is given up


class Busy(Exception):
    """The service takes no further request now; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Job:
    """A Request that is being answered. Iterate over `steps` in the event loop that made the job; `cancel`
    works from any thread.

    `resolved` is the request with token ids as its prompt, as the engine takes it. `queued`, `started`,
    `first` (when the first token came) and `ended` are times of `time.perf_counter`, 0 until they are known.
    """

    def __init__(self, request: Request, resolved: Request) -> None:
        self.request, self.resolved = request, resolved
        self.prompt_ids = list(resolved.prompt_ids)
        self.prompt_tokens, self.cached_tokens, self.predicted_tokens = len(self.prompt_ids), 0, 0
        # For each prompt token but the first: its log-probability and the likeliest tokens. Empty unless the
        # request asks for scores.
        self.scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self.queued, self.started, self.first, self.ended = time.perf_counter(), 0.0, 0.0, 0.0
        self.stop: str | None = None
        self.has_line = False  # whether a line of the answer is complete
        self.cancelled = threading.Event()
        self.on_cancel: Callable[[], object] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | Exception] = asyncio.Queue()
        self._trimmer = Trimmer(request, resolved.layout)

    def take(self, step: Step) -> Step:
        """Counts a step, and returns it with its text trimmed. It is the last one if it has `stop`."""
        now = time.perf_counter()
        step = self._trimmer.push(step)
        self.first = self.first or now
        self.predicted_tokens += step.token is not None
        self.has_line = self.has_line or "\n" in step.text
        if step.stop is not None:
            self.stop, self.ended = step.stop, now
        return step

    def post(self, step: Step | Exception) -> None:
        """Passes a step, or an error, from any thread to the reader of `steps`, if its event loop is open."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    def cancel(self) -> None:
        """Asks the service to stop the job. Does nothing if the job has ended."""
        if self.stop is None and not self.cancelled.is_set():
            self.cancelled.set()
            self.on_cancel()

    async def steps(self) -> AsyncIterator[Step]:
        """The steps in the order they arrive. Raises the error of a job that failed."""
        while True:
            step = await self._steps.get()
            if isinstance(step, Exception):
                raise step
            yield step
            if step.stop is not None:
                return

    def overdue(self, now: float) -> bool:
        """Whether the first token is late, or the time since then is up and a line is complete."""
        if not self.first:
            seconds = prompt_timeout(self.request)
            return seconds is not None and now - self.started > seconds
        seconds = self.request.predict_seconds
        return seconds is not None and self.has_line and now - self.first > seconds

    def timings(self) -> dict[str, Any]:
        """Counts and times so far, with llama.cpp's names where it has one."""
        ended = self.ended or time.perf_counter()
        started = self.started or ended
        first = self.first or ended
        prompt_n = self.prompt_tokens - self.cached_tokens
        return {
            "prompt_n": prompt_n,  # also in _speed: here it keeps its place in front of cache_n
            "cache_n": self.cached_tokens,
            **_speed("prompt", prompt_n, first - started),
            **_speed("predicted", self.predicted_tokens, ended - first),
            "queue_ms": round(1000 * (started - self.queued), 3),
            "mode": self.resolved.layout,
            "adapter": None if self.resolved.adapter == "none" else self.resolved.adapter,
            "stop": self.stop,
        }


def _speed(kind: str, tokens: int, seconds: float) -> dict[str, Any]:
    milliseconds = 1000 * seconds
    return {
        f"{kind}_n": tokens,
        f"{kind}_ms": round(milliseconds, 3),
        f"{kind}_per_token_ms": round(milliseconds / max(tokens, 1), 3),
        f"{kind}_per_second": round(1000 * tokens / max(milliseconds, 1e-3), 3),
    }


def prompt_timeout(request: Request) -> float | None:
    """How many seconds a job may take to its first token before it is given up. None, which is no limit,
    without a time budget, and for a request that only warms the cache."""
    if request.prompt_seconds is None or not request.max_tokens:
        return None
    return PROMPT_TIMEOUT_FACTOR * request.prompt_seconds


def supersedes(new: Job, old: Job) -> bool:
    """Whether both are Infills of one editor session: the text of the old one has changed since."""
    return (
        new.request.session is not None
        and isinstance(new.request.prompt, Infill)
        and isinstance(old.request.prompt, Infill)
        and (new.request.client, new.request.session) == (old.request.client, old.request.session)
    )


def can_chat(preset: Preset | None, tokenizer: Tokenizer) -> bool:
    """Whether a model was tuned for chats. Without a preset: whether its vocabulary has tokens for turns."""
    return "chat" in preset.uses if preset else tokenizer.control.start_of_turn is not None


def model_id(preset: Preset | None, path: Path) -> tuple[str, list[str]]:
    """The name of a model for clients, such as codegemma-2b, and its aliases."""
    if preset is not None:
        name, alias = preset.hub.rpartition("/")[2], preset.name
    else:
        name, alias = hub.name_of(path), path.stem
    return name, [alias] if alias != name else []


class CompletionService(Protocol):
    """What answers the requests: this machine's model, or another server."""

    name: str
    aliases: list[str]  # other names that clients may know the model by
    title: str
    tokenizer: Tokenizer
    context: int  # in tokens
    slots: int  # jobs that run at once
    size: int  # of the model, in bytes
    chats: bool  # whether the model was tuned for chats
    metrics: Metrics

    @property
    def default_layout(self) -> Layout:
        """The layout that the mode "auto" means: "prefix" if the model was not trained to fill in the
        middle."""

    @property
    def reads_files(self) -> bool:
        """Whether the model was trained on documents with other files in front; see `Model.reads_files`."""

    @property
    def adapters(self) -> list[str]:
        """The names that a request may choose."""

    async def submit(self, requests: Sequence[Request]) -> list[Job]:
        """A job for each request. Raises ValueError on what the model cannot do, Busy where too many wait."""

    async def close(self) -> None:
        """Cancels all jobs and frees what the service holds."""
