"""One thread that owns the engine: continuous batching of every client's requests, fair, bounded, and quick to let go.

Laws: a long prompt delays another's next token by at most one decode step and PAUSE; whoever has had least goes first;
a client that left costs nothing after KEEN, also in the middle of its prompt; by the engine's own law, no neighbour
changes a token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastapi import HTTPException

from codegemma.generate import sampling as sampler
from codegemma.generate.engine import Batch, Engine, Running, Step
from codegemma.generate.model import Model
from codegemma.generate.request import Request
from codegemma.generate.resolve import layout_for
from codegemma.native import CHUNK, PAGE, Cancel
from codegemma.prompts import Layout
from codegemma.serve.requests import Busy, Job, Metrics, supersedes

log = logging.getLogger("codegemma.serve")

SLOTS = 16  # sequences that run together
QUEUE = 256  # jobs that wait, and of one client
QUEUE_OF_ONE = 128
PAUSE = 0.1  # seconds of another's prompt between two tokens
KEEN = 0.05  # seconds to let go in
LEAST = 16  # prompt tokens that a step reads at least
ROWS = 32  # of logits at once where a prompt is scored: a row is a megabyte


class _Scoring:
    """A prompt read with the log-probability of each of its tokens; from the start, for the cache keeps no logits."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.job = job
        self.one = engine.start(Request(job.prompt_ids, max_tokens=0, adapter=job.resolved.adapter))
        self.one.pages, self.one.done, self.one.cached = [], 0, 0

    def step(self, engine: Engine, cancel: Cancel, rows: int) -> bool:
        """Reads some more; True at the end."""
        one, job = self.one, self.job
        part = one.ids[one.done : one.done + rows]
        logits = engine.backend.run([engine.claim(one, part, len(part))], cancel)
        if logits is None:
            engine.unclaim(one, one.done)
            return False
        for row, target in enumerate(one.ids[one.done + 1 : one.done + 1 + len(part)]):
            values_V, normaliser = logits.values[row], float(logits.normaliser[row])
            best = (
                [logits.argmax[row]]
                if job.request.top_logprobs == 1
                else sampler.top(values_V, job.request.top_logprobs)
                if job.request.top_logprobs
                else ()
            )
            top = tuple((int(token), float(values_V[token]) - normaliser) for token in best)
            job.scores.append((float(values_V[target]) - normaliser, top))
        one.done += len(part)
        return one.done >= len(one.ids)


