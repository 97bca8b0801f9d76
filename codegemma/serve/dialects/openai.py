"""OpenAI's completions (with `suffix`), chat completions and models.

Clients of /v1/completions render FIM themselves where they send no suffix, so control tokens spelled in a prompt are
read; with a suffix, and in chats, text is text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from codegemma.generate.engine import Step, Stop
from codegemma.generate.sampling import Sampling
from codegemma.prompts import Message
from codegemma.serve.requests import Ask, Chat, Fill, Job, Text
from codegemma.serve.wire import (
    Answer,
    Own,
    Stops,
    Stream,
    backend,
    collect,
    event,
    merged,
    reply,
    stop_word,
    stops,
)
from codegemma.tokenizer import Tokenizer

router = APIRouter(tags=["OpenAI"])

FINISH: dict[Stop | None, str] = {
    "end": "stop",
    "stop_text": "stop",
    "length": "length",
    "cancelled": "stop",
    None: "stop",
}
SEEDS = 1_000_003  # between the seeds of a request's choices
MOST_CHOICES = 512

Ids = Annotated[list[int], Field(min_length=1)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Generation(Own):
    """What completions and chats have in common."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
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
    stop: Stops = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, temperature: float) -> Sampling:
        """`temperature` where none was sent."""
        return Sampling(
            temperature if self.temperature is None else self.temperature,
            max(self.top_k or 0, 0),
            1.0 if self.top_p is None else self.top_p,
            self.min_p or 0.0,
            1.0 if self.repetition_penalty is None else self.repetition_penalty,
            secrets.randbits(32) if self.seed is None else self.seed,
            self.presence_penalty or 0.0,
            self.frequency_penalty or 0.0,
            tuple((self.logit_bias or {}).items()),
        )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Completion(Generation):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [tuple(given)]  # type: ignore[arg-type]
        return [one if isinstance(one, str) else tuple(one) for one in given]  # type: ignore[arg-type]


class Part(BaseModel):
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def message(self) -> Message:
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise ValueError(
                        f"a message's part is of type {part.type!r}, but this model reads text alone"
                    )
            content = "".join(part.text or "" for part in content)
        role: Literal["system", "user", "assistant"] = "system" if self.role == "developer" else self.role
        return Message(role, content or "")


class ResponseFormat(BaseModel):
    type: str


