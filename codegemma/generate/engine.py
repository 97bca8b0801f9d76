"""Generation as an iterator of Steps, over any backend: batches of sequences, a shared prefix cache, exact speculation.

Users call `Engine.generate` (one request) or drive a `Batch` (many at once: evaluation, the server). The law it keeps:
batching, caching and speculation never change a token, provided that the backend is `invariant`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from codegemma.adapters.adapter import Adapter
from codegemma.config import ModelConfig
from codegemma.generate import sampling as sampler
from codegemma.generate.cache import PrefixCache, common_prefix
from codegemma.generate.request import Request
from codegemma.native import CHUNK, PAGE, Cancel, Logits, Page, Slice
from codegemma.tokenizer import Stream, Tokenizer

Stop = Literal["end", "stop_text", "length", "cancelled"]
DRAFTS = (4, 15)  # tokens drafted at first, and once a draft was accepted whole
MATCH = 3  # tokens that must repeat before a draft is made
SHARED = 16  # tokens of another's prompt that are worth waiting for


class Backend(Protocol):
    """What computes. `invariant`: logits do not depend on batch, chunking, cache or threads. `key` names all that
    cached pages depend on besides the weights."""

    config: ModelConfig
    invariant: bool
    key: str
    page_bytes: int

    def new_page(self) -> Page: ...
    def copy_page(self, page: Page, used: int) -> Page: ...
    def add_adapter(self, name: str, adapter: Adapter) -> None: ...
    def run(self, slices: Sequence[Slice], cancel: Cancel | None = None) -> Logits | None: ...


@dataclass(frozen=True)
class Step:
    """One generated token. `text` is what it adds to the output, often "" while a character or a stop text is open.

    The last step of a request has `stop`: "end" (a sentinel or end of text, whose token it carries), "stop_text",
    "length", or "cancelled" (token None). `logprob` is the model's own, before temperature and filters.
    """

    token: int | None
    text: str
    logprob: float
    stop: Stop | None = None
    top: tuple[tuple[int, float], ...] = ()  # likeliest tokens and their log-probabilities, where asked for


class Running:
    """A request on its way: its tokens, the pages behind them, and what has not been shown yet."""

    def __init__(
        self, request: Request, ids: list[int], tokenizer: Tokenizer | None, limit: int, adapter: str = ""
    ) -> None:
        self.request, self.ids, self.limit, self.adapter = request, ids, limit, adapter
        self.prompt_length = len(ids)
        self.pages: list[Page] = []
        self.done = 0  # tokens whose keys and values are in the pages
        self.cached = 0  # of these, how many came from the cache
        self.stop: Stop | None = None
        self.leader: Running | None = None  # who is reading the first `shared` tokens for both
        self.shared = 0
        self._stream = Stream(tokenizer) if tokenizer else None
        self._held = ""
        self._draft = _Draft(ids) if request.speculate else None

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    def draft(self) -> list[int]:
        """Tokens that probably follow; never past the limit."""
        return self._draft.propose(self.ids, self.limit - self.generated - 1) if self._draft else []

    def take(self, row: int, logits: Logits) -> Step:
        """Chooses the next token from a row of logits and says what it shows."""
        values_V, request = logits.values[row], self.request
        token = sampler.choose(request.sampling, values_V, int(logits.argmax[row]), self.ids, self.generated)
        normaliser = float(logits.normaliser[row])
        best = sampler.top(values_V, request.top_logprobs) if request.top_logprobs else ()
        top = tuple((int(i), float(values_V[i]) - normaliser) for i in best)
        logprob = float(values_V[token]) - normaliser
        self.ids.append(token)
        if token in request.stop_ids:
            return self._last(token, self._flush(), logprob, "end", top)
        text = self._show(self._stream.push(token) if self._stream else "")
        if self.stop:
            return self._last(token, text, logprob, "stop_text", top)
        if self.generated >= self.limit:
            return self._last(token, text + self._flush(), logprob, "length", top)
        return Step(token, text, logprob, None, top)

    def end(self, stop: Stop) -> Step:
        """Ends without a token."""
        return self._last(None, self._flush(), 0.0, stop, ())

    def catch_up(self, others: Sequence[Running]) -> bool:
        """False while another still reads what both prompts start with; then its pages are taken."""
        if self.leader is None:
            return True
        if self.leader.done < self.shared and self.leader in others:
            return False
        length = min(self.shared, self.leader.done)
        if length > self.done:
            self.pages, self.done, self.cached = self.leader.pages[: -(-length // PAGE)], length, length
        self.leader = None
        return True

    def learn(self, drafted: int, accepted: int) -> None:
        if self._draft and drafted:
            self._draft.learn(drafted, accepted)

    def _last(
        self, token: int | None, text: str, logprob: float, stop: Stop, top: tuple[tuple[int, float], ...]
    ) -> Step:
        self.stop = stop
        return Step(token, text, logprob, stop, top)

    def _flush(self) -> str:
        text = self._held + (self._stream.flush() if self._stream else "")
        self._held = ""
        return text

    def _show(self, text: str) -> str:
        """Adds text; holds back what may be the start of a stop text; sets `stop` where one is complete."""
        stops = self.request.stop
        if not stops:
            return text
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            self.stop, self._held = "stop_text", ""
            return held[: min(found)]
        keep = max(
            (n for stop in stops for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n])),
            default=0,
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class Completion(Iterator[Step]):
    """Steps as they are made; `text` and `stop` run it to its end first. `close()` stops the work."""

    def __init__(self, steps: Iterator[Step], running: Running) -> None:
        self._steps, self.running = steps, running
        self._taken: list[Step] = []

    def __next__(self) -> Step:
        step = next(self._steps)
        self._taken.append(step)
        return step

    @property
    def steps(self) -> list[Step]:
        """All of them, in order."""
        for _ in self:
            pass
        return self._taken

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def stop(self) -> Stop | None:
        """Why it ended: "end", "stop_text", "length" or "cancelled"; None where it was closed before."""
        return self.steps[-1].stop if self.steps else None

    @property
    def ids(self) -> list[int]:
        """Every generated token, a final sentinel included."""
        return [step.token for step in self.steps if step.token is not None]

    @property
    def prompt_tokens(self) -> int:
        return self.running.prompt_length

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens came from the cache."""
        return self.running.cached

    def close(self) -> None:
        if hasattr(self._steps, "close"):
            self._steps.close()


