"""Chat and instruction data -> training rows: Gemma's turns, loss on the answers alone.

`read` reads chat messages, instruction pairs and TRL's and NeMo's forms, one JSON object per line; `rows`
packs them. Only in its rows does instruction tuning differ from continued pretraining.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from codegemma import prompts
from codegemma.data.pack import fit, places, positions
from codegemma.prompts import Message
from codegemma.tokenizer import Tokenizer

# The fields of a question and its answer. Either may be a text or a list of messages; of TRL's preferences
# the chosen answer counts.
PAIRS = (
    *(("instruction", "output"), ("instruction", "response"), ("input", "output"), ("question", "answer")),
    *(("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen")),
)
DIALOGUES = ("messages", "conversations", "conversation", "chosen")
FORMS = "a line needs messages of role and content, or instruction and output, or prompt and completion"
ROLES = prompts.ROLES | {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "user"}
Item = TypeVar("Item")


@dataclass
class DialogueFile:
    """The dialogues of a file, and how many lines were left out for each reason."""

    dialogues: list[list[Message]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read(path: Path) -> DialogueFile:
    """The dialogues of a JSON-lines file, or of a file that is one JSON list.

    A line is {"messages": [{"role", "content"}, ...]} (or "conversations" with "from" and "value"),
    {"instruction", "input", "output"}, or a pair such as {"prompt", "completion"}, of texts or of messages.
    Small faults are repaired: messages after the last answer are dropped, and lone surrogates become U+FFFD.
    Other faulty lines are left out and counted. Raises ValueError, with the first fault, where no dialogue is
    left.
    """
    return DialogueFile(*parsed(path, messages, "dialogue", FORMS))


def parsed(
    path: Path, parse: Callable[[Any], Item], kind: str, forms: str
) -> tuple[list[Item], Counter[str]]:
    """(what `parse` makes of each line, how many lines were left out for each reason).

    Raises ValueError, which says that no line is of this `kind` and which `forms` there are, where no line is
    left.
    """
    items: list[Item] = []
    left_out, first = Counter[str](), ""
    for number, line in _lines(path):
        try:
            items.append(parse(json.loads(line) if isinstance(line, bytes) else line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = str(error) if isinstance(error, BadLine) else "no JSON object of a known form"
            first = first or f"line {number}: {error}"
            left_out[reason] += 1
    if left_out and not items:
        raise ValueError(f"{path}: none of {left_out.total():,} lines is a {kind}; {first}: {forms}")
    if not items:
        raise ValueError(
            f"{path}: is empty, but needs one JSON object a line: check that it is the right file"
        )
    return items, left_out


class BadLine(ValueError):
    """A line of a known form that holds nothing to learn from; lines are counted by this error's message."""


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, line) of each line with content, or of each item where the file is one JSON list."""
    with open(path, "rb") as file:
        if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            file.seek(0)
            try:
                yield from enumerate(json.load(file), 1)
                return
            except (ValueError, RecursionError):
                pass  # not one list, but lines
        file.seek(0)
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def messages(line: Mapping[str, Any]) -> list[Message]:
    """The dialogue of one object of the file. Raises ValueError where it holds none."""
    name = next((name for name in DIALOGUES if line.get(name) and not isinstance(line[name], str)), "")
    pair = next((pair for pair in PAIRS if all(name in line for name in pair)), None)
    if line.get("label") is False:
        raise BadLine("its label says that the answer is wrong")
    # a pair wins over a list of messages if it begins with "prompt", or if the only list is "chosen"
    if pair and (name in ("", "chosen") or pair[0] == "prompt"):
        dialogue = [*_turns(line[pair[0]], "user"), *_turns(line[pair[1]], "assistant")]
        if pair[0] == "instruction" and (context := _text(line.get("input") or "")):
            dialogue.insert(1, Message("user", context))
    elif name:
        dialogue = _turns(line[name], "user")
    else:
        raise ValueError(f"it has the fields {', '.join(map(repr, line)) or 'none'}")
    if line.get("system") and dialogue[0].role != "system":
        dialogue.insert(0, Message("system", _text(line["system"])))
    while dialogue and dialogue[-1].role != "assistant":
        dialogue.pop()
    if not dialogue:
        raise BadLine("no answer of the assistant")
    if all(message.role == "assistant" for message in dialogue):
        raise BadLine("no question before the answer")
    return prompts.chat_turns(dialogue, reply=False)


def _turns(value: Any, role: prompts.Role) -> list[Message]:
    """A text as a message of this role, or a list of messages as it is."""
    if not isinstance(value, list) or all(isinstance(part, dict) and "type" in part for part in value):
        return [Message(role, _text(value))]
    return [_message(turn) for turn in value]


def _message(turn: Mapping[str, Any]) -> Message:
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadLine("a message of an unknown role")
    if turn.get("weight") == 0:
        raise BadLine("a message of weight 0")
    content = turn.get("content", turn.get("value"))
    if content is None and turn.get("tool_calls"):
        raise BadLine("calls of tools")
    return Message(ROLES[role.lower()], _text(content))


def _text(value: Any) -> str:
    """A text that is given as a string, or as OpenAI's list of parts."""
    parts = value if isinstance(value, list) and all(isinstance(part, dict) for part in value) else []
    if parts and all(part.get("type") == "text" for part in parts):
        return "".join(_text(part.get("text")) for part in parts)
    if parts:
        raise BadLine("a message with images or other parts that are no text")
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, got {value!r:.60}")
    joined = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates: U+FFFD
    return joined.replace("\r\n", "\n").replace("\r", "\n")


def rows(
    dialogues: Sequence[Sequence[Message]], tokenizer: Tokenizer, length: int
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
    """Whether each answer has a token besides its stop token."""
    return all(len(ids) > 1 for label, ids in prompt.spans if label == "reply")
