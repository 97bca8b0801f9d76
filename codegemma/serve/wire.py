"""From Steps to HTTP responses in JSON, complete or streamed. A client that leaves cancels its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive

from codegemma.generate.completion import is_worth_showing
from codegemma.generate.request import Infill, Request
from codegemma.generate.running import Step
from codegemma.safety.secrets import safe_files
from codegemma.serve import stats
from codegemma.serve.bounds import bounded
from codegemma.serve.logprobs import token_text
from codegemma.serve.requests import CompletionService, Job
from codegemma.tokenizer import Tokenizer

log = logging.getLogger("codegemma.serve")
T = TypeVar("T")

PING_S = 2.0  # a stream that has sent nothing for this long sends a ping
MANY_TOKENS = 500  # it takes some 20 ms to write their texts and log-probabilities
MAX_MESSAGE = 500  # characters of an error, so that it does not repeat a whole request


@dataclass(frozen=True)
class Answer:
    """A job with its steps so far; `index` is its place among the answers to one HTTP request."""

    index: int
    job: Job
    steps: list[Step]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def stop(self) -> str:
        """Why it ended; see running.Stop."""
        return self.steps[-1].stop or "end"

    def stop_word(self, tokenizer: Tokenizer) -> str:
        """The stop text that ended it; "" where none did."""
        if self.stop != "stop_text":
            return ""
        text = tokenizer.decode([step.token for step in self.steps if step.token is not None])
        matches = [(text.find(stop), stop) for stop in self.job.request.stop if stop in text]
        return min(matches)[1] if matches else ""

    def confidence(self) -> dict[str, float | None]:
        """The field `confidence` as a dict, which is empty unless the answer fills in the middle.

        The value is that of the last token (see running.Step), or None if no token is known. It is 0 if the
        text is a loop or has a destructive command.
        """
        infill = self.job.request.prompt
        if not isinstance(infill, Infill):
            return {}
        if self.text.strip() and not is_worth_showing(self.text, 1.0, infill, 0.0):
            return {"confidence": 0.0}
        known = (step.confidence for step in reversed(self.steps) if step.token is not None)
        return {"confidence": next(known, None)}

    def offer(self, language: str | None) -> str:
        """An id, with which the client may tell /v1/events whether the suggestion was accepted."""
        latency_ms = 1000 * (self.job.ended - self.job.queued)
        return stats.offer(stats.Shown(language or "", latency_ms, len(self.text)))


def service_of(http: HttpRequest) -> CompletionService:
    """The service that answers this server's requests."""
    return http.app.state.service  # type: ignore[no-any-return]


def dumps(value: Any) -> bytes:
    """JSON in ASCII, without spaces: llama.vim drops a reply with a space behind a colon."""
    return json.dumps(value, separators=(",", ":")).encode()


