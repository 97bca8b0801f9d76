"""From Steps to bytes: JSON, server-sent events, lines of JSON. Each stops when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive

from codegemma.generate.request import Infill, Request
from codegemma.generate.running import Step
from codegemma.safety.secrets import safe_files
from codegemma.serve import stats
from codegemma.serve.requests import CompletionService, Job
from codegemma.tokenizer import Tokenizer

log = logging.getLogger("codegemma.serve")

DONE = b"data: [DONE]\n\n"  # the end of OpenAI's and Mistral's streams


@dataclass(frozen=True)
class Answer:
    """A job with all its steps."""

    job: Job
    steps: list[Step]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def stop(self) -> str:
        """Why it ended; see engine.Stop."""
        return self.steps[-1].stop or "end"

    def stop_word(self, tokenizer: Tokenizer) -> str:
        """The stop text that ended it, or ""."""
        if self.stop != "stop_text":
            return ""
        text = tokenizer.decode([step.token for step in self.steps if step.token is not None])
        matches = [(text.find(stop), stop) for stop in self.job.request.stop if stop in text]
        return min(matches)[1] if matches else ""

    def offer(self, language: str | None) -> str:
        """An id for it, by which /v1/events may say whether the suggestion was accepted."""
        timings = self.job.timings()
        latency_ms = timings["queue_ms"] + timings["prompt_ms"] + timings["predicted_ms"]
        return stats.offer(stats.Shown(language or "", latency_ms, len(self.text)))


def service(http: HttpRequest) -> CompletionService:
    """What answers this server's requests."""
    return http.app.state.service  # type: ignore[no-any-return]


def dumps(value: Any) -> bytes:
    """JSON in ASCII, without spaces: llama.vim drops a reply with a space behind a colon."""
    return json.dumps(value, separators=(",", ":")).encode()


def reply(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(dumps(value), status, media_type="application/json")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def line(value: Any) -> bytes:
    """A line of JSON."""
    return dumps(value) + b"\n"


def spelled(data: bytes) -> str:
    """A token's bytes as OpenAI shows them: those that are no text as \\xNN."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


LogprobEntry = Callable[[int, float, bytes], dict[str, Any]]  # (token, log-probability, the token's bytes)


def openai_entry(token: int, logprob: float, data: bytes) -> dict[str, Any]:
    """A token of a log-probability list, as OpenAI and Ollama write it."""
    return {"token": spelled(data), "logprob": logprob, "bytes": list(data)}


def logprob_entries(
    tokenizer: Tokenizer, steps: Sequence[Step], entry: LogprobEntry = openai_entry, keep_empty: bool = True
) -> list[dict[str, Any]]:
    """The log-probabilities of the steps' tokens, each with its alternatives in `top_logprobs`.

    `keep_empty`: whether a token without alternatives has an empty list.
    """

    def entry_of(token: int, logprob: float) -> dict[str, Any]:
        return entry(token, logprob, tokenizer.decode_bytes([token], control=True))

    entries = []
    for step in steps:
        if step.token is not None:
            alternatives = [entry_of(*top) for top in step.top]
            more = {"top_logprobs": alternatives} if alternatives or keep_empty else {}
            entries.append(entry_of(step.token, step.logprob) | more)
    return entries


async def submit(http: HttpRequest, requests: Sequence[Request]) -> list[Job]:
    """Jobs for the requests, after secrets are taken out of their context files (unless --no-redact).

    The text around the cursor, and any other prompt, stay as they are. Raises ValueError and Busy.
    """
    if http.app.state.redact:
        requests = [await _without_secrets(request) for request in requests]
    return await service(http).submit(requests)


async def _without_secrets(request: Request) -> Request:
    """The request with its context files as safety/secrets.py lets them stand in a prompt."""
    prompt = request.prompt
    if not isinstance(prompt, Infill) or not prompt.files:
        return request
    files = await asyncio.to_thread(safe_files, prompt.files)  # a search of megabytes takes time
    return replace(request, prompt=replace(prompt, files=files))


async def collect(http: HttpRequest, requests: Sequence[Request]) -> list[Answer]:
    """The complete answers to all requests. Raises ValueError and Busy as the service does."""
    jobs = await submit(http, requests)
    async with _cancelled_on_disconnect(http.receive, jobs):
        return [Answer(job, [step async for step in job.steps()]) for job in jobs]


@dataclass(frozen=True)
class Dialect:
    """How a protocol writes: `write` makes a part of a stream, `error` the value of an error."""

    error: Callable[[int, str], dict[str, Any]]
    write: Callable[[Any], bytes] = event
    media_type: str = "text/event-stream"

    async def respond(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        stream: bool,
        complete: Callable[[list[Answer]], Any],
        parts: Callable[[list[Job]], AsyncIterator[bytes]],
    ) -> Response:
        """The response to one client: a stream of `parts`, or else the JSON value `complete`."""
        if not stream:
            return reply(complete(await collect(http, requests)))
        jobs = await submit(http, requests)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(http, jobs, parts(jobs)), 200, headers, self.media_type)

    async def _stream(
        self, http: HttpRequest, jobs: list[Job], parts: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """The parts. An error on the way becomes the last part: the status was sent before."""
        async with _cancelled_on_disconnect(http.receive, jobs):
            try:
                async for part in parts:
                    yield part
            except Exception as error:
                log.warning("%s %s: %s", http.method, http.url.path, error)
                yield self.write(self.error(500, str(error)))


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Step]]:
    """The steps of all jobs as they come, each with its job's index."""
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
            index, step = await queue.get()
            if isinstance(step, Exception):
                raise step
            running -= step.stop is not None
            yield index, step
    finally:
        for task in tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def _cancelled_on_disconnect(receive: Receive, jobs: Sequence[Job]) -> AsyncIterator[None]:
    """Cancels the jobs when the client leaves, and those that still run at the end."""

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
