"""Mistral's fill-in-the-middle: its requests are like a completion's, its answers like a chat's."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from codegemma.serve.bodies import ExtensionFields, StopTexts, TokenCount
from codegemma.serve.dialects.openai import finish_reason, usage
from codegemma.serve.requests import Job
from codegemma.serve.wire import DONE, Answer, Dialect, event, merged, service

router = APIRouter(tags=["Mistral"])


class MistralFimBody(ExtensionFields):
    prompt: str
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: TokenCount | None = None
    random_seed: int | None = None
    stop: StopTexts = None
    stream: bool | None = None


def error(status: int, message: str) -> dict[str, Any]:
    """The value of an error."""
    kind = "invalid_request_error" if status < 500 else "internal_error"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": str(status)}


DIALECT = Dialect(error)


@router.post("/v1/fim/completions")
@router.post("/fim/completions", include_in_schema=False)
async def complete(body: MistralFimBody, http: HttpRequest) -> Response:
    """Fills the middle between prompt and suffix."""
    request = body.request(http, body.infill(body.prompt, body.suffix), 128)
    created, name = int(time.time()), body.model or service(http).name
    head = {"id": secrets.token_hex(16), "created": created, "model": name}

    def complete_answer(answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        message = {"role": "assistant", "content": answer.text, "tool_calls": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(answer.stop)}
        end = {"usage": usage([answer.job]), "timings": answer.job.timings()}
        return {**head, "object": "chat.completion", "choices": [choice], **end}

    return await DIALECT.respond(
        http, [request], bool(body.stream), complete_answer, lambda jobs: _chunks(head, jobs[0])
    )


async def _chunks(head: dict[str, Any], job: Job) -> AsyncIterator[bytes]:
    """Every chunk has a string in `delta.content`, which Tabby insists on."""
    role: dict[str, str] = {"role": "assistant"}
    async for _, step in merged([job]):
        if step.text or step.stop is not None:
            reason = finish_reason(step.stop)
            choice = {"index": 0, "delta": {**role, "content": step.text}, "finish_reason": reason}
            end = {"usage": usage([job]), "timings": job.timings()} if reason else {}
            yield event({**head, "object": "chat.completion.chunk", "choices": [choice], **end})
            role = {}
    yield DONE
