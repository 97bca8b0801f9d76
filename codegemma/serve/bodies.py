"""The fields that the bodies of several protocols share, and the Request that is made from them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from codegemma.config import Mode, Trim
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File
from codegemma.serve.wire import service

MAX_STOPS = 64
MAX_MS = 86_400_000
StopTexts = str | Annotated[list[str | None], Field(max_length=MAX_STOPS)] | None
Milliseconds = Annotated[float, Field(gt=0, le=MAX_MS)]
LlamaMilliseconds = Annotated[float, Field(le=MAX_MS)]  # llama.cpp's: 0 and below are no limit
TokenCount = Annotated[int, Field(ge=0)]
TopCount = Annotated[int, Field(ge=0, le=20)]  # how many of the likeliest tokens are listed

# The protocols' names of Request.max_tokens; a value below 0 means the default.
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "n_predict", "num_predict")
# The protocols' names of Sampling's fields.
SAMPLING_FIELDS = {"repetition_penalty": "repeat_penalty", "random_seed": "seed", "logit_bias": "bias"}
SAMPLING_FIELDS |= {name: name for name in Sampling.__dataclass_fields__}


class SamplingFields(BaseModel):
    """How tokens are sampled and where the answer stops, under the names that most protocols use."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StopTexts = None


class ExtraFile(BaseModel):
    """A context file, as llama.cpp's clients send it. Without a name it has no path line in the prompt."""

    text: str
    filename: str = ""


class ExtensionFields(BaseModel):
    """The fields that every protocol has here beside its own; see docs/server.md."""

    mode: Mode | None = None
    trim: Trim | None = None
    time_budget_ms: Milliseconds | None = None
    t_max_prompt_ms: LlamaMilliseconds | None = None
    t_max_predict_ms: LlamaMilliseconds | None = None
    path: str | None = None
    input_extra: list[ExtraFile] | None = None
    adapter: str | None = None
    session: str | None = None
    model: str | None = None

    def infill(self, prefix: str, suffix: str | None, files: Sequence[File] = ()) -> Infill:
        """A fill-in-the-middle prompt; the body's extra files come after `files`, nearer to the prefix."""
        extra = [File(one_line(file.filename), file.text) for file in self.input_extra or ()]
        mode, trim = self.mode or "auto", self.trim or "none"
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
        an adapter: "ours", or "tiny:ours". Raises ValueError on a value that Request or Sampling refuses.
        """
        fields = dict(options or self)
        limit = next((fields[name] for name in LIMIT_FIELDS if fields.get(name) is not None), -1)
        adapter = self.adapter or "auto"
        if self.adapter is None and (name := (self.model or "").rpartition(":")[2]) in service(http).adapters:
            adapter = name
        session = self.session or http.headers.get("x-session-id")
        prompt_ms = self.time_budget_ms or max(self.t_max_prompt_ms or 0, 0)
        predict_ms = max(self.t_max_predict_ms or 0, 0)
        stop = fields.get("stop") or ()
        return Request(
            prompt,
            max_tokens if limit < 0 else limit,
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


def _sampling(fields: dict[str, Any], defaults: dict[str, Any]) -> Sampling:
    """The Sampling of a body's fields, under any protocol's names. Without a seed it is random."""
    sent = {SAMPLING_FIELDS[name]: value for name, value in fields.items() if name in SAMPLING_FIELDS}
    values = defaults | {name: value for name, value in sent.items() if value is not None}
    values["top_k"] = max(values.get("top_k", 0), 0)
    values["bias"] = tuple(values.get("bias", {}).items())
    return Sampling(**{"seed": secrets.randbits(32), **values})


def one_line(path: str) -> str:
    """The path with every run of whitespace as one blank: a prompt names each file on one line."""
    return " ".join(path.split())
