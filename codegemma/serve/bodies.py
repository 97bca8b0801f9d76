"""The fields that the bodies of several protocols share, and how they become a request to the model."""

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
TopCount = Annotated[int, Field(ge=0, le=20)]  # of alternatives to a token

# What the protocols call the limit of the answer's tokens; below 0 is the default.
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "n_predict", "num_predict")
# What they call the fields of Sampling, where it is not the same name.
SAMPLING_FIELDS = {"repetition_penalty": "repeat_penalty", "random_seed": "seed", "logit_bias": "bias"}
SAMPLING_FIELDS |= {name: name for name in Sampling.__dataclass_fields__}


class SamplingFields(BaseModel):
    """How an answer is drawn and where it stops, in the names that most protocols have."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StopTexts = None


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
        extra = [File(one_line(file.filename), file.text) for file in self.input_extra or ()]
        files = (*files, *extra)
        return Infill(
            prefix, suffix or "", self.path or None, files, self.mode or "auto", self.trim or "none"
        )

    def request(
        self,
        http: HttpRequest,
        prompt: Infill | TextPrompt | Chat,
        max_tokens: int,
        top_logprobs: int = 0,
        options: BaseModel | None = None,
        **sampling: Any,
    ) -> Request:
        """The request that the body, its headers and its model's name ask for.

        `max_tokens` and `sampling` hold where the body says nothing. `options` has the limit, stops and
        sampling; by default the body has. A model's name may choose an adapter: "ours", or "tiny:ours".
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
    """The sampling that fields ask for, by any protocol's names. A seed that was not sent is random."""
    sent = {SAMPLING_FIELDS[name]: value for name, value in fields.items() if name in SAMPLING_FIELDS}
    values = defaults | {name: value for name, value in sent.items() if value is not None}
    values["top_k"] = max(values.get("top_k", 0), 0)
    values["bias"] = tuple(values.get("bias", {}).items())
    return Sampling(**{"seed": secrets.randbits(32), **values})


def one_line(path: str) -> str:
    """A client's name of a file as it may stand in a prompt: on one line."""
    return " ".join(path.split())
