"""llama.cpp's server: infill as llama.vim and llama.vscode send it, completion, tokens, health, metrics, props, slots."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from codegemma import __version__, prompts
from codegemma.generate.engine import Step
from codegemma.generate.sampling import Sampling
from codegemma.serve.dialects import openai
from codegemma.serve.requests import Ask, Fill, Job, Text
from codegemma.serve.wire import (
    Answer,
    Extra,
    Own,
    Stops,
    Stream,
    backend,
    collect,
    event,
    merged,
    offer,
    reply,
    stop_word,
    stops,
)

router = APIRouter(tags=["llama.cpp"])

STOP_TYPES = {"end": "eos", "stop_text": "word", "length": "limit", "cancelled": "limit"}
INFILL_TOKENS = 128
COMPLETION_TOKENS = 1024  # where n_predict is -1: llama.cpp would go on for ever

Pieces = str | Annotated[list[int | str], Field(min_length=1)]


class Lora(BaseModel):
    id: int
    scale: float = 1.0


class Generation(Own):
    n_predict: Annotated[int, Field(ge=-2)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: Stops = None
    stream: bool | None = None
    id_slot: int | None = None
    n_probs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_tokens: bool | None = None
    response_fields: list[str] | None = None
    lora: list[Lora] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None

    def make(
        self, request: Request, what: Fill | Text, most: int, sampling: Sampling, indent: int = 0
    ) -> Ask:
        asked = self.ask(
            request,
            what=what,
            max_tokens=most if self.n_predict is None or self.n_predict < 0 else self.n_predict,
            sampling=sampling,
            stop=stops(self.stop),
            top=self.n_probs or 0,
            indent=indent,
        )
        if self.grammar or self.json_schema:
            raise ValueError(
                "grammar and json_schema are not supported: ask for the form in the prompt, and check it"
            )
        chosen = max(self.lora or (), key=lambda one: one.scale, default=None)
        if chosen is None or chosen.scale <= 0:
            return asked
        names = backend(request).adapters
        if not 0 <= chosen.id < len(names):
            raise ValueError(
                f"lora: there is no adapter {chosen.id}, the server has {len(names)}: leave lora out"
            )
        return replace(asked, adapter=names[chosen.id])

    def sampling(self, temperature: float, top_k: int, top_p: float, min_p: float) -> Sampling:
        """Our own defaults where nothing was sent; a seed below 0 is random, as in llama.cpp."""

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Sampling(
            max(given(self.temperature, temperature), 0.0),
            max(given(self.top_k, top_k), 0),
            given(self.top_p, top_p),
            given(self.min_p, min_p),
            given(self.repeat_penalty, 1.0),
            secrets.randbits(32) if self.seed is None or self.seed < 0 else self.seed,
        )


class Infill(Generation):
    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] | None = None
    prompt: str | None = None
    n_indent: int | None = None
    n_cmpl: int | None = None
    language: str | None = None  # for the statistics of suggestions


class Completion(Generation):
    prompt: Pieces | Annotated[list[Pieces], Field(min_length=1)]


class Tokenize(BaseModel):
    """llama.cpp's `content`, or vLLM's `prompt`."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    with_pieces: bool = False


class Detokenize(BaseModel):
    tokens: Annotated[list[int], Field(max_length=1_000_000)]


class Template(BaseModel):
    messages: Annotated[list[openai.ChatMessage], Field(min_length=1)]


def error(status: int, message: str) -> dict[str, Any]:
    kind = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "unavailable_error",
        501: "not_supported_error",
        503: "unavailable_error",
    }.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"code": status, "message": message, "type": kind}}


@router.post("/infill")
async def infill(body: Infill, request: Request) -> Response:
    count = 1 if body.n_cmpl is None else body.n_cmpl
    if not 1 <= count <= 4:
        raise ValueError("Field 'n_cmpl': Value must be between 1 <= value <= 4")
    prefix = body.input_prefix + (body.prompt or "")
    ask = body.make(
        request,
        body.fill(prefix, body.input_suffix),
        INFILL_TOKENS,
        body.sampling(0.0, 0, 1.0, 0.0),
        max(body.n_indent or 0, 0),
    )
    if count > 1 and body.temperature is None:
        ask = replace(ask, sampling=replace(ask.sampling, temperature=0.8))  # else all would be one
    asks = (
        [replace(ask, sampling=replace(ask.sampling, temperature=0.0)), *openai._several(ask, count)[1:]]
        if count > 1
        else [ask]
    )
    return await _answered(body, request, asks)


