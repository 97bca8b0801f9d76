"""A request while it is answered: its tokens, their pages of keys and values, and the text held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from codegemma.generate import sampling
from codegemma.generate.request import Request
from codegemma.native import PAGE, Logits, Page
from codegemma.tokenizer import StreamDecoder, Tokenizer

Stop = Literal["end", "stop_text", "length", "cancelled"]
DRAFT_TOKENS = (4, 15)  # drafted at first, and after a draft that was accepted whole
MATCH_TOKENS = 3  # that must repeat before a draft is made
MAX_PAUSE = 32  # tokens without a draft, after drafts that failed


@dataclass(frozen=True)
class Step:
    """One generated token. `text` is what it adds, often "" while a character or a stop text is incomplete.

    The last step of a request has `stop`: "end" (a stop id, which `token` is), "stop_text", "length", or
    "cancelled" (token None). `logprob` is the model's own, before temperature and filters.
    """

    token: int | None
    text: str
    logprob: float
    stop: Stop | None = None
    top: tuple[
        tuple[int, float], ...
    ] = ()  # the likeliest tokens and their log-probabilities, where asked for


class RunningRequest:
    """A request of token ids on its way through the engine. `ids` are the prompt's and the generated ones."""

    def __init__(
        self, request: Request, ids: list[int], tokenizer: Tokenizer | None, limit: int, adapter: str
    ) -> None:
        """`limit` is the most tokens to generate; `adapter` is the backend's name of it, "" for the base."""
        self.request, self.ids, self.limit, self.adapter = request, ids, limit, adapter
        self.prompt_length = len(ids)
        self.pages: list[Page] = []
        self.done = 0  # tokens whose keys and values are in the pages
        self.cached = 0  # of these, how many came from the cache
        self.stop: Stop | None = None
        self.leader: RunningRequest | None = None  # it computes the first `shared` tokens for both
        self.shared = 0
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._held = ""  # text that may be the start of a stop text
        self._drafter = _Drafter() if request.speculate else None

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return len(self.ids) - self.prompt_length

    def draft(self) -> list[int]:
        """Tokens that probably follow; never past the limit."""
        return self._drafter.propose(self.ids, self.limit - self.generated - 1) if self._drafter else []

    def record_draft(self, drafted: int, accepted: int) -> None:
        """Tells the drafter how many of its tokens were right."""
        if self._drafter and drafted:
            self._drafter.record(drafted, accepted)

    def take(self, row: int, logits: Logits) -> Step:
        """Chooses the next token from a row of the logits and returns its Step."""
        values_V, request = logits.values[row], self.request
        token = sampling.choose(request.sampling, values_V, int(logits.argmax[row]), self.ids, self.generated)
        normaliser = float(logits.normaliser[row])
        likeliest = sampling.top(values_V, request.top_logprobs) if request.top_logprobs else ()
        top = tuple((int(i), float(values_V[i]) - normaliser) for i in likeliest)
        self.ids.append(token)
        if token in request.stop_ids:
            text, self.stop = self._flush(), "end"
        else:
            text = self._release(self._decoder.push(token) if self._decoder else "")
            if self.stop is None and self.generated >= self.limit:
                text, self.stop = text + self._flush(), "length"
        return Step(token, text, float(values_V[token]) - normaliser, self.stop, top)

    def end(self, stop: Stop) -> Step:
        """Ends the request without a token."""
        self.stop = stop
        return Step(None, self._flush(), 0.0, stop)

    def catch_up(self, others: Sequence[RunningRequest]) -> bool:
        """False while the leader still computes the shared prefix; when it has, takes over its pages."""
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
        text = self._held + (self._decoder.flush() if self._decoder else "")
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        """The text that can be shown: not what may start a stop text. Sets `stop` at a complete one."""
        stop_texts = self.request.stop
        text = self._held + text
        matches = [start for start in map(text.find, stop_texts) if start >= 0]
        if matches:
            self.stop, self._held = "stop_text", ""
            return text[: min(matches)]
        sizes = (n for stop in stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - max(sizes, default=0)
        self._held = text[shown:]
        return text[:shown]


class _Drafter:
    """n-gram speculation: what followed the last MATCH_TOKENS ids when they last occurred."""

    def __init__(self) -> None:
        self._last_end: dict[tuple[int, ...], int] = {}  # of each n-gram: the index of the token after it
        self._indexed = MATCH_TOKENS  # the next end to index
        self._length, self._pause, self._misses = DRAFT_TOKENS[0], 0, 0

    def propose(self, ids: list[int], max_tokens: int) -> list[int]:
        for end in range(self._indexed, len(ids)):
            self._last_end[tuple(ids[end - MATCH_TOKENS : end])] = end
        self._indexed = max(self._indexed, len(ids))
        if self._pause > 0:
            self._pause -= 1
            return []
        start = self._last_end.get(tuple(ids[-MATCH_TOKENS:]))
        return [] if start is None or max_tokens <= 0 else ids[start : start + min(self._length, max_tokens)]

    def record(self, drafted: int, accepted: int) -> None:
        """Drafts grow after one that was accepted whole; after misses in a row, a pause that doubles."""
        self._length = DRAFT_TOKENS[1] if accepted == drafted else DRAFT_TOKENS[0]
        self._misses = self._misses + 1 if accepted == 0 else 0
        self._pause = min(2**self._misses, MAX_PAUSE) if self._misses > 1 else 0
