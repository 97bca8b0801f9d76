"""From Steps to bytes: whole answers, server-sent events and lines of JSON, each ended as soon as its reader is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from codegemma.generate.completion import Mode, Trim
from codegemma.generate.engine import Step
from codegemma.prompts import File
from codegemma.serve import stats
from codegemma.serve.requests import Ask, Backend, Fill, Job
from codegemma.tokenizer import Tokenizer

log = logging.getLogger("codegemma.serve")

MOST_STOPS = 64
Stops = str | Annotated[list[str | None], Field(max_length=MOST_STOPS)] | None
Milliseconds = Annotated[float, Field(gt=0, le=86_400_000)]
Limit = Annotated[float, Field(le=86_400_000)]  # llama.cpp's: 0 and below are none


class Extra(BaseModel):
    """Another file, as llama.cpp's clients send it; one without a name has no path line in the prompt."""

    text: str
    filename: str = ""


class Own(BaseModel):
    """The fields that we add to every protocol; see docs/server.md."""

    mode: Mode | None = None
    trim: Trim | None = None
    time_budget_ms: Milliseconds | None = None
    t_max_prompt_ms: Limit | None = None
    t_max_predict_ms: Limit | None = None
    path: str | None = None
    input_extra: list[Extra] | None = None
    adapter: str | None = None
    session: str | None = None
    model: str | None = None

    def fill(self, prefix: str, suffix: str | None, files: Sequence[File] = ()) -> Fill:
        extra = tuple(File(_line(one.filename), one.text) for one in self.input_extra or ())
        return Fill(
            prefix,
            suffix or "",
            self.path or None,
            (*files, *extra),
            self.mode or "auto",
            self.trim or "none",
        )

    def ask(self, request: Request, **parts: Any) -> Ask:
        """An Ask with what our own fields, the headers and the model's name say."""
        adapter = self.adapter
        if adapter is None and self.model:
            name = self.model.rpartition(":")[2]
            adapter = name if name in backend(request).adapters else None
        session = self.session or request.headers.get("x-session-id")
        prompt_ms, predict_ms = (
            self.time_budget_ms or max(self.t_max_prompt_ms or 0, 0),
            max(self.t_max_predict_ms or 0, 0),
        )
        return Ask(
            adapter=adapter,
            session=session,
            client=f"{request.scope.get('client_name', '')} {session or ''}",
            prompt_seconds=prompt_ms / 1000 if prompt_ms else None,
            predict_seconds=predict_ms / 1000 if predict_ms else None,
            **parts,
        )


@dataclass(frozen=True)
class Answer:
    """A job with all its steps."""

    job: Job
    steps: list[Step]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)


def backend(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found


def stops(given: Stops) -> tuple[str, ...]:
    """Stop texts as a tuple; empty ones say nothing."""
    return (given,) if isinstance(given, str) and given else tuple(one for one in given or () if one)


def stop_word(answer: Answer, tokenizer: Tokenizer) -> str:
    """The stop text that ended an answer, or ""."""
    if answer.steps[-1].stop != "stop_text":
        return ""
    text = tokenizer.decode([step.token for step in answer.steps if step.token is not None])
    found = [(text.find(one), one) for one in answer.job.ask.stop if one in text]
    return min(found)[1] if found else ""


def offer(answer: Answer, language: str | None) -> str:
    """An answer's id, by which an event may tell what became of it."""
    timings = answer.job.timings()
    spent = timings["queue_ms"] + timings["prompt_ms"] + timings["predicted_ms"]
    return stats.offer(stats.Shown(language or "", spent, len(answer.text)))


def dumps(value: Any) -> bytes:
    """Compact, for llama.vim drops a reply with a space behind a colon; ASCII, for any string can then be sent."""
    return json.dumps(value, separators=(",", ":")).encode()


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def line(value: Any) -> bytes:
    return dumps(value) + b"\n"


async def collect(request: Request, asks: Sequence[Ask]) -> list[Answer]:
    """Every ask's whole answer. Raises ValueError and Busy as the backend does."""
    jobs = await backend(request).submit(asks)
    async with _watched(request.receive, jobs):
        return [Answer(job, [step async for step in job.steps()]) for job in jobs]


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Step]]:
    """Steps of all jobs as they come, each with its job's index."""
    if len(jobs) == 1:
        async for step in jobs[0].steps():
            yield 0, step
        return
    queue: asyncio.Queue[tuple[int, Step | BaseException]] = asyncio.Queue()

    async def drain(index: int, job: Job) -> None:
        try:
            async for step in job.steps():
                queue.put_nowait((index, step))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(drain(index, job)) for index, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            index, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            left -= found.stop is not None
            yield index, found
    finally:
        for task in tasks:
            task.cancel()


class Stream(Response):
    """Parts as they are made. A fault on the way becomes a last part, for the status has been sent."""

    def __init__(
        self,
        request: Request,
        jobs: Sequence[Job],
        parts: AsyncIterator[bytes],
        fault: Callable[[str], bytes],
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._jobs, self._parts, self._fault = jobs, parts, fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with _watched(receive, self._jobs):
            try:
                async for part in self._parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Exception as error:
                log.warning("%s %s: %s", scope["method"], scope["path"], error)
                await send({"type": "http.response.body", "body": self._fault(str(error)), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def _watched(receive: Receive, jobs: Sequence[Job]) -> AsyncIterator[None]:
    """Cancels the jobs where the client leaves before they end."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            job.cancel()

    watcher = asyncio.ensure_future(gone())
    try:
        yield
    finally:
        watcher.cancel()
        for job in jobs:
            job.cancel()


def _line(path: str) -> str:
    """A client's name of a snippet may be anything; ours stands on one line."""
    return " ".join(path.split())
