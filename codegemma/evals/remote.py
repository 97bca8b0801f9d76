"""Any OpenAI-compatible completions server as the model of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from codegemma.evals.task import Decoding, ModelOutput, Score, StopReason
from codegemma.generate.client import (
    api_url,
    completion_body,
    error_message,
    key_headers,
    prompt_logprobs,
    stopped_by_text,
)
from codegemma.generate.request import Request
from codegemma.generate.sampling import Sampling
from codegemma.tokenizer import Tokenizer

SEED_STEP = 1_000_003  # between the seeds of runs, so that their samples have different ones


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
            choice = self._complete(_sample_request(prompts[i], number, decoding))
            ids = self.tokenizer.encode(choice["text"])
            return ModelOutput(
                choice["text"], ids, _stop_reason(choice, decoding), time.monotonic() - started
            )

        with ThreadPoolExecutor(self.concurrent) as pool:
            pairs = [(i, number) for i in range(len(prompts)) for number in range(decoding.samples)]
            running = {pool.submit(ask, *pair): pair for pair in pairs}
            for future in as_completed(running):
                yield *running[future], future.result()

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """See EvaluatedModel. Raises ValueError where the server gives no log-probabilities of a prompt."""
        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(self._score, pairs))

    def _score(self, pair: tuple[list[int], list[int]]) -> Score:
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
            problem = f"{self.url}{path} cannot be reached ({error})"
            raise ValueError(f"{problem}: is the server running?") from error
        if answer.status_code != 200:
            raise ValueError(f"{self.url}{path} answered {answer.status_code}: {error_message(answer)[:300]}")
        return answer.json()


def _sample_request(prompt: list[int], number: int, decoding: Decoding) -> Request:
    seed = decoding.seed * SEED_STEP + number
    sampling = Sampling(decoding.temperature, top_p=decoding.top_p, seed=seed)
    return Request(prompt, decoding.max_tokens, sampling, decoding.stop_ids, decoding.stop)


def _stop_reason(choice: dict[str, Any], decoding: Decoding) -> StopReason:
    """Servers other than vLLM do not say what stopped an answer: where there are stop texts, one of them is
    the usual reason."""
    if choice.get("finish_reason") == "length":
        return "length"
    if "stop_reason" not in choice and choice.get("finish_reason") == "stop" and decoding.stop:
        return "stop"
    return "stop" if stopped_by_text(choice) else "token"
