"""What to generate: a Request, which every caller (Python, command line, server, editor, evaluation) makes.

It is checked when it is made, and passed whole to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import get_args

from codegemma.config import Mode, Trim
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File, Layout, Message


@dataclass(frozen=True)
class Infill:
    """The text around an editor's cursor, the path of its file, and other files as context.

    `trim` says where the answer is cut (see `completion.cut`): "auto" means "line" where a word follows the
    cursor on its line, else "block". The answer also ends before the first line that is indented by fewer
    than `min_indent` blanks. `language` is a name that `data.documents.language_of` gives; if it is empty,
    the path tells the language. With `heal`, the model writes anew the word or indentation that ends at the
    cursor: see `cursor.typed_piece`.
    """

    prefix: str
    suffix: str = ""
    path: str | None = None
    files: Sequence[File] = ()
    mode: Mode = "auto"
    trim: Trim = "auto"
    min_indent: int = 0
    language: str = ""
    heal: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f'mode must be "auto", "psm", "spm" or "prefix", got {self.mode!r}')
        if self.trim not in get_args(Trim):
            raise ValueError(f'trim must be "auto", "none", "line" or "block", got {self.trim!r}')

    @cached_property
    def newline(self) -> str:
        """How lines end: "\\r\\n" if the first line ends so, else "\\n"."""
        text = self.prefix if "\n" in self.prefix else self.suffix
        end = text.find("\n")
        return "\r\n" if end > 0 and text[end - 1] == "\r" else "\n"

    def normalized(self) -> Infill:
        """The same with lines that end in "\\n", as models know them."""
        if "\r" not in self.prefix and "\r" not in self.suffix:
            return self
        prefix, suffix = (text.replace("\r\n", "\n") for text in (self.prefix, self.suffix))
        if prefix.endswith("\r") and suffix.startswith("\n"):  # the cursor is inside of a "\r\n"
            prefix = prefix[:-1]
        return replace(self, prefix=prefix, suffix=suffix)


@dataclass(frozen=True)
class TextPrompt:
    """Text, or token ids, to continue.

    `raw`: control tokens spelled in the text become control ids. `truncate`: a prompt that is too long loses
    its oldest tokens. `score`: the log-probability of each prompt token is wanted (the server computes it).
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
    """A prompt and how to answer it. The engine needs token ids as the prompt: `resolve` encodes the others.

    `max_tokens` 0 only reads the prompt into the cache. The answer ends at a token of `stop_ids`, which gives
    no text, or before a text of `stop`. `adapter` is "auto" (the model's completing adapter for an Infill,
    otherwise the base), "none" (the base) or the name of an added adapter. In the server, a newer Infill of
    the same `client` and `session` cancels the older one.

    `prompt_seconds` is the time allowed until the first token; it limits how much of an Infill's text is
    read. `predict_seconds` counts in the server only: so long after its first token, an answer ends as soon
    as it has a complete line. `begin` is text that the answer's tokens must begin with; its first `typed`
    characters stand before the cursor already, and are left out of the answer's text.
    """

    prompt: Infill | TextPrompt | Chat | Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    stop: Sequence[str] = ()
    top_logprobs: int = 0  # how many of the likeliest tokens each Step reports
    speculate: bool = True
    adapter: str = "auto"
    client: str = ""
    session: str | None = None
    prompt_seconds: float | None = None
    predict_seconds: float | None = None
    begin: str = ""  # set by `resolve` for an Infill, as are the fields after it
    typed: int = 0
    layout: Layout | None = None  # order of an Infill's prompt
    left_out: int = 0  # tokens of an Infill's text that its prompt has no room or time for

    def __post_init__(self) -> None:
        limits = {"time budget": self.prompt_seconds, "predict_seconds": self.predict_seconds}
        for name, seconds in limits.items():
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be above 0 seconds and finite, got {seconds:g}")
        if self.max_tokens < 0 or self.top_logprobs < 0:
            counts = f"{self.max_tokens} and {self.top_logprobs}"
            raise ValueError(f"max_tokens and top must be at least 0, got {counts}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of texts, none of them empty, got {self.stop!r:.80}")
        if not isinstance(self.adapter, str) or not self.adapter:
            rule = 'adapter must be "auto", "none" (the base) or the name of an adapter'
            raise ValueError(f"{rule}, got {self.adapter!r:.80}")

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt of a resolved request."""
        assert not isinstance(self.prompt, Infill | TextPrompt | Chat)
        return self.prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the log-probabilities of the prompt are wanted."""
        return isinstance(self.prompt, TextPrompt) and self.prompt.score
