"""Evaluates a model on this machine: samples and likelihoods in batches that share prefixes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from codegemma import hub
from codegemma.evals.task import Decoding, IdPair, ModelOutput, Score, StopReason
from codegemma.generate.engine import Batch
from codegemma.generate.model import Model
from codegemma.generate.request import Request
from codegemma.generate.resolve import layout_for
from codegemma.generate.running import RunningRequest, Stop
from codegemma.native import PAGE
from codegemma.prompts import Layout

MAX_SEQUENCES = (
    32  # decoded together; the kernels compute 16 tokens at once, and more than twice that is no faster
)
CACHE_BYTES = 4 << 30  # for the keys and values of these sequences, at 1,024 tokens each
LOGIT_ROWS = 32  # to compute in one run: a row of 262,144 floats is a megabyte
REASONS: dict[Stop, StopReason] = {"end": "token", "stop_text": "stop", "length": "length"}


class LocalModel:
    """An EvaluatedModel over the engine, with the named adapter ("none": the base model).

    The engine generates the same tokens whatever else is in the batch, so a resumed run equals one that was
    never interrupted.
    """

    def __init__(self, model: Model, adapter: str = "none") -> None:
        self.model, self.engine, self.adapter = model, model.engine, adapter
        self.tokenizer = model.tokenizer
        self.name = model.preset.name if model.preset else hub.name_of(model.path)
        self.name += f" with {adapter}" if adapter != "none" else ""

    @property
    def layout(self) -> Layout:
        """The order in which `complete` asks the model with this adapter to fill a hole."""
        return layout_for("auto", self.model.fim_orders(self.adapter))

    def completing(self) -> LocalModel:
        """The model with the adapter that `complete` applies by default."""
        return LocalModel(self.model, self.model.completing_adapter())

    def sample(self, prompts: list[list[int]], decoding: Decoding) -> Iterator[tuple[int, int, ModelOutput]]:
        """See EvaluatedModel."""
        waiting = ((i, number) for i in range(len(prompts)) for number in range(decoding.samples))
        page_bytes = self.engine.cache.page_bytes
        sequences = max(1, min(MAX_SEQUENCES, CACHE_BYTES // (1024 // PAGE * page_bytes)))
        batch = Batch(self.engine)
        started: dict[RunningRequest, tuple[int, int, float]] = {}
        texts: dict[RunningRequest, str] = {}
        while True:
            for i, number in islice(waiting, sequences - len(batch.running)):
                seed = _seed(decoding.seed, prompts[i], number)
                running = batch.add(decoding.request(prompts[i], seed, self.adapter))
                started[running], texts[running] = (i, number, time.perf_counter()), ""
            if not batch.running:
                return
            with self.engine.lock:
                steps = batch.step()
            for running, step in steps:
                if isinstance(step, Exception):
                    raise step
                texts[running] += step.text
                if step.stop is not None:
                    i, number, start = started.pop(running)
                    ids, seconds = running.ids[running.prompt_length :], time.perf_counter() - start
                    yield i, number, ModelOutput(texts.pop(running), ids, REASONS[step.stop], seconds)

    def score(self, pairs: list[IdPair]) -> list[Score]:
        """See EvaluatedModel. Raises ValueError where a context or a continuation is empty."""
        scores: list[Score] = []
        batch: list[IdPair] = []
        for pair in pairs:
            if not all(pair):
                raise ValueError("a likelihood needs a context and a continuation of at least one token each")
            if batch and sum(len(continuation) for _, continuation in batch) + len(pair[1]) > LOGIT_ROWS:
                scores += self._score(batch)
                batch = []
            batch.append(pair)
        return scores + (self._score(batch) if batch else [])

    def _score(self, pairs: Sequence[IdPair]) -> list[Score]:
        """Runs each different context once, which fills the cache, then all continuations in one run."""
        engine = self.engine
        with engine.lock:
            batch = Batch(engine)
            for ids in dict.fromkeys(tuple(context) for context, _ in pairs):
                if engine.cached(ids, self.adapter) < len(ids) - 1:
                    batch.add(Request(ids[:-1], max_tokens=0, adapter=self.adapter))
            while batch.running:
                if fault := next((step for _, step in batch.step() if isinstance(step, Exception)), None):
                    raise fault
            slices = []
            for context, continuation in pairs:
                request = Request([*context, *continuation[:-1]], max_tokens=0, adapter=self.adapter)
                running = engine.start(request)
                running.done = min(running.done, len(context) - 1)
                slices.append(engine.claim(running, running.ids[running.done :], len(continuation)))
            logits = engine.backend.run(slices)
            assert logits is not None  # nothing cancels it
            rows = iter(range(len(logits.argmax)))
            scores = []
            for _, continuation in pairs:
                # `continuation` must come first: zip then takes no row beyond its end, and the next pair goes
                # on from there.
                tokens = list(zip(continuation, rows, strict=False))
                logprobs = [float(logits.values[r, t]) - float(logits.normaliser[r]) for t, r in tokens]
                scores.append(Score(logprobs, all(int(logits.argmax[r]) == t for t, r in tokens)))
        return scores


def _seed(seed: int, prompt: list[int], number: int) -> int:
    """A sample's seed. It depends on the prompt and not on its index, which differs in a resumed run."""
    digest = hashlib.blake2b(f"{seed} {number} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
