"""llama.cpp's server: infill (for llama.vim and llama.vscode), completion, tokens, server description."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from operator import getitem
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from codegemma import __version__, prompts
from codegemma.generate.request import Infill, Request, TextPrompt
from codegemma.generate.running import Step
from codegemma.serve.bodies import (
    DEFAULT_TOKENS,
    INFILL_TOKENS,
    ExtensionFields,
    Items,
    JsonRoute,
    SamplingFields,
    TopCount,
    refuse_unsupported,
)
from codegemma.serve.bounds import check_length
from codegemma.serve.dialects.openai import ERROR_TYPES, OpenAIMessage, check_choice_count, choices_of
from codegemma.serve.guard import MAX_VALUES
from codegemma.serve.requests import CompletionService
from codegemma.serve.wire import Answer, AnswerWriter, reply, service_of

router = APIRouter(tags=["llama.cpp"], route_class=JsonRoute)

STOP_TYPES = {"end": "eos", "stop_text": "word", "length": "limit", "cancelled": "limit"}
SHOWN_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed", "repeat_penalty")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
LLAMA_ERROR_TYPES = ERROR_TYPES | {
    429: "unavailable_error",
    501: "not_supported_error",
    503: "unavailable_error",
}

MAX_TOKENIZED = 1 << 15  # tokens; a text that certainly has more is refused

MixedPrompt = str | Annotated[Items[int | str], Field(min_length=1)]


class LlamaAdapter(BaseModel):
    id: int
    scale: float = 1.0


class LlamaFields(ExtensionFields, SamplingFields):
    """The fields that infill and completion share. A `temperature` below 0 is 0, a `seed` below 0 random."""

    n_predict: Annotated[int, Field(ge=-2)] | None = None
    temperature: Annotated[float, AfterValidator(partial(max, 0.0))] | None = None
    seed: Annotated[int, AfterValidator(lambda seed: None if seed < 0 else seed)] | None = None
    repeat_penalty: float | None = None
    stream: bool | None = None
    id_slot: int | None = None
    n_probs: TopCount | None = None
    return_tokens: bool | None = None
    response_fields: list[str] | None = None
    lora: list[LlamaAdapter] | None = None

    def llama_request(
        self, http: HttpRequest, prompt: Infill | TextPrompt, limit: int, **sampling: Any
    ) -> Request:
        """ExtensionFields.request with llama.cpp's own fields. Raises ValueError on one that is wrong."""
        request = self.request(http, prompt, limit, self.n_probs or 0, **sampling)
        strongest = max(self.lora or (), key=lambda adapter: adapter.scale, default=None)
        if strongest is None or strongest.scale <= 0:
            return request
        names = service_of(http).adapters
        if not 0 <= strongest.id < len(names):
            problem = f"lora: there is no adapter {strongest.id}, the server has {len(names)}"
            raise ValueError(f"{problem}: leave lora out")
        return replace(request, adapter=names[strongest.id])


class LlamaInfillBody(LlamaFields):
    input_prefix: str
    input_suffix: str
    prompt: str | None = None
    n_indent: int | None = None
    n_cmpl: int | None = None
    language: str | None = None  # for the statistics of suggestions


class LlamaCompletionBody(LlamaFields):
    prompt: MixedPrompt | Annotated[Items[MixedPrompt], Field(min_length=1)]
    n_cmpl: Annotated[int, Field(ge=1, le=128)] | None = None

    def prompts(self) -> list[Any]:
        """The prompts: a list of lists, or of two or more texts, has several; any other value is one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt_types = (str, list) if len(self.prompt) > 1 else list
        are_prompts = all(isinstance(part, prompt_types) for part in self.prompt)
        return list(self.prompt) if are_prompts else [self.prompt]


class TokenizeBody(BaseModel):
    """llama.cpp's `content`, or vLLM's `prompt`."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(BaseModel):
    tokens: Annotated[Items[int], Field(max_length=MAX_VALUES)]


class TemplateBody(BaseModel):
    model_config = ConfigDict(extra="allow")  # for refuse_unsupported

    messages: Annotated[Items[OpenAIMessage], Field(min_length=1)]


