"""Another OpenAI-compatible server as the engine: prompts, budgets, trimming and dialects are ours, generation is theirs.

Prompts travel as token ids on /v1/completions, so that control tokens stay what they are; the tokenizer must be the
served model's own.
"""

from __future__ import annotations

import asyncio
import json
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
from codegemma.generate.completion import layout_for
from codegemma.generate.engine import Step, Stop
from codegemma.native import PAGE, Page
from codegemma.prompts import Layout
from codegemma.serve.requests import LATE, Ask, Busy, Job, Metrics, Text, prompt_of, supersedes
from codegemma.tokenizer import Tokenizer

SLOTS = 256  # requests at once: the engine behind batches and queues them
FIRST_RATE = 2000.0  # prompt tokens a second, until it was measured
REMEMBERED = 1 << 16  # pages of prompts that the engine behind probably still has


class Remote:
    """A Backend. Made by `open`, which asks the server what it serves."""

    adapters: list[str] = []

    def __init__(self, client: httpx.AsyncClient, name: str, checkpoint: Checkpoint, context: int) -> None:
        if checkpoint.tokenizer is None:
            raise ValueError(
                f"{checkpoint.path} has no tokenizer: -m must name a model whose tokenizer is that of the served one"
            )
        self.client, self.name, self.title, self.context = (
            client,
            name,
            f"{name} at {client.base_url}",
            context,
        )
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.slots, self.size, self.metrics = SLOTS, 0, Metrics()
        self.cache = PrefixCache("remote", 1, REMEMBERED)  # which prompts, not their keys and values
        self.prefill_rate = FIRST_RATE
        self._preset = hub.preset(name) or hub.preset_in(name, checkpoint.config)
        self._jobs: dict[Job, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, url: str, checkpoint: Checkpoint, key: str = "") -> Remote:
        """Raises ValueError where no such server answers."""
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        client = httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(600.0, connect=10.0),
            limits=httpx.Limits(max_connections=SLOTS),
        )
        try:
            answer = await client.get("/models")
            answer.raise_for_status()
            served = answer.json()["data"][0]
            name, context = str(served["id"]), int(served.get("max_model_len") or checkpoint.config.context)
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            await client.aclose()
            raise ValueError(
                f"{base}/models does not tell what is served ({error}): is it an OpenAI-compatible server?"
            ) from error
        return cls(client, name, checkpoint, min(context, checkpoint.config.context))

    @property
    def fim_trained(self) -> bool:
        return self._preset.fim if self._preset else self.tokenizer.control.fim == "named"

    @property
    def mode(self) -> Layout:
        return layout_for("auto", self.fim_trained, spm_trained=False)

    @property
    def chats(self) -> bool:
        return (
            "chat" in self._preset.uses if self._preset else self.tokenizer.control.start_of_turn is not None
        )

    def cached(self, ids: Sequence[int], adapter: str | None = None) -> int:
        """How many first tokens the engine behind probably still has."""
        return self.cache.find(ids[:-1])[1]

    async def submit(self, asks: Sequence[Ask]) -> list[Job]:
        if len(self._jobs) >= SLOTS:
            self.metrics.counts["rejected"] += 1
            raise Busy(f"{len(self._jobs)} requests are under way: try again in a moment", 1)
        prompts = await asyncio.to_thread(
            lambda: [prompt_of(self, ask, {self.mode} - {"prefix"}) for ask in asks]
        )
        jobs = [Job(ask, prompt) for ask, prompt in zip(asks, prompts, strict=True)]
        for older in [job for job in self._jobs if supersedes(jobs[0], job)]:
            older.cancel()
        loop = asyncio.get_running_loop()
        for job in jobs:
            task = self._jobs[job] = asyncio.create_task(self._run(job))
            job.on_cancel = partial(loop.call_soon_threadsafe, task.cancel)
        self.metrics.running = len(self._jobs)
        return jobs

    async def close(self) -> None:
        tasks = list(self._jobs.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()

    async def _run(self, job: Job) -> None:
        """Reads the answer into the job; whatever happens, the job ends."""
        job.started = time.perf_counter()
        last = Step(None, "", 0.0, "length")
        try:
            limit = LATE * job.ask.prompt_seconds if job.ask.prompt_seconds and job.ask.max_tokens else None
            async with asyncio.timeout(limit) as deadline:
                async for step in self._steps(job):
                    deadline.reschedule(None)
                    if step.stop is not None:
                        last = step
                        break
                    shown = job.take(step)
                    job.put([shown])
                    if shown.stop is not None:
                        return
                    if job.overdue(time.perf_counter()):
                        break
            job.put([job.take(last)])
        except (asyncio.CancelledError, TimeoutError):
            job.put([job.take(replace(last, stop="cancelled"))])
        except Exception as error:
            job.stop, job.ended = "cancelled", time.perf_counter()
            job.put([error])
        finally:
            self._jobs.pop(job, None)
            self.metrics.running = len(self._jobs)
            self.metrics.finished(job)

    async def _steps(self, job: Job) -> AsyncIterator[Step]:
        """Their chunks as Steps. The last one is held back until their usage has told how many tokens there were."""
        last: Step | None = None
        async for chunk in self._chunks(job):
            if usage := chunk.get("usage"):
                job.predicted_tokens = usage.get("completion_tokens") or job.predicted_tokens
                job.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in chunk.get("choices") or ():
                if not job.first:
                    self._has_read(job)
                steps = list(self._read(job, choice))
                if (reason := choice.get("finish_reason")) is not None:
                    stopped = isinstance(choice.get("stop_reason"), str)
                    stop: Stop = "length" if reason == "length" else "stop_text" if stopped else "end"
                    last = replace(steps.pop() if steps else Step(None, "", 0.0), stop=stop)
                if job.ask.max_tokens:
                    for step in steps:
                        yield step
        if last is None:
            raise HTTPException(502, f"{self.client.base_url} broke off its answer")
        yield last if job.ask.max_tokens else Step(None, "", 0.0, "length")

    async def _chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        ask, what = job.ask, job.ask.what
        sampling = ask.sampling
        scored = isinstance(what, Text) and what.score
        body: dict[str, Any] = {
            "model": self.name,
            "prompt": job.prompt.ids,
            "max_tokens": max(ask.max_tokens, 1),
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "stream": not scored,
            "stop_token_ids": sorted(job.prompt.stops | ask.stop_ids),
        }
        optional: dict[str, Any] = {
            "stop": list(ask.stop),
            "logprobs": max(ask.top, 1) if scored or ask.top else None,
            "echo": scored or None,
            "stream_options": None if scored else {"include_usage": True},
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "top_p": sampling.top_p if sampling.top_p < 1 else None,
            "repetition_penalty": sampling.repeat_penalty if sampling.repeat_penalty != 1 else None,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": {str(token): value for token, value in sampling.bias},
        }
        body |= {name: value for name, value in optional.items() if value}
        try:
            async with self.client.stream("POST", "/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise _refusal(
                        answer.status_code, (await answer.aread()).decode("utf-8", "replace"), answer.headers
                    )
                if scored:
                    yield self._scored(job, json.loads(await answer.aread()))
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        chunk = json.loads(data)
                        if "error" in chunk:
                            raise HTTPException(502, f"the engine behind failed: {chunk['error']}")
                        yield chunk
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise HTTPException(
                502, f"the engine behind, {self.client.base_url}, fails: {error!r}"
            ) from error

    def _has_read(self, job: Job) -> None:
        """Brings up to date what the engine behind is thought to have cached, and its speed."""
        ids = job.prompt.ids
        fresh = len(ids) - self.cache.find(ids)[1]
        seconds = time.perf_counter() - job.started
        if fresh >= 32 and seconds > 0:
            self.prefill_rate += (fresh / seconds - self.prefill_rate) / 4
        self.cache.put(ids, [Page(np.empty(0, np.uint8), PAGE) for _ in range(-(-len(ids) // PAGE))])

    def _scored(self, job: Job, answer: dict[str, Any]) -> dict[str, Any]:
        """Takes the prompt's log-probabilities out of an echo, and leaves what was generated."""
        choice, count = answer["choices"][0], len(job.prompt.ids)
        found = choice.get("logprobs") or {}
        values, best = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        if len(values) < count:
            raise HTTPException(
                502, f"{self.client.base_url} does not give a prompt's log-probabilities (echo with logprobs)"
            )
        job.scores = [
            (float(value), self._tops(top)) for value, top in zip(values[1:count], best[1:count], strict=True)
        ]
        text = "".join(found["tokens"][count:])
        choice["text"] = (
            choice["text"][len(choice["text"]) - len(text) :]
            if text and choice["text"].endswith(text)
            else ""
        )
        choice["logprobs"] = {
            name: found[name][count:] for name in ("tokens", "token_logprobs", "top_logprobs")
        }
        return answer

    def _read(self, job: Job, choice: dict[str, Any]) -> Iterator[Step]:
        """A chunk as Steps: one for each token where log-probabilities tell them apart, else one for all."""
        text, found = choice.get("text") or "", choice.get("logprobs") or {}
        tokens = found.get("tokens") or []
        if not tokens:
            if text:
                yield Step(None, text, 0.0)
            return
        for at, token in enumerate(tokens):
            tops = found.get("top_logprobs")
            yield Step(
                self._id(token),
                text if at == 0 else "",
                float(found["token_logprobs"][at]),
                None,
                self._tops(tops[at]) if tops and job.ask.top else (),
            )

    def _tops(self, top: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        ids = ((self._id(token), float(value)) for token, value in (top or {}).items())
        return tuple((token, value) for token, value in ids if token is not None)

    def _id(self, text: str) -> int | None:
        """The id of a token that a server spells."""
        if text.startswith("bytes:\\x") and len(text) == 10:
            text = f"<0x{text[8:].upper()}>"
        return self.tokenizer.token_id(text.replace(" ", "\u2581"))


def _refusal(status: int, text: str, headers: httpx.Headers) -> Exception:
    """Their refusal as ours: what they say of the request goes on to the client."""
    try:
        found = json.loads(text)
        message = (
            found["error"]["message"]
            if isinstance(found.get("error"), dict)
            else found.get("message") or text
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        message = text
    if status == 429:
        after = headers.get("retry-after", "")
        return Busy(str(message), int(after) if after.isdigit() else 1)
    if status in (400, 422):
        return ValueError(str(message)[:2000])
    return HTTPException(502, f"the engine behind answered {status}: {str(message)[:300]}")
