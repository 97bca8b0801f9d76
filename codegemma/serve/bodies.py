"""The fields that the bodies of several protocols share, and the Request that is made from them."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from codegemma.config import Mode, Trim
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File
from codegemma.serve.wire import service_of
from codegemma.tokenizer import without_surrogates

INFILL_TOKENS = 128  # of a suggestion, where the body has no limit
# The most tokens of an answer if the body's limit is negative (it asks for no limit), or if the field is
# missing in a chat, in /completion, or in /api/generate without a suffix.
DEFAULT_TOKENS = 1024
T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]  # the first wrong item is reported, not each of 100,000
SLICE_CHARACTERS = 1 << 14  # of a text that `well_formed` reads at once
LARGE_BODY_BYTES = 1 << 16  # a larger body is parsed in a thread beside the event loop
MAX_STOPS = 64
MAX_BIASES = 1024
MAX_MS = 86_400_000
StopTexts = str | Annotated[list[str | None], Field(max_length=MAX_STOPS)] | None
Milliseconds = Annotated[float, Field(gt=0, le=MAX_MS)]
LlamaMilliseconds = Annotated[float, Field(le=MAX_MS)]  # llama.cpp's: 0 and below are no limit
TokenCount = Annotated[int, Field(ge=-1)]
TopCount = Annotated[int, Field(ge=0, le=20)]  # how many of the likeliest tokens are listed

# The protocols' names of Request.max_tokens.
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "n_predict", "num_predict")
# The protocols' names of Sampling's fields.
SAMPLING_FIELDS = {"repetition_penalty": "repeat_penalty", "random_seed": "seed", "logit_bias": "bias"}
SAMPLING_FIELDS |= {name: name for name in Sampling.__dataclass_fields__}

# Fields of these protocols and of vLLM that would change the answer, but are not supported.
STRUCTURED_OUTPUT_FIELDS = (
    *("format", "response_format", "grammar", "json_schema", "regex", "structured_outputs", "structural_tag"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding"),
)
OTHER_FIELDS = (
    *("modalities", "audio", "image_data", "web_search_options", "chat_template", "continue_final_message"),
    *("min_tokens", "ignore_eos", "bad_words", "allowed_token_ids", "include_stop_str_in_output"),
    *("use_beam_search", "prompt_logprobs"),
)
TOOL_FIELDS = {"tools": "tool_choice", "functions": "function_call"}
OFF: tuple[Any, ...] = (None, False, "", [], {}, {"type": "text"}, ["text"])  # values that ask for nothing

_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE_MARKS = (b"\\ud", b"\\uD", b"\xed")  # JSON with a surrogate has one of these


def well_formed(value: Any) -> Any:
    """A JSON value whose texts are Unicode: half a surrogate pair becomes U+FFFD, a whole one a character."""
    if isinstance(value, str):
        return value if value.isascii() else "".join(_pieces(value))
    if isinstance(value, list):
        return [well_formed(item) for item in value]
    if isinstance(value, dict):
        return {well_formed(name): well_formed(item) for name, item in value.items()}
    return value


def _pieces(text: str) -> Iterator[str]:
    """A text in well-formed pieces, so that other threads may run between them."""
    start = 0
    while start < len(text):
        end = start + SLICE_CHARACTERS
        end += bool(_PAIR.match(text, end - 1))  # a pair stays together
        yield without_surrogates(text[start:end])
        start = end


class _JsonRequest(HttpRequest):
    async def json(self) -> Any:
        body = await self.body()
        return await asyncio.to_thread(_parsed, body) if len(body) > LARGE_BODY_BYTES else _parsed(body)


def _parsed(body: bytes) -> Any:
    value = json.loads(body)
    return well_formed(value) if any(mark in body for mark in _SURROGATE_MARKS) else value


class JsonRoute(APIRoute):
    """A route whose bodies are well_formed: editors that count in UTF-16 may cut a surrogate pair in two."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(http: HttpRequest) -> Response:
            return await handler(_JsonRequest(http.scope, http.receive))

        return handle


def _bias_by_token(value: Any) -> Any:
    """llama.cpp's list of [id, bias] as a dict; the bias false bans a token.

    Raises ValueError on a list of anything else.
    """
    if isinstance(value, list) and len(value) <= MAX_BIASES:
        if not all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in value):
            raise ValueError("each pair must be [token id, bias]: /tokenize gives the ids of a text")
        value = dict(value)
    if isinstance(value, dict) and len(value) <= MAX_BIASES:
        value = {token: -100 if bias is False else bias for token, bias in value.items()}
    return value


class SamplingFields(BaseModel):
    """How tokens are sampled and where the answer stops, under the names that most protocols use."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: (
        Annotated[dict[int, float], Field(max_length=MAX_BIASES), BeforeValidator(_bias_by_token)] | None
    ) = None
    seed: int | None = None
    stop: StopTexts = None


class ExtraFile(BaseModel):
    """A context file, as llama.cpp's clients send it. Without a name it has no path line in the prompt."""

    text: str
    filename: str = ""