class _Draft:
    """n-gram speculation: what followed the last MATCH tokens when they last occurred, in prompt or output."""

    def __init__(self, ids: list[int]) -> None:
        self._seen: dict[tuple[int, ...], int] = {}
        self._indexed = MATCH  # next end position to index
        self._length, self._rest, self._misses = DRAFTS[0], 0, 0

    def propose(self, ids: list[int], most: int) -> list[int]:
        for end in range(self._indexed, len(ids)):
            self._seen[tuple(ids[end - MATCH : end])] = end
        self._indexed = max(self._indexed, len(ids))
        if self._rest > 0:
            self._rest -= 1
            return []
        at = self._seen.get(tuple(ids[-MATCH:]))
        return ids[at : at + min(self._length, most)] if at is not None and most > 0 else []

    def learn(self, drafted: int, accepted: int) -> None:
        """Longer drafts after a whole one; after misses in a row, a pause that doubles."""
        self._length = DRAFTS[1] if accepted == drafted else DRAFTS[0]
        self._misses = self._misses + 1 if accepted == 0 else 0
        self._rest = min(2**self._misses, 32) if self._misses > 1 else 0


@dataclass
class Batch:
    """Requests that run together. `add` them at any time; each `step` gives their new Steps, in order, per request.

    A step reads at most `chunk` prompt tokens, so that a long prompt does not hold the others up for long.
    """

    engine: Engine
    cancel: Cancel = field(default_factory=Cancel)
    chunk: int = CHUNK
    running: list[Running] = field(default_factory=list)

    def add(self, request: Request) -> Running:
        """Raises ValueError where the request does not fit the model."""
        one = self.engine.start(request)
        for other in self.running:  # the prefix that samples or tasks share is computed once
            shared = min(common_prefix(one.ids, other.ids), len(one.ids) - 1)
            if one.adapter == other.adapter and shared >= max(one.done, one.shared) + SHARED:
                one.leader, one.shared = other, shared
        self.running.append(one)
        return one

    def remove(self, one: Running) -> None:
        """Takes a request out, finished or not; what it computed stays in the cache."""
        self.running.remove(one)
        self.engine.remember(one)

    def step(self) -> list[tuple[Running, Step]]:
        """Runs all requests by one decode step or prompt chunk. Nothing comes back where `cancel` was set meanwhile:
        the caller removes what is to go, and steps on."""
        slices, owners, drafts, room = [], [], [], self.chunk
        for one in self.running:
            if not one.catch_up(self.running):
                continue
            waiting = len(one.ids) - one.done
            draft = one.draft() if waiting == 1 and one.generated and len(self.running) <= 2 else []
            ids = (
                one.ids[one.done : one.done + max(1, min(waiting, room))]
                if waiting > 1
                else [one.ids[-1], *draft]
            )
            if waiting > 1 and room <= 0:
                continue
            room -= len(ids) if waiting > 1 else 0
            reaches_end = one.done + len(ids) >= len(one.ids)
            slices.append(self.engine.claim(one, ids, 1 + len(draft) if reaches_end and one.limit else 0))
            owners.append(one)
            drafts.append(draft)
        if not slices:
            return []
        started = time.perf_counter()
        logits = self.engine.backend.run(slices, self.cancel)
        if logits is None:
            for one, part in zip(owners, slices, strict=True):
                self.engine.unclaim(one, part.start)
            return []
        self.engine.measured(sum(len(part.ids) for part in slices), time.perf_counter() - started)
        steps: list[tuple[Running, Step]] = []
        row = 0
        for one, part, draft in zip(owners, slices, drafts, strict=True):
            one.done = part.start + len(part.ids) - len(draft)
            if part.wanted:
                steps += [(one, step) for step in self._accept(one, draft, row, logits)]
            elif one.done == len(one.ids):  # max_tokens is 0: the prompt was only to be read
                steps.append((one, one.end("length")))
            row += part.wanted
        for one in [one for one in owners if one.stop]:
            self.remove(one)
        return steps

    def _accept(self, one: Running, draft: list[int], row: int, logits: Logits) -> Iterator[Step]:
        """A drafted token holds where it is what the sampler chose; the first other choice ends the draft."""
        accepted = 0
        for position in range(len(draft) + 1):
            step = one.take(row + position, logits)
            yield step
            if one.stop or position == len(draft) or step.token != draft[position]:
                break
            accepted += 1
        one.done += accepted
        one.learn(len(draft), accepted)
        self.engine.unclaim(one, one.done)


