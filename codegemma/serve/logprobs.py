"""OpenAI's lists of log-probabilities: each token's text, value, alternatives, and its offset in the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from codegemma.tokenizer import Tokenizer

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
Logprobs = dict[str, list[Any]]  # LISTS, one entry for each token


def token_text(data: bytes) -> str:
    """A token's bytes in OpenAI's form: text, or bytes:\\xNN where they are not valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """The lists of several parts as one."""
    return {name: [value for part in parts for value in part[name]] for name in LISTS}


class LogprobLists:
    """Makes the entries of one choice's tokens in order; `position` is the length of its text so far.

    A token that begins within a character has that character's offset.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.begin_answer(0)

    def begin_answer(self, position: int) -> None:
        """The tokens from here on are of the answer, which is decoded by itself. It begins at `position`, a
        number below 0 if its first tokens spell again what stands before the cursor."""
        self.position = position
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def entry(
        self,
        token: int,
        logprob: float | None,
        top: Sequence[tuple[int, float]] | None,
        prompt: str = "",
    ) -> Logprobs:
        """The lists with one token. `prompt`: the text of the token's prompt, if it may spell control tokens.
        Of alternatives with the same text, `top_logprobs` has the likeliest."""
        text = self._text_of(token)
        best: dict[str, float] | None = None if top is None else {}
        if best is not None:
            for other, value in [*(top or ()), *([] if logprob is None else [(token, logprob)])]:
                name = self._text_of(other)
                best[name] = max(value, best.get(name, value))
        return dict(
            zip(LISTS, ([text], [logprob], [best], [max(self._advance(token, prompt), 0)]), strict=True)
        )

    def _advance(self, token: int, prompt: str) -> int:
        """The token's offset. Moves `position` past the characters that the token completes."""
        if self._tokenizer.is_control(token):  # has no text, unless the prompt spells it
            spellings = self._tokenizer.piece(token), self._tokenizer.decode([token], control=True)
            offset = self.position
            self.position += max(len(s) if prompt.startswith(s, offset) else 0 for s in spellings)
            return offset
        data, (pending, _) = self._tokenizer.decode_bytes([token]), self._decoder.getstate()
        # Pending bytes that the token does not continue become a character of their own, U+FFFD.
        broken = bool(pending) and len((pending + data[:1]).decode("utf-8", "replace")) > 1
        offset = self.position + broken
        self.position += len(self._decoder.decode(data))
        return offset

    def _text_of(self, token: int) -> str:
        return token_text(self._tokenizer.decode_bytes([token], control=True))
