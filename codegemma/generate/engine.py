"""Generation as an iterator of Steps, over any backend: batches of requests, a prefix cache, exact
speculation.

Users call `Engine.generate` (one request) or drive a `Batch` (many at once: evaluation, the server). The law:
batching, caching and speculation never change a token, provided that the backend is `invariant`.
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
from codegemma.generate.cache import PrefixCache, common_prefix
from codegemma.generate.request import Request
from codegemma.generate.running import RunningRequest, Step, Stop
from codegemma.native import CHUNK, PAGE, Cancel, Logits, Page, Slice
from codegemma.tokenizer import Tokenizer

MIN_SHARED = 16  # tokens of another request's prompt that are worth waiting for
LOGIT_ROWS = 64  # computed in one run by `logits`
CANCEL_POLL_S = 0.02  # how often a request that waits for the engine looks whether it was cancelled
FIRST_OPERATIONS_PER_SECOND = 1e11  # from which the prompt speed is guessed until it was measured


class Backend(Protocol):
    """What computes. `invariant`: logits do not depend on batch, chunking, cache or threads. `key` names all
    that cached pages depend on besides the weights."""

    config: ModelConfig
    invariant: bool
    key: str
    page_bytes: int

    def new_page(self) -> Page: ...
    def copy_page(self, page: Page, used: int) -> Page: ...
    def add_adapter(self, name: str, adapter: Adapter) -> None: ...
    def run(self, slices: Sequence[Slice], cancel: Cancel | None = None) -> Logits | None: ...


class Completion(Iterator[Step]):
    """Steps as they are made. The other properties run it to its end first; `close()` stops the work."""

    def __init__(self, steps: Iterator[Step], running: RunningRequest) -> None:
        self._steps, self.running = steps, running
        self._past: list[Step] = []

    def __next__(self) -> Step:
        step = next(self._steps)
        self._past.append(step)
        return step

    @property
    def steps(self) -> list[Step]:
        """All of them, in order."""
        for _ in self:
            pass
        return self._past

    @property
    def text(self) -> str:
        """All text."""
        return "".join(step.text for step in self.steps)

    @property
    def stop(self) -> Stop | None:
        """Why it ended: "end", "stop_text", "length" or "cancelled"; None where it was closed before."""
        return self.steps[-1].stop if self.steps else None

    @property
    def ids(self) -> list[int]:
        """Every generated token, a final stop id included."""
        return [step.token for step in self.steps if step.token is not None]

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt; known at once."""
        return self.running.prompt_length

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens came from the cache; known at once."""
        return self.running.cached

    def close(self) -> None:
        """Stops the work; what was computed stays in the cache."""
        if hasattr(self._steps, "close"):
            self._steps.close()


@dataclass
class Batch:
    """Requests that run together. `add` them at any time; each `step` returns their new Steps, in order per
    request.

    A step reads at most `chunk` prompt tokens, so that a long prompt does not hold the others up for long.
    """

    engine: Engine
    cancel: Cancel = field(default_factory=Cancel)
    chunk: int = CHUNK
    running: list[RunningRequest] = field(default_factory=list)

    def add(self, request: Request) -> RunningRequest:
        """Raises ValueError where the request does not fit the model."""
        running = self.engine.start(request)
        for other in self.running:  # a prefix that requests share is computed once
            shared = min(common_prefix(running.ids, other.ids), len(running.ids) - 1)
            if running.adapter == other.adapter and shared >= max(running.done, running.shared) + MIN_SHARED:
                running.leader, running.shared = other, shared
        self.running.append(running)
        return running

    def remove(self, running: RunningRequest) -> None:
        """Takes a request out, finished or not; what it computed stays in the cache."""
        self.running.remove(running)
        self.engine.remember(running)

    def step(self) -> list[tuple[RunningRequest, Step]]:
        """Runs all requests by one token or prompt chunk. Returns nothing where `cancel` was set meanwhile:
        the caller removes the requests that are to go, and calls it again."""
        batch, slices, drafts = self._next_slices()
        if not slices:
            return []
        started = time.perf_counter()
        logits = self.engine.backend.run(slices, self.cancel)
        if logits is None:
            for running, part in zip(batch, slices, strict=True):
                self.engine.unclaim(running, part.start)
            return []
        self.engine.measured(sum(len(part.ids) for part in slices), time.perf_counter() - started)
        steps: list[tuple[RunningRequest, Step]] = []
        row = 0
        for running, part, draft in zip(batch, slices, drafts, strict=True):
            running.done = part.start + len(part.ids) - len(draft)
            if part.wanted:
                steps += [(running, step) for step in self._accept(running, draft, row, logits)]
            elif running.done == len(running.ids):  # max_tokens is 0: the prompt was only to be read
                steps.append((running, running.end("length")))
            row += part.wanted
        for running in batch:
            if running.stop:
                self.remove(running)
        return steps

    def _next_slices(self) -> tuple[list[RunningRequest], list[Slice], list[list[int]]]:
        """The requests that take part in the next step, with what each computes and the draft at its end."""
        batch, slices, drafts, room = [], [], [], self.chunk
        for running in self.running:
            if not running.catch_up(self.running):
                continue
            unread, draft = len(running.ids) - running.done, []
            if unread > 1:
                if room <= 0:
                    continue
                ids = running.ids[running.done : running.done + min(unread, room)]
                room -= len(ids)
            else:
                if running.generated and len(self.running) <= 2:
                    draft = running.draft()
                ids = [running.ids[-1], *draft]
            wants_logits = running.limit and running.done + len(ids) >= len(running.ids)
            slices.append(self.engine.claim(running, ids, 1 + len(draft) if wants_logits else 0))
            batch.append(running)
            drafts.append(draft)
        return batch, slices, drafts

    def _accept(self, running: RunningRequest, draft: list[int], row: int, logits: Logits) -> Iterator[Step]:
        """A drafted token holds where it is what the sampler chose; the first other choice ends the draft."""
        accepted = 0
        for position in range(len(draft) + 1):
            step = running.take(row + position, logits)
            yield step
            if running.stop or position == len(draft) or step.token != draft[position]:
                break
            accepted += 1
        running.done += accepted
        running.record_draft(len(draft), accepted)
        self.engine.unclaim(running, running.done)


class Engine:
    """A backend with its prefix cache. Threads take turns: callers hold `lock` around a step of a Batch.

    `prefill_rate` is the prompt speed in tokens a second, as measured so far. `adapters` are names and the
    digests that the backend and the cache know them by; a prompt of token ids is for the base where it says
    "auto".
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        identity: str = "",
        cache_bytes: int = 1 << 30,
    ) -> None:
        """`identity` tells the model's weights apart in saved caches."""
        self.backend, self.tokenizer = backend, tokenizer
        self.cache = PrefixCache(f"{identity} {backend.key}", backend.page_bytes, cache_bytes)
        self.lock = threading.Lock()
        self.adapters = {"auto": "", "none": ""}
        self._added: set[str] = set()  # digests
        c = backend.config
        layer_weights = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_width + 3 * c.width * c.ffn_width
        self.prefill_rate = FIRST_OPERATIONS_PER_SECOND / (2 * c.layers * layer_weights)

    @property
    def context(self) -> int:
        """How many tokens the model reads, prompt and answer together."""
        return self.backend.config.context

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Makes an adapter known to requests by a name. Where the name had another one, running requests keep
        that.

        Raises ValueError where it does not fit the model or the backend runs no adapters.
        """
        adapter.check(self.backend.config)
        if not hasattr(self.backend, "add_adapter"):
            raise ValueError(
                "this backend runs no adapters: merge it into the model (codegemma convert --adapter)"
            )
        with self.lock:
            if adapter.digest not in self._added:
                self.backend.add_adapter(adapter.digest, adapter)
                self._added.add(adapter.digest)
            self.adapters[name] = adapter.digest

    def adapter_digest(self, name: str) -> str:
        """The backend's and the cache's name of an adapter; "" for the base. Raises ValueError on others."""
        if name not in self.adapters:
            names = ", ".join(name for name in self.adapters if name not in ("auto", "none")) or "none"
            remedy = "add it with add_adapter, or start the server with --adapter NAME=PATH"
            raise ValueError(f"no adapter {name!r}: there are {names}; {remedy}")
        return self.adapters[name]

    def cached(self, ids: Sequence[int], adapter: str = "none") -> int:
        """How many of a prompt's first tokens are in the cache."""
        return self.cache.find(ids[:-1], self.adapter_digest(adapter))[1]

    def generate(self, request: Request, cancel: Cancel | None = None) -> Completion:
        """The Steps of a request of token ids. Closing the iterator, or setting `cancel` in another thread,
        stops the work. Raises ValueError, at once, where the request does not fit the model; see `start`."""
        batch = Batch(self, cancel or Cancel())
        running = batch.add(request)
        return Completion(self._run(batch, running), running)

    def _run(self, batch: Batch, running: RunningRequest) -> Iterator[Step]:
        try:
            while running.stop is None:
                steps: list[tuple[RunningRequest, Step]] = []
                if self.lock.acquire(timeout=CANCEL_POLL_S):
                    try:
                        steps = [] if batch.cancel.is_set() else batch.step()
                    finally:
                        self.lock.release()
                if batch.cancel.is_set():
                    yield running.end("cancelled")
                    return
                for _, step in steps:
                    yield step
        finally:
            if running in batch.running:
                batch.remove(running)

    def logits(self, ids: Sequence[int], start: int = 0, adapter: str = "none") -> np.ndarray:
        """float32 [T, V]: row t is the prediction after ids[:start + t + 1]. Gigabytes for long texts."""
        running = self.start(Request(ids, max_tokens=0, adapter=adapter))
        running.done, running.pages = 0, []
        logits_TV = np.empty((max(len(running.ids) - start, 0), self.backend.config.vocab), np.float32)
        while running.done < len(running.ids):
            chunk = running.ids[running.done : running.done + LOGIT_ROWS]
            end = running.done + len(chunk)
            rows = max(0, min(len(chunk), end - start))
            with self.lock:
                result = self.backend.run([self.claim(running, chunk, rows)])
                assert result is not None  # nothing can cancel it
                logits_TV[end - start - rows : max(end - start, 0)] = result.values[:rows]
            running.done = end
        self.remember(running)
        return logits_TV

    def start(self, request: Request) -> RunningRequest:
        """A request of token ids with the cached pages of its prompt.

        Raises ValueError where the prompt is empty, too long or holds ids outside of the vocabulary, where
        the adapter is unknown, and where stop texts were given without a tokenizer.
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
        bias = request.sampling.bias
        if any(not 0 <= token < config.vocab for token, _ in bias):
            raise ValueError(f"sampling: bias must name token ids from 0 to {config.vocab - 1:,}, got {bias}")
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
        """The Slice that computes `ids` after a request's pages, with logits of the last `wanted` ids.

        A page that others may read is copied before it is written.
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
        """Gives back the rows after `length` that a draft or a cancelled run had claimed."""
        _set_used(running.pages, length // PAGE * PAGE, length)
        for page in running.pages[-(-length // PAGE) :]:
            page.used = 0

    def measured(self, tokens: int, seconds: float) -> None:
        """Updates the prompt speed. Runs of fewer than 32 tokens are not prompts and say little."""
        if tokens >= 32 and seconds > 0:
            self.prefill_rate += (tokens / seconds - self.prefill_rate) / 4

    def remember(self, running: RunningRequest) -> None:
        """Puts what a request computed into the cache."""
        pages = running.pages[: -(-running.done // PAGE)]
        self.cache.put(running.ids[: running.done], pages, running.adapter)


def _set_used(pages: list[Page], start: int, end: int) -> None:
    for index in range(start // PAGE, -(-end // PAGE)):
        pages[index].used = min(PAGE, end - index * PAGE)