def reply(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(dumps(value), status, media_type="application/json")


def shortened(message: str) -> str:
    """An error's message, cut to MAX_MESSAGE characters."""
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."


async def submit(http: HttpRequest, requests: Sequence[Request]) -> list[Job]:
    """A job for each request, once its text is bounded and secrets are removed from its context files (unless
    --no-redact).

    The text around the cursor and all other prompts stay unchanged. Raises ValueError and Busy.
    """
    service, redact, prompts = service_of(http), http.app.state.redact, dict[int, Any]()
    for request in requests:  # the choices of one prompt share it, so it is prepared once
        if id(request.prompt) not in prompts:
            prepared = await asyncio.to_thread(_prepared, request, service, redact)
            prompts[id(request.prompt)] = prepared.prompt
    return await service.submit(
        [replace(request, prompt=prompts[id(request.prompt)]) for request in requests]
    )


def _prepared(request: Request, service: CompletionService, redact: bool) -> Request:
    """The request within the bounds of the model, with the context files that safety/secrets.py allows."""
    request = bounded(request, service.tokenizer, service.context)
    prompt = request.prompt
    if not redact or not isinstance(prompt, Infill) or not prompt.files:
        return request
    return replace(request, prompt=replace(prompt, files=safe_files(prompt.files)))


async def collect(http: HttpRequest, requests: Sequence[Request]) -> list[Answer]:
    """The complete answers to all requests. Raises ValueError and Busy as the service does."""
    jobs = await submit(http, requests)
    async with _cancelled_on_disconnect(http.receive, jobs):
        return [Answer(index, job, [step async for step in job.steps()]) for index, job in enumerate(jobs)]


async def _off_loop(tokens: int, work: Callable[[], T]) -> T:
    """The result of `work`, which writes this number of tokens. Where they are many, it runs in a thread, so
    that other clients need not wait."""
    return await asyncio.to_thread(work) if tokens > MANY_TOKENS else work()


class AnswerWriter:
    """Writes the answers to one HTTP request in a protocol's form. Each protocol has a subclass."""

    media_type = "text/event-stream"  # of a stream
    end_marker = b""  # the last bytes of a stream

    def __init__(self, http: HttpRequest) -> None:
        self.http, self.service = http, service_of(http)
        self.tokenizer = self.service.tokenizer

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        """The JSON value of an error."""
        raise NotImplementedError

    def complete(self, answers: list[Answer]) -> Any:
        """The JSON value of finished answers."""
        raise NotImplementedError

    def begin(self, answers: list[Answer]) -> Iterable[Any]:
        """The JSON values of a stream before the first step."""
        return ()

    def parts(self, answer: Answer, step: Step) -> Iterable[Any]:
        """The JSON values that a stream sends for a step, which is the last of `answer.steps` so far."""
        raise NotImplementedError

    def end(self, answers: list[Answer]) -> Iterable[Any]:
        """The JSON values of a stream after the last step."""
        return ()

    def encode(self, value: Any) -> bytes:
        """A JSON value of a stream as bytes: a server-sent event."""
        return b"data: " + dumps(value) + b"\n\n"

    def ping(self) -> bytes:
        """What a stream sends in a silence, such as while a long prompt is read: clients and proxies give up
        a silent connection. The comment is empty, since Continue takes some words for the end."""
        return b":\n\n"

    def logprob_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token of a log-probability list, as OpenAI and Ollama write it."""
        data = self.tokenizer.decode_bytes([token], control=True)
        return {"token": token_text(data), "logprob": logprob, "bytes": list(data)}

    def logprob_entries(self, steps: Sequence[Step], keep_empty: bool = True) -> list[dict[str, Any]]:
        """The log-probabilities of the steps' tokens, each with its alternatives in `top_logprobs`.

        `keep_empty`: whether a token without alternatives has an empty list.
        """
        entries = []
        for step in steps:
            if step.token is not None:
                alternatives = [self.logprob_entry(*top) for top in step.top]
                listed = {"top_logprobs": alternatives} if alternatives or keep_empty else {}
                entries.append(self.logprob_entry(step.token, step.logprob) | listed)
        return entries

    async def respond(self, requests: Sequence[Request], stream: bool) -> Response:
        """The response with the answers to all requests. Raises ValueError and Busy as the service does."""
        if not stream:
            answers = await collect(self.http, requests)
            tokens = sum(len(answer.steps) + len(answer.job.scores) for answer in answers)
            return await _off_loop(tokens, lambda: reply(self.complete(answers)))
        jobs = await submit(self.http, requests)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(jobs), 200, headers, self.media_type)

    async def _stream(self, jobs: list[Job]) -> AsyncIterator[bytes]:
        """The bytes of a stream. An error becomes its last value, since the status was sent before."""
        answers = [Answer(index, job, []) for index, job in enumerate(jobs)]
        async with _cancelled_on_disconnect(self.http.receive, jobs):
            try:
                for value in self.begin(answers):
                    yield self.encode(value)
                sent = time.monotonic()
                async for index, step in _merged(jobs):
                    parts = b""
                    if step:
                        answer = answers[index]
                        # The first part may echo the prompt's log-probabilities.
                        tokens = 0 if answer.steps else len(answer.job.scores)
                        parts = await _off_loop(tokens, partial(self._next_parts, answer, step))
                    if not parts and time.monotonic() - sent >= PING_S:
                        parts = self.ping()
                    if parts:
                        yield parts
                        sent = time.monotonic()
                for value in self.end(answers):
                    yield self.encode(value)
                yield self.end_marker
            except Exception as error:
                message = shortened(str(error))
                log.warning("%s %s: %s", self.http.method, self.http.url.path, message)
                yield self.encode(self.error(500, message))

    def _next_parts(self, answer: Answer, step: Step) -> bytes:
        """Adds a step to an answer, and returns what a stream sends for it."""
        answer.steps.append(step)
        return b"".join(map(self.encode, self.parts(answer, step)))


async def _merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Step | None]]:
    """The steps of all jobs in the order they arrive, each with its job's index; (0, None) after each PING_S
    without one."""
    queue: asyncio.Queue[tuple[int, Step | Exception]] = asyncio.Queue()

    async def drain(index: int, job: Job) -> None:
        try:
            async for step in job.steps():
                queue.put_nowait((index, step))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(drain(index, job)) for index, job in enumerate(jobs)]
    try:
        running = len(jobs)
        while running:
            try:
                async with asyncio.timeout(PING_S):
                    index, step = await queue.get()
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(step, Exception):
                raise step
            running -= step.stop is not None
            yield index, step
    finally:
        for task in tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def _cancelled_on_disconnect(receive: Receive, jobs: Sequence[Job]) -> AsyncIterator[None]:
    """Cancels the jobs when the client disconnects, and at the end those that still run."""

    def cancel() -> None:
        for job in jobs:
            job.cancel()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()
        cancel()
