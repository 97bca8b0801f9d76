"""A model on this machine as the model of an evaluation: samples and likelihoods in batches that share prefixes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from codegemma.evals.task import Completion, Score, StopReason
from codegemma.generate.engine import Batch, Request, Running, Stop
from codegemma.generate.model import Model
from codegemma.generate.sampling import Sampling
from codegemma.native import CHUNK, PAGE

SEQUENCES = 32  # that run together at most: two groups of the packed kernels; more gain nothing
CACHE_BYTES = 4 << 30  # of keys and values that they may take, at 1,024 tokens each
ROWS = 32  # of logits at once: a row of 262,144 floats is a megabyte
REASONS: dict[Stop, StopReason] = {"end": "token", "stop_text": "stop", "length": "length"}


class Local:
    """Satisfies `task.Model`, with one of the model's adapters on if it is named. By the engine's law the batch changes no
    token, so neither does an interruption."""

    def __init__(self, model: Model, adapter: str | None = None) -> None:
        self.model, self.engine, self.adapter = model, model.engine, adapter
        self.tokenizer = model.tokenizer
        self.name = (model.preset.name if model.preset else model.path.name) + (
            f" with {adapter}" if adapter else ""
        )

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
        waiting = ((at, number) for at in range(len(prompts)) for number in range(n))
        together = max(1, min(SEQUENCES, CACHE_BYTES // (1024 // PAGE * self.engine.cache.page_bytes)))
        batch = Batch(self.engine)
        started: dict[Running, tuple[int, int, float]] = {}
        texts: dict[Running, str] = {}
        while True:
            for at, number in islice(waiting, together - len(batch.running)):
                sampling = Sampling(temperature, top_p=top_p, seed=_seed(seed, prompts[at], number))
                one = batch.add(
                    Request(prompts[at], max_tokens, sampling, stop_ids, stop, adapter=self.adapter)
                )
                started[one], texts[one] = (at, number, time.perf_counter()), ""
            if not batch.running:
                return
            with self.engine.lock:
                steps = batch.step()
            for one, step in steps:
                texts[one] += step.text
                if step.stop is not None:
                    at, number, since = started.pop(one)
                    yield (
                        at,
                        number,
                        Completion(
                            texts.pop(one),
                            one.ids[one.prompt_length :],
                            REASONS[step.stop],
                            time.perf_counter() - since,
                        ),
                    )

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        scores: list[Score] = []
        pending: list[tuple[list[int], list[int]]] = []
        for pair in pairs:
            if not all(pair):
                raise ValueError("a likelihood needs a context and a continuation of at least one token each")
            if pending and sum(len(continuation) for _, continuation in pending) + len(pair[1]) > ROWS:
                scores += self._score(pending)
                pending = []
            pending.append(pair)
        return scores + (self._score(pending) if pending else [])

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Contexts first, each once; then all continuations in one run."""
        with self.engine.lock:
            for known in {tuple(context): None for context, _ in pairs}:
                self._read(list(known[:-1]))
            running = []
            for context, continuation in pairs:
                one = self.engine.start(
                    Request([*context, *continuation[:-1]], max_tokens=0, adapter=self.adapter)
                )
                one.done = min(one.done, len(context) - 1)
                running.append(one)
            slices = [
                self.engine.claim(one, one.ids[one.done :], len(pair[1]))
                for one, pair in zip(running, pairs, strict=True)
            ]
            logits = self.engine.backend.run(slices)
            assert logits is not None  # nothing cancels it
            scores, row = [], 0
            for _, continuation in pairs:
                rows = range(row, row + len(continuation))
                scores.append(
                    Score(
                        [
                            float(logits.values[i, token]) - float(logits.normaliser[i])
                            for i, token in zip(rows, continuation, strict=True)
                        ],
                        all(
                            int(logits.argmax[i]) == token
                            for i, token in zip(rows, continuation, strict=True)
                        ),
                    )
                )
                row = rows.stop
        return scores

    def _read(self, ids: list[int]) -> None:
        """Leaves the keys and values of a context in the cache."""
        if not ids:
            return
        one = self.engine.start(Request([*ids, ids[-1]], max_tokens=0, adapter=self.adapter))
        while one.done < len(ids):
            part = ids[one.done : one.done + CHUNK]
            self.engine.backend.run([self.engine.claim(one, part, 0)])
            one.done += len(part)
        one.ids = ids
        self.engine.remember(one)


def _seed(seed: int, prompt: list[int], number: int) -> int:
    """Of the prompt itself and not of its place, so that a resumed run draws the same."""
    digest = hashlib.blake2b(f"{seed} {number} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