class LlamaWriter(AnswerWriter):
    """Writes an answer as one value. In a stream, values with the parts of the text come before it."""

    def __init__(self, http: HttpRequest, body: LlamaInfillBody | LlamaCompletionBody) -> None:
        super().__init__(http)
        self.body = body

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        kind = LLAMA_ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"code": status, "message": message, "type": kind}}

    def complete(self, answers: list[Answer]) -> Any:
        values = [self._final(answer, answer.steps) for answer in answers]
        return values if len(values) > 1 else values[0]

    def parts(self, answer: Answer, step: Step) -> Iterable[dict[str, Any]]:
        if step.text or (step.token is not None and (self.body.return_tokens or self.body.n_probs)):
            yield {
                "index": answer.index,
                "content": step.text,
                "tokens": self._tokens([step]),
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": answer.job.predicted_tokens,
                "tokens_evaluated": answer.job.prompt_tokens,
                **self._probabilities([step]),
            }
        if step.stop is not None:
            yield self._final(answer, [])

    def logprob_entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token], control=True)
        text = data.decode("utf-8", "replace")
        return {"id": token, "token": text, "bytes": list(data), "logprob": logprob}

    def _final(self, answer: Answer, steps: Sequence[Step]) -> dict[str, Any]:
        """The value of an answer with the text of `steps`: all, or none where a stream has sent them."""
        job, request = answer.job, answer.job.request
        value = {
            "index": answer.index,
            "content": "".join(step.text for step in steps),
            "tokens": self._tokens(steps),
            "id_slot": -1,
            "stop": True,
            "model": self.service.name,
            "tokens_predicted": job.predicted_tokens,
            "tokens_evaluated": job.prompt_tokens,
            "generation_settings": {
                "n_predict": request.max_tokens,
                **{name: getattr(request.sampling, name) for name in SHOWN_SETTINGS},
                "stop": list(request.stop),
            },
            "prompt": self.tokenizer.decode(job.prompt_ids, control=True),
            "has_new_line": job.has_line,
            "truncated": False,
            "stop_type": STOP_TYPES.get(answer.stop, "none"),
            "stopping_word": answer.stop_word(self.tokenizer),
            "tokens_cached": job.cached_tokens,
            "timings": job.timings(),
            **self._probabilities(steps),
        }
        if isinstance(self.body, LlamaInfillBody) and answer.text:
            value["id"] = answer.offer(self.body.language)
        value |= answer.confidence()
        return _selected(value, self.body.response_fields)

    def _tokens(self, steps: Sequence[Step]) -> list[int]:
        return [step.token for step in steps if step.token is not None] if self.body.return_tokens else []

    def _probabilities(self, steps: Sequence[Step]) -> dict[str, Any]:
        wanted = self.body.n_probs and steps
        return {"completion_probabilities": self.logprob_entries(steps)} if wanted else {}


@router.post("/infill")
async def infill(body: LlamaInfillBody, http: HttpRequest) -> Response:
    """Fills in the middle. Of several suggestions (`n_cmpl`), the first is greedy. A single one is greedy
    unless the body has a temperature."""
    count = 1 if body.n_cmpl is None else body.n_cmpl
    if not 1 <= count <= 4:
        raise ValueError("Field 'n_cmpl': Value must be between 1 <= value <= 4")
    prompt = body.infill(body.input_prefix + (body.prompt or ""), body.input_suffix)
    language = "" if body.path else body.language or ""
    prompt = replace(prompt, min_indent=max(body.n_indent or 0, 0), language=language)
    temperature = 0.0 if count == 1 else 0.8  # greedy suggestions would all be the same
    requests = choices_of(body.llama_request(http, prompt, INFILL_TOKENS, temperature=temperature), count)
    if count > 1:
        requests[0] = replace(requests[0], sampling=replace(requests[0].sampling, temperature=0.0))
    return await LlamaWriter(http, body).respond(requests, bool(body.stream))


@router.post("/completion")
@router.post("/completions", include_in_schema=False)
async def complete(body: LlamaCompletionBody, http: HttpRequest) -> Response:
    """Continues one prompt or several, each `n_cmpl` times. A prompt is text, ids, or a list of both."""
    prompts, count = body.prompts(), body.n_cmpl or 1
    check_choice_count(len(prompts) * count)
    seed = secrets.randbits(32)  # of all prompts, if the body has none
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": seed}
    service = service_of(http)
    texts = [
        TextPrompt(await asyncio.to_thread(_text_or_ids, service, prompt), raw=True) for prompt in prompts
    ]
    requests = [body.llama_request(http, text, DEFAULT_TOKENS, **sampling) for text in texts]
    choices = [choice for request in requests for choice in choices_of(request, count)]
    return await LlamaWriter(http, body).respond(choices, bool(body.stream))


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, http: HttpRequest) -> Response:
    """Turns text into token ids."""
    tokenizer = service_of(http).tokenizer
    vllm = body.content is None and body.prompt is not None
    bos = body.add_special_tokens if vllm else bool(body.add_special)
    text = (body.prompt if vllm else body.content) or ""
    check_length(len(text), tokenizer, MAX_TOKENIZED)

    def tokenized() -> Response:
        with_bos = bos and tokenizer.control.bos is not None
        ids = tokenizer.encode(text, bos=with_bos, control=body.parse_special)
        if vllm:
            return reply({"tokens": ids, "count": len(ids), "max_model_len": service_of(http).context})
        if not body.with_pieces:
            return reply({"tokens": ids})
        pieces = [_text_or_bytes(tokenizer.decode_bytes([token], control=True)) for token in ids]
        tokens = [{"id": token, "piece": piece} for token, piece in zip(ids, pieces, strict=True)]
        return reply({"tokens": tokens})

    return await asyncio.to_thread(tokenized)