@router.post("/completion")
@router.post("/completions", include_in_schema=False)
async def complete(body: Completion, request: Request) -> Response:
    given = body.prompt
    several = isinstance(given, list) and all(
        isinstance(one, list) or (isinstance(one, str) and len(given) > 1) for one in given
    )
    pieces: list[Any] = list(given) if several else [given]  # type: ignore[arg-type]
    openai.expect_choices(len(pieces))
    sampling = body.sampling(0.8, 40, 0.95, 0.05)
    asks = [
        body.make(request, Text(_ids(request, one), raw=True), COMPLETION_TOKENS, sampling) for one in pieces
    ]
    return await _answered(body, request, asks)


@router.post("/tokenize")
async def tokenize(body: Tokenize, request: Request) -> Response:
    tokenizer = backend(request).tokenizer
    vllm = body.content is None and body.prompt is not None
    bos = body.add_special_tokens if vllm else bool(body.add_special)
    text = body.prompt if vllm else body.content
    ids = tokenizer.encode(
        text or "", bos=bos and tokenizer.control.bos is not None, control=body.parse_special
    )
    if vllm:
        return reply({"tokens": ids, "count": len(ids), "max_model_len": backend(request).context})
    if not body.with_pieces:
        return reply({"tokens": ids})
    return reply(
        {
            "tokens": [
                {"id": token, "piece": _piece(tokenizer.decode_bytes([token], control=True))} for token in ids
            ]
        }
    )


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """vLLM's, which lm-eval asks for."""
    tokenizer = backend(request).tokenizer
    names = {
        name: getattr(tokenizer.control, name.removesuffix("_token"))
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return reply(
        {
            "tokenizer_class": "GemmaTokenizer",
            "model_max_length": backend(request).context,
            "chat_template": None,
            **{name: None if token is None else tokenizer.piece(token) for name, token in names.items()},
        }
    )


@router.post("/detokenize")
async def detokenize(body: Detokenize, request: Request) -> Response:
    text = backend(request).tokenizer.decode(body.tokens, control=True)
    return reply({"content": text, "prompt": text})


@router.post("/apply-template")
async def apply_template(body: Template, request: Request) -> Response:
    tokenizer = backend(request).tokenizer
    made = prompts.chat(tokenizer, [one.message() for one in body.messages])
    return reply({"prompt": tokenizer.decode(made.ids, control=True)})


@router.get("/health")
async def health() -> Response:
    return reply({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus' text format, with llama.cpp's names where it has one."""
    found = backend(request).metrics
    counts = found.counts
    rows = [
        ("llamacpp:prompt_tokens_total", "counter", counts["prompt_tokens"] - counts["cached_tokens"]),
        ("llamacpp:prompt_seconds_total", "counter", counts["prompt_seconds"]),
        ("llamacpp:tokens_predicted_total", "counter", counts["predicted_tokens"]),
        ("llamacpp:tokens_predicted_seconds_total", "counter", counts["predicted_seconds"]),
        ("llamacpp:requests_processing", "gauge", found.running),
        ("llamacpp:requests_deferred", "gauge", found.waiting),
        *(
            (f"codegemma_{name}_total", "counter", counts[name])
            for name in ("requests", "rejected", "cancelled", "cached_tokens")
        ),
    ]
    lines = [part for name, kind, value in rows for part in (f"# TYPE {name} {kind}", f"{name} {value:g}")]
    name = "codegemma_time_to_first_token_seconds"
    lines += [
        f"# TYPE {name} histogram",
        *(
            f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else bound}"}} {count}'
            for bound, count in found.buckets.items()
        ),
        f"{name}_sum {found.waited:.6f}",
        f"{name}_count {max(found.buckets.values())}",
    ]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


@router.get("/props")
async def props(request: Request) -> Response:
    served = backend(request)
    return reply(
        {
            "default_generation_settings": {"n_ctx": served.context, "params": {"n_predict": INFILL_TOKENS}},
            "total_slots": served.slots,
            "model_path": served.name,
            "chat_template": "",
            "build_info": f"codegemma {__version__}",
            "modalities": {"vision": False, "audio": False},
            "codegemma": {
                "version": __version__,
                "model": served.name,
                "title": served.title,
                "fim_trained": served.fim_trained,
                "mode": served.mode,
                "adapters": served.adapters,
                "chat": served.chats,
            },
        }
    )


@router.get("/slots")
async def slots(request: Request) -> Response:
    served = backend(request)
    return reply(
        [
            {"id": index, "n_ctx": served.context, "is_processing": index < served.metrics.running}
            for index in range(served.slots)
        ]
    )


@router.post("/v1/embeddings", include_in_schema=False)  # nothing that is offered
@router.post("/embedding", include_in_schema=False)
@router.post("/embeddings", include_in_schema=False)
async def embeddings() -> Response:
    return reply(error(501, "This server does not support embeddings: CodeGemma is a generator"), 501)


def _ids(request: Request, pieces: Pieces) -> str | tuple[int, ...]:
    """A prompt of text, ids, or both mixed."""
    if isinstance(pieces, str):
        return pieces
    tokenizer = backend(request).tokenizer
    parts = [tokenizer.encode(one, control=True) if isinstance(one, str) else [one] for one in pieces]
    if any(isinstance(one, str) for one in pieces[:1]) and tokenizer.control.bos is not None:
        parts.insert(0, [tokenizer.control.bos])
    return tuple(token for part in parts for token in part)


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def _answered(body: Generation, request: Request, asks: list[Ask]) -> Response:
    if body.stream:
        jobs = await backend(request).submit(asks)
        return Stream(request, jobs, _stream(body, request, jobs), lambda message: event(error(500, message)))
    answers = await collect(request, asks)
    found = [
        _picked(_final(body, request, answer, index, answer.steps), body.response_fields)
        for index, answer in enumerate(answers)
    ]
    return reply(found if len(found) > 1 else found[0])


async def _stream(body: Generation, request: Request, jobs: list[Job]) -> AsyncIterator[bytes]:
    taken: list[list[Step]] = [[] for _ in jobs]
    async for index, step in merged(jobs):
        taken[index].append(step)
        if step.text or (step.token is not None and (body.return_tokens or body.n_probs)):
            yield event(
                {
                    "index": index,
                    "content": step.text,
                    "tokens": _tokens(body, [step]),
                    "stop": False,
                    "id_slot": -1,
                    "tokens_predicted": jobs[index].predicted_tokens,
                    "tokens_evaluated": jobs[index].prompt_tokens,
                    **_probabilities(body, request, [step]),
                }
            )
        if step.stop is not None:
            last = _final(body, request, Answer(jobs[index], taken[index]), index, [])
            yield event(_picked(last, body.response_fields))


def _final(
    body: Generation, request: Request, answer: Answer, index: int, steps: list[Step]
) -> dict[str, Any]:
    """The answer of a whole request; or, without steps, the last event of a stream, which has told them."""
    job, last = answer.job, answer.steps[-1]
    sampling = job.ask.sampling
    return {
        "index": index,
        "content": "".join(step.text for step in steps),
        "tokens": _tokens(body, steps),
        "id_slot": -1,
        "stop": True,
        "model": backend(request).name,
        "tokens_predicted": job.predicted_tokens,
        "tokens_evaluated": job.prompt_tokens,
        "generation_settings": {
            "n_predict": job.ask.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
            "repeat_penalty": sampling.repeat_penalty,
            "stop": list(job.ask.stop),
        },
        "prompt": backend(request).tokenizer.decode(job.prompt.ids, control=True),
        "has_new_line": any("\n" in step.text for step in answer.steps),
        "truncated": False,
        "stop_type": STOP_TYPES.get(last.stop or "", "none"),
        "stopping_word": stop_word(answer, backend(request).tokenizer),
        "tokens_cached": job.cached_tokens,
        "timings": job.timings(),
        **_probabilities(body, request, steps),
        **({"id": offer(answer, body.language)} if isinstance(body, Infill) and answer.text else {}),
    }


def _tokens(body: Generation, steps: list[Step]) -> list[int]:
    return [step.token for step in steps if step.token is not None] if body.return_tokens else []


def _probabilities(body: Generation, request: Request, steps: list[Step]) -> dict[str, Any]:
    if not body.n_probs or not steps:
        return {}
    tokenizer = backend(request).tokenizer

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.decode_bytes([token], control=True)
        return {
            "id": token,
            "token": data.decode("utf-8", "replace"),
            "bytes": list(data),
            "logprob": logprob,
        }

    return {
        "completion_probabilities": [
            {**entry(step.token, step.logprob), "top_logprobs": [entry(*one) for one in step.top]}
            for step in steps
            if step.token is not None
        ]
    }


def _picked(answer: dict[str, Any], fields: list[str] | None) -> dict[str, Any]:
    """The fields asked for, in a stream of its last event; `timings/prompt_n` comes back flat under that very name, as
    llama.vim reads it."""
    if not fields or fields == [""]:
        return answer
    found: dict[str, Any] = {}
    for name in fields:
        value: Any = answer
        for key in name.split("/"):
            if not isinstance(value, dict) or key not in value:
                break
            value = value[key]
        else:
            found[name] = value
    return found
