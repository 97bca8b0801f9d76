"""What clients of other completion servers share: OpenAI's /v1/completions with vLLM's extensions.

Prompts travel as token ids, so that control tokens stay what they are; the tokenizer must be that of the
served model.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from codegemma.generate.request import Request


def api_url(url: str) -> str:
    """A server's URL with /v1, however its user wrote it."""
    return url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"


def key_headers(key: str) -> dict[str, str]:
    """The headers that carry an API key; none for ""."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def completion_body(model: str, request: Request, echo: bool = False, stream: bool = False) -> dict[str, Any]:
    """The body of a request whose prompt is token ids; `echo` asks for the prompt's log-probabilities.

    Fields that would only say the default are left out: some servers refuse those they do not know.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": max(request.max_tokens, 1),
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "stop_token_ids": sorted(request.stop_ids),
    }
    optional: dict[str, Any] = {
        "stop": list(request.stop),
        "logprobs": max(request.top_logprobs, int(echo)),
        "echo": echo,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "repetition_penalty": sampling.repeat_penalty if sampling.repeat_penalty != 1 else None,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): value for token, value in sampling.bias},
    }
    return body | {name: value for name, value in optional.items() if value}


def prompt_logprobs(choice: dict[str, Any], start: int, end: int) -> list[tuple[float, dict[str, float]]]:
    """The log-probabilities and alternatives of an echo's tokens [start, end); [] where they are missing."""
    lists = choice.get("logprobs") or {}
    values = (lists.get("token_logprobs") or [])[start:end]
    top = (lists.get("top_logprobs") or [])[start:end]
    if len(values) != end - start or None in values:
        return []
    top = top if len(top) == len(values) else [None] * len(values)
    return [(float(value), best or {}) for value, best in zip(values, top, strict=True)]


def stopped_by_text(choice: dict[str, Any]) -> bool:
    """Whether a stop text ended it: vLLM's `stop_reason` is that text, a token id, or null at <eos>."""
    return isinstance(choice.get("stop_reason"), str)


def error_message(answer: httpx.Response) -> str:
    """What a server's refusal says, in the forms of OpenAI and vLLM, or else its whole text."""
    try:
        value = answer.json()
        error = value.get("error")
        return str(error["message"] if isinstance(error, dict) else value.get("message") or answer.text)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return answer.text
