"""OpenAI's completions (with `suffix`), chat completions and models.

Clients of /v1/completions that send no suffix may write a fill-in-the-middle prompt themselves, so control
tokens spelled in such a prompt are read as tokens. With a suffix, and in chats, they are plain text.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from codegemma.generate.request import Chat, Request, TextPrompt
from codegemma.generate.running import Step
from codegemma.prompts import ROLES, Message
from codegemma.serve.bodies import (
    DEFAULT_TOKENS,
    INFILL_TOKENS,
    ExtensionFields,
    FunctionCall,
    Items,
    JsonRoute,
    SamplingFields,
    TokenCount,
    ToolCall,
    TopCount,
    with_calls,
)
from codegemma.serve.logprobs import LogprobLists, Logprobs, joined
from codegemma.serve.requests import Job
from codegemma.serve.wire import Answer, AnswerWriter, reply, service_of

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

DONE = b"data: [DONE]\n\n"  # the end of OpenAI's and Mistral's streams
SEED_STEP = 1_000_003  # between the seeds of a request's choices
MAX_CHOICES = 512
TEXT_TOKENS = 16  # the limit without max_tokens and suffix, as in OpenAI's API
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

TokenIds = Annotated[Items[int], Field(min_length=1)]
Prompts = Annotated[Items[str], Field(min_length=1)] | Annotated[Items[TokenIds], Field(min_length=1)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class OpenAIFields(ExtensionFields, SamplingFields):
    """The fields that completions and chats share."""

    max_tokens: TokenCount | None = None
    repetition_penalty: float | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop_token_ids: Items[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class OpenAICompletionBody(OpenAIFields):
    prompt: str | TokenIds | Prompts
    suffix: str | None = None
    echo: bool | None = None
    logprobs: TopCount | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    def prompts(self) -> list[Any]:
        """Texts or lists of token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)

    def request_for(self, prompt: str | list[int], http: HttpRequest) -> Request:
        """The request for one of the prompts. Raises ValueError where its fields exclude each other."""
        top = self.logprobs or 0
        if self.suffix is None:
            score = bool(self.echo and self.logprobs is not None)
            text = TextPrompt(prompt, raw=True, score=score)
            return self.request(http, text, TEXT_TOKENS, top, temperature=1.0)
        if not isinstance(prompt, str) or self.echo:
            raise ValueError("suffix needs a prompt of text, and no echo: leave out suffix or echo")
        return self.request(http, self.infill(prompt, self.suffix), INFILL_TOKENS, top)


class OpenAIMessagePart(BaseModel):
    type: str
    text: str | None = None
    refusal: str | None = None  # of an earlier answer


class OpenAIMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Items[OpenAIMessagePart] | None = None
    tool_calls: Items[ToolCall] | None = None
    function_call: FunctionCall | None = None

    def message(self) -> Message:
        """The message for the model. Raises ValueError where a part is not text."""
        text = self.content if isinstance(self.content, str) else ""
        for part in self.content if isinstance(self.content, list) else ():
            if (words := part.text if part.text is not None else part.refusal) is None:
                raise ValueError(
                    f"a part of a message has type {part.type!r:.40}: this model reads text alone"
                )
            text += words
        calls = [
            *(self.tool_calls or ()),
            *([ToolCall(function=self.function_call)] * bool(self.function_call)),
        ]
        return Message(ROLES[self.role], with_calls(text, calls))