@router.get("/tokenizer_info")
async def tokenizer_info(http: HttpRequest) -> Response:
    """The special tokens, on vLLM's route, which lm-eval needs."""
    tokenizer = service_of(http).tokenizer
    tokens = {name: getattr(tokenizer.control, name.removesuffix("_token")) for name in SPECIAL_TOKENS}
    return reply(
        {
            "tokenizer_class": "GemmaTokenizer",
            "model_max_length": service_of(http).context,
            "chat_template": None,
            **{name: None if token is None else tokenizer.piece(token) for name, token in tokens.items()},
        }
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, http: HttpRequest) -> Response:
    """Turns token ids into text, under llama.cpp's name and vLLM's."""
    text = await asyncio.to_thread(service_of(http).tokenizer.decode, body.tokens, control=True)
    return reply({"content": text, "prompt": text})


@router.post("/apply-template")
async def apply_template(body: TemplateBody, http: HttpRequest) -> Response:
    """The prompt that is made from a conversation."""
    refuse_unsupported(body, service_of(http).name)
    tokenizer = service_of(http).tokenizer
    messages = [message.message() for message in body.messages]
    check_length(sum(len(message.text) for message in messages), tokenizer, service_of(http).context)
    prompt = await asyncio.to_thread(prompts.chat, tokenizer, messages)
    return reply({"prompt": tokenizer.decode(prompt.ids, control=True)})


@router.get("/health")
async def health() -> Response:
    """Whether the server runs."""
    return reply({"status": "ok"})


@router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """The server's totals in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(service_of(http).metrics)
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


@router.get("/props")
async def props(http: HttpRequest) -> Response:
    """Describes the server and its model; the page reads `codegemma`."""
    service = service_of(http)
    return reply(
        {
            "default_generation_settings": {"n_ctx": service.context, "params": {"n_predict": INFILL_TOKENS}},
            "total_slots": service.slots,
            "model_path": service.name,
            "chat_template": "",
            "build_info": f"codegemma {__version__}",
            "modalities": {"vision": False, "audio": False},
            "codegemma": {
                "version": __version__,
                "model": service.name,
                "title": service.title,
                "fim_trained": service.default_layout != "prefix",
                "mode": service.default_layout,
                "reads_files": service.reads_files,
                "adapters": service.adapters,
                "chat": service.chats,
            },
        }
    )


@router.get("/slots")
async def slots(http: HttpRequest) -> Response:
    """The slots, one for each request that may run at once."""
    service = service_of(http)
    running = service.metrics.running
    slot = {"n_ctx": service.context}
    return reply([{"id": i, **slot, "is_processing": i < running} for i in range(service.slots)])


@router.post("/v1/embeddings", include_in_schema=False)
@router.post("/embedding", include_in_schema=False)
@router.post("/embeddings", include_in_schema=False)
async def embeddings() -> Response:
    """Not supported."""
    problem = "This server does not support embeddings: CodeGemma is a generator"
    return reply(LlamaWriter.error(501, problem), 501)


def _text_or_ids(service: CompletionService, prompt: MixedPrompt) -> str | tuple[int, ...]:
    """A prompt of text unchanged; a list as token ids. Raises ValueError where its texts are too long."""
    if isinstance(prompt, str):
        return prompt
    tokenizer = service.tokenizer
    check_length(sum(len(part) for part in prompt if isinstance(part, str)), tokenizer, service.context)
    parts = [tokenizer.encode(part, control=True) if isinstance(part, str) else [part] for part in prompt]
    if isinstance(prompt[0], str) and tokenizer.control.bos is not None:
        parts.insert(0, [tokenizer.control.bos])
    return tuple(token for part in parts for token in part)


def _text_or_bytes(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _selected(answer: dict[str, Any], fields: list[str] | None) -> dict[str, Any]:
    """The fields of a final value that `response_fields` names, or all.

    A nested field, such as `timings/prompt_n`, stands under that whole name, as llama.vim reads it.
    """
    if not fields or fields == [""]:
        return answer
    selected: dict[str, Any] = {}
    for name in fields:
        with suppress(KeyError, TypeError):  # unknown fields are left out
            selected[name] = reduce(getitem, name.split("/"), answer)
    return selected
