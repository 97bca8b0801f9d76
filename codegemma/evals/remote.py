"""Evaluates a model behind any OpenAI-compatible completions server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from codegemma.evals.task import Decoding, IdPair, ModelOutput, Score, StopReason
from codegemma.generate.client import (
    api_url,
    completion_body,
    error_message,
    key_headers,
    prompt_logprobs,
    stopped_by_text,
)
from codegemma.generate.request import Request
from codegemma.tokenizer import Tokenizer

SEED_STEP = 1_000_003  # a run's seed times this is the seed of its first sample: runs share no sample's seed


class RemoteModel:
    """An EvaluatedModel over HTTP. `tokenizer` must be the served model's.

    Likelihoods need a server that knows `echo` with `logprobs` (vLLM does).
    """

    def __init__(
        self, url: str, tokenizer: Tokenizer, model: str = "", key: str = "", concurrent: int = 16
    ) -> None:
        self.url = api_url(url)
        self.client = httpx.Client(headers=key_headers(key), timeout=httpx.Timeout(600.0))
        self.tokenizer, self.concurrent = tokenizer, concurrent
        self.name = model or self._request("GET", "/models")["data"][0]["id"]

    def sample(self, prompts: list[list[int]], decoding: Decoding) -> Iterator[tuple[int, int, ModelOutput]]:
        """See EvaluatedModel."""

        def ask(i: int, number: int) -> ModelOutput:
            started = time.monotonic()
            choice = self._complete(decoding.request(prompts[i], decoding.seed * SEED_STEP + number))
            text, seconds = choice["text"], time.monotonic() - started
            return ModelOutput(text, self.tokenizer.encode(text), _stop_reason(choice, decoding), seconds)

        with ThreadPoolExecutor(self.concurrent) as pool:
            pairs = [(i, number) for i in range(len(prompts)) for number in range(decoding.samples)]
            running = {pool.submit(ask, *pair): pair for pair in pairs}
            for future in as_completed(running):
                yield *running[future], future.result()

    def score(self, pairs: list[IdPair]) -> list[Score]:
        """See EvaluatedModel. Raises ValueError where the server gives no log-probabilities of a prompt."""
        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(self._score, pairs))

    def _score(self, pair: IdPair) -> Score:
        context, continuation = pair
        ids = context + continuation
        choice = self._complete(Request(ids, max_tokens=1), echo=True)
        scores = prompt_logprobs(choice, len(context), len(ids))
        if len(scores) != len(continuation):
            raise ValueError(
                f"{self.url} does not give the log-probabilities of a prompt (echo with logprobs), "
                "which this benchmark needs: use vLLM, or a local model"
            )
        greedy = all(top and value >= max(top.values()) for value, top in scores)
        return Score([value for value, _ in scores], greedy)

    def _complete(self, request: Request, echo: bool = False) -> dict[str, Any]:
        return self._request("POST", "/completions", completion_body(self.name, request, echo))["choices"][0]

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer. Raises ValueError with the server's own message where it refuses."""
        try:
            answer = self.client.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(
                f"{self.url}{path} cannot be reached ({error}): is the server running?"
            ) from error
        if answer.status_code != 200:
            raise ValueError(f"{self.url}{path} answered {answer.status_code}: {error_message(answer)[:300]}")
        return answer.json()


def _stop_reason(choice: dict[str, Any], decoding: Decoding) -> StopReason:
    """What ended an answer. Servers other than vLLM do not say whether it was a stop text or a control id;
    then a stop text is assumed if the request had any.
    """
    if choice.get("finish_reason") == "length":
        return "length"
    guess = "stop_reason" not in choice and choice.get("finish_reason") == "stop" and bool(decoding.stop)
    return "stop" if guess or stopped_by_text(choice) else "token"