class OpenAIChatBody(OpenAIFields):
    messages: Annotated[Items[OpenAIMessage], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None


async def complete(body: OpenAICompletionBody, http: HttpRequest) -> Response:
    """/v1/completions, where the body is not Tabby's."""
    prompts, n = body.prompts(), body.n or 1
    draws = max(body.best_of or n, n)
    if body.best_of is not None and body.best_of < n:
        raise ValueError(f"best_of must be at least n, got {body.best_of} and {n}")
    if draws > n and body.stream:
        raise ValueError("best_of compares whole answers, so it cannot stream: leave out best_of or stream")
    check_choice_count(len(prompts) * draws)
    requests = [body.request_for(prompt, http) for prompt in prompts]
    choices = [choice for request in requests for choice in choices_of(request, draws)]
    return await OpenAICompletionWriter(http, body, draws).respond(choices, bool(body.stream))


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat(body: OpenAIChatBody, http: HttpRequest) -> Response:
    """Answers a conversation."""
    prompt, top = Chat([message.message() for message in body.messages]), body.top_logprobs or 0
    request = body.request(http, prompt, DEFAULT_TOKENS, top if body.logprobs else 0, temperature=1.0)
    choices = choices_of(request, body.n or 1)
    return await OpenAIChatWriter(http, body).respond(choices, bool(body.stream))


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(http: HttpRequest) -> Response:
    """The model, with its other names as aliases, and each of its adapters as a model."""
    service = service_of(http)
    first = _model(service.name) | ({"aliases": service.aliases} if service.aliases else {})
    return reply({"object": "list", "data": [first, *map(_model, service.adapters)]})


@router.get("/v1/models/{name:path}")
async def model(name: str) -> Response:
    """The model under the given name, whatever it is: there is only one."""
    return reply(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "codegemma"}


def check_choice_count(count: int) -> None:
    """Raises ValueError where one request asks for too many answers."""
    if count > MAX_CHOICES:
        raise ValueError(f"a request may have {MAX_CHOICES} choices, this one has {count:,}: split it")


def choices_of(request: Request, count: int) -> list[Request]:
    """The request `count` times, each with another seed."""
    seeds = [request.sampling.seed + SEED_STEP * number for number in range(count)]
    return [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]


def finish_reason(stop: str | None) -> str | None:
    """Why an answer ended, as OpenAI, Mistral and Ollama call it; None while it runs."""
    return stop and ("length" if stop == "length" else "stop")


def usage(jobs: Sequence[Job], choices: int = 1) -> dict[str, Any]:
    """The token counts. Each prompt has `choices` jobs in a row, and counts once."""
    prompts = jobs[::choices]
    prompt, predicted = sum(job.prompt_tokens for job in prompts), sum(job.predicted_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": predicted,
        "total_tokens": prompt + predicted,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in prompts)},
    }


def without_end_token(steps: Sequence[Step]) -> list[Step]:
    """The steps without the one for the token that ends an answer: it is not part of the answer."""
    return [step for step in steps if step.stop != "end"]


class OpenAIWriter(AnswerWriter):
    """What completions and chats share. Each prompt is answered `draws` times, and the best n are shown."""

    end_marker = DONE

    def __init__(self, http: HttpRequest, body: OpenAIFields, draws: int) -> None:
        super().__init__(http)
        self.n, self.draws, self.wants_usage = body.n or 1, draws, body.wants_usage
        model = body.model or self.service.name
        self.head = {"created": int(time.time()), "model": model, "system_fingerprint": None}

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}

    def choice(self, answer: Answer) -> dict[str, Any]:
        """The value of a finished answer."""
        raise NotImplementedError

    def complete(self, answers: list[Answer]) -> dict[str, Any]:
        groups = [answers[start : start + self.draws] for start in range(0, len(answers), self.draws)]
        best = [answer for group in groups for answer in _likeliest(group, self.n)]
        choices = [self.choice(replace(answer, index=index)) for index, answer in enumerate(best)]
        return {**self.head, "choices": choices, **self._totals(answers)}

    def chunk(self, choice: dict[str, Any], ended: Job | None = None) -> dict[str, Any]:
        """A value of a stream that adds to one choice; `ended` is the choice's job if this is its end."""
        choice["finish_reason"] = finish_reason(ended.stop) if ended else None
        # With include_usage, OpenAI sends null in every chunk but the last.
        null_usage = {"usage": None} if self.wants_usage else {}
        timings = {"timings": ended.timings()} if ended else {}
        return {**self.head, "choices": [choice], **null_usage, **timings}

    def end(self, answers: list[Answer]) -> Iterable[dict[str, Any]]:
        if self.wants_usage:
            yield {**self.head, "choices": [], **self._totals(answers)}

    def _totals(self, answers: list[Answer]) -> dict[str, Any]:
        jobs = [answer.job for answer in answers]
        return {"usage": usage(jobs, self.draws), "timings": jobs[0].timings()}


