"""Chat and instruction data -> training rows: Gemma's turns, loss on the answers alone.

`read` reads chat messages, instruction pairs and NeMo's pairs, one JSON object per line; `rows` packs them.
Only in its rows does instruction tuning differ from continued pretraining.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegemma import prompts
from codegemma.data.pack import fit, places, positions
from codegemma.prompts import Message
from codegemma.tokenizer import Tokenizer

PAIRS = (("input", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
FORMS = "a line needs messages of role and content, or instruction and output, or input and output"
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}


def read(path: Path) -> Iterator[list[Message]]:
    """The dialogues of a JSON-lines file.

    A line is {"messages": [{"role", "content"}, ...]} (or "conversations" with "from" and "value"),
    {"instruction", "input", "output"}, or a pair such as NeMo's {"input", "output"}. Raises ValueError naming
    the line and what it lacks.
    """
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            try:
                yield messages(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}: {FORMS}") from None
    if empty:
        raise ValueError(
            f"{path}: is empty, but needs one JSON object a line: check that it is the right file"
        )


def messages(line: Mapping[str, Any]) -> list[Message]:
    """The dialogue of one object of the file. Raises ValueError where it does not end with an answer."""
    if turns := line.get("messages") or line.get("conversations"):
        roles = [_text(turn.get("role") or turn.get("from")).lower() for turn in turns]
        texts = [_text(turn.get("content", turn.get("value"))) for turn in turns]
        dialogue = [Message(ROLES.get(role, role), text) for role, text in zip(roles, texts, strict=True)]  # type: ignore[arg-type]
    elif "instruction" in line:
        context = _text(line.get("input") or "")
        question = _text(line["instruction"]) + (f"\n\n{context}" if context else "")
        answer = _text(line.get("output", line.get("response")))
        dialogue = [Message("user", question), Message("assistant", answer)]
    else:
        pair = next((pair for pair in PAIRS if all(name in line for name in pair)), None)
        if pair is None:
            raise ValueError(f"it has the fields {', '.join(map(repr, line)) or 'none'}")
        dialogue = [Message("user", _text(line[pair[0]])), Message("assistant", _text(line[pair[1]]))]
    if line.get("system") and dialogue[0].role != "system":
        dialogue.insert(0, Message("system", _text(line["system"])))
    if dialogue[-1].role != "assistant":
        raise ValueError("the last message must be the assistant's, because training is on its answers")
    prompts.chat_turns(dialogue, reply=False)
    return dialogue


def _text(value: Any) -> str:
    """A text that is given as a string, or as OpenAI's list of parts."""
    parts = value if isinstance(value, list) and all(isinstance(part, dict) for part in value) else []
    if parts and all(part.get("type") == "text" for part in parts):
        return "".join(_text(part.get("text")) for part in parts)
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, got {value!r}")
    value.encode()  # raises for a lone surrogate, which no tokens can encode
    return value


def rows(
    dialogues: Iterable[Sequence[Message]], tokenizer: Tokenizer, length: int
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Rows of `length` tokens, as data.pack.Rows gives them, and how many dialogues were left out.

    Each dialogue is a segment. It is left out where it is too long for a row or has an empty answer. Raises
    ValueError where all are left out.
    """
    chats = [prompts.chat(tokenizer, dialogue, reply=False) for dialogue in dialogues]
    fitting = [prompt for prompt in chats if len(prompt.ids) <= length and _is_answered(prompt)]
    if not fitting:
        fault = f"none of {len(chats):,} dialogues fits a row of {length:,} tokens and has answers"
        raise ValueError(f"{fault}: raise --length")
    sizes = [len(prompt.ids) for prompt in fitting]
    packed = fit(sizes, length)
    shape = (len(packed), length)
    tokens_RT, loss_RT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segments_RT = np.zeros(shape, np.uint16)
    for row, segment, item, place in places(packed, sizes):
        tokens_RT[row, place], segments_RT[row, place] = fitting[item].ids, segment
        loss_RT[row, place] = [label == "reply" for label in fitting[item].labels]
    arrays = zip(tokens_RT, loss_RT, segments_RT, map(positions, segments_RT), strict=True)
    names = ("tokens", "loss", "segments", "positions")
    return [dict(zip(names, row, strict=True)) for row in arrays], len(chats) - len(fitting)


def _is_answered(prompt: prompts.Prompt) -> bool:
    """Whether each answer has a token besides its terminator."""
    return all(len(ids) > 1 for label, ids in prompt.segments if label == "reply")