class Engine:
    """A backend with its prefix cache. Not for several threads at once: `lock` is what callers hold around a step."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        identity: str = "",
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.cache = PrefixCache(f"{identity} {backend.key}", backend.page_bytes, cache_bytes)
        self.lock = threading.Lock()
        # Names, and what the backend and cached pages know them by. A prompt of token ids has no "auto" adapter.
        self.adapters = {"auto": "", "none": ""}
        self._known: set[str] = set()
        c = backend.config
        layer = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_width + 3 * c.width * c.ffn_width
        self.prefill_rate = 1e11 / (
            2 * c.layers * layer
        )  # tokens a second: at first what 100 GOP/s would give

    @property
    def context(self) -> int:
        return self.backend.config.context

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Makes an adapter known to requests by a name, or gives a name to another one: requests that run keep theirs.
        Raises ValueError where it does not fit the model."""
        adapter.check(self.backend.config)
        if not hasattr(self.backend, "add_adapter"):
            raise ValueError(
                "this backend runs no adapters: merge it into the model (codegemma convert --adapter)"
            )
        with self.lock:
            if adapter.digest not in self._known:
                self.backend.add_adapter(adapter.digest, adapter)
                self._known.add(adapter.digest)
            self.adapters[name] = adapter.digest

    def adapter_digest(self, name: str) -> str:
        """What the backend and cached pages know an adapter by; "" for the base. Raises ValueError on other names."""
        if name not in self.adapters:
            names = ", ".join(name for name in self.adapters if name not in ("auto", "none"))
            raise ValueError(
                f"no adapter {name!r}: there are {names or 'none'}; add it with add_adapter, or start the server "
                "with --adapter NAME=PATH"
            )
        return self.adapters[name]

    def cached(self, ids: Sequence[int], adapter: str = "none") -> int:
        """How many first tokens of a prompt are in the cache."""
        return self.cache.find(ids[:-1], self.adapter_digest(adapter))[1]

    def generate(self, request: Request, cancel: Cancel | None = None) -> Completion:
        """The Steps of one request. Closing the iterator, or setting `cancel` in another thread, stops the work.

        Raises ValueError, at once, where the prompt is empty, too long or holds ids outside the vocabulary.
        """
        batch = Batch(self, cancel or Cancel())
        one = batch.add(request)
        return Completion(self._drain(batch, one), one)

    def _drain(self, batch: Batch, one: Running) -> Iterator[Step]:
        try:
            while one.stop is None:
                steps: list[tuple[Running, Step]] = []
                if self.lock.acquire(
                    timeout=0.02
                ):  # a cancelled request does not wait for another's long prompt
                    try:
                        steps = [] if batch.cancel.is_set() else batch.step()
                    finally:
                        self.lock.release()
                if batch.cancel.is_set():
                    yield one.end("cancelled")
                    return
                for _, step in steps:
                    yield step
        finally:
            if one in batch.running:
                batch.remove(one)

    def logits(self, ids: Sequence[int], start: int = 0, adapter: str = "none") -> np.ndarray:
        """float32 [T, V]: row t is what the model says after ids[:start + t + 1]. Gigabytes for long texts."""
        one = self.start(Request(ids, max_tokens=0, adapter=adapter))
        one.done, one.pages = 0, []
        logits_TV = np.empty((max(len(one.ids) - start, 0), self.backend.config.vocab), np.float32)
        while one.done < len(one.ids):
            chunk = one.ids[one.done : one.done + 64]
            end = one.done + len(chunk)
            wanted = max(0, min(len(chunk), end - start))
            with self.lock:
                result = self.backend.run([self.claim(one, chunk, wanted)])
                assert result is not None  # nothing can cancel it
                logits_TV[end - start - wanted : max(end - start, 0)] = result.values[:wanted]
            one.done = end
        self.remember(one)
        return logits_TV

    def start(self, request: Request) -> Running:
        config, ids = self.backend.config, [int(token) for token in request.prompt]
        if not ids:
            raise ValueError("the prompt is empty: a model needs at least <bos>")
        bad = next((token for token in ids if not 0 <= token < config.vocab), None)
        if bad is not None:
            raise ValueError(
                f"the prompt holds token id {bad}, but the vocabulary has {config.vocab:,} ids, from 0: "
                "use the tokenizer that belongs to the model"
            )
        if any(not 0 <= token < config.vocab for token, _ in request.sampling.bias):
            raise ValueError(
                f"sampling: bias must name token ids from 0 to {config.vocab - 1:,}, got {request.sampling.bias}"
            )
        if len(ids) + min(request.max_tokens, 1) > config.context:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens but the model reads {config.context:,}: shorten it "
                'or pass truncate="left"'
            )
        if request.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and this model came without one: pass stop_ids")
        adapter = self.adapter_digest(request.adapter)
        one = Running(
            request, ids, self.tokenizer, min(request.max_tokens, config.context - len(ids)), adapter
        )
        one.pages, one.done = self.cache.find(ids[:-1], adapter)
        one.cached = one.done
        return one

    def claim(self, one: Running, ids: Sequence[int], wanted: int) -> Slice:
        """Room for `ids` behind the pages of a sequence: a page that others may read is copied before it is written."""
        start, end = one.done, one.done + len(ids)
        offset = start % PAGE
        if offset and one.pages[start // PAGE].used != offset:
            one.pages[start // PAGE] = self.backend.copy_page(one.pages[start // PAGE], offset)
        del one.pages[-(-start // PAGE) :]
        while len(one.pages) * PAGE < end:
            one.pages.append(self.backend.new_page())
        self._mark(one, start, end)
        return Slice(ids, start, one.pages, wanted, one.adapter or None)

    def unclaim(self, one: Running, length: int) -> None:
        """Gives back the rows behind `length` that a draft or a cancelled run had claimed."""
        self._mark(one, length // PAGE * PAGE, length)
        for page in one.pages[-(-length // PAGE) :]:
            page.used = 0

    def measured(self, tokens: int, seconds: float) -> None:
        """Keeps the prompt speed up to date: runs of few tokens are not prompts and say little."""
        if tokens >= 32 and seconds > 0:
            self.prefill_rate += (tokens / seconds - self.prefill_rate) / 4

    def remember(self, one: Running) -> None:
        self.cache.put(one.ids[: one.done], one.pages[: -(-one.done // PAGE)], one.adapter)

    @staticmethod
    def _mark(one: Running, start: int, end: int) -> None:
        for index in range(start // PAGE, -(-end // PAGE)):
            one.pages[index].used = min(PAGE, end - index * PAGE)
