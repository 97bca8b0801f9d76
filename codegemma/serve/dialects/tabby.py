"""Tabby's completions (on OpenAI's path, but with other fields), events and health."""

from __future__ import annotations

import platform
from typing import Any, Self

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, field_validator, model_validator

from codegemma import __version__
from codegemma.generate.request import Infill, TextPrompt
from codegemma.native import usable_cpus
from codegemma.prompts import File
from codegemma.serve import stats
from codegemma.serve.bodies import ExtensionFields, Items, JsonRoute, one_line
from codegemma.serve.wire import collect, reply, service_of

router = APIRouter(tags=["Tabby"], route_class=JsonRoute)

MAX_TOKENS = 64  # as in Tabby, whose requests have no limit


class TabbySnippet(BaseModel):
    filepath: str
    body: str
    score: float = 0.0


class TabbySegments(BaseModel):
    prefix: str
    suffix: str | None = None
    filepath: str | None = None
    declarations: Items[TabbySnippet] | None = None
    relevant_snippets_from_changed_files: Items[TabbySnippet] | None = None
    relevant_snippets_from_recently_opened_files: Items[TabbySnippet] | None = None

    def files(self) -> list[File]:
        """Opened files, changed files, then declarations, each by rising score: the last are the nearest to
        the prefix."""
        opened = self.relevant_snippets_from_recently_opened_files
        changed = self.relevant_snippets_from_changed_files
        snippets: list[TabbySnippet] = []
        for group in (opened, changed, self.declarations):
            snippets += sorted(group or (), key=lambda snippet: snippet.score)
        return [File(one_line(snippet.filepath), snippet.body) for snippet in snippets]


class TabbyDebugOptions(BaseModel):
    raw_prompt: str | None = None
    return_prompt: bool = False
    return_snippets: bool = False


class TabbyCompletionBody(ExtensionFields):
    segments: TabbySegments | None = None
    language: str | None = None
    user: str | None = None
    temperature: float | None = None
    seed: int | None = None
    debug_options: TabbyDebugOptions | None = None

    @field_validator("mode", mode="before")
    @classmethod
    def _ignore_standard_mode(cls, mode: Any) -> Any:
        """Tabby has a `mode` too. Its "standard" means our default; its other values are refused."""
        return None if mode == "standard" else mode

    @model_validator(mode="after")
    def _has_prompt(self) -> Self:
        if self.segments is None and (self.debug_options is None or self.debug_options.raw_prompt is None):
            remedy = "send segments, or debug_options with a raw_prompt"
            raise ValueError(f"there is nothing to complete: {remedy}")
        return self


class TabbyEvent(BaseModel):
    type: str
    completion_id: str
    choice_index: int
    view_id: str | None = None
    elapsed: int | None = None


def is_tabby(body: Any) -> bool:
    """Whether a body of /v1/completions is Tabby's, not OpenAI's."""
    return isinstance(body, dict) and ("segments" in body or "debug_options" in body)


async def complete(body: TabbyCompletionBody, http: HttpRequest) -> Response:
    """/v1/completions, where the body is Tabby's."""
    segments, debug = body.segments, body.debug_options or TabbyDebugOptions()
    prompt: Infill | TextPrompt
    if segments is None or debug.raw_prompt is not None:
        prompt = TextPrompt(debug.raw_prompt or "", raw=True)
    else:
        body = body.model_copy(update={"path": body.path or segments.filepath})
        prompt = body.infill(segments.prefix, segments.suffix, segments.files())
    request = body.request(http, prompt, MAX_TOKENS, seed=0)
    (answer,) = await collect(http, [request])
    choices = [{"index": 0, "text": answer.text, **answer.confidence()}]
    value: dict[str, Any] = {"id": answer.offer(body.language), "choices": choices}
    if debug.return_prompt or debug.return_snippets:
        text = service_of(http).tokenizer.decode(answer.job.prompt_ids, control=True)
        value["debug_data"] = {"prompt": text if debug.return_prompt else None, "snippets": []}
    return reply({**value, "timings": answer.job.timings()})


@router.post("/v1/events")
async def events(body: TabbyEvent) -> Response:
    """Records in the local statistics whether a suggestion of Tabby's route or of /infill was accepted."""
    if body.type in ("select", "dismiss"):
        stats.settle(body.completion_id, body.type == "select")
    return Response(status_code=200)


@router.get("/v1/health")
@router.post("/v1/health", include_in_schema=False)
async def health(http: HttpRequest) -> Response:
    """Describes the server with Tabby's fields, and llama.cpp's `status`."""
    service = service_of(http)
    build = {"build_date": "", "build_timestamp": "", "git_sha": ""}
    return reply(
        {
            "status": "ok",
            "model": service.name,
            "chat_model": service.name if service.chats else None,
            "device": "cpu",
            "arch": platform.machine(),
            "cpu_info": platform.processor() or platform.machine(),
            "cpu_count": usable_cpus(),
            "cuda_devices": [],
            "version": {**build, "git_describe": f"codegemma-{__version__}"},
        }
    )


@router.get("/v1beta/server_setting")
async def server_setting() -> Response:
    """Tells Tabby's plug-ins to send no telemetry."""
    return reply({"disable_client_side_telemetry": True})
