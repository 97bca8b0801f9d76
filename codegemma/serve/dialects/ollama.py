"""Ollama's API: generate with `suffix`, chat, show, tags, ps, version. Lines of JSON, streamed unless told otherwise."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from codegemma.generate.engine import Step
from codegemma.generate.sampling import Sampling
from codegemma.prompts import Message
from codegemma.serve.dialects.openai import spelled
from codegemma.serve.requests import Ask, Chat, Fill, Job, Text
from codegemma.serve.wire import Answer, Own, Stops, Stream, backend, collect, line, reply, stops

router = APIRouter(tags=["Ollama"])

VERSION = "0.12.0"  # of the API that we speak: clients compare it
TOKENS = 1024  # where num_predict is -1: Ollama would fill the context
TEMPLATE = (
    "{{- if .Suffix }}<|fim_prefix|>{{ .Prompt }}<|fim_suffix|>{{ .Suffix }}<|fim_middle|>{{- else }}"  # Continue looks
    "{{ .Prompt }}{{- end }}"
)  # for .Suffix
CHAT_TEMPLATE = TEMPLATE.replace(
    "{{- else }}{{ .Prompt }}",
    "{{- else }}<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n"
    "{{ end }}{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n",
)


class Options(BaseModel):
    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    stop: Stops = None

    def sampling(self, temperature: float, filters: bool = True) -> Sampling:
        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Sampling(
            given(self.temperature, temperature),
            max(given(self.top_k, 40 if filters else 0), 0),
            given(self.top_p, 0.9 if filters else 1.0),
            given(self.min_p, 0.0),
            given(self.repeat_penalty, 1.0),
            secrets.randbits(32) if self.seed is None else self.seed,
        )

    @property
    def tokens(self) -> int:
        return TOKENS if self.num_predict is None or self.num_predict < 0 else self.num_predict


class Asked(Own):
    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: str | float | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def make(self, request: Request, what: Fill | Text | Chat) -> Ask:
        options = self.options or Options()
        fill = isinstance(what, Fill)
        return self.ask(
            request,
            what=what,
            max_tokens=options.tokens,
            sampling=options.sampling(0.0 if fill else 0.8, not fill),
            stop=stops(options.stop),
            top=(self.top_logprobs or 0) if self.logprobs else 0,
        )

    def check(self) -> None:
        if self.format:
            raise ValueError("format is not supported: ask for JSON in the prompt, and check it")
        if self.think and self.think != "false":
            raise ValueError(f'"{self.model}" does not support thinking')


class Generate(Asked):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class ChatMessage(BaseModel):
    role: str
    content: str | None = None
    images: list[str] | None = None


class ChatBody(Asked):
    messages: list[ChatMessage] | None = None
    tools: list[Any] | None = None


class Show(BaseModel):
    model: str | None = None
    name: str | None = None


def error(status: int, message: str) -> dict[str, Any]:
    return {"error": message}


@router.post("/api/generate")
async def generate(body: Generate, request: Request) -> Response:
    body.check()
    if body.images:
        raise ValueError("this model reads text alone: leave images out")
    if not body.prompt and not body.suffix:
        return reply({**_head(body), "response": "", "done": True, "done_reason": _loading(body)})
    ask = body.make(request, _what(body, request))
    if body.suffix:
        return await _answered(body, request, ask, lambda text: {"response": text})
    return await _answered(body, request, ask, lambda text: {"response": text}, context=True)


@router.post("/api/chat")
async def chat(body: ChatBody, request: Request) -> Response:
    body.check()
    if body.tools:
        raise ValueError(f'"{body.model}" does not support tools')
    if not body.messages:
        return reply(
            {
                **_head(body),
                "message": {"role": "assistant", "content": ""},
                "done": True,
                "done_reason": _loading(body),
            }
        )
    for one in body.messages:
        if one.role not in ("system", "user", "assistant"):
            raise ValueError(f"a message's role must be system, user or assistant, got {one.role!r}")
        if one.images:
            raise ValueError("this model reads text alone: leave images out")
    ask = body.make(request, Chat(tuple(Message(one.role, one.content or "") for one in body.messages)))  # type: ignore[arg-type]
    return await _answered(
        body, request, ask, lambda text: {"message": {"role": "assistant", "content": text}}
    )


@router.post("/api/show")
async def show(body: Show, request: Request) -> Response:
    served = backend(request)
    capabilities = ["completion", "insert"]
    return reply(
        {
            "modelfile": f"# {served.title}\n",
            "parameters": "",
            "template": CHAT_TEMPLATE if served.chats else TEMPLATE,
            "license": "Gemma: see /terms",
            "details": _details(),
            "capabilities": capabilities,
            "model_info": {"general.architecture": "gemma", "gemma.context_length": served.context},
            "modified_at": _now(),
        }
    )


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    return reply({"models": _models(request)})


@router.get("/api/ps")
async def ps(request: Request) -> Response:
    until = (datetime.now(UTC) + timedelta(days=365)).isoformat().replace("+00:00", "Z")
    return reply({"models": [{**one, "expires_at": until, "size_vram": 0} for one in _models(request)]})


@router.get("/api/version")
async def version() -> Response:
    return reply({"version": VERSION})


def _what(body: Generate, request: Request) -> Fill | Text | Chat:
    """A hole; raw text, also where the client's own template is the bare prompt; else a turn, where the model has any."""
    served, prompt = backend(request), body.prompt or ""
    if body.suffix:
        return body.fill(prompt, body.suffix)
    bare = body.template is not None and body.template.replace(" ", "") == "{{.Prompt}}"
    if body.raw or bare:
        return Text(prompt, raw=True, truncate=True)
    if served.chats:
        if body.context:
            raise ValueError("context is not supported with an instruction-tuned model: use /api/chat")
        system = (Message("system", body.system),) if body.system else ()
        return Chat((*system, Message("user", prompt)))
    if body.context:
        return Text((*body.context, *served.tokenizer.encode(prompt)), truncate=True)
    return Text(f"{body.system}\n\n{prompt}" if body.system else prompt, truncate=True)


