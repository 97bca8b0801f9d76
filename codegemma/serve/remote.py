"""Has another OpenAI-compatible server answer: this one makes the prompts and trims the answers."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import numpy as np
from fastapi import HTTPException

from codegemma import hub
from codegemma.checkpoints import Checkpoint
from codegemma.generate.cache import PrefixCache
from codegemma.generate.client import (
    api_url,
    completion_body,
    error_message,
    key_headers,
    prompt_logprobs,
    stopped_by_text,
)
from codegemma.generate.request import Infill, Request
from codegemma.generate.resolve import resolve
from codegemma.generate.running import Step, Stop
from codegemma.native import PAGE, Page
from codegemma.prompts import Layout
from codegemma.serve.metrics import Metrics
from codegemma.serve.requests import Busy, Job, can_chat, prompt_timeout, supersedes
from codegemma.tokenizer import Tokenizer

MAX_REQUESTS = 256  # at once: the remote server batches and queues them
INITIAL_PREFILL_RATE = 2000.0  # prompt tokens a second, until it is measured
REMEMBERED_PAGES = 1 << 16  # of prompts that the remote server probably still has in its cache


class RemoteService:
    """A CompletionService in front of another server. Make one with `open`."""

    adapters: list[str] = []
    aliases: list[str] = []

    def __init__(self, client: httpx.AsyncClient, name: str, checkpoint: Checkpoint, context: int) -> None:
        if checkpoint.tokenizer is None:
            remedy = "-m must name a model whose tokenizer is that of the served one"
            raise ValueError(f"{checkpoint.path} has no tokenizer: {remedy}")
        self.client, self.name, self.context = client, name, context
        self.title = f"{name} at {client.base_url}"
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.slots, self.size, self.metrics = MAX_REQUESTS, 0, Metrics()
        self.cache = PrefixCache("remote", 1, REMEMBERED_PAGES)  # of prompts, without their keys and values
        self.prefill_rate = INITIAL_PREFILL_RATE
        preset = hub.preset(name) or hub.preset_in(name, checkpoint.config)
        fim_trained = preset.fim if preset else self.tokenizer.control.fim == "named"
        self.default_layout: Layout = "psm" if fim_trained else "prefix"
        self.reads_files = fim_trained
        self.chats = can_chat(preset, self.tokenizer)
        self._jobs: dict[Job, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, url: str, checkpoint: Checkpoint, key: str = "") -> RemoteService:
        """Asks the server which model it serves; `checkpoint` gives the tokenizer.

        Raises ValueError where no such server answers.
        """
        client = httpx.AsyncClient(
            base_url=api_url(url),
            headers=key_headers(key),
            timeout=httpx.Timeout(600.0, connect=10.0),
            limits=httpx.Limits(max_connections=MAX_REQUESTS),
        )
        try:
            answer = await client.get("/models")
            answer.raise_for_status()
            served = answer.json()["data"][0]
            name, context = str(served["id"]), int(served.get("max_model_len") or checkpoint.config.context)
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            await client.aclose()
            problem = f"{api_url(url)}/models does not tell what is served ({error})"
            raise ValueError(f"{problem}: is it an OpenAI-compatible server?") from error
        return cls(client, name, checkpoint, min(context, checkpoint.config.context))

    def cached(self, ids: Sequence[int], adapter: str = "none") -> int:
        """How many first tokens the remote server probably has in its cache."""
        return self.cache.find(ids[:-1])[1]

    async def submit(self, requests: Sequence[Request]) -> list[Job]:
        """A job for each request; see CompletionService."""
        if len(requests) > MAX_REQUESTS:
            problem = f"a request to a remote server may have {MAX_REQUESTS} choices"
            raise ValueError(f"{problem}, this one has {len(requests):,}: split it")
        self._check_room(len(requests))  # before the work of encoding
        resolved = await asyncio.to_thread(lambda: list(map(self._resolve, requests)))
        self._check_room(len(requests))  # other requests may have come meanwhile
        jobs = list(map(Job, requests, resolved))
        for older in [job for job in self._jobs if supersedes(jobs[0], job)]:
            older.cancel()
        loop = asyncio.get_running_loop()
        for job in jobs:
            job.resolved = replace(job.resolved, adapter="none")  # the remote server has none of ours
            task = self._jobs[job] = asyncio.create_task(self._run(job))
            job.on_cancel = partial(loop.call_soon_threadsafe, task.cancel)
        self.metrics.running = len(self._jobs)
        return jobs

    def _check_room(self, count: int) -> None:
        """Raises Busy where `count` more jobs would exceed MAX_REQUESTS."""
        if len(self._jobs) + count > MAX_REQUESTS:
            self.metrics.counts["rejected"] += 1
            raise Busy(f"{len(self._jobs)} requests are running: try again in a moment", 1)

    def _resolve(self, request: Request) -> Request:
        """The request as token ids, without `Infill.heal`: the protocol has no field for the text that an
        answer must begin with."""
        if isinstance(request.prompt, Infill):
            request = replace(request, prompt=replace(request.prompt, heal=False))
        return resolve(self, request, {self.default_layout} - {"prefix"}, self.reads_files)

    async def close(self) -> None:
        """Cancels all jobs and closes the connections."""
        tasks = list(self._jobs.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()

    async def _run(self, job: Job) -> None:
        """Reads the answer into the job. The job ends in any case."""
        job.started = time.perf_counter()
        last = Step(None, "", 0.0, "length")
        try:
            async with asyncio.timeout(prompt_timeout(job.request)) as deadline:
                async for step in self._steps(job):
                    deadline.reschedule(None)
                    if step.stop is not None:
                        last = step
                        break
                    shown = job.take(step)
                    job.post(shown)
                    if shown.stop is not None:
                        return
                    if job.overdue(time.perf_counter()):
                        break
            job.post(job.take(last))
        except (asyncio.CancelledError, TimeoutError):
            job.post(job.take(replace(last, stop="cancelled")))
        except Exception as error:
            job.stop, job.ended = "cancelled", time.perf_counter()
            job.post(error)
        finally:
            self._jobs.pop(job, None)
            self.metrics.running = len(self._jobs)
            self.metrics.add(job.timings())

    async def _steps(self, job: Job) -> AsyncIterator[Step]:
        """The answer as Steps. The last one comes after the usage, which has the number of tokens."""
        last: Step | None = None
        logprobs: list[float] = []
        async for chunk in self._chunks(job):
            if usage := chunk.get("usage"):
                job.predicted_tokens = usage.get("completion_tokens") or job.predicted_tokens
                job.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in chunk.get("choices") or ():
                if not job.first:
                    self._remember_prompt(job)
                steps = [_with_confidence(step, logprobs) for step in self._steps_of(job, choice)]
                if (reason := choice.get("finish_reason")) is not None:
                    ended: Stop = "stop_text" if stopped_by_text(choice) else "end"
                    last = steps.pop() if steps else Step(None, "", 0.0)
                    last = replace(last, stop="length" if reason == "length" else ended)
                if job.request.max_tokens:
                    for step in steps:
                        yield step
        if last is None:
            raise HTTPException(502, f"{self.client.base_url} broke off its answer")
        yield last if job.request.max_tokens else Step(None, "", 0.0, "length")

    async def _chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """The parsed parts of the server's answer. Raises `_refusal(answer)`, or HTTPException 502."""
        scored = job.request.wants_prompt_logprobs
        body = completion_body(self.name, job.resolved, echo=scored, stream=not scored)
        try:
            async with self.client.stream("POST", "/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _refusal(answer)
                if scored:
                    yield self._without_prompt(job, json.loads(await answer.aread()))
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        chunk = json.loads(data)
                        if "error" in chunk:
                            raise HTTPException(502, f"the remote server failed: {chunk['error']}")
                        yield chunk
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            reason = f"the remote server, {self.client.base_url}, fails: {error!r}"
            raise HTTPException(502, reason) from error

    def _remember_prompt(self, job: Job) -> None:
        """Notes that the server has read a prompt, and now caches it; the time gives its prefill rate."""
        ids = job.prompt_ids
        uncached = len(ids) - self.cache.find(ids)[1]
        seconds = time.perf_counter() - job.started
        if uncached >= 32 and seconds > 0:
            self.prefill_rate += (uncached / seconds - self.prefill_rate) / 4
        self.cache.put(ids, [Page(np.empty(0, np.uint8), PAGE) for _ in range(-(-len(ids) // PAGE))])

    def _without_prompt(self, job: Job, answer: dict[str, Any]) -> dict[str, Any]:
        """An echoed answer without the prompt, whose log-probabilities go to `job.scores`."""
        choice, count = answer["choices"][0], len(job.prompt_ids)
        scores = prompt_logprobs(choice, 1, count)
        if len(scores) != count - 1:
            problem = "does not give a prompt's log-probabilities: use vLLM, or leave echo out"
            raise HTTPException(502, f"{self.client.base_url} {problem}")
        job.scores = [(value, self._with_ids(top)) for value, top in scores]
        choice["logprobs"] = {name: values[count:] for name, values in choice["logprobs"].items()}
        text = "".join(choice["logprobs"]["tokens"])
        choice["text"] = text if choice["text"].endswith(text) else ""
        return answer

    def _steps_of(self, job: Job, choice: dict[str, Any]) -> Iterator[Step]:
        """A part of an answer as Steps: one for each token if it has log-probabilities, else one for all."""
        text, logprobs = choice.get("text") or "", choice.get("logprobs") or {}
        tokens = logprobs.get("tokens") or []
        if not tokens and text:
            yield Step(None, text, 0.0)
        tops = (job.request.top_logprobs and logprobs.get("top_logprobs")) or [None] * len(tokens)
        for token, value, top in zip(tokens, logprobs.get("token_logprobs") or (), tops, strict=False):
            yield Step(self._token_id(token), text, float(value), None, self._with_ids(top))
            text = ""

    def _with_ids(self, top: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        ids = ((self._token_id(token), float(value)) for token, value in (top or {}).items())
        return tuple((token, value) for token, value in ids if token is not None)

    def _token_id(self, text: str) -> int | None:
        """The id of a token that the server wrote as text; None where it is unknown."""
        if text.startswith("bytes:\\x") and len(text) == 10:
            text = f"<0x{text[8:].upper()}>"
        return self.tokenizer.token_id(text.replace(" ", "\u2581"))


def _refusal(answer: httpx.Response) -> Exception:
    """The exception for a refusal: Busy for 429, ValueError for a bad request, else HTTPException 502."""
    status, message = answer.status_code, error_message(answer)
    if status == 429:
        after = answer.headers.get("retry-after", "")
        return Busy(message, int(after) if after.isdigit() else 1)
    if status in (400, 422):
        return ValueError(message[:2000])
    return HTTPException(502, f"the remote server answered {status}: {message[:300]}")


def _with_confidence(step: Step, logprobs: list[float]) -> Step:
    """The step with the confidence up to it; adds its log-probability to those of the steps before."""
    if step.token is None:
        return step
    logprobs.append(step.logprob)
    return replace(step, confidence=math.exp(sum(logprobs) / len(logprobs)))
