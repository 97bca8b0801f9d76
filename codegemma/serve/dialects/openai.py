"""OpenAI's completions (with `suffix`), chat completions and models.

Clients of /v1/completions that send no suffix write fill-in-the-middle prompts themselves, so control tokens in
such a prompt are read as tokens; with a suffix, and in chats, text is only text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from codegemma.generate.engine import Step
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.prompts import Message
from codegemma.serve.bodies import ExtensionFields, StopTexts, TokenCount, sampling_of, stop_texts
from codegemma.serve.requests import Job
from codegemma.serve.wire import (
    DONE,
    Answer,
    Dialect,
    event,
    logprob_entries,
    merged,
    reply,
    service,
    spelled,
)
from codegemma.tokenizer import Tokenizer

router = APIRouter(tags=["OpenAI"])

SEED_STEP = 1_000_003  # between the seeds of a request's choices
MAX_CHOICES = 512
LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

TokenIds = Annotated[list[int], Field(min_length=1)]
Logprobs = dict[str, list[Any]]  # LOGPROB_LISTS, one entry for each token


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class OpenAIFields(ExtensionFields):
    """What completions and chats have in common."""

    max_tokens: TokenCount | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: StopTexts = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def openai_request(
        self, http: HttpRequest, prompt: Infill | TextPrompt | Chat, limit: int, top: int
    ) -> Request:
        """A request of at most `limit` tokens with `top` alternatives for each."""
        return self.request(
            http,
            prompt=prompt,
            max_tokens=limit,
            sampling=sampling_of(self, temperature=0.0 if isinstance(prompt, Infill) else 1.0),
            stop=stop_texts(self.stop),
            stop_ids=frozenset(self.stop_token_ids or ()),
            top_logprobs=top,
        )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class OpenAICompletionBody(OpenAIFields):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        prompts = (
            [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt
        )
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]  # type: ignore[arg-type]

    def request_for(self, prompt: str | tuple[int, ...], http: HttpRequest) -> Request:
        """The request that one of the prompts makes. Raises ValueError where its fields exclude each other."""
        limit = 16 if self.max_tokens is None else self.max_tokens
        if self.suffix is None:
            scored = bool(self.echo and self.logprobs is not None)
            text = TextPrompt(prompt, raw=True, score=scored)
            return self.openai_request(http, text, limit, self.logprobs or 0)
        if not isinstance(prompt, str) or self.echo:
            raise ValueError("suffix goes with a prompt of text, and without echo")
        return self.openai_request(http, self.infill(prompt, self.suffix), limit, self.logprobs or 0)


class OpenAIMessagePart(BaseModel):
    type: str
    text: str | None = None


class OpenAIMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[OpenAIMessagePart] | None = None

    def message(self) -> Message:
        """The message to the model. Raises ValueError where a part is not text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise ValueError(
                        f"a message's part is of type {part.type!r}, but this model reads text alone"
                    )
            content = "".join(part.text or "" for part in content)
        return Message("system" if self.role == "developer" else self.role, content or "")


class ResponseFormat(BaseModel):
    type: str


