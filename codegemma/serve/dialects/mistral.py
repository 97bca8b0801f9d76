"""Mistral's fill-in-the-middle: asked like a completion, answered like a chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from codegemma.generate.sampling import Sampling
from codegemma.serve.dialects.openai import FINISH, usage
from codegemma.serve.requests import Job
from codegemma.serve.wire import Own, Stops, Stream, backend, collect, event, merged, reply, stops

router = APIRouter(tags=["Mistral"])


class Fim(Own):
    prompt: str
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    random_seed: int | None = None
    stop: Stops = None
    stream: bool | None = None


def error(status: int, message: str) -> dict[str, Any]:
    return {
        "object": "error",
        "message": message,
        "type": "invalid_request_error" if status < 500 else "internal_error",
        "param": None,
        "code": str(status),
    }


@router.post("/v1/fim/completions")
@router.post("/fim/completions", include_in_schema=False)
async def complete(body: Fim, request: Request) -> Response:
    seed = secrets.randbits(32) if body.random_seed is None else body.random_seed
    sampling = Sampling(body.temperature or 0.0, top_p=1.0 if body.top_p is None else body.top_p, seed=seed)
    ask = body.ask(
        request,
        what=body.fill(body.prompt, body.suffix),
        sampling=sampling,
        stop=stops(body.stop),
        max_tokens=128 if body.max_tokens is None else body.max_tokens,
    )
    head = {
        "id": secrets.token_hex(16),
        "created": int(time.time()),
        "model": body.model or backend(request).name,
    }
    if body.stream:
        jobs = await backend(request).submit([ask])
        return Stream(
            request,
            jobs,
            _stream({**head, "object": "chat.completion.chunk"}, jobs[0]),
            lambda message: event(error(500, message)),
        )
    (answer,) = await collect(request, [ask])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "tool_calls": None},
        "finish_reason": FINISH[answer.steps[-1].stop],
    }
    return reply(
        {
            **head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage([answer.job]),
            "timings": answer.job.timings(),
        }
    )


async def _stream(head: dict[str, Any], job: Job) -> AsyncIterator[bytes]:
    """Every chunk has `delta.content`, for Tabby insists on a string."""
    role: dict[str, str] = {"role": "assistant"}
    async for _, step in merged([job]):
        if step.text or step.stop is not None:
            finish = FINISH[step.stop] if step.stop is not None else None
            choice = {"index": 0, "delta": {**role, "content": step.text}, "finish_reason": finish}
            last = {"usage": usage([job]), "timings": job.timings()} if finish else {}
            yield event({**head, "choices": [choice], **last})
            role = {}
    yield b"data: [DONE]\n\n"
