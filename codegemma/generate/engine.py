"""Generates tokens, as an iterator of Steps, on any backend: batches of requests, prefix cache, speculation.

Callers use `Engine.generate` (one request) or step a `Batch` (many at once: evaluation, the server). One law
holds where the backend is `invariant`: batching, caching, chunking, speculation and the number of threads
never change a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from codegemma.adapters.adapter import Adapter
from codegemma.config import ModelConfig
from codegemma.generate.cache import PrefixCache, common_prefix_length
from codegemma.generate.request import Request
from codegemma.generate.running import RunningRequest, Step, Stop
from codegemma.native import CHUNK, PAGE, Cancel, Logits, Page, Slice
from codegemma.tokenizer import Tokenizer

MIN_SHARED = 16  # a request waits for another that computes at least this many tokens of its prompt
LOGIT_ROWS = 64  # rows that `logits` computes per run
CANCEL_POLL_S = 0.02  # how often a request that waits for the lock checks whether it was cancelled
INITIAL_OPERATIONS_PER_SECOND = 1e11  # assumed for the prompt speed until it has been measured


class Backend(Protocol):
    """What runs the model.

    `invariant`: logits do not depend on batch, chunking, cache or threads. `key` names everything that the
    contents of cached pages depend on besides the weights.
    """

    config: ModelConfig
    invariant: bool
    key: str
    page_bytes: int

    def new_page(self) -> Page: ...
    def copy_page(self, page: Page, used: int) -> Page: ...
    def add_adapter(self, name: str, adapter: Adapter) -> None: ...
    def run(self, slices: Sequence[Slice], cancel: Cancel | None = None) -> Logits | None: ...


class Completion(Iterator[Step]):
    """The Steps of an answer as they are computed; `close()` stops the computation.

    `steps`, `text`, `stop`, `ids` and `confidence` first run it to its end."""

    def __init__(self, steps: Iterator[Step], running: RunningRequest) -> None:
        self._steps, self.running = steps, running
        self._past: list[Step] = []

    def __next__(self) -> Step:
        step = next(self._steps)
        self._past.append(step)
        return step

    @property
    def steps(self) -> list[Step]:
        """All steps, in order."""
        for _ in self:
            pass
        return self._past

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(step.text for step in self.steps)

    @property
    def stop(self) -> Stop | None:
        """Why it ended: "end", "stop_text", "length" or "cancelled"; None if it was closed before its end."""
        return self.steps[-1].stop if self.steps else None

    @property
    def ids(self) -> list[int]:
        """The generated tokens, including a final stop id."""
        return [step.token for step in self.steps if step.token is not None]

    @property
    def confidence(self) -> float:
        """How sure the model was of its tokens; see `Step.confidence`. 1 where there are none."""
        return self.steps[-1].confidence if self.steps else 1.0

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt, known from the start."""
        return self.running.prompt_length

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens came from the cache, known from the start."""
        return self.running.cached

    def close(self) -> None:
        """Stops the computation; its results so far stay in the cache."""
        if hasattr(self._steps, "close"):
            self._steps.close()


_Scheduled = tuple[RunningRequest, Slice, list[int]]  # the list: the drafted tokens that end the slice


@dataclass
class Batch:
    """Requests that run together: `add` them at any time; each `step` returns their new Steps.

    A step reads at most `chunk` prompt tokens, so that a long prompt does not delay the other requests.
    """

    engine: Engine
    cancel: Cancel = field(default_factory=Cancel)
    chunk: int = CHUNK
    running: list[RunningRequest] = field(default_factory=list)

    def add(self, request: Request) -> RunningRequest:
        """Adds a request of token ids. Raises ValueError where it does not fit the model (`Engine.start`)."""
        running = self.engine.start(request)
        for other in self.running:  # a prefix that both share is computed once, by the other
            shared = min(common_prefix_length(running.ids, other.ids), len(running.ids) - 1)
            if running.adapter == other.adapter and shared >= max(running.done, running.shared) + MIN_SHARED:
                running.leader, running.shared = other, shared
        self.running.append(running)
        return running

    def remove(self, running: RunningRequest) -> None:
        """Removes a request, finished or not, and caches what it computed."""
        self.running.remove(running)
        self.engine.remember(running)

    def step(self) -> list[tuple[RunningRequest, Step | Exception]]:
        """Advances the requests and returns their new Steps, those of each request in order.

        A request advances by a token and the drafted tokens that are accepted, or by a piece of its prompt
        while `chunk` has room; one that waits for a shared prefix stands still.

        A request that fails is removed, and its exception is its last entry; the others are not affected.
        Where `cancel` was set during the run, no request advances: the caller removes those that were
        cancelled and calls `step` again.
        """
        steps: list[tuple[RunningRequest, Step | Exception]] = []
        scheduled = self._schedule(steps)
        if scheduled:
            self._advance(scheduled, steps)
        for running, *_ in scheduled:
            if running.stop and running in self.running:
                self.remove(running)
        return steps

    def _schedule(self, steps: list[tuple[RunningRequest, Step | Exception]]) -> list[_Scheduled]:
        """The requests that take part in the next step. Failures are added to `steps`."""
        scheduled, room = [], self.chunk
        for running in list(self.running):
            try:
                if not running.catch_up(self.running):
                    continue
                is_prompt = len(running.ids) - running.done > 1
                if is_prompt and room <= 0:
                    continue
                scheduled.append(self._slice(running, room))
                room -= len(scheduled[-1][1].ids) if is_prompt else 0
            except Exception as error:
                steps.append((running, self._fail(running, error)))
        return scheduled

    def _slice(self, running: RunningRequest, room: int) -> _Scheduled:
        """A request's part of the next step: at most `room` tokens of its prompt, or a token and a draft."""
        unread, draft = len(running.ids) - running.done, list[int]()
        if unread > 1:
            ids = running.ids[running.done : running.done + min(unread, room)]
        else:
            if running.request.speculate and running.generated and len(self.running) <= 2:
                draft = running.drafter.propose(running.ids, running.limit - running.generated - 1)
            ids = [running.ids[-1], *draft]
        wants_logits = running.limit and running.done + len(ids) >= len(running.ids)
        return running, self.engine.claim(running, ids, 1 + len(draft) if wants_logits else 0), draft

    def _advance(
        self, scheduled: Sequence[_Scheduled], steps: list[tuple[RunningRequest, Step | Exception]]
    ) -> None:
        """Runs the slices and adds the new Steps. Where the run fails, each slice is run again alone, so that
        only the requests at fault fail; the others' tokens are the same."""
        slices = [part for _, part, _ in scheduled]
        started = time.perf_counter()
        try:
            logits = self.engine.backend.run(slices, self.cancel)
        except Exception as error:
            if len(scheduled) > 1:
                for alone in scheduled:
                    self._advance([alone], steps)
            else:
                steps.append((scheduled[0][0], self._fail(scheduled[0][0], error)))
            return
        if logits is None:
            for running, part, _ in scheduled:
                self.engine.unclaim(running, part.start)
            return
        self.engine.update_prefill_rate(sum(len(part.ids) for part in slices), time.perf_counter() - started)
        row = 0
        for running, part, draft in scheduled:
            running.done = part.start + len(part.ids) - len(draft)
            try:
                if part.wanted:
                    for step in self._accept(running, draft, row, logits):
                        steps.append((running, step))
                elif running.done == len(running.ids):  # max_tokens is 0: only the prompt is read
                    steps.append((running, running.end("length")))
            except Exception as error:
                steps.append((running, self._fail(running, error)))
            row += part.wanted

    def _fail(self, running: RunningRequest, error: Exception) -> Exception:
        """Removes a request that failed. What it computed is not cached, since the fault may lie there."""
        self.running.remove(running)
        running.stop = "cancelled"
        self.engine.unclaim(running, running.done)
        return error

    def _accept(self, running: RunningRequest, draft: list[int], row: int, logits: Logits) -> Iterator[Step]:
        """Accepts drafted tokens up to the first that differs from the sampler's choice."""
        accepted = 0
        for position in range(len(draft) + 1):
            step = running.next_step(row + position, logits)
            yield step
            if running.stop or position == len(draft) or step.token != draft[position]:
                break
            accepted += 1
        running.done += accepted
        if draft:
            running.drafter.record(len(draft), accepted)
        self.engine.unclaim(running, running.done)