class Scheduler:
    """This machine's model as a CompletionService. `submit` in a loop of asyncio; `close` ends the thread."""

    def __init__(
        self, model: Model, slots: int = SLOTS, queue: int = QUEUE, cache: Path | None = None
    ) -> None:
        """`cache` is a directory where prompts are kept from one start to the next, in a file for each model."""
        self.model, self.engine, self.slots, self.queue = model, model.engine, slots, queue
        self.tokenizer, self.context = model.tokenizer, model.engine.context
        self.name = model.preset.name if model.preset else model.path.stem
        self.title = model.preset.title if model.preset else model.path.name
        self.size = (
            model.path.stat().st_size
            if model.path.is_file()
            else sum(one.stat().st_size for one in model.path.iterdir())
        )
        self.metrics = Metrics()
        model.completing_adapter()  # loaded now, not with the first request
        self._batch = Batch(self.engine)
        self._jobs: dict[Running, Job] = {}
        self._waiting: list[Job] = []
        self._scoring: list[_Scoring] = []
        self._work: dict[str, float] = {}  # tokens computed for each client, from a common start
        self._clock = 0.0  # where a client that comes begins
        self._changed = threading.Condition()
        self._closing = self._cut = False  # cut: the step before this one was given up half-way
        self._until = 0.0  # when the present step should end
        self._pace = 0.0  # seconds of a step without prompts
        self._scored: Job | None = None  # whose prompt the present step scores
        self._room = (
            self.engine.cache.most_bytes // self.engine.backend.page_bytes * PAGE
        )  # tokens that may run at once
        self._saved = (
            cache / hashlib.sha256(self.engine.cache.key.encode()).hexdigest()[:32] if cache else None
        )
        if self._saved is not None:  # in the background: requests are answered meanwhile
            threading.Thread(
                target=self.engine.cache.load, name="cache", args=(self._saved,), daemon=True
            ).start()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def fim_trained(self) -> bool:
        return self.model.fim_trained

    @property
    def mode(self) -> Layout:
        """What "auto" means."""
        return layout_for("auto", self.model.fim_orders())

    @property
    def chats(self) -> bool:
        """Whether it was tuned to talk; where nothing tells, whether it could."""
        control, preset = self.tokenizer.control, self.model.preset
        return "chat" in preset.uses if preset else control.start_of_turn is not None

    @property
    def adapters(self) -> list[str]:
        return self.model.adapters

    async def submit(self, requests: Sequence[Request]) -> list[Job]:
        """A job for each request. Raises ValueError on what the model cannot do, Busy where too many wait."""
        resolved = await asyncio.to_thread(lambda: [self._resolve(request) for request in requests])
        jobs = [Job(request, ids) for request, ids in zip(requests, resolved, strict=True)]
        with self._changed:
            if self._closing:
                raise Busy("the server is stopping", 1)
            self._bound(jobs[0].request.client)
            older = [job for job in (*self._waiting, *self._jobs.values()) if supersedes(jobs[0], job)]
            for job in jobs:
                job.on_cancel = partial(self._let_go, job)
                self._waiting.append(job)
                self._work[job.request.client] = max(self._work.get(job.request.client, 0.0), self._clock)
            if len(self._batch.running) == 1 and not self._cut:
                self._interrupt(PAUSE)  # its chunk was sized for being alone
            self._gauge()
            self._changed.notify()
        for job in older:
            job.cancel()
        return jobs

    async def close(self) -> None:
        """Cancels all, ends the thread and saves the cache."""
        with self._changed:
            self._closing = True
            jobs = [*self._waiting, *self._jobs.values(), *(one.job for one in self._scoring)]
            self._changed.notify()
        for job in jobs:
            job.cancel()
        await asyncio.to_thread(self._thread.join)
        if self._saved is not None:
            try:
                self._saved.parent.mkdir(0o700, parents=True, exist_ok=True)  # prompts are private
                await asyncio.to_thread(self.engine.cache.save, self._saved)
            except OSError as error:
                log.warning("the prompt cache is not saved: %s", error)

    def _resolve(self, request: Request) -> Request:
        """The request as token ids, checked as the engine will check it."""
        resolved = self.model.resolve(request)
        self.engine.start(resolved)  # raises where it does not fit
        return resolved

    def _bound(self, client: str) -> None:
        theirs = sum(job.request.client == client for job in self._waiting)
        if len(self._waiting) >= self.queue or theirs >= min(QUEUE_OF_ONE, self.queue):
            self.metrics.counts["rejected"] += 1
            counts = self.metrics.counts
            each = (counts["prompt_seconds"] + counts["predicted_seconds"]) / max(counts["requests"], 1)
            seconds = math.ceil(each * len(self._waiting) / self.slots)
            raise Busy(
                f"{len(self._waiting)} requests wait already: try again in a moment", min(max(seconds, 1), 60)
            )

    def _let_go(self, job: Job) -> None:
        """Nobody reads `job` any more. What waits is dropped at once, what runs is taken out after this step, which is
        given up where it would take long; but never two in a row, so that those who stay get on."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, Step(None, "", 0.0, "cancelled"))
            elif job is self._scored:
                self._batch.cancel.set()  # which costs nobody else
            elif not self._cut or all(one.cancelled.is_set() for one in list(self._jobs.values())):
                self._interrupt(KEEN)
            self._changed.notify()

    def _interrupt(self, patience: float) -> None:
        if self._until - time.perf_counter() > patience:
            self._cut = True
            self._batch.cancel.set()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._settle()
                while not (self._closing or self._waiting or self._jobs or self._scoring):
                    self._changed.wait()
                if self._closing and not (self._waiting or self._jobs or self._scoring):
                    return
                admitted = self._admitted()
                self._gauge(len(admitted))
            try:
                while admitted:
                    self._start(admitted[-1])
                    admitted.pop()
                self._drop()
                self._turn()
            except Exception as error:  # a fault of the engine: its requests fail, the server goes on
                log.exception("the engine failed")
                self._fail([*self._jobs.values(), *(one.job for one in self._scoring), *admitted], error)

    def _admitted(self) -> list[Job]:
        """Who waits longest, of those who have had least, while there are slots, and room for the whole of it."""
        admitted: list[Job] = []
        running = [*self._jobs.values(), *(one.job for one in self._scoring)]
        while self._waiting and len(running) < self.slots:
            job = min(self._waiting, key=lambda one: self._work[one.request.client])
            running.append(job)
            if len(running) > 1 and sum(self._size(one) for one in running) > self._room:
                break
            self._waiting.remove(job)
            admitted.insert(0, job)
            self._work[job.request.client] += 1  # so that the next one is another's
            job.started = time.perf_counter()
        return admitted

    def _size(self, job: Job) -> int:
        return min(job.prompt_tokens + job.request.max_tokens, self.context)

    def _start(self, job: Job) -> None:
        if job.request.is_score and not job.scores and job.prompt_tokens > 1:
            self._scoring.append(_Scoring(self.engine, job))
            return
        one = self._batch.add(job.resolved)
        self._jobs[one] = job

    def _drop(self) -> None:
        """Takes out who left or is past a deadline."""
        now = time.perf_counter()
        for one, job in list(self._jobs.items()):
            gone = self._closing or job.cancelled.is_set()
            if gone or job.overdue(now):
                self._finish(one, one.end("cancelled" if gone or not job.first else "length"))
        for scoring in [one for one in self._scoring if self._closing or one.job.cancelled.is_set()]:
            self._scoring.remove(scoring)
            self._end(scoring.job, Step(None, "", 0.0, "cancelled"))

    def _turn(self) -> None:
        """One step of all sequences, then one of a prompt that is scored."""
        batch, engine = self._batch, self.engine
        with self._changed:
            self._cut = self._cut and batch.cancel.is_set()
            if batch.cancel.is_set():
                batch.cancel = Cancel()
        if batch.running:
            batch.running.sort(
                key=lambda one: (
                    self._jobs[one].request.max_tokens == 0,
                    self._work[self._jobs[one].request.client],
                )
            )
            batch.chunk = self._chunk()
            before = {one: one.done for one in batch.running}
            started = time.perf_counter()
            with engine.lock:
                steps = batch.step()
            if not batch.cancel.is_set():
                self._cut = False
                if all(one.done - before[one] <= 1 for one in before):
                    self._pace += (time.perf_counter() - started - self._pace) / 4
            self._count(before)
            self._deliver(steps)
        if self._scoring:
            scoring = self._scoring[0]
            done, self._scored = scoring.one.done, scoring.job
            with engine.lock:
                finished = scoring.step(engine, batch.cancel, LEAST if batch.running else ROWS)
            self._scored = None
            self._work[scoring.job.request.client] += scoring.one.done - done
            self._scoring.append(self._scoring.pop(0))
            if finished:
                engine.remember(scoring.one)
                self._scoring.remove(scoring)
                self._start(scoring.job)

    def _chunk(self) -> int:
        """Prompt tokens for this step: PAUSE long, but for one who is alone; and when the step should end."""
        paused = max(LEAST, int(PAUSE * self.engine.prefill_rate))
        chunk = CHUNK if len(self._batch.running) == 1 else min(paused, CHUNK)
        reads = min(sum(len(one.ids) - one.done - 1 for one in self._batch.running), chunk)
        self._until = time.perf_counter() + reads / self.engine.prefill_rate + self._pace
        return chunk

    def _count(self, before: dict[Running, int]) -> None:
        for one, done in before.items():
            self._work[self._jobs[one].request.client] += max(one.done - done, 0)
        self._clock = max(
            self._clock, min((self._work[job.request.client] for job in self._jobs.values()), default=0.0)
        )

    def _deliver(self, steps: Sequence[tuple[Running, Step]]) -> None:
        for one, step in steps:
            job = self._jobs.get(one)
            if job is None:
                continue  # trimming ended it at an earlier step of the same draft
            job.cached_tokens = 0 if job.scores else one.cached
            shown = job.take(step)
            if shown.stop is None:
                job.post([shown])
            elif one.stop is None:  # trimming ended it
                self._batch.remove(one)
                self._leave(one, shown)
            else:
                self._leave(one, shown)

    def _finish(self, one: Running, step: Step) -> None:
        self._batch.remove(one)
        self._leave(one, self._jobs[one].take(step))

    def _leave(self, one: Running, last: Step) -> None:
        job = self._jobs.pop(one)
        self._gauge()
        self.metrics.finished(job)
        job.post([last])

    def _end(self, job: Job, step: Step) -> None:
        """Ends a job that never ran."""
        last = job.take(step)
        self._gauge()
        self.metrics.finished(job)
        job.post([last])

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        self._jobs.clear()
        self._scoring.clear()
        self._batch = Batch(self.engine)
        self._gauge()
        for job in jobs:
            job.stop, job.ended = "cancelled", time.perf_counter()
            self.metrics.finished(job)
            job.post([HTTPException(500, f"the engine failed: {error}")])

    def _gauge(self, admitted: int = 0) -> None:
        self.metrics.running, self.metrics.waiting = (
            len(self._jobs) + len(self._scoring) + admitted,
            len(self._waiting),
        )

    def _settle(self) -> None:
        """Closes the accounts of clients that are gone."""
        if len(self._work) > 4 * self.queue:
            running = [*self._jobs.values(), *(one.job for one in self._scoring)]
            clients = {job.request.client for job in (*running, *self._waiting)}
            self._work = {client: work for client, work in self._work.items() if client in clients}
