"""Any OpenAI-compatible completions server as the model of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from codegemma.evals.task import Decoding, ModelOutput, Score, StopReason
from codegemma.tokenizer import Tokenizer


class RemoteModel:
    """An EvaluatedModel over HTTP. `tokenizer` must be the served model's: prompts are sent as token ids, so
    that control tokens stay what they are.

    Likelihoods need a server that knows `echo` with `logprobs` (vLLM does).
    """

    def __init__(
        self, url: str, tokenizer: Tokenizer, model: str = "", key: str = "", concurrent: int = 16
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(600.0))
        self.tokenizer, self.concurrent = tokenizer, concurrent
        self.name = model or self._request("GET", "/models")["data"][0]["id"]

    def sample(self, prompts: list[list[int]], decoding: Decoding) -> Iterator[tuple[int, int, ModelOutput]]:
        """See EvaluatedModel."""

        def ask(i: int, number: int) -> ModelOutput:
            started = time.monotonic()
            choice = self._complete(_body(prompts[i], number, decoding))
            reason = _stop_reason(choice, decoding)
            return ModelOutput(
                choice["text"], self.tokenizer.encode(choice["text"]), reason, time.monotonic() - started
            )

        with ThreadPoolExecutor(self.concurrent) as pool:
            asked = [(i, number) for i in range(len(prompts)) for number in range(decoding.samples)]
            running = {pool.submit(ask, *pair): pair for pair in asked}
            for future in as_completed(running):
                yield *running[future], future.result()

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """See EvaluatedModel. Raises ValueError where the server gives no log-probabilities of a prompt."""
        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(self._score, pairs))

    def _score(self, pair: tuple[list[int], list[int]]) -> Score:
        context, continuation = pair
        ids = context + continuation
        body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        logprobs = self._complete(body).get("logprobs") or {}
        values = (logprobs.get("token_logprobs") or [])[len(context) : len(ids)]
        top = (logprobs.get("top_logprobs") or [])[len(context) : len(ids)]
        if len(values) != len(continuation) or None in values:
            raise ValueError(
                f"{self.url} does not give the log-probabilities of a prompt (echo with logprobs), "
                "which this benchmark needs: use vLLM, or a local model"
            )
        greedy = len(top) == len(values) and all(
            value >= max(best.values()) for value, best in zip(values, top, strict=True)
        )
        return Score([float(value) for value in values], greedy)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.name} | {name: value for name, value in body.items() if value is not None}
        return self._request("POST", "/completions", body)["choices"][0]

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer. Raises ValueError with the server's own message where it refuses."""
        try:
            answer = self.client.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(
                f"{self.url}{path} cannot be reached ({error}): is the server running?"
            ) from error
        if answer.status_code != 200:
            raise ValueError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()


def _body(prompt: list[int], number: int, decoding: Decoding) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": decoding.max_tokens,
        "stop": list(decoding.stop) or None,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": decoding.seed * 1_000_003 + number,
        "stop_token_ids": sorted(decoding.stop_ids),
    }


def _stop_reason(choice: dict[str, Any], decoding: Decoding) -> StopReason:
    """vLLM's `stop_reason` is a stop text, a token id, or none for <eos>; other servers do not say which it
    was, and where there are stop texts, one of them is the usual end."""
    if choice.get("finish_reason") == "length":
        return "length"
    if "stop_reason" not in choice and choice.get("finish_reason") == "stop" and decoding.stop:
        return "stop"
    return "stop" if isinstance(choice.get("stop_reason"), str) else "token"
