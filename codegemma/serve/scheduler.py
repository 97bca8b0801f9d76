"""Runs the requests of all clients together, in the one thread that uses the engine (continuous batching).

Rules: a long prompt delays the next token of other requests by at most one decode step and MAX_PAUSE_S; the
client for which the fewest tokens were computed goes first; a request whose client left stops within
CANCEL_LATENCY_S, also in the middle of its prompt. The engine ensures that requests do not change each
other's tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from fastapi import HTTPException

from codegemma.checkpoints import gguf_files
from codegemma.files import explain
from codegemma.generate import sampling
from codegemma.generate.engine import Batch, Engine
from codegemma.generate.model import Model
from codegemma.generate.request import Request
from codegemma.generate.resolve import layout_for
from codegemma.generate.running import RunningRequest, Step
from codegemma.native import CHUNK, PAGE, Cancel
from codegemma.prompts import Layout
from codegemma.serve.metrics import Metrics
from codegemma.serve.requests import Busy, Job, can_chat, model_id, supersedes

log = logging.getLogger("codegemma.serve")

SLOTS = 16  # requests that run together
MAX_WAITING = 256  # requests
MAX_WAITING_OF_CLIENT = 128
MAX_PAUSE_S = 0.1  # between two tokens, for the prompts of other requests
CANCEL_LATENCY_S = 0.05  # from a cancellation to the end of the work
MIN_CHUNK = 16  # the fewest prompt tokens of a step
SCORE_ROWS = 32  # prompt tokens scored in a step: a row of logits takes a megabyte
CANCELLED = Step(None, "", 0.0, "cancelled")


class _Scoring:
    """Computes the log-probability of each token of a prompt, without the cache, which holds no logits."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.job = job
        self.running = engine.start(Request(job.prompt_ids, max_tokens=0, adapter=job.resolved.adapter))
        self.running.pages, self.running.done, self.running.cached = [], 0, 0

    def step(self, engine: Engine, cancel: Cancel, rows: int) -> bool:
        """Scores up to `rows` further tokens, and returns whether the prompt is done."""
        running, count = self.running, self.job.request.top_logprobs
        part = running.ids[running.done : running.done + rows]
        logits = engine.backend.run([engine.claim(running, part, len(part))], cancel)
        if logits is None:
            engine.unclaim(running, running.done)
            return False
        for row, target in enumerate(running.ids[running.done + 1 : running.done + 1 + len(part)]):
            values_V, normaliser = logits.values[row], float(logits.normaliser[row])
            likeliest = sampling.top(values_V, count) if count > 1 else [logits.argmax[row]][:count]
            top = tuple((int(token), float(values_V[token]) - normaliser) for token in likeliest)
            self.job.scores.append((float(values_V[target]) - normaliser, top))
        running.done += len(part)
        return running.done >= len(running.ids)


