"""Ollama's API: generate with `suffix`, chat, show, tags, ps, version. By default it streams JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel

from codegemma.generate.request import Chat, Infill, TextPrompt
from codegemma.generate.running import Step
from codegemma.prompts import ROLES, Message, ollama_template
from codegemma.serve.bodies import (
    DEFAULT_TOKENS,
    INFILL_TOKENS,
    ExtensionFields,
    Items,
    JsonRoute,
    SamplingFields,
    ToolCall,
    TopCount,
    refuse_unsupported,
    with_calls,
)
from codegemma.serve.dialects.openai import finish_reason, without_end_token
from codegemma.serve.wire import Answer, AnswerWriter, dumps, reply, service_of

router = APIRouter(tags=["Ollama"], route_class=JsonRoute)

VERSION = "0.12.0"  # of the Ollama that has this API; clients check it
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "gemma",
    "families": ["gemma"],
    "parameter_size": "",
    "quantization_level": "",
}


class OllamaOptions(SamplingFields):
    num_predict: int | None = None
    repeat_penalty: float | None = None


class OllamaFields(ExtensionFields):
    """What generate and chat have in common."""

    model: str
    stream: bool | None = None
    options: OllamaOptions | None = None
    keep_alive: str | float | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None

    def check(self) -> None:
        """Raises ValueError where the body asks for what is not supported."""
        refuse_unsupported(self, self.model)
        if self.think and self.think != "false":
            raise ValueError(f'"{self.model}" does not support thinking: leave think out')


class OllamaGenerateBody(OllamaFields):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: Items[int] | None = None
    raw: bool | None = None
    images: Items[str] | None = None

    @property
    def infills(self) -> bool:
        """Whether the body asks to fill in the middle: it has a suffix, which is empty at the end of a file.

        An empty suffix counts as none with `raw`, and where system and template are sent empty too, as
        Ollama's Go client does: it sends every field.
        """
        sends_all = self.system == "" and self.template == ""
        return bool(self.suffix) or (self.suffix == "" and not self.raw and not sends_all)

    def model_prompt(self, http: HttpRequest) -> Infill | TextPrompt | Chat:
        """With a suffix, an Infill. With `raw`, or a template that is the bare prompt, raw text. Otherwise a
        chat turn if the model was tuned for chats, else plain text."""
        service, prompt = service_of(http), self.prompt or ""
        if self.infills:
            return self.infill(prompt, self.suffix)
        template = _without_spaces(self.template or "")
        if self.raw or template == "{{.Prompt}}":
            return TextPrompt(prompt, raw=True, truncate=True)
        if template not in ("", _without_spaces(ollama_template(service.chats))):
            raise ValueError("template is not supported: send the whole prompt, with raw true")
        if service.chats:
            if self.context:
                raise ValueError("context is not supported with an instruction-tuned model: use /api/chat")
            system = (Message("system", self.system),) if self.system else ()
            return Chat((*system, Message("user", prompt)))
        if self.context:
            return TextPrompt((*self.context, *service.tokenizer.encode(prompt)), truncate=True)
        return TextPrompt(f"{self.system}\n\n{prompt}" if self.system else prompt, truncate=True)


class OllamaMessage(BaseModel):
    role: str
    content: str | None = None
    images: Items[str] | None = None
    tool_calls: Items[ToolCall] | None = None

    def message(self) -> Message:
        """The message for the model. Raises ValueError on an unknown role and on images."""
        if self.role not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {self.role!r:.40}")
        if self.images:
            raise ValueError("this model reads text alone: leave images out")
        return Message(ROLES[self.role], with_calls(self.content or "", self.tool_calls or ()))


class OllamaChatBody(OllamaFields):
    messages: Items[OllamaMessage] | None = None


class OllamaShowBody(BaseModel):
    model: str | None = None
    name: str | None = None


class OllamaWriter(AnswerWriter):
    """Writes one answer as lines of JSON."""

    media_type = "application/x-ndjson"

    def __init__(self, http: HttpRequest, body: OllamaGenerateBody | OllamaChatBody) -> None:
        super().__init__(http)
        self.body = body

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        return {"error": message}

    def encode(self, value: Any) -> bytes:
        return dumps(value) + b"\n"

    def ping(self) -> bytes:
        return self.encode({**self.head(""), "done": False})  # lines of JSON have no comments

    def head(self, text: str) -> dict[str, Any]:
        """The fields of every value, with a part of the answer's text."""
        message = {"message": {"role": "assistant", "content": text}}
        content = message if isinstance(self.body, OllamaChatBody) else {"response": text}
        return {"model": self.body.model, "created_at": _utc_time(), **content}

    def complete(self, answers: list[Answer]) -> dict[str, Any]:
        return self._final(answers[0], answers[0].text, answers[0].steps)

    def parts(self, answer: Answer, step: Step) -> Iterable[dict[str, Any]]:
        if step.text:
            yield {**self.head(step.text), "done": False, **self._logprobs([step])}
        if step.stop is not None:
            yield self._final(answer, "", [])

    def _final(self, answer: Answer, text: str, steps: Sequence[Step]) -> dict[str, Any]:
        """The last value, with the text and the steps that were not sent before."""
        job, timings = answer.job, answer.job.timings()
        context = {}
        if isinstance(self.body, OllamaGenerateBody) and not self.body.infills:
            tokens = [step.token for step in without_end_token(answer.steps) if step.token is not None]
            context = {"context": [*job.prompt_ids, *tokens]}
        return {
            **self.head(text),
            "done": True,
            "done_reason": finish_reason(answer.stop),
            **context,
            "total_duration": int((job.ended - job.queued) * 1e9),  # durations in nanoseconds
            "load_duration": 0,
            "prompt_eval_count": job.prompt_tokens,
            "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
            "eval_count": job.predicted_tokens,
            "eval_duration": int(timings["predicted_ms"] * 1e6),
            "timings": timings,
            **self._logprobs(steps),
            **answer.confidence(),
        }

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        shown = without_end_token(steps) if self.body.logprobs else []
        entries = self.logprob_entries(shown, keep_empty=False)
        return {"logprobs": entries} if entries else {}