async def _answered(body: Asked, request: Request, ask: Ask, shape: Any, context: bool = False) -> Response:
    if body.stream is not False:
        jobs = await backend(request).submit([ask])
        return Stream(
            request,
            jobs,
            _stream(body, request, jobs[0], shape, context),
            lambda message: line(error(500, message)),
            "application/x-ndjson",
        )
    (answer,) = await collect(request, [ask])
    return reply(_final(body, request, answer, shape, answer.text, context, answer.steps))


async def _stream(body: Asked, request: Request, job: Job, shape: Any, context: bool) -> AsyncIterator[bytes]:
    taken: list[Step] = []
    async for step in job.steps():
        taken.append(step)
        if step.text:
            yield line({**_head(body), **shape(step.text), "done": False, **_logprobs(body, request, [step])})
    yield line(_final(body, request, Answer(job, taken), shape, "", context, []))


def _final(
    body: Asked, request: Request, answer: Answer, shape: Any, text: str, context: bool, steps: Sequence[Step]
) -> dict[str, Any]:
    job, timings = answer.job, answer.job.timings()
    reason = "length" if answer.steps[-1].stop == "length" else "stop"
    ids = [
        *job.prompt.ids,
        *(step.token for step in answer.steps if step.token is not None and step.stop != "end"),
    ]

    def nanoseconds(milliseconds: float) -> int:
        return int(milliseconds * 1e6)

    return {
        **_head(body),
        **shape(text),
        "done": True,
        "done_reason": reason,
        **({"context": ids} if context else {}),
        "total_duration": nanoseconds(timings["queue_ms"] + timings["prompt_ms"] + timings["predicted_ms"]),
        "load_duration": 0,
        "prompt_eval_count": job.prompt_tokens,
        "prompt_eval_duration": nanoseconds(timings["prompt_ms"]),
        "eval_count": job.predicted_tokens,
        "eval_duration": nanoseconds(timings["predicted_ms"]),
        "timings": timings,
        **_logprobs(body, request, steps),
    }


def _logprobs(body: Asked, request: Request, steps: Sequence[Step]) -> dict[str, Any]:
    if not body.logprobs:
        return {}
    tokenizer = backend(request).tokenizer

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": spelled(tokenizer, token),
            "logprob": logprob,
            "bytes": list(tokenizer.decode_bytes([token], control=True)),
        }

    found = [
        {
            **entry(one.token, one.logprob),
            **({"top_logprobs": [entry(*top) for top in one.top]} if one.top else {}),
        }
        for one in steps
        if one.token is not None and one.stop != "end"
    ]
    return {"logprobs": found} if found else {}


def _loading(body: Asked) -> str:
    return "unload" if body.keep_alive in (0, "0", "0s") else "load"


def _head(body: Asked) -> dict[str, str]:
    return {"model": body.model, "created_at": _now()}


def _models(request: Request) -> list[dict[str, Any]]:
    served = backend(request)
    return [
        {
            "name": name,
            "model": name,
            "modified_at": _now(),
            "size": served.size,
            "digest": "0" * 64,
            "details": _details(),
        }
        for name in (f"{served.name}:latest", *(f"{served.name}:{one}" for one in served.adapters))
    ]


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": "gemma",
        "families": ["gemma"],
        "parameter_size": "",
        "quantization_level": "",
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
