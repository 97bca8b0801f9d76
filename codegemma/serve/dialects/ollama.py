"""Ollama's API: generate with `suffix`, chat, show, tags, ps, version. Lines of JSON, streamed by default."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel

from codegemma.generate.request import Chat, Infill, TextPrompt
from codegemma.generate.running import Step
from codegemma.prompts import Message, ollama_template
from codegemma.serve.bodies import ExtensionFields, SamplingFields, TopCount
from codegemma.serve.requests import Job
from codegemma.serve.wire import Answer, Dialect, line, logprob_entries, reply, service

router = APIRouter(tags=["Ollama"])

VERSION = "0.12.0"  # of the API that this is: clients compare it
DEFAULT_TOKENS = 1024  # where num_predict is -1: Ollama would fill the context
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
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    keep_alive: str | float | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None

    def check(self) -> None:
        """Raises ValueError where the body asks for what is not supported."""
        if self.format:
            raise ValueError("format is not supported: ask for JSON in the prompt, and check it")
        if self.think and self.think != "false":
            raise ValueError(f'"{self.model}" does not support thinking')

    def answer_field(self, text: str) -> dict[str, Any]:
        """The field that has an answer's text."""
        return {"response": text}

    @property
    def wants_context(self) -> bool:
        """Whether the answer has the ids of the whole conversation."""
        return False


class OllamaGenerateBody(OllamaFields):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None

    @property
    def wants_context(self) -> bool:
        return not self.suffix

    def model_prompt(self, http: HttpRequest) -> Infill | TextPrompt | Chat:
        """A fill-in-the-middle prompt where there is a suffix; raw text where the client asks for it, or its
        template is the bare prompt; else a chat turn where the model was tuned for chats, or text."""
        served, prompt = service(http), self.prompt or ""
        if self.suffix:
            return self.infill(prompt, self.suffix)
        bare = self.template is not None and self.template.replace(" ", "") == "{{.Prompt}}"
        if self.raw or bare:
            return TextPrompt(prompt, raw=True, truncate=True)
        if served.chats:
            if self.context:
                raise ValueError("context is not supported with an instruction-tuned model: use /api/chat")
            system = (Message("system", self.system),) if self.system else ()
            return Chat((*system, Message("user", prompt)))
        if self.context:
            return TextPrompt((*self.context, *served.tokenizer.encode(prompt)), truncate=True)
        return TextPrompt(f"{self.system}\n\n{prompt}" if self.system else prompt, truncate=True)


class OllamaMessage(BaseModel):
    role: str
    content: str | None = None
    images: list[str] | None = None

    def message(self) -> Message:
        """The message to the model. Raises ValueError where it cannot be one."""
        if self.role not in ("system", "user", "assistant"):
            raise ValueError(f"a message's role must be system, user or assistant, got {self.role!r}")
        if self.images:
            raise ValueError("this model reads text alone: leave images out")
        return Message(self.role, self.content or "")  # type: ignore[arg-type]