class Engine:
    """A backend with its prefix cache. Threads take turns: callers hold `lock` around a step of a Batch.

    `prefill_rate` is the measured speed of reading prompts, in tokens a second. `adapters` maps each
    adapter's name to its digest, which identifies it in the backend and the cache. The digest "" is the base,
    which is called both "auto" and "none" here.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        identity: str = "",
        cache_bytes: int = 1 << 30,
    ) -> None:
        """`identity` names the model's weights, so that a saved cache is not used with others."""
        self.backend, self.tokenizer = backend, tokenizer
        self.cache = PrefixCache(f"{identity} {backend.key}", backend.page_bytes, cache_bytes)
        self.lock = threading.Lock()
        self.adapters = {"auto": "", "none": ""}
        self._added: set[str] = set()  # digests
        c = backend.config
        layer_weights = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_width + 3 * c.width * c.ffn_width
        self.prefill_rate = INITIAL_OPERATIONS_PER_SECOND / (2 * c.layers * layer_weights)

    @property
    def context(self) -> int:
        """How many tokens the model reads, prompt and answer together."""
        return self.backend.config.context

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter under a name. If the name was taken, running requests keep the old adapter.

        Raises ValueError where it does not fit the model or the backend runs no adapters.
        """
        adapter.check(self.backend.config)
        if not hasattr(self.backend, "add_adapter"):
            remedy = "merge it into the model (codegemma convert --adapter)"
            raise ValueError(f"this backend runs no adapters: {remedy}")
        with self.lock:
            if adapter.digest not in self._added:
                self.backend.add_adapter(adapter.digest, adapter)
                self._added.add(adapter.digest)
            self.adapters[name] = adapter.digest

    def adapter_digest(self, name: str) -> str:
        """The digest of an added adapter, "" for the base. Raises ValueError on an unknown name."""
        if name not in self.adapters:
            names = ", ".join(name for name in self.adapters if name not in ("auto", "none")) or "none"
            remedy = "add it with add_adapter, or start the server with --adapter NAME=PATH"
            raise ValueError(f"no adapter {name!r:.80}: there are {names}; {remedy}")
        return self.adapters[name]

    def cached(self, ids: Sequence[int], adapter: str = "none") -> int:
        """How many tokens of a prompt of `ids` are cached, from its start."""
        return self.cache.find(ids[:-1], self.adapter_digest(adapter))[1]

    def generate(self, request: Request, cancel: Cancel | None = None) -> Completion:
        """The Steps of a request of token ids. Closing the iterator, or setting `cancel` in another thread,
        stops it. Raises ValueError, before the first Step, where the request does not fit; see `start`."""
        batch = Batch(self, cancel or Cancel())
        running = batch.add(request)
        return Completion(self._run(batch, running), running)

    def _run(self, batch: Batch, running: RunningRequest) -> Iterator[Step]:
        try:
            while running.stop is None:
                steps: list[tuple[RunningRequest, Step | Exception]] = []
                if self.lock.acquire(timeout=CANCEL_POLL_S):
                    try:
                        steps = [] if batch.cancel.is_set() else batch.step()
                    finally:
                        self.lock.release()
                if batch.cancel.is_set():
                    yield running.end("cancelled")
                    return
                for _, step in steps:
                    if isinstance(step, Exception):
                        raise step
                    yield step
        finally:
            if running in batch.running:
                batch.remove(running)

    def logits(self, ids: Sequence[int], adapter: str = "none") -> np.ndarray:
        """float32 [T, V]: row t predicts the token after ids[:t + 1]. Gigabytes for long texts."""
        running = self.start(Request(ids, max_tokens=0, adapter=adapter))
        running.done, running.pages = 0, []  # computes cached tokens again: the cache has no logits
        logits_TV = np.empty((len(running.ids), self.backend.config.vocab), np.float32)
        while running.done < len(running.ids):
            chunk = running.ids[running.done : running.done + LOGIT_ROWS]
            with self.lock:
                result = self.backend.run([self.claim(running, chunk, len(chunk))])
                assert result is not None  # nothing can cancel it
                logits_TV[running.done : running.done + len(chunk)] = result.values[: len(chunk)]
            running.done += len(chunk)
        self.remember(running)
        return logits_TV

    def start(self, request: Request) -> RunningRequest:
        """Prepares a request of token ids, with the cached pages of its prompt.

        Raises ValueError on a prompt that is empty, too long or has ids outside the vocabulary, on an unknown
        adapter, and on stop texts without a tokenizer.
        """
        config, ids = self.backend.config, [int(token) for token in request.prompt_ids]
        if not ids:
            raise ValueError("the prompt is empty: a model needs at least <bos>")
        outside = next((token for token in ids if not 0 <= token < config.vocab), None)
        if outside is not None:
            raise ValueError(
                f"the prompt holds token id {outside}, but the vocabulary has {config.vocab:,} ids, from 0: "
                "use the tokenizer that belongs to the model"
            )
        outside = next((token for token, _ in request.sampling.bias if not 0 <= token < config.vocab), None)
        if outside is not None:
            rule = f"bias must name token ids from 0 to {config.vocab - 1:,}"
            raise ValueError(f"sampling: {rule}, got {outside}: leave it out")
        if len(ids) + min(request.max_tokens, 1) > config.context:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens but the model reads {config.context:,}: shorten it "
                'or pass truncate="left"'
            )
        adapter = self.adapter_digest(request.adapter)
        if request.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and this model came without one: pass stop_ids")
        limit = min(request.max_tokens, config.context - len(ids))
        running = RunningRequest(request, ids, self.tokenizer, limit, adapter)
        running.pages, running.done = self.cache.find(ids[:-1], adapter)
        running.cached = running.done
        return running

    def claim(self, running: RunningRequest, ids: Sequence[int], wanted: int) -> Slice:
        """Reserves rows of a request's pages for its next `ids`; returns the Slice that computes them.

        `wanted` is how many of the last ids need logits. A page that holds rows of
        another sequence from `done` on is copied first.
        """
        start, end = running.done, running.done + len(ids)
        pages, offset = running.pages, start % PAGE
        if offset and pages[start // PAGE].used != offset:
            pages[start // PAGE] = self.backend.copy_page(pages[start // PAGE], offset)
        del pages[-(-start // PAGE) :]
        while len(pages) * PAGE < end:
            pages.append(self.backend.new_page())
        _set_used(pages, start, end)
        return Slice(ids, start, pages, wanted, running.adapter or None)

    def unclaim(self, running: RunningRequest, length: int) -> None:
        """Releases the rows from `length` on, which a refused draft or a cancelled run had reserved."""
        _set_used(running.pages, length // PAGE * PAGE, length)
        for page in running.pages[-(-length // PAGE) :]:
            page.used = 0

    def update_prefill_rate(self, tokens: int, seconds: float) -> None:
        """Averages a run of at least 32 tokens into the prompt speed. A smaller one is left out: it is
        perhaps nothing but decoding, which is slower."""
        if tokens >= 32 and seconds > 0:
            self.prefill_rate += (tokens / seconds - self.prefill_rate) / 4

    def remember(self, running: RunningRequest) -> None:
        """Caches the pages that a request has computed."""
        pages = running.pages[: -(-running.done // PAGE)]
        self.cache.put(running.ids[: running.done], pages, running.adapter)


def _set_used(pages: list[Page], start: int, end: int) -> None:
    """Marks rows as used up to `end`, in the pages from that of row `start` on."""
    for index in range(start // PAGE, -(-end // PAGE)):
        pages[index].used = min(PAGE, end - index * PAGE)