@router.post("/api/generate")
async def generate(body: OllamaGenerateBody, http: HttpRequest) -> Response:
    """Continues a prompt, or fills in the middle between it and `suffix`."""
    body.check()
    if body.images:
        raise ValueError("this model reads text alone: leave images out")
    prompt = body.model_prompt(http) if body.prompt or body.infills else None
    return await _respond(body, http, prompt)


@router.post("/api/chat")
async def chat(body: OllamaChatBody, http: HttpRequest) -> Response:
    """Answers a conversation."""
    body.check()
    messages = [message.message() for message in body.messages or ()]
    return await _respond(body, http, Chat(messages) if messages else None)


@router.post("/api/show")
async def show(body: OllamaShowBody, http: HttpRequest) -> Response:
    """The model's template, capabilities and details."""
    service = service_of(http)
    return reply(
        {
            "modelfile": f"# {service.title}\n",
            "parameters": "",
            "template": ollama_template(service.chats),  # Continue looks for .Suffix in it
            "license": "Gemma: see /terms",
            "details": DETAILS,
            "capabilities": ["completion", "insert"],
            "model_info": {"general.architecture": "gemma", "gemma.context_length": service.context},
            "modified_at": _utc_time(),
        }
    )


@router.get("/api/tags")
async def tags(http: HttpRequest) -> Response:
    """The model, and each of its adapters as a model."""
    return reply({"models": _models(http)})


@router.get("/api/ps")
async def ps(http: HttpRequest) -> Response:
    """The models in memory."""
    expires = {"expires_at": _utc_time(timedelta(days=365)), "size_vram": 0}
    return reply({"models": [model | expires for model in _models(http)]})


@router.get("/api/version")
async def version() -> Response:
    """The version of the Ollama that has this API."""
    return reply({"version": VERSION})


async def _respond(
    body: OllamaGenerateBody | OllamaChatBody, http: HttpRequest, prompt: Infill | TextPrompt | Chat | None
) -> Response:
    """The answer to a prompt. None: the client asks to load or unload the model, and nothing is done."""
    writer = OllamaWriter(http, body)
    if prompt is None:
        reason = "unload" if body.keep_alive in (0, "0", "0s") else "load"
        return reply({**writer.head(""), "done": True, "done_reason": reason})
    is_infill = isinstance(prompt, Infill)
    sampling = {} if is_infill else {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    limit = INFILL_TOKENS if is_infill else DEFAULT_TOKENS
    top, options = (body.top_logprobs or 0) if body.logprobs else 0, body.options or OllamaOptions()
    request = body.request(http, prompt, limit, top, options, **sampling)
    return await writer.respond([request], body.stream is not False)


def _models(http: HttpRequest) -> list[dict[str, Any]]:
    service = service_of(http)
    tags = ("latest", *service.adapters)
    facts = {"modified_at": _utc_time(), "size": service.size, "digest": "0" * 64, "details": DETAILS}
    return [{"name": f"{service.name}:{tag}", "model": f"{service.name}:{tag}", **facts} for tag in tags]


def _without_spaces(template: str) -> str:
    return "".join(template.split())


def _utc_time(delay: timedelta = timedelta()) -> str:
    """The time that is `delay` from now, as Ollama writes times."""
    return (datetime.now(UTC) + delay).isoformat().replace("+00:00", "Z")