class Scheduler:
    """The CompletionService of a model on this machine. `submit` and `close` are called in an event loop.

    `_work` counts the tokens computed for each client: the client with the fewest goes first. When a
    client submits, its count is raised to `_clock` if it is lower. `_clock` follows the lowest count among
    the running clients and never goes back, so nobody gains by having been idle.
    """

    def __init__(
        self, model: Model, slots: int = SLOTS, queue: int = MAX_WAITING, cache: Path | None = None
    ) -> None:
        """`queue` is how many requests may wait. `cache` is a folder: there the prompt cache of each model is
        saved at the end, and loaded at the start."""
        self.model, self.engine, self.slots, self.queue = model, model.engine, slots, queue
        self.tokenizer, self.context = model.tokenizer, model.engine.context
        self.name, self.aliases = model_id(model.preset, model.path)
        self.title = model.title
        files = gguf_files.parts(model.path) if model.path.is_file() else list(model.path.iterdir())
        self.size = sum(file.stat().st_size for file in files)
        self.chats, self.metrics = can_chat(model.preset, self.tokenizer), Metrics()
        model.completing_adapter()  # loads it now rather than for the first request
        self._batch = Batch(self.engine)
        self._jobs: dict[RunningRequest, Job] = {}
        self._waiting: list[Job] = []
        self._scoring: list[_Scoring] = []
        self._work: dict[str, float] = {}
        self._clock = 0.0
        self._changed = threading.Condition()
        self._closing = False
        self._interrupted = False  # whether the last step was interrupted
        self._step_ends = 0.0  # when the present step should end
        self._decode_seconds = 0.0  # mean time of a step without prompts
        self._scored: Job | None = None  # the job whose prompt is scored in the present step
        # The most tokens that the running requests may have together.
        self._max_tokens = self.engine.cache.max_bytes // self.engine.backend.page_bytes * PAGE
        key = hashlib.sha256(self.engine.cache.key.encode()).hexdigest()[:32]
        self._cache_file = cache / key if cache else None
        if self._cache_file is not None:  # in the background, while requests are answered
            load = partial(self.engine.cache.load, self._cache_file)
            threading.Thread(target=load, name="cache", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def default_layout(self) -> Layout:
        """The layout that the mode "auto" means."""
        return layout_for("auto", self.model.fim_orders())

    @property
    def reads_files(self) -> bool:
        """Whether the model was trained on documents with other files in front."""
        return self.model.reads_files()

    @property
    def adapters(self) -> list[str]:
        """The names that a request may choose."""
        return self.model.adapters

    async def submit(self, requests: Sequence[Request]) -> list[Job]:
        """A job for each request; see CompletionService."""
        resolved = await asyncio.to_thread(lambda: [self._resolve(request) for request in requests])
        jobs = list(map(Job, requests, resolved))
        with self._changed:
            if self._closing:
                raise Busy("the server is stopping", 1)
            self._check_queue(jobs[0].request.client)
            older = [job for job in (*self._waiting, *self._jobs.values()) if supersedes(jobs[0], job)]
            for job in jobs:
                job.on_cancel = partial(self._cancel, job)
                self._waiting.append(job)
                client = job.request.client
                self._work[client] = max(self._work.get(client, 0.0), self._clock)
            if len(self._batch.running) == 1 and not self._interrupted:
                self._interrupt(MAX_PAUSE_S)  # the request that ran alone may be reading a larger chunk
            self._update_gauges()
            self._changed.notify()
        for job in older:
            job.cancel()
        return jobs

    async def close(self) -> None:
        """Cancels all jobs, ends the thread and saves the prompt cache."""
        with self._changed:
            self._closing = True
            jobs = [*self._waiting, *self._running_jobs()]
            self._changed.notify()
        for job in jobs:
            job.cancel()
        await asyncio.to_thread(self._thread.join)
        # An empty cache must not replace one that another worker saved.
        if self._cache_file is not None and self.engine.cache.nbytes:
            try:
                self._cache_file.parent.mkdir(0o700, parents=True, exist_ok=True)  # prompts are private
                await asyncio.to_thread(self.engine.cache.save, self._cache_file)
            except OSError as error:
                log.warning("the prompt cache is not saved: %s", explain(error))
            except ValueError as error:  # the path has a file that is no saved cache
                log.warning("the prompt cache is not saved: %s", error)

    def _resolve(self, request: Request) -> Request:
        """The request with token ids as its prompt. Raises ValueError where the engine cannot run it."""
        resolved = self.model.resolve(request)
        self.engine.start(resolved)  # only for its checks
        return resolved

    def _running_jobs(self) -> list[Job]:
        return [*self._jobs.values(), *(scoring.job for scoring in self._scoring)]

    def _check_queue(self, client: str) -> None:
        waiting_of_client = sum(job.request.client == client for job in self._waiting)
        if len(self._waiting) < self.queue and waiting_of_client < min(MAX_WAITING_OF_CLIENT, self.queue):
            return
        counts = self.metrics.counts
        counts["rejected"] += 1
        mean_seconds = (counts["prompt_seconds"] + counts["predicted_seconds"]) / max(counts["requests"], 1)
        seconds = math.ceil(mean_seconds * len(self._waiting) / self.slots)
        message = f"{len(self._waiting)} requests wait already: try again in a moment"
        raise Busy(message, min(max(seconds, 1), 60))

    def _cancel(self, job: Job) -> None:
        """Ends a waiting job at once, and a running one after the present step. A step that would take long
        is interrupted, but never two in a row while other jobs run, so that those make progress."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                with self._isolated(job):
                    self._finish(job, job.take(CANCELLED))
            elif job is self._scored:
                self._batch.cancel.set()  # the step has no other request
            elif not self._interrupted or all(other.cancelled.is_set() for other in [*self._jobs.values()]):
                self._interrupt(CANCEL_LATENCY_S)
            self._changed.notify()

    def _interrupt(self, max_seconds: float) -> None:
        """Interrupts the present step where it would take longer than `max_seconds` from now."""
        if self._step_ends - time.perf_counter() > max_seconds:
            self._interrupted = True
            self._batch.cancel.set()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._forget_clients()
                while not (self._closing or self._waiting or self._jobs or self._scoring):
                    self._changed.wait()
                if self._closing and not (self._waiting or self._jobs or self._scoring):
                    return
                admitted = self._admit()
                self._update_gauges(len(admitted))
            for job in admitted:
                with self._isolated(job):
                    self._start(job)
            try:
                self._remove_ended()
                self._step()
            except Exception as error:  # not of a single job: all running jobs fail, the server continues
                for job in self._running_jobs():
                    self._fail(job, error)
                self._batch = Batch(self.engine)

    def _admit(self) -> list[Job]:
        """Takes jobs from the queue while slots and memory last, the client with the least work first."""
        admitted: list[Job] = []
        running = self._running_jobs()
        while self._waiting and len(running) < self.slots:
            job = min(self._waiting, key=lambda job: self._work[job.request.client])
            running.append(job)
            if len(running) > 1 and sum(map(self._max_length, running)) > self._max_tokens:
                break
            self._waiting.remove(job)
            admitted.append(job)
            self._work[job.request.client] += 1  # so that the next job is another client's
            job.started = time.perf_counter()
        return admitted

    def _max_length(self, job: Job) -> int:
        return min(job.prompt_tokens + job.request.max_tokens, self.context)

    def _start(self, job: Job) -> None:
        if job.request.wants_prompt_logprobs and not job.scores and job.prompt_tokens > 1:
            self._scoring.append(_Scoring(self.engine, job))
        else:
            self._jobs[self._batch.add(job.resolved)] = job

    def _remove_ended(self) -> None:
        """Ends the running jobs that were cancelled or are overdue."""
        now = time.perf_counter()
        for running, job in list(self._jobs.items()):
            cancelled = self._closing or job.cancelled.is_set()
            if cancelled or job.overdue(now):
                with self._isolated(job):
                    last = job.take(running.end("cancelled" if cancelled or not job.first else "length"))
                    self._batch.remove(running)
                    del self._jobs[running]
                    self._finish(job, last)
        for scoring in list(self._scoring):
            if self._closing or scoring.job.cancelled.is_set():
                self._scoring.remove(scoring)
                with self._isolated(scoring.job):
                    self._finish(scoring.job, scoring.job.take(CANCELLED))

    def _step(self) -> None:
        """One step of all requests that generate, then one of a prompt that is scored."""
        with self._changed:
            self._interrupted = self._interrupted and self._batch.cancel.is_set()
            if self._batch.cancel.is_set():
                self._batch.cancel = Cancel()
        if self._batch.running:
            self._batch_step()
        if self._scoring:
            with self._isolated(self._scoring[0].job):
                self._score_step()

    def _batch_step(self) -> None:
        batch = self._batch
        requests = {running: job.request for running, job in self._jobs.items()}
        # Prompts are read in this order; requests that only warm the cache come last.
        batch.running.sort(key=lambda r: (requests[r].max_tokens == 0, self._work[requests[r].client]))
        batch.chunk = self._chunk()
        done = {running: running.done for running in batch.running}
        started = time.perf_counter()
        with self.engine.lock:
            steps = batch.step()
        if not batch.cancel.is_set():
            self._interrupted = False
            if all(running.done - before <= 1 for running, before in done.items()):
                self._decode_seconds += (time.perf_counter() - started - self._decode_seconds) / 4
        for running, before in done.items():
            self._work[requests[running].client] += max(running.done - before, 0)
        least = min((self._work[request.client] for request in requests.values()), default=0.0)
        self._clock = max(self._clock, least)
        self._deliver(steps)

    def _score_step(self) -> None:
        scoring = self._scoring.pop(0)
        self._scoring.append(scoring)  # they take turns
        done, self._scored = scoring.running.done, scoring.job
        try:
            with self.engine.lock:
                rows = MIN_CHUNK if self._batch.running else SCORE_ROWS
                finished = scoring.step(self.engine, self._batch.cancel, rows)
        finally:
            self._scored = None
        self._work[scoring.job.request.client] += scoring.running.done - done
        if finished:
            self.engine.remember(scoring.running)
            self._scoring.remove(scoring)
            self._start(scoring.job)

    def _chunk(self) -> int:
        """How many prompt tokens the next step reads: as many as take MAX_PAUSE_S, or CHUNK if one request
        runs alone. Sets `_step_ends`."""
        rate, running = self.engine.prefill_rate, self._batch.running
        chunk = CHUNK if len(running) == 1 else min(max(MIN_CHUNK, int(MAX_PAUSE_S * rate)), CHUNK)
        tokens = min(sum(len(request.ids) - request.done - 1 for request in running), chunk)
        self._step_ends = time.perf_counter() + tokens / rate + self._decode_seconds
        return chunk

    def _deliver(self, steps: Sequence[tuple[RunningRequest, Step | Exception]]) -> None:
        for running, step in steps:
            job = self._jobs.get(running)
            if job is None:
                continue  # its answer ended with an earlier token of the same draft
            with self._isolated(job):
                if isinstance(step, Exception):
                    raise step
                self._deliver_step(running, job, step)

    def _deliver_step(self, running: RunningRequest, job: Job, step: Step) -> None:
        job.cached_tokens = 0 if job.scores else running.cached
        shown = job.take(step)
        if shown.stop is None:
            job.post(shown)
            return
        if running.stop is None:  # it would go on, but what follows would be trimmed off
            self._batch.remove(running)
        del self._jobs[running]
        self._finish(job, shown)

    def _finish(self, job: Job, last: Step) -> None:
        self._update_gauges()
        self.metrics.add(job.timings())
        job.post(last)

    @contextlib.contextmanager
    def _isolated(self, job: Job) -> Iterator[None]:
        """An exception in the block ends this job, and no other."""
        try:
            yield
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends a job with an error. What it computed is not cached: it may be wrong."""
        log.error("a request failed", exc_info=error)
        for running in [running for running, other in list(self._jobs.items()) if other is job]:
            del self._jobs[running]
            if running in self._batch.running:
                self._batch.running.remove(running)
        self._scoring = [scoring for scoring in self._scoring if scoring.job is not job]
        self._update_gauges()
        job.stop, job.ended = "cancelled", time.perf_counter()
        self.metrics.add(job.timings())
        job.post(HTTPException(500, f"the engine failed: {error}"))

    def _update_gauges(self, admitted: int = 0) -> None:
        self.metrics.running = len(self._jobs) + len(self._scoring) + admitted
        self.metrics.waiting = len(self._waiting)

    def _forget_clients(self) -> None:
        """Forgets the work of clients without requests, once there are many clients."""
        if len(self._work) > 4 * self.queue:
            clients = {job.request.client for job in (*self._running_jobs(), *self._waiting)}
            self._work = {client: work for client, work in self._work.items() if client in clients}
