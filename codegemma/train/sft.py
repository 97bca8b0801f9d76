"""Chat and instruction data -> training rows: Gemma's turns, loss on the answers alone.

`read` takes chat messages, instruction pairs and NeMo's pairs, one JSON object a line; `rows` packs them.
Instruction tuning differs from continued pretraining in its rows alone.
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
    """One object of the file as a dialogue that ends with an answer. Raises ValueError."""
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
        raise ValueError("the last message must be the assistant's, which is what is learned")
    prompts.split_system(dialogue, reply=False)
    return dialogue


def _text(value: Any) -> str:
    """A text, given as one string or in OpenAI's parts."""
    parts = value if isinstance(value, list) and all(isinstance(part, dict) for part in value) else []
    if parts and all(part.get("type") == "text" for part in parts):
        return "".join(_text(part.get("text")) for part in parts)
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, got {value!r}")
    value.encode()  # raises for a lone surrogate, which no token spells
    return value


def rows(
    dialogues: Iterable[Sequence[Message]], tokenizer: Tokenizer, length: int
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Rows of `length` tokens, each dialogue a segment, and how many dialogues were left out.

    A dialogue is left out where it is too long for a row or has an empty answer. Rows are as data.pack.Rows
    gives them. Raises ValueError where no dialogue is left.
    """
    made = [prompts.chat(tokenizer, dialogue, reply=False) for dialogue in dialogues]
    fitting = [prompt for prompt in made if len(prompt.ids) <= length and _answered(prompt)]
    if not fitting:
        fault = f"none of {len(made):,} dialogues fits a row of {length:,} tokens and has answers"
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
    return [dict(zip(names, row, strict=True)) for row in arrays], len(made) - len(fitting)


def _answered(prompt: prompts.Prompt) -> bool:
    """Whether each answer has a token beside its terminator."""
    return all(len(ids) > 1 for label, ids in prompt.segments if label == "reply")