class OpenAIChatWriter(OpenAIWriter):
    """Writes the choices of a chat."""

    def __init__(self, http: HttpRequest, body: OpenAIChatBody) -> None:
        super().__init__(http, body, body.n or 1)
        self.with_logprobs = bool(body.logprobs)
        form = "chat.completion.chunk" if body.stream else "chat.completion"
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", **self.head, "object": form}

    def choice(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs, reason = self._logprobs(answer.steps), finish_reason(answer.stop)
        return {"index": answer.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def begin(self, answers: list[Answer]) -> Iterable[dict[str, Any]]:
        for answer in answers:
            delta = {"role": "assistant", "content": ""}
            yield self.chunk({"index": answer.index, "delta": delta, "logprobs": None})

    def parts(self, answer: Answer, step: Step) -> Iterable[dict[str, Any]]:
        if step.text or step.stop is not None or self.with_logprobs:
            delta = {"content": step.text} if step.text else {}
            choice = {"index": answer.index, "delta": delta, "logprobs": self._logprobs([step])}
            yield self.chunk(choice, answer.job if step.stop else None)

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {"content": self.logprob_entries(without_end_token(steps)), "refusal": None}


class OpenAICompletionWriter(OpenAIWriter):
    """Writes the choices of a completion: the prompt where it is echoed, then the steps."""

    def __init__(self, http: HttpRequest, body: OpenAICompletionBody, draws: int) -> None:
        super().__init__(http, body, draws)
        self.echo, self.with_logprobs = bool(body.echo), body.logprobs is not None
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", **self.head}
        self.lists: defaultdict[int, LogprobLists] = defaultdict(lambda: LogprobLists(self.tokenizer))

    def choice(self, answer: Answer) -> dict[str, Any]:
        index, last = answer.index, answer.steps[-1]
        parts = [self._echo(index, answer.job), *(self._part(answer, step) for step in answer.steps)]
        text, logprobs = "".join(text for text, _ in parts), joined([lists for _, lists in parts if lists])
        # The tokens of a stop text, or of what was trimmed off, have the end of the text as their offset.
        logprobs["text_offset"] = [min(offset, len(text)) for offset in logprobs["text_offset"]]
        return {
            "text": text,
            "index": index,
            "logprobs": logprobs if self.with_logprobs else None,
            "finish_reason": finish_reason(answer.stop),
            # vLLM's field: the stop text or the token that ended the answer
            "stop_reason": answer.stop_word(self.tokenizer) or (last.token if answer.stop == "end" else None),
            **answer.confidence(),
        }

    def parts(self, answer: Answer, step: Step) -> Iterable[dict[str, Any]]:
        if self.echo and len(answer.steps) == 1:
            text, logprobs = self._echo(answer.index, answer.job)
            yield self.chunk({"text": text, "index": answer.index, "logprobs": logprobs})
        text, logprobs = self._part(answer, step)
        if text or logprobs or step.stop is not None:
            choice = {"text": text, "index": answer.index, "logprobs": logprobs}
            chunk = self.chunk(choice, answer.job if step.stop else None)
            choice |= answer.confidence() if step.stop else {}
            yield chunk

    def _echo(self, index: int, job: Job) -> tuple[str, Logprobs | None]:
        """The prompt and its log-probabilities, where the body asks for an echo; else "" and None."""
        ids, prompt = job.prompt_ids, job.request.prompt
        if not self.echo or not isinstance(prompt, TextPrompt):
            return "", None
        spelled = prompt.prompt if isinstance(prompt.prompt, str) else ""
        text = spelled or self.tokenizer.decode(ids)
        if not self.with_logprobs:
            return text, None
        lists = self.lists[index]
        scores = [(None, None), *job.scores]  # nothing predicts the first token
        scored = zip(ids, scores, strict=False) if job.scores or len(ids) == 1 else ()
        entries = joined([lists.entry(token, *score, spelled) for token, score in scored])
        lists.begin_answer(len(text))
        return text, entries

    def _part(self, answer: Answer, step: Step) -> tuple[str, Logprobs | None]:
        """A step's text and log-probabilities. <eos> has an entry too: lm-eval drops the last one."""
        if not self.with_logprobs or step.token is None:
            return step.text, None
        lists, typed = self.lists[answer.index], answer.job.resolved.typed
        if typed and step is answer.steps[0]:
            lists.begin_answer(-typed)
        return step.text, lists.entry(step.token, step.logprob, step.top)


def _likeliest(answers: list[Answer], n: int) -> list[Answer]:
    """The `n` answers with the highest mean log-probability per token."""

    def mean_logprob(answer: Answer) -> float:
        values = [step.logprob for step in answer.steps if step.token is not None]
        return sum(values) / max(len(values), 1)

    return sorted(answers, key=mean_logprob, reverse=True)[:n] if len(answers) > n else answers