class OllamaChatBody(OllamaFields):
    messages: list[OllamaMessage] | None = None
    tools: list[Any] | None = None

    def answer_field(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


class OllamaShowBody(BaseModel):
    model: str | None = None
    name: str | None = None


def error(status: int, message: str) -> dict[str, Any]:
    """The value of an error."""
    return {"error": message}


DIALECT = Dialect(error, line, "application/x-ndjson")


@router.post("/api/generate")
async def generate(body: OllamaGenerateBody, http: HttpRequest) -> Response:
    """Continues a prompt, or fills the middle before `suffix`."""
    body.check()
    if body.images:
        raise ValueError("this model reads text alone: leave images out")
    if not body.prompt and not body.suffix:
        return _loaded(body)
    return await _respond(body, http, body.model_prompt(http))


@router.post("/api/chat")
async def chat(body: OllamaChatBody, http: HttpRequest) -> Response:
    """A chat."""
    body.check()
    if body.tools:
        raise ValueError(f'"{body.model}" does not support tools')
    if not body.messages:
        return _loaded(body)
    return await _respond(body, http, Chat([message.message() for message in body.messages]))


@router.post("/api/show")
async def show(body: OllamaShowBody, http: HttpRequest) -> Response:
    """What the model is and can do."""
    served = service(http)
    return reply(
        {
            "modelfile": f"# {served.title}\n",
            "parameters": "",
            "template": ollama_template(served.chats),  # Continue looks for .Suffix in it
            "license": "Gemma: see /terms",
            "details": DETAILS,
            "capabilities": ["completion", "insert"],
            "model_info": {"general.architecture": "gemma", "gemma.context_length": served.context},
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
    """The version of Ollama that this behaves like."""
    return reply({"version": VERSION})


async def _respond(body: OllamaFields, http: HttpRequest, prompt: Infill | TextPrompt | Chat) -> Response:
    sampling = {} if isinstance(prompt, Infill) else {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    top, options = (body.top_logprobs or 0) if body.logprobs else 0, body.options or OllamaOptions()
    request = body.request(http, prompt, DEFAULT_TOKENS, top, options, **sampling)
    final = partial(_final, body, http)
    return await DIALECT.respond(
        http,
        [request],
        body.stream is not False,
        lambda answers: final(answers[0], answers[0].text, answers[0].steps),
        lambda jobs: _stream(body, http, jobs[0]),
    )


async def _stream(body: OllamaFields, http: HttpRequest, job: Job) -> AsyncIterator[bytes]:
    steps: list[Step] = []
    async for step in job.steps():
        steps.append(step)
        if step.text:
            text = body.answer_field(step.text)
            yield line({**_head(body), **text, "done": False, **_logprobs(body, http, [step])})
    yield line(_final(body, http, Answer(job, steps), "", []))


def _final(
    body: OllamaFields, http: HttpRequest, answer: Answer, text: str, steps: Sequence[Step]
) -> dict[str, Any]:
    """The last value of an answer, with the text and the steps that were not sent before."""
    job, timings = answer.job, answer.job.timings()
    ids = [step.token for step in answer.steps if step.token is not None and step.stop != "end"]
    latency_ms = timings["queue_ms"] + timings["prompt_ms"] + timings["predicted_ms"]
    return {
        **_head(body),
        **body.answer_field(text),
        "done": True,
        "done_reason": "length" if answer.stop == "length" else "stop",
        **({"context": [*job.prompt_ids, *ids]} if body.wants_context else {}),
        "total_duration": int(latency_ms * 1e6),  # durations in nanoseconds
        "load_duration": 0,
        "prompt_eval_count": job.prompt_tokens,
        "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
        "eval_count": job.predicted_tokens,
        "eval_duration": int(timings["predicted_ms"] * 1e6),
        "timings": timings,
        **_logprobs(body, http, steps),
    }


def _logprobs(body: OllamaFields, http: HttpRequest, steps: Sequence[Step]) -> dict[str, Any]:
    if not body.logprobs:
        return {}
    shown = [step for step in steps if step.stop != "end"]
    entries = logprob_entries(service(http).tokenizer, shown, keep_empty=False)
    return {"logprobs": entries} if entries else {}


def _loaded(body: OllamaFields) -> Response:
    """The answer to a body without a prompt, by which clients load and unload models."""
    reason = "unload" if body.keep_alive in (0, "0", "0s") else "load"
    return reply({**_head(body), **body.answer_field(""), "done": True, "done_reason": reason})


def _head(body: OllamaFields) -> dict[str, str]:
    return {"model": body.model, "created_at": _utc_time()}


def _models(http: HttpRequest) -> list[dict[str, Any]]:
    served = service(http)
    tags = ("latest", *served.adapters)
    more = {"modified_at": _utc_time(), "size": served.size, "digest": "0" * 64, "details": DETAILS}
    return [{"name": f"{served.name}:{tag}", "model": f"{served.name}:{tag}", **more} for tag in tags]


def _utc_time(later: timedelta = timedelta()) -> str:
    return (datetime.now(UTC) + later).isoformat().replace("+00:00", "Z")
