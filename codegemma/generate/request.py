"""What to generate: a Request, made where a caller comes in (Python, command line, server, editor,
evaluation) and passed whole from there to the engine. Values are checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import get_args

from codegemma.config import Mode, Trim
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File, Layout, Message

MODES, TRIMS = get_args(Mode), get_args(Trim)


@dataclass(frozen=True)
class Infill:
    """The text around an editor's cursor, its file's path, and other files that the answer may draw on.

    `trim` cuts the answer (see `trim.cut`); a line of it that has fewer than `min_indent` blanks in front
    ends it.
    """

    prefix: str
    suffix: str = ""
    path: str | None = None
    files: Sequence[File] = ()
    mode: Mode = "auto"
    trim: Trim = "none"
    min_indent: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f'mode must be "auto", "psm", "spm" or "prefix", got {self.mode!r}')
        if self.trim not in TRIMS:
            raise ValueError(f'trim must be "none", "line" or "block", got {self.trim!r}')


@dataclass(frozen=True)
class TextPrompt:
    """Text, or token ids, to continue.

    `raw` reads control tokens spelled in the text; `truncate` drops the oldest tokens of a prompt that is too
    long; `score` asks for the log-probability of each token of the prompt (the server computes it).
    """

    prompt: str | Sequence[int]
    raw: bool = False
    truncate: bool = False
    score: bool = False


@dataclass(frozen=True)
class Chat:
    """A conversation, whose next turn is the model's."""

    messages: Sequence[Message]


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. The engine takes a Request whose prompt is token ids; `resolve` makes it so.

    `max_tokens` 0 only reads the prompt into the cache. `stop_ids` end the answer and give no text; `stop`
    are texts that end it and are cut off. `adapter` is "auto" (the model's completing adapter for an Infill,
    otherwise the base), "none" (the base) or the name of one that was added. A newer Infill of the same
    `client` and `session` replaces an older one in the server. `prompt_seconds`, the time until the first
    token, limits how much of an Infill's text is read; the answer ends `predict_seconds` after the first
    token if it has a complete line.
    """

    prompt: Infill | TextPrompt | Chat | Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    stop: Sequence[str] = ()
    top_logprobs: int = 0  # how many of the likeliest tokens each Step tells
    speculate: bool = True
    adapter: str = "auto"
    client: str = ""
    session: str | None = None
    prompt_seconds: float | None = None
    predict_seconds: float | None = None
    layout: Layout | None = None  # set by `resolve` for an Infill: the order that its prompt is written in

    def __post_init__(self) -> None:
        for name, seconds in (
            ("time budget", self.prompt_seconds),
            ("t_max_predict_ms", self.predict_seconds),
        ):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"the {name} must be above 0 seconds, got {seconds:g}")
        if self.max_tokens < 0 or self.top_logprobs < 0:
            raise ValueError(
                f"max_tokens and top must be at least 0, got {self.max_tokens} and {self.top_logprobs}"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")
        if not isinstance(self.adapter, str) or not self.adapter:
            raise ValueError(
                f'adapter must be "auto", "none" (the base) or the name of an adapter, got {self.adapter!r}'
            )

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt of a resolved request."""
        assert not isinstance(self.prompt, Infill | TextPrompt | Chat)
        return self.prompt

    @property
    def is_score(self) -> bool:
        """Whether the log-probabilities of the prompt are wanted."""
        return isinstance(self.prompt, TextPrompt) and self.prompt.score