class FunctionCall(BaseModel):
    name: str = ""
    arguments: str | dict[str, Any] | None = None  # OpenAI's are JSON in a text


class ToolCall(BaseModel):
    """A call of a tool in an earlier answer, which another model may have given."""

    function: FunctionCall | None = None


def with_calls(text: str, calls: Sequence[ToolCall]) -> str:
    """A message's text, and each call after it on a line of its own: no Gemma has tokens for calls."""
    lines = [text] if text else []
    for function in (call.function for call in calls if call.function):
        arguments = function.arguments or ""
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        lines.append(f"{function.name}({arguments})")
    return "\n".join(lines)


class ExtensionFields(BaseModel):
    """The fields that every protocol has here beside its own; see docs/server.md."""

    model_config = ConfigDict(extra="allow")  # for refuse_unsupported; other fields have no effect

    mode: Mode | None = None
    trim: Trim | None = None
    time_budget_ms: Milliseconds | None = None
    t_max_prompt_ms: LlamaMilliseconds | None = None
    t_max_predict_ms: LlamaMilliseconds | None = None
    path: str | None = None
    input_extra: Items[ExtraFile] | None = None
    adapter: str | None = None
    session: str | None = None
    model: str | None = None

    def infill(self, prefix: str, suffix: str | None, files: Sequence[File] = ()) -> Infill:
        """A fill-in-the-middle prompt; the body's extra files come after `files`, nearer to the prefix."""
        extra = [File(one_line(file.filename), file.text) for file in self.input_extra or ()]
        mode, trim = self.mode or "auto", self.trim or "auto"
        return Infill(prefix, suffix or "", self.path or None, (*files, *extra), mode, trim)

    def request(
        self,
        http: HttpRequest,
        prompt: Infill | TextPrompt | Chat,
        max_tokens: int,
        top_logprobs: int = 0,
        options: BaseModel | None = None,
        **sampling: Any,
    ) -> Request:
        """The request for one answer.

        `max_tokens` and `sampling` are the defaults for what the body leaves out. `options` is the part of
        the body with the limit, the stops and the sampling; None: the body itself. A model's name may choose
        an adapter: "ours", or "tiny:ours". Raises ValueError on a value that Request or Sampling refuses, and
        on a field that is not supported.
        """
        refuse_unsupported(self, self.model or service_of(http).name)
        source = options or self
        fields = {name: getattr(source, name) for name in type(source).model_fields}
        limit = next((fields[name] for name in LIMIT_FIELDS if fields.get(name) is not None), max_tokens)
        adapter = self.adapter or "auto"
        if (
            self.adapter is None
            and (name := (self.model or "").rpartition(":")[2]) in service_of(http).adapters
        ):
            adapter = name
        session = self.session or http.headers.get("x-session-id")
        prompt_ms = self.time_budget_ms or max(self.t_max_prompt_ms or 0, 0)
        predict_ms = max(self.t_max_predict_ms or 0, 0)
        stop = fields.get("stop") or ()
        return Request(
            prompt,
            DEFAULT_TOKENS if limit < 0 else limit,
            _sampling(fields, sampling),
            frozenset(fields.get("stop_token_ids") or ()),
            tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text),
            top_logprobs,
            adapter=adapter,
            session=session,
            client=f"{http.scope.get('client_name', '')} {session or ''}",
            prompt_seconds=prompt_ms / 1000 or None,
            predict_seconds=predict_ms / 1000 or None,
        )


def refuse_unsupported(body: BaseModel, model: str) -> None:
    """Raises ValueError on the first field of a body that asks for what is not supported; `model` is the name
    that the client knows. The words "does not support tools" are Ollama's, which clients look for."""
    sent = {name: value for name, value in (body.model_extra or {}).items() if value not in OFF}
    for tools, choice in TOOL_FIELDS.items():
        mode = sent.get(choice, "auto")
        if mode != "none" and (tools in sent or mode != "auto"):
            remedy = f'leave {tools} out, or send "{choice}": "none"'
            raise ValueError(f'"{model:.80}" does not support tools: {remedy}')
    for name in (*STRUCTURED_OUTPUT_FIELDS, *OTHER_FIELDS):
        if name in sent:
            is_format = name in STRUCTURED_OUTPUT_FIELDS
            remedy = "ask for the format in the prompt, and check the answer" if is_format else "leave it out"
            raise ValueError(f"{name} is not supported: {remedy}")


def _sampling(fields: dict[str, Any], defaults: dict[str, Any]) -> Sampling:
    """The Sampling of a body's fields, under any protocol's names. Draws a seed if there is none."""
    sent = {name: value for name, value in fields.items() if name in SAMPLING_FIELDS and value is not None}
    values = defaults | {SAMPLING_FIELDS[name]: value for name, value in sent.items()}
    values["top_k"] = max(values.get("top_k", 0), 0)
    values["bias"] = tuple(values.get("bias", {}).items())
    return Sampling(**{"seed": secrets.randbits(32), **values})


def one_line(path: str) -> str:
    """The path with every run of whitespace as one space: a prompt names each file on one line."""
    return " ".join(path.split())
