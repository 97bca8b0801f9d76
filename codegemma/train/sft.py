"""Chat and instruction data -> training rows: Gemma's turns, loss on the answers alone.

`read` takes chat messages, instruction pairs and NeMo's pairs, one JSON object a line; `rows` packs them. Both differ
from continued pretraining in the rows alone.
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

PAIRS = (
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)  # NeMo's first


def read(path: Path) -> Iterator[list[Message]]:
    """The dialogues of a JSON-lines file. A line is {"messages": [{"role", "content"}, ...]} (or "conversations" with
    "from" and "value"), {"instruction", "input", "output"}, or a pair such as NeMo's {"input", "output"}.

    Raises ValueError naming the line and what it lacks.
    """
    found = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            found = True
            try:
                yield messages(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error}: a line needs messages of role and content, or instruction "
                    "and output, or input and output"
                ) from None
    if not found:
        raise ValueError(
            f"{path}: is empty, but needs one JSON object a line: check that it is the right file"
        )


def messages(one: Mapping[str, Any]) -> list[Message]:
    """One object of the file as a dialogue that ends with an answer. Raises ValueError."""
    turns = one.get("messages") or one.get("conversations")
    if turns:
        names = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
        found = [
            (turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))) for turn in turns
        ]
        roles: list[Any] = [names.get(_text(role).lower(), _text(role).lower()) for role, _ in found]
        made = [Message(role, _text(text)) for role, (_, text) in zip(roles, found, strict=True)]
    elif "instruction" in one:
        more = _text(one.get("input") or "")
        asked = _text(one["instruction"]) + (f"\n\n{more}" if more else "")
        made = [Message("user", asked), Message("assistant", _text(one.get("output", one.get("response"))))]
    else:
        pair = next((pair for pair in PAIRS if all(name in one for name in pair)), None)
        if pair is None:
            raise ValueError(f"it has the fields {', '.join(map(repr, one)) or 'none'}")
        made = [Message("user", _text(one[pair[0]])), Message("assistant", _text(one[pair[1]]))]
    if one.get("system") and made[0].role != "system":
        made.insert(0, Message("system", _text(one["system"])))
    if made[-1].role != "assistant":
        raise ValueError("the last message must be the assistant's, which is what is learned")
    prompts.split_system(made, reply=False)
    return made


def _text(value: Any) -> str:
    """A text, whole or in OpenAI's parts."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        return "".join(_text(part.get("text")) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, got {value!r}")
    value.encode()  # raises for a lone surrogate, which no token spells
    return value


def rows(
    dialogues: Iterable[Sequence[Message]], tokenizer: Tokenizer, length: int
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Dialogues packed into rows of `length` tokens, each a segment of its own, and how many were left out: too long to fit
    one, or with an empty answer.

    Rows are as data.pack.Rows gives them. Raises ValueError where none is left.
    """
    made = [prompts.chat(tokenizer, dialogue, reply=False) for dialogue in dialogues]
    fitting = [
        prompt
        for prompt in made
        if len(prompt.ids) <= length
        and all(len(ids) > 1 for label, ids in prompt.segments if label == "reply")
    ]  # 1: its terminator
    if not fitting:
        raise ValueError(
            f"none of {len(made):,} dialogues fits a row of {length:,} tokens and has answers: raise --length"
        )
    sizes = [len(prompt.ids) for prompt in fitting]
    packed = fit(sizes, length)
    tokens_RT, loss_RT, segments_RT = (
        np.zeros((len(packed), length), kind) for kind in (np.int32, bool, np.uint16)
    )
    for row, segment, item, here in places(packed, sizes):
        tokens_RT[row, here], segments_RT[row, here] = fitting[item].ids, segment
        loss_RT[row, here] = [label == "reply" for label in fitting[item].labels]
    found = [
        {"tokens": tokens_T, "loss": loss_T, "segments": segments_T, "positions": positions(segments_T)}
        for tokens_T, loss_T, segments_T in zip(tokens_RT, loss_RT, segments_RT, strict=True)
    ]
    return found, len(made) - len(fitting)
