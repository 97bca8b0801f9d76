"""Bounds on the text of a request: what cannot fit into the context is left out or refused early.

Encoding and redacting a megabyte of text takes seconds, during which the other clients would wait.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.tokenizer import Tokenizer

# Context files in a request. Of a longer list the last are kept, which stand nearest to the cursor.
MAX_FILES = 1024
TOKEN_CHARACTERS = 128  # the most that a token spells, unless the vocabulary has a longer one


def bounded(request: Request, tokenizer: Tokenizer, context: int) -> Request:
    """The request without what lies too far from the cursor, and without context files that cannot fit.

    The window that `generate/resolve.py` chooses lies within what remains. Raises ValueError on any other
    prompt that has more characters than the context has room for.
    """
    prompt = request.prompt
    if isinstance(prompt, Infill):
        if len(prompt.files) > MAX_FILES:
            prompt = replace(prompt, files=tuple(prompt.files[-MAX_FILES:]))
            request = replace(request, prompt=prompt)
        texts = [prompt.prefix, prompt.suffix, prompt.path or "", *(file.text for file in prompt.files)]
    elif isinstance(prompt, Chat):
        texts = [message.text for message in prompt.messages]
    else:
        text = prompt.prompt if isinstance(prompt, TextPrompt) else prompt
        texts = [text] if isinstance(text, str) else []
    length = sum(map(len, texts))
    if length <= context * TOKEN_CHARACTERS:
        return request
    room = max_characters(tokenizer, context)
    if isinstance(prompt, Infill):
        return replace(request, prompt=_cut(prompt, room))
    check_length(length, tokenizer, context)
    return request


def check_length(characters: int, tokenizer: Tokenizer, tokens: int) -> None:
    """Raises ValueError if a text has so many characters that `tokens` tokens cannot spell it."""
    if characters > tokens * TOKEN_CHARACTERS and characters > max_characters(tokenizer, tokens):
        least = tokens * characters // max_characters(tokenizer, tokens)
        raise ValueError(f"the text has at least {least:,} tokens, but {tokens:,} are read: shorten it")


@lru_cache(maxsize=8)
def max_characters(tokenizer: Tokenizer, tokens: int) -> int:
    """The most characters that `tokens` tokens can spell. Reads the whole vocabulary."""
    longest = max(len(tokenizer.piece(token)) for token in range(tokenizer.vocab_size))
    return tokens * max(TOKEN_CHARACTERS, longest)


def _cut(prompt: Infill, room: int) -> Infill:
    """The prompt with `room` characters (or up to an eighth more) before the cursor, `room` after it, and as
    many of the last files as have at most `room` characters together."""
    step = max(room // 8, 1)  # the start moves in steps: it mostly stays the same while somebody types
    start = max(0, (len(prompt.prefix) - room) // step * step)
    files = list(prompt.files)
    for first in reversed(range(len(files))):
        room_left = room - sum(len(file.text) for file in files[first:])
        if room_left < 0:
            files = files[first + 1 :]
            break
    if len(prompt.path or "") > room:
        path = f"the path has {len(prompt.path or ''):,} characters"
        raise ValueError(f"{path}, but at most {room:,} fit into the context: shorten it")
    return replace(prompt, prefix=prompt.prefix[start:], suffix=prompt.suffix[:room], files=tuple(files))
