"""Mistral's fill-in-the-middle: its bodies are like OpenAI's completions, its answers like OpenAI's chats."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from codegemma.generate.running import Step
from codegemma.serve.bodies import INFILL_TOKENS, ExtensionFields, JsonRoute, SamplingFields, TokenCount
from codegemma.serve.dialects.openai import DONE, finish_reason, usage
from codegemma.serve.wire import Answer, AnswerWriter

router = APIRouter(tags=["Mistral"], route_class=JsonRoute)


class MistralFimBody(ExtensionFields, SamplingFields):
    prompt: str
    suffix: str | None = None
    max_tokens: TokenCount | None = None
    random_seed: int | None = None
    stream: bool | None = None


class MistralWriter(AnswerWriter):
    """Writes one answer. Every chunk has a string in `delta.content`: Tabby, which can use a Mistral server
    as its model, requires it."""

    end_marker = DONE

    def __init__(self, http: HttpRequest, body: MistralFimBody) -> None:
        super().__init__(http)
        created, model = int(time.time()), body.model or self.service.name
        self.head = {"id": secrets.token_hex(16), "created": created, "model": model}
        self.role: dict[str, str] = {"role": "assistant"}  # in the first chunk

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        kind = "invalid_request_error" if status < 500 else "internal_error"
        return {"object": "error", "message": message, "type": kind, "param": None, "code": str(status)}

    def complete(self, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        message = {"role": "assistant", "content": answer.text, "tool_calls": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(answer.stop)}
        choice |= answer.confidence()
        return {**self.head, "object": "chat.completion", "choices": [choice], **_totals(answer)}

    def parts(self, answer: Answer, step: Step) -> Iterable[dict[str, Any]]:
        if step.text or step.stop is not None:
            delta, self.role = {**self.role, "content": step.text}, {}
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason(step.stop)}
            choice |= answer.confidence() if step.stop else {}
            totals = _totals(answer) if step.stop else {}
            yield {**self.head, "object": "chat.completion.chunk", "choices": [choice], **totals}


def _totals(answer: Answer) -> dict[str, Any]:
    return {"usage": usage([answer.job]), "timings": answer.job.timings()}


@router.post("/v1/fim/completions")
@router.post("/fim/completions", include_in_schema=False)
async def complete(body: MistralFimBody, http: HttpRequest) -> Response:
    """Fills in the middle between `prompt` and `suffix`."""
    request = body.request(http, body.infill(body.prompt, body.suffix), INFILL_TOKENS)
    return await MistralWriter(http, body).respond([request], bool(body.stream))
