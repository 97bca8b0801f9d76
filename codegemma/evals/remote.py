"""Any OpenAI-compatible completions server as the model of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from codegemma.evals.task import Completion, Score, StopReason
from codegemma.tokenizer import Tokenizer


class Remote:
    """Prompts travel as token ids, so that control tokens stay what they are; `tokenizer` must be the served model's.

    Likelihoods need `echo` and `logprobs` of the server (vLLM has them); a server without raises ValueError.
    """

    def __init__(
        self, url: str, tokenizer: Tokenizer, model: str = "", key: str = "", concurrent: int = 16
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(600.0))
        self.tokenizer, self.concurrent = tokenizer, concurrent
        self.name = model or self._request("GET", "/models")["data"][0]["id"]

    def sample(
        self,
        prompts: list[list[int]],
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        stop: list[str],
        temperature: float,
        top_p: float,
        seed: int,
        n: int,
    ) -> Iterator[tuple[int, int, Completion]]:
        def ask(at: int, number: int) -> Completion:
            body = {
                "prompt": prompts[at],
                "max_tokens": max_tokens,
                "stop": stop or None,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed * 1_000_003 + number,
                "stop_token_ids": sorted(stop_ids),
            }
            started = time.monotonic()
            choice = self._complete(body)
            text, reason = choice["text"], choice.get("finish_reason")
            why = choice.get("stop_reason")  # vLLM tells: a string, an id, or none for <eos>
            ended: StopReason = (
                "length" if reason == "length" else "stop" if isinstance(why, str) else "token"
            )
            if "stop_reason" not in choice and reason == "stop" and stop:
                ended = "stop"  # other servers do not; a stop string is the usual end
            return Completion(text, self.tokenizer.encode(text), ended, time.monotonic() - started)

        with ThreadPoolExecutor(self.concurrent) as pool:
            running = {
                pool.submit(ask, at, number): (at, number)
                for at in range(len(prompts))
                for number in range(n)
            }
            for done in as_completed(running):
                yield *running[done], done.result()

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        def ask(pair: tuple[list[int], list[int]]) -> Score:
            context, continuation = pair
            ids = context + continuation
            choice = self._complete(
                {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
            )
            found = choice.get("logprobs") or {}
            values = (found.get("token_logprobs") or [])[len(context) : len(ids)]
            best = (found.get("top_logprobs") or [])[len(context) : len(ids)]
            if len(values) != len(continuation) or None in values:
                raise ValueError(
                    f"{self.url} does not give the log-probabilities of a prompt (echo with logprobs), "
                    "which this benchmark needs: use vLLM, or a local model"
                )
            likeliest = [max(top.values()) for top in best]
            greedy = len(best) == len(values) and all(
                v >= top for v, top in zip(values, likeliest, strict=True)
            )
            return Score([float(value) for value in values], greedy)

        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(ask, pairs))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.name} | {name: value for name, value in body.items() if value is not None}
        return self._request("POST", "/completions", body)["choices"][0]

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises ValueError with the server's own words where it refuses."""
        try:
            answer = self.client.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(
                f"{self.url}{path} cannot be reached ({error}): is the server running?"
            ) from error
        if answer.status_code != 200:
            raise ValueError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()