class OpenAIChatBody(OpenAIFields):
    messages: Annotated[list[OpenAIMessage], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None


def error(status: int, message: str) -> dict[str, Any]:
    """The value of an error."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


DIALECT = Dialect(error)


async def complete(body: OpenAICompletionBody, http: HttpRequest) -> Response:
    """/v1/completions, which app shares with Tabby."""
    prompts, n = body.prompts(), body.n or 1
    draws = max(body.best_of or n, n)
    if body.best_of is not None and body.best_of < n:
        raise ValueError(f"best_of must be at least n, got {body.best_of} and {n}")
    if draws > n and body.stream:
        raise ValueError("best_of compares complete answers, so it cannot be streamed: leave out one of them")
    check_choice_count(len(prompts) * draws)
    requests = [
        request for prompt in prompts for request in choices_of(body.request_for(prompt, http), draws)
    ]
    head = _head("cmpl", body, http)
    head = {"id": head["id"], "object": "text_completion"} | head  # in OpenAI's order
    tokenizer = service(http).tokenizer

    def complete_answer(answers: list[Answer]) -> dict[str, Any]:
        groups = [answers[start : start + draws] for start in range(0, len(answers), draws)]
        best = [answer for group in groups for answer in _likeliest(group, n)]
        choices = [_completion_choice(body, index, answer, tokenizer) for index, answer in enumerate(best)]
        return {**head, "choices": choices, **_usage_and_timings([answer.job for answer in answers], draws)}

    def parts(jobs: list[Job]) -> AsyncIterator[bytes]:
        return _stream(head, body, jobs, _completion_chunks(head, body, jobs, tokenizer))

    return await DIALECT.respond(http, requests, bool(body.stream), complete_answer, parts)


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat(body: OpenAIChatBody, http: HttpRequest) -> Response:
    """A chat."""
    if body.response_format is not None and body.response_format.type != "text":
        form = body.response_format.type
        raise ValueError(f"response_format {form!r} is not supported: ask for JSON in the message")
    if body.tools:
        raise ValueError("tools are not supported: this model was not trained to call any")
    limits = (body.max_completion_tokens, body.max_tokens, 1024)
    limit = next(limit for limit in limits if limit is not None)
    messages = Chat(tuple(message.message() for message in body.messages))
    request = body.openai_request(http, messages, limit, (body.top_logprobs or 0) if body.logprobs else 0)
    head, n, tokenizer = _head("chatcmpl", body, http), body.n or 1, service(http).tokenizer

    def complete_answer(answers: list[Answer]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": _chat_logprobs(tokenizer, answer.steps) if body.logprobs else None,
                "finish_reason": finish_reason(answer.stop),
            }
            for index, answer in enumerate(answers)
        ]
        jobs = [answer.job for answer in answers]
        return {**head, "object": "chat.completion", "choices": choices, **_usage_and_timings(jobs, n)}

    def parts(jobs: list[Job]) -> AsyncIterator[bytes]:
        chunk_head = {**head, "object": "chat.completion.chunk"}
        return _stream(chunk_head, body, jobs, _chat_chunks(chunk_head, body, jobs, tokenizer))

    return await DIALECT.respond(http, choices_of(request, n), bool(body.stream), complete_answer, parts)


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(http: HttpRequest) -> Response:
    """The model, and each of its adapters as a model."""
    names = [service(http).name, *service(http).adapters]
    return reply({"object": "list", "data": [_model(name) for name in names]})


@router.get("/v1/models/{name:path}")
async def model(name: str) -> Response:
    """Any name means the one model."""
    return reply(_model(name))


def check_choice_count(count: int) -> None:
    """Raises ValueError where one request asks for too many answers."""
    if count > MAX_CHOICES:
        raise ValueError(f"a request may have {MAX_CHOICES} choices, this one has {count:,}: split it")


def choices_of(request: Request, count: int) -> list[Request]:
    """The request `count` times, each with a seed of its own."""
    seeds = [request.sampling.seed + SEED_STEP * number for number in range(count)]
    return [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]


def finish_reason(stop: str) -> str:
    """OpenAI's and Mistral's word for why an answer ended."""
    return "length" if stop == "length" else "stop"


def usage(jobs: Sequence[Job], choices: int = 1) -> dict[str, Any]:
    """Tokens of all answers, and of every `choices`-th prompt: the choices of a request share one."""
    prompts = jobs[::choices]
    prompt, predicted = sum(job.prompt_tokens for job in prompts), sum(job.predicted_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": predicted,
        "total_tokens": prompt + predicted,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in prompts)},
    }


def _usage_and_timings(jobs: Sequence[Job], choices: int) -> dict[str, Any]:
    return {"usage": usage(jobs, choices), "timings": jobs[0].timings()}


def _head(kind: str, body: OpenAIFields, http: HttpRequest) -> dict[str, Any]:
    """The fields that every chunk of an answer repeats."""
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model or service(http).name,
        "system_fingerprint": None,
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "codegemma"}


def _likeliest(answers: list[Answer], n: int) -> list[Answer]:
    """The `n` answers with the highest mean log-probability of a token."""

    def mean_logprob(answer: Answer) -> float:
        values = [step.logprob for step in answer.steps if step.token is not None]
        return sum(values) / max(len(values), 1)

    return sorted(answers, key=mean_logprob, reverse=True)[:n] if len(answers) > n else answers


def _completion_choice(
    body: OpenAICompletionBody, index: int, answer: Answer, tokenizer: Tokenizer
) -> dict[str, Any]:
    writer = _CompletionWriter(body, answer.job, tokenizer)
    parts = [writer.echo(), *map(writer.write, answer.steps)]
    last = answer.steps[-1]
    return {
        "text": "".join(text for text, _ in parts),
        "index": index,
        "logprobs": None if body.logprobs is None else _joined([lists for _, lists in parts if lists]),
        "finish_reason": finish_reason(answer.stop),
        # vLLM's field: the stop text or the token that ended the answer
        "stop_reason": answer.stop_word(tokenizer) or (last.token if answer.stop == "end" else None),
    }


class _CompletionWriter:
    """Writes the prompt and the steps of one choice as text and log-probabilities."""

    def __init__(self, body: OpenAICompletionBody, job: Job, tokenizer: Tokenizer) -> None:
        self.body, self.job, self.tokenizer = body, job, tokenizer
        self.offset = 0  # of the next token in the text

    def echo(self) -> tuple[str, Logprobs | None]:
        """The prompt, where the body asks to have it repeated."""
        ids, prompt = self.job.prompt_ids, self.job.request.prompt
        if not self.body.echo or not isinstance(prompt, TextPrompt):
            return "", None
        text = prompt.prompt if isinstance(prompt.prompt, str) else self.tokenizer.decode(ids)
        if self.body.logprobs is None:
            return text, None
        scores = [(None, None), *self.job.scores]  # the first token has nothing before it
        scored = zip(ids, scores, strict=False) if self.job.scores or len(ids) == 1 else ()
        return text, _joined([self._lists(token, logprob, top) for token, (logprob, top) in scored])

    def write(self, step: Step) -> tuple[str, Logprobs | None]:
        """A step; <eos> counts as a token, since lm-eval drops the last entry."""
        if self.body.logprobs is None or step.token is None:
            return step.text, None
        return step.text, self._lists(step.token, step.logprob, step.top)

    def _lists(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]] | None) -> Logprobs:
        """The lists of one token."""
        text = self._spelled(token)
        best = None if top is None else {self._spelled(other): value for other, value in top}
        if best is not None and logprob is not None:
            best.setdefault(text, logprob)  # the token itself is always among them
        offset, self.offset = (
            self.offset,
            self.offset + len(self.tokenizer.decode([token])),
        )  # <bos> has no text
        return dict(zip(LOGPROB_LISTS, ([text], [logprob], [best], [offset]), strict=True))

    def _spelled(self, token: int) -> str:
        return spelled(self.tokenizer.decode_bytes([token], control=True))


def _joined(parts: Sequence[Logprobs]) -> Logprobs:
    return {name: [value for part in parts for value in part[name]] for name in LOGPROB_LISTS}


async def _stream(
    head: dict[str, Any], body: OpenAIFields, jobs: list[Job], chunks: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """The chunks, then the usage where it is wanted, and the end."""
    async for chunk in chunks:
        yield chunk
    if body.wants_usage:
        yield event({**head, "choices": [], **_usage_and_timings(jobs, body.n or 1)})
    yield DONE


async def _completion_chunks(
    head: dict[str, Any], body: OpenAICompletionBody, jobs: list[Job], tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    writers = [_CompletionWriter(body, job, tokenizer) for job in jobs]
    echoed: set[int] = set()
    async for index, step in merged(jobs):
        if index not in echoed and body.echo:
            echoed.add(index)
            text, logprobs = writers[index].echo()
            yield _chunk(head, body, jobs[index], {"text": text, "index": index, "logprobs": logprobs})
        text, logprobs = writers[index].write(step)
        if text or logprobs or step.stop is not None:
            choice = {"text": text, "index": index, "logprobs": logprobs}
            yield _chunk(head, body, jobs[index], choice, step.stop)


async def _chat_chunks(
    head: dict[str, Any], body: OpenAIChatBody, jobs: list[Job], tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    for index, job in enumerate(jobs):
        start = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        yield _chunk(head, body, job, start)
    async for index, step in merged(jobs):
        if step.text or step.stop is not None or body.logprobs:
            delta = {"content": step.text} if step.text else {}
            logprobs = _chat_logprobs(tokenizer, [step]) if body.logprobs else None
            choice = {"index": index, "delta": delta, "logprobs": logprobs}
            yield _chunk(head, body, jobs[index], choice, step.stop)


def _chunk(
    head: dict[str, Any], body: OpenAIFields, job: Job, choice: dict[str, Any], stop: str | None = None
) -> bytes:
    """A chunk of a stream; the last one of a choice has `stop`."""
    choice["finish_reason"] = finish_reason(stop) if stop else None
    chunk = {**head, "choices": [choice]}
    if body.wants_usage:
        chunk["usage"] = None
    if stop:
        chunk["timings"] = job.timings()
    return event(chunk)


def _chat_logprobs(tokenizer: Tokenizer, steps: Sequence[Step]) -> dict[str, Any]:
    shown = [step for step in steps if step.stop != "end"]
    return {"content": logprob_entries(tokenizer, shown), "refusal": None}
