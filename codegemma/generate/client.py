"""Requests to other completion servers, and answers: OpenAI's /v1/completions with vLLM's extensions.

Prompts are sent as token ids, so that control tokens survive; the tokenizer must be the served model's.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from codegemma.generate.request import Request


def api_url(url: str) -> str:
    """The URL of a server's API, ending in /v1, from a URL with or without /v1 or /completions."""
    return url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"


def key_headers(key: str) -> dict[str, str]:
    """The HTTP headers for an API key; none for "" (no key)."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def completion_body(model: str, request: Request, echo: bool = False, stream: bool = False) -> dict[str, Any]:
    """The JSON body of a request of token ids. `echo` asks for the prompt's log-probabilities.

    Fields at their default are left out, since some servers refuse fields that they do not know.
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
    """Log-probability and alternatives of each echoed token [start, end); [] if one lacks the former."""
    lists = choice.get("logprobs") or {}
    values = (lists.get("token_logprobs") or [])[start:end]
    top = (lists.get("top_logprobs") or [])[start:end]
    if len(values) != end - start or None in values:
        return []
    top = top if len(top) == len(values) else [None] * len(values)
    return [(float(value), best or {}) for value, best in zip(values, top, strict=True)]


def stopped_by_text(choice: dict[str, Any]) -> bool:
    """Whether a stop text ended the answer: vLLM's `stop_reason` is that text, a token id or null (<eos>)."""
    return isinstance(choice.get("stop_reason"), str)


def error_message(answer: httpx.Response) -> str:
    """The message of an error response, in OpenAI's or vLLM's form; in any other form, the whole text."""
    try:
        value = answer.json()
        error = value.get("error")
        return str(error["message"] if isinstance(error, dict) else value.get("message") or answer.text)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return answer.text
