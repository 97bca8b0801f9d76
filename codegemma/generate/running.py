"""A request while it is answered: its tokens, the pages of their keys and values, its text, its drafts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from codegemma.generate import sampling
from codegemma.generate.request import Request
from codegemma.native import PAGE, Logits, Page
from codegemma.tokenizer import StreamDecoder, Tokenizer

Stop = Literal["end", "stop_text", "length", "cancelled"]
MAX_DRAFT = 15  # tokens
DRAFT_PER_MATCH = 2  # drafted tokens for each token of the match
MIN_MATCH, MAX_MATCH = 2, 16  # how many tokens must match for a draft; how many are compared
MAX_PLACES = 256  # how many earlier places are compared with the end of the text
MAX_PAUSE = 32  # the most tokens that are generated without a draft after refused ones


@dataclass(frozen=True)
class Step:
    """One generated token. `text` is held back while a character, or what may be a stop text, is incomplete.

    The last step of a request has a `stop`: "end" (`token` is a stop id), "stop_text", "length", or
    "cancelled" (`token` is None). `logprob` is the token's log-probability by the model's logits, before
    temperature and filters; `top` are the likeliest tokens with theirs, as many as the request wants.
    `confidence`, 0 to 1, is the geometric mean of the probabilities of all tokens up to this one, each
    renormalised over the tokens that `Request.begin` allowed there; 1 before the first token.
    """

    token: int | None
    text: str
    logprob: float
    stop: Stop | None = None
    top: tuple[tuple[int, float], ...] = ()
    confidence: float = 1.0


class RunningRequest:
    """The state of a request of token ids in the engine. `ids` are the prompt's and the generated tokens."""

    def __init__(
        self, request: Request, ids: list[int], tokenizer: Tokenizer | None, limit: int, adapter: str
    ) -> None:
        """`limit` is how many tokens may be generated; `adapter` is a digest, "" for the base."""
        self.request, self.ids, self.limit, self.adapter = request, ids, limit, adapter
        self.prompt_length = len(ids)
        self.pages: list[Page] = []
        self.done = 0  # number of tokens whose keys and values are in the pages
        self.cached = 0  # how many of them came from the cache
        self.stop: Stop | None = None
        self.leader: RunningRequest | None = None  # computes the first `shared` tokens for this one too
        self.shared = 0
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer) if tokenizer else None
        self._unwritten = request.begin.encode()  # what is left of `Request.begin`, for the next tokens
        self._unshown = request.typed  # how many more characters to leave out of the answer's text
        self._log_confidence = 0.0
        self._held = ""  # text held back because a stop text may start in it
        self._stop_texts = [StopText(stop) for stop in request.stop]
        self.drafter = Drafter()

    @property
    def generated(self) -> int:
        """The number of generated tokens."""
        return len(self.ids) - self.prompt_length

    @property
    def confidence(self) -> float:
        """How sure the model is of the tokens so far; see `Step.confidence`."""
        return math.exp(self._log_confidence / self.generated) if self.generated else 1.0

    def next_step(self, row: int, logits: Logits) -> Step:
        """Samples the next token from a row of the logits, appends it and returns its Step."""
        request = self.request
        values_V, argmax, log_sum_exp = self._without_padding(row, logits)
        likeliest = sampling.top(values_V, request.top_logprobs) if request.top_logprobs else ()
        top = tuple((int(i), float(values_V[i]) - log_sum_exp) for i in likeliest)
        allowed_V, allowed_log_sum_exp = values_V, log_sum_exp
        if self._unwritten:
            allowed_V, argmax, allowed_log_sum_exp = self._continuing(values_V)
        token = sampling.choose(request.sampling, allowed_V, argmax, self.ids, self.generated)
        self.ids.append(token)
        self._log_confidence += float(values_V[token]) - allowed_log_sum_exp
        if token in request.stop_ids:
            text, self.stop = self._flush(), "end"
        else:
            text = self._hold_back(self._decoded(token))
            if self.stop is None and self.generated >= self.limit:
                text, self.stop = text + self._flush(), "length"
        return Step(token, text, float(values_V[token]) - log_sum_exp, self.stop, top, self.confidence)

    def _without_padding(self, row: int, logits: Logits) -> tuple[np.ndarray, int, float]:
        """The logits of the tokens that the tokenizer has, their argmax and log-sum-exp.

        A model may have more rows, which pad its vocabulary to a round size.
        """
        values_V, argmax = logits.values[row], int(logits.argmax[row])
        size = self._tokenizer.vocab_size if self._tokenizer else len(values_V)
        if size >= len(values_V):
            return values_V, argmax, float(logits.normaliser[row])
        values_V = values_V[:size]
        return values_V, int(values_V.argmax()), sampling.log_sum_exp(values_V)

    def _continuing(self, values_V: np.ndarray) -> tuple[np.ndarray, int, float]:
        """The logits of the tokens that agree with the unwritten bytes, -inf for all others; their argmax and
        log-sum-exp."""
        assert self._tokenizer
        allowed = self._tokenizer.ids_compatible_with(self._unwritten)
        allowed_V = np.full_like(values_V, -np.inf)
        allowed_V[allowed] = values_V[allowed]
        return allowed_V, int(allowed_V.argmax()), sampling.log_sum_exp(values_V[allowed])

    def _decoded(self, token: int) -> str:
        """The text that a token completes, without what was typed already."""
        if self._tokenizer is None or self._decoder is None:
            return ""
        if self._unwritten:
            self._unwritten = self._unwritten[len(self._tokenizer.decode_bytes([token])) :]
        text = self._decoder.push(token)
        hidden = min(self._unshown, len(text))
        self._unshown -= hidden
        return text[hidden:]

    def end(self, stop: Stop) -> Step:
        """Ends the request without a token."""
        self.stop = stop
        return Step(None, self._flush(), 0.0, stop, confidence=self.confidence)

    def catch_up(self, others: Sequence[RunningRequest]) -> bool:
        """False while the leader computes the shared prefix; then takes over its pages and returns True."""
        if self.leader is None:
            return True
        if self.leader.done < self.shared and self.leader in others:
            return False
        length = min(self.shared, self.leader.done)
        if length > self.done:
            self.pages, self.done, self.cached = self.leader.pages[: -(-length // PAGE)], length, length
        self.leader = None
        return True

    def _flush(self) -> str:
        """The text that was held back, which now will not be completed."""
        text = self._held + (self._decoder.flush() if self._decoder else "")
        self._held = ""
        return text

    def _hold_back(self, text: str) -> str:
        """The text without an end that may begin a stop text. Sets `stop` where a stop text is complete."""
        held = max((stop_text.push(text) for stop_text in self._stop_texts), default=0)
        text = self._held + text
        matches = [start for start in map(text.find, self.request.stop) if start >= 0]
        if matches:
            self.stop, self._held = "stop_text", ""
            return text[: min(matches)]
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown]


class StopText:
    """How much of a stop text stands at the end of a text that comes in pieces.

    The time is proportional to the text, however long the stop text is (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._matched = 0  # how many characters of the stop text the text ends with
        # [n]: the length of the longest proper suffix of stop[:n] that is also a prefix of it
        self._borders = [0, 0]

    def push(self, text: str) -> int:
        """Appends `text`; how many characters, at the end of the whole text, begin the stop text."""
        for letter in text:
            self._matched = self._advance(self._matched, letter)
            if self._matched >= len(
                self._borders
            ):  # the first match of this size: its border may be needed next
                self._borders.append(self._advance(self._borders[-1], letter))
        return self._matched

    def _advance(self, size: int, letter: str) -> int:
        """The size of the longest start of the stop text that ends stop[:size] + letter."""
        while size and (size == len(self._stop) or self._stop[size] != letter):
            size = self._borders[size]
        return size + 1 if self._stop[size] == letter else 0


class Drafter:
    """Speculation: drafts what followed the longest end of the text that also occurs earlier in it.

    Of equally long matches the last one counts. The longer the match, the longer the draft (suffix decoding,
    arXiv 2411.04975). The places of a pair of tokens form a chain, from the last to the first: the memory is
    proportional to the text, and so is the time to enter it.
    """

    def __init__(self) -> None:
        self._last_end: dict[tuple[int, ...], int] = {}  # pair -> index after its last occurrence
        # [end]: where the pair that ends there ended before: the index after it; 0: nowhere
        self._earlier_end = [0] * MIN_MATCH
        self._pause, self._misses = 0, 0

    def propose(self, ids: list[int], max_tokens: int) -> list[int]:
        """A guess of the next tokens, at most `max_tokens`; [] where there is none.

        `ids` are those of the last call and what follows them.
        """
        for end in range(len(self._earlier_end), len(ids)):
            pair = tuple(ids[end - MIN_MATCH : end])
            self._earlier_end.append(self._last_end.get(pair, 0))
            self._last_end[pair] = end
        if self._pause > 0:
            self._pause -= 1
            return []
        start, size = self._longest_match(ids)
        return ids[start : start + max(0, min(DRAFT_PER_MATCH * size, MAX_DRAFT, max_tokens))]

    def _longest_match(self, ids: list[int]) -> tuple[int, int]:
        """The index after the last of the longest matches, and its length; 0 and 0 where nothing matches."""
        best, size = 0, 0
        end = self._last_end.get(tuple(ids[-MIN_MATCH:]), 0)
        for _ in range(MAX_PLACES):
            if not end or size == MAX_MATCH:
                break
            length = MIN_MATCH
            while length < min(MAX_MATCH, end) and ids[end - 1 - length] == ids[-1 - length]:
                length += 1
            if length > size:
                best, size = end, length
            end = self._earlier_end[end]
        return best, size

    def record(self, drafted: int, accepted: int) -> None:
        """The more drafts in a row were refused completely, the longer no draft is made."""
        self._misses = self._misses + 1 if accepted == 0 else 0
        self._pause = min(2**self._misses, MAX_PAUSE) if self._misses > 1 else 0