class ChatCompletion(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def complete(body: Completion, request: Request) -> Response:
    prompts, n = body.prompts(), body.n or 1
    drawn = max(body.best_of or n, n)
    if body.best_of is not None and body.best_of < n:
        raise ValueError(f"best_of must be at least n, got {body.best_of} and {n}")
    if drawn > n and body.stream:
        raise ValueError("best_of chooses once all is there: it cannot be streamed")
    expect_choices(len(prompts) * drawn)
    asks = [ask for prompt in prompts for ask in _several(_ask(body, prompt, request), drawn)]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or backend(request).name,
        "system_fingerprint": None,
    }
    tokenizer = backend(request).tokenizer
    if body.stream:
        jobs = await backend(request).submit(asks)
        return Stream(request, jobs, _stream(head, body, jobs, tokenizer), _fault)
    answers = await collect(request, asks)
    groups = [answers[at : at + drawn] for at in range(0, len(answers), drawn)]
    kept = [
        answer
        for group in groups
        for answer in (sorted(group, key=_likelihood, reverse=True)[:n] if drawn > n else group)
    ]
    choices = []
    for index, answer in enumerate(kept):
        shown = _Shown(body, answer.job, tokenizer)
        parts = [shown.head(), *map(shown.step, answer.steps)]
        choices.append(
            {
                "text": "".join(text for text, _ in parts),
                "index": index,
                "logprobs": _joined([found for _, found in parts if found])
                if body.logprobs is not None
                else None,
                "finish_reason": FINISH[answer.steps[-1].stop],
                "stop_reason": stop_reason(answer, tokenizer),
            }
        )
    return reply(
        {
            **head,
            "choices": choices,
            "usage": usage([answer.job for answer in answers], drawn),
            "timings": answers[0].job.timings(),
        }
    )


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat(body: ChatCompletion, request: Request) -> Response:
    if body.response_format is not None and body.response_format.type != "text":
        raise ValueError(
            f"response_format {body.response_format.type!r} is not supported: ask for JSON in the message"
        )
    if body.tools:
        raise ValueError("tools are not supported: this model was not trained to call any")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    ask = body.ask(
        request,
        what=Chat(tuple(one.message() for one in body.messages)),
        max_tokens=1024 if most is None else most,
        sampling=body.sampling(1.0),
        stop=stops(body.stop),
        stop_ids=frozenset(body.stop_token_ids or ()),
        top=(body.top_logprobs or 0) if body.logprobs else 0,
    )
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model or backend(request).name,
        "system_fingerprint": None,
    }
    asks, tokenizer = _several(ask, body.n or 1), backend(request).tokenizer
    if body.stream:
        jobs = await backend(request).submit(asks)
        return Stream(
            request,
            jobs,
            _chat_stream({**head, "object": "chat.completion.chunk"}, body, jobs, tokenizer),
            _fault,
        )
    answers = await collect(request, asks)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _chat_logprobs(tokenizer, answer.steps) if body.logprobs else None,
            "finish_reason": FINISH[answer.steps[-1].stop],
        }
        for index, answer in enumerate(answers)
    ]
    return reply(
        {
            **head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage([answer.job for answer in answers], len(answers)),
            "timings": answers[0].job.timings(),
        }
    )


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> Response:
    return reply({"object": "list", "data": [_model(name) for name in _names(request)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """Any name means the one model."""
    return reply(_model(name))


def expect_choices(count: int) -> None:
    if count > MOST_CHOICES:
        raise ValueError(f"a request may have {MOST_CHOICES} choices, this one has {count:,}: split it")


def usage(jobs: Sequence[Job], each: int = 1) -> dict[str, Any]:
    """Tokens of all answers, and of every `each`-th prompt, for a request's choices share one."""
    prompt, predicted = (
        sum(job.prompt_tokens for job in jobs[::each]),
        sum(job.predicted_tokens for job in jobs),
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": predicted,
        "total_tokens": prompt + predicted,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs[::each])},
    }


def stop_reason(answer: Answer, tokenizer: Tokenizer) -> str | int | None:
    """vLLM's: the stop text or the token that ended it."""
    return stop_word(answer, tokenizer) or (
        answer.steps[-1].token if answer.steps[-1].stop == "end" else None
    )


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as OpenAI shows it: bytes that are no text as \\xNN."""
    data = tokenizer.decode_bytes([token], control=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _ask(body: Completion, prompt: str | tuple[int, ...], request: Request) -> Ask:
    what: Fill | Text
    scored = bool(body.echo and body.logprobs is not None)
    if body.suffix is not None:
        if not isinstance(prompt, str) or body.echo:
            raise ValueError("suffix goes with a prompt of text, and without echo")
        what = body.fill(prompt, body.suffix)
    else:
        what = Text(prompt, raw=True, score=scored)
    most = 16 if body.max_tokens is None else body.max_tokens
    return body.ask(
        request,
        what=what,
        max_tokens=most,
        sampling=body.sampling(0.0 if body.suffix is not None else 1.0),
        stop=stops(body.stop),
        stop_ids=frozenset(body.stop_token_ids or ()),
        top=body.logprobs or 0,
    )


def _several(ask: Ask, count: int) -> list[Ask]:
    """The same once for each choice, drawn with seeds of their own."""
    seeds = [ask.sampling.seed + SEEDS * number for number in range(count)]
    return [replace(ask, sampling=replace(ask.sampling, seed=seed)) for seed in seeds]


def _likelihood(answer: Answer) -> float:
    """Mean log-probability of a token."""
    values = [step.logprob for step in answer.steps if step.token is not None]
    return sum(values) / max(len(values), 1)


class _Shown:
    """Steps of one choice as text and log-probabilities."""

    def __init__(self, body: Completion, job: Job, tokenizer: Tokenizer) -> None:
        self.body, self.job, self.tokenizer, self.offset = body, job, tokenizer, 0

    def head(self) -> tuple[str, dict[str, list[Any]] | None]:
        """The prompt, where it is to be echoed."""
        ids, what = self.job.prompt.ids, self.job.ask.what
        if not self.body.echo or not isinstance(what, Text):
            return "", None
        text = what.prompt if isinstance(what.prompt, str) else self.tokenizer.decode(ids)
        found = (
            [
                self._entry(token, logprob, top)
                for token, (logprob, top) in zip(ids, [(None, None), *self.job.scores], strict=False)
            ]
            if self.job.scores or len(ids) == 1
            else []
        )
        return text, _joined(found) if self.body.logprobs is not None else None

    def step(self, step: Step) -> tuple[str, dict[str, list[Any]] | None]:
        if (
            self.body.logprobs is None or step.token is None
        ):  # a final sentinel counts: lm-eval drops the last entry
            return step.text, None
        return step.text, self._entry(step.token, step.logprob, step.top)

    def _entry(
        self, token: int, logprob: float | None, top: Sequence[tuple[int, float]] | None
    ) -> dict[str, list[Any]]:
        text = spelled(self.tokenizer, token)
        best = {spelled(self.tokenizer, one): value for one, value in top or ()}
        if top is not None and logprob is not None:
            best.setdefault(text, logprob)  # the chosen one is always among them
        at, self.offset = (
            self.offset,
            self.offset + len(self.tokenizer.decode([token])),
        )  # <bos> is not in the text
        return {
            "tokens": [text],
            "token_logprobs": [logprob],
            "top_logprobs": [best if top is not None else None],
            "text_offset": [at],
        }


def _joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {
        name: [value for part in parts for value in part[name]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }


async def _stream(
    head: dict[str, Any], body: Completion, jobs: Sequence[Job], tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    choices = [_Shown(body, job, tokenizer) for job in jobs]
    opened: set[int] = set()

    def chunk(index: int, text: str, logprobs: Any, step: Step | None) -> bytes:
        last = step is not None and step.stop is not None
        choice = {
            "text": text,
            "index": index,
            "logprobs": logprobs,
            "finish_reason": FINISH[step.stop] if last and step else None,
        }
        return event(
            {
                **head,
                "choices": [choice],
                **({"usage": None} if body.wants_usage else {}),
                **({"timings": jobs[index].timings()} if last else {}),
            }
        )

    async for index, step in merged(jobs):
        if index not in opened and body.echo:
            opened.add(index)
            text, found = choices[index].head()
            yield chunk(index, text, found, None)
        text, found = choices[index].step(step)
        if text or found or step.stop is not None:
            yield chunk(index, text, found, step)
    if body.wants_usage:
        yield event({**head, "choices": [], "usage": usage(jobs, body.n or 1), "timings": jobs[0].timings()})
    yield b"data: [DONE]\n\n"


async def _chat_stream(
    head: dict[str, Any], body: ChatCompletion, jobs: Sequence[Job], tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    def chunk(index: int, delta: dict[str, str], step: Step | None = None) -> bytes:
        last = step is not None and step.stop is not None
        found = _chat_logprobs(tokenizer, [step]) if body.logprobs and step is not None else None
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": found,
            "finish_reason": FINISH[step.stop] if last and step else None,
        }
        return event(
            {
                **head,
                "choices": [choice],
                **({"usage": None} if body.wants_usage else {}),
                **({"timings": jobs[index].timings()} if last else {}),
            }
        )

    for index in range(len(jobs)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, step in merged(jobs):
        if step.text or step.stop is not None or body.logprobs:
            yield chunk(index, {"content": step.text} if step.text else {}, step)
    if body.wants_usage:
        yield event({**head, "choices": [], "usage": usage(jobs, len(jobs)), "timings": jobs[0].timings()})
    yield b"data: [DONE]\n\n"


def _chat_logprobs(tokenizer: Tokenizer, steps: Sequence[Step]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": spelled(tokenizer, token),
            "logprob": logprob,
            "bytes": list(tokenizer.decode_bytes([token], control=True)),
        }

    return {
        "content": [
            {**entry(step.token, step.logprob), "top_logprobs": [entry(*one) for one in step.top]}
            for step in steps
            if step.token is not None and step.stop != "end"
        ],
        "refusal": None,
    }


def _fault(message: str) -> bytes:
    return event(error(500, message))


def _names(request: Request) -> list[str]:
    return [backend(request).name, *backend(request).adapters]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "codegemma"}
