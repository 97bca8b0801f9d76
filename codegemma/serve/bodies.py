"""The fields that the bodies of several protocols share, and how they become a request to the model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from codegemma.config import Mode, Trim
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File
from codegemma.generate.request import Infill, Request
from codegemma.serve.wire import service

MAX_STOPS = 64
MAX_MS = 86_400_000
StopTexts = str | Annotated[list[str | None], Field(max_length=MAX_STOPS)] | None
Milliseconds = Annotated[float, Field(gt=0, le=MAX_MS)]
LlamaMilliseconds = Annotated[float, Field(le=MAX_MS)]  # llama.cpp's: 0 and below are no limit
TokenCount = Annotated[int, Field(ge=0)]

# The protocols' names of the fields of Sampling.
SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
    "random_seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "bias",
}


class ExtraFile(BaseModel):
    """Another file, as llama.cpp's clients send it; without a name it has no path line in the prompt."""

    text: str
    filename: str = ""


class ExtensionFields(BaseModel):
    """The fields that we add to every protocol; see docs/server.md."""

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
        extra = tuple(File(one_line(file.filename), file.text) for file in self.input_extra or ())
        files = (*files, *extra)
        return Infill(
            prefix, suffix or "", self.path or None, files, self.mode or "auto", self.trim or "none"
        )

    def request(self, http: HttpRequest, **fields: Any) -> Request:
        """A request with what the shared fields, the headers and the model's name say.

        A model's name may choose an adapter: "ours", or "tiny:ours".
        """
        adapter = self.adapter or "auto"
        if self.adapter is None and self.model:
            name = self.model.rpartition(":")[2]
            adapter = name if name in service(http).adapters else "auto"
        session = self.session or http.headers.get("x-session-id")
        prompt_ms = self.time_budget_ms or max(self.t_max_prompt_ms or 0, 0)
        predict_ms = max(self.t_max_predict_ms or 0, 0)
        return Request(
            adapter="auto" if adapter is None else adapter,
            session=session,
            client=f"{http.scope.get('client_name', '')} {session or ''}",
            prompt_seconds=prompt_ms / 1000 or None,
            predict_seconds=predict_ms / 1000 or None,
            **fields,
        )


def sampling_of(body: BaseModel, **defaults: Any) -> Sampling:
    """The sampling that a body's fields ask for, by any protocol's names; `defaults` for those not sent.

    A seed that was not sent is random.
    """
    sent = {SAMPLING_FIELDS[name]: value for name, value in body if name in SAMPLING_FIELDS}
    values = defaults | {name: value for name, value in sent.items() if value is not None}
    values["top_k"] = max(values.get("top_k", 0), 0)
    values["bias"] = tuple(values.get("bias", {}).items())
    return Sampling(**{"seed": secrets.randbits(32), **values})


def stop_texts(stop: StopTexts) -> tuple[str, ...]:
    """Stop texts as a tuple; empty ones mean nothing."""
    return tuple(text for text in ([stop] if isinstance(stop, str) else stop or ()) if text)


def one_line(path: str) -> str:
    """A client's name of a file as it may stand in a prompt: on one line."""
    return " ".join(path.split())
