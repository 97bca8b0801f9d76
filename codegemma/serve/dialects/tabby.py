"""Tabby's completions, told from OpenAI's on the same path by fields of their own; events and health."""

from __future__ import annotations

import platform
from typing import Any, Self

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, field_validator, model_validator

from codegemma import __version__
from codegemma.generate.sampling import Sampling
from codegemma.native import usable_cpus
from codegemma.prompts import File
from codegemma.serve import stats
from codegemma.serve.requests import Fill, Text
from codegemma.serve.wire import Own, backend, collect, offer, reply

router = APIRouter(tags=["Tabby"])

MOST_TOKENS = 64  # Tabby's own: its requests name no length


class Snippet(BaseModel):
    filepath: str
    body: str
    score: float = 0.0


class Segments(BaseModel):
    prefix: str
    suffix: str | None = None
    filepath: str | None = None
    declarations: list[Snippet] | None = None
    relevant_snippets_from_changed_files: list[Snippet] | None = None
    relevant_snippets_from_recently_opened_files: list[Snippet] | None = None

    def files(self) -> list[File]:
        """The nearest last: opened files, changed files, declarations, each by rising score."""
        groups = (
            self.relevant_snippets_from_recently_opened_files,
            self.relevant_snippets_from_changed_files,
            self.declarations,
        )
        return [
            File(" ".join(one.filepath.split()), one.body)
            for group in groups
            for one in sorted(group or (), key=lambda one: one.score)
        ]


class Debug(BaseModel):
    raw_prompt: str | None = None
    return_prompt: bool = False
    return_snippets: bool = False


class Completion(Own):
    segments: Segments | None = None
    language: str | None = None
    user: str | None = None
    temperature: float | None = None
    seed: int | None = None
    debug_options: Debug | None = None

    @field_validator("mode", mode="before")
    @classmethod
    def _ours(cls, mode: Any) -> Any:
        return (
            None if mode == "standard" else mode
        )  # Tabby's own field of that name; its other value is refused

    @model_validator(mode="after")
    def _prompted(self) -> Self:
        if self.segments is None and (self.debug_options is None or self.debug_options.raw_prompt is None):
            raise ValueError(
                "there is nothing to complete: send segments, or debug_options with a raw_prompt"
            )
        return self


class Event(BaseModel):
    type: str
    completion_id: str
    choice_index: int
    view_id: str | None = None
    elapsed: int | None = None


def owns(body: Any) -> bool:
    return isinstance(body, dict) and ("segments" in body or "debug_options" in body)


async def complete(body: Completion, request: Request) -> Response:
    segments, debug = body.segments, body.debug_options or Debug()
    what: Fill | Text
    if segments is None or debug.raw_prompt is not None:
        what = Text(debug.raw_prompt or "", raw=True)
    else:
        body = body.model_copy(update={"path": body.path or segments.filepath})
        what = body.fill(segments.prefix, segments.suffix, segments.files())
    (answer,) = await collect(
        request,
        [
            body.ask(
                request,
                what=what,
                max_tokens=MOST_TOKENS,
                sampling=Sampling(body.temperature or 0.0, seed=body.seed or 0),
            )
        ],
    )
    found: dict[str, Any] = {
        "id": offer(answer, body.language),
        "choices": [{"index": 0, "text": answer.text}],
    }
    if debug.return_prompt or debug.return_snippets:
        prompt = backend(request).tokenizer.decode(answer.job.prompt.ids, control=True)
        found["debug_data"] = {"prompt": prompt if debug.return_prompt else None, "snippets": []}
    return reply({**found, "timings": answer.job.timings()})


@router.post("/v1/events")
async def events(body: Event) -> Response:
    """What became of a suggestion, of Tabby's or /infill's, goes into the local statistics, and nowhere else."""
    if body.type in ("select", "dismiss"):
        stats.settle(body.completion_id, body.type == "select")
    return Response(status_code=200)


@router.get("/v1/health")
@router.post("/v1/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Tabby's, and llama.cpp's `status`."""
    served = backend(request)
    version = {
        "build_date": "",
        "build_timestamp": "",
        "git_sha": "",
        "git_describe": f"codegemma-{__version__}",
    }
    return reply(
        {
            "status": "ok",
            "model": served.name,
            "chat_model": served.name if served.chats else None,
            "device": "cpu",
            "arch": platform.machine(),
            "cpu_info": platform.processor() or platform.machine(),
            "cpu_count": usable_cpus(),
            "cuda_devices": [],
            "version": version,
        }
    )


@router.get("/v1beta/server_setting")
async def server_setting() -> Response:
    return reply({"disable_client_side_telemetry": True})
