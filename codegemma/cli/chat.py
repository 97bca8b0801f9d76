"""The verb `chat`: a conversation at a terminal, or from a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from codegemma.cli import interrupt
from codegemma.cli.complete import interruptible
from codegemma.cli.options import ModelOptions, Positive, SamplingOptions
from codegemma.cli.output import note
from codegemma.files import atomic_write, explain

if TYPE_CHECKING:
    from codegemma.generate.model import Model
    from codegemma.generate.request import Request
    from codegemma.prompts import Message

HELP = '''\
/reset        forget the conversation
/system TEXT  instructions that go before your first message; without TEXT, none
/save FILE    write the conversation as JSON
/exit         leave (so does Ctrl-D)
"""           starts and ends a message of several lines
Ctrl-C        stops an answer'''
COMMANDS = ("reset", "system", "save", "help", "exit")
COMMAND = re.compile(rf"/({'|'.join(COMMANDS)})(?:\s+(.*))?", re.DOTALL)
LIKE_A_COMMAND = re.compile(r"/([a-z]+)(\s[^\n]*)?")
# An answer is stopped if it ends with LOOP_REPEATS copies of one text, which has at most MAX_UNIT characters
# and at least MIN_LETTERS different letters.
LOOP_REPEATS, MAX_UNIT, MIN_LETTERS = 6, 200, 3

SAVED_MARK = b'[\n {\n  "role": "'  # a saved conversation begins so: other files are not replaced


def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    system: str = "",
    max_tokens: Positive = 1024,
    adapter: str = "none",
    strict: bool = False,
) -> None:
    """Talk with an instruction-tuned model.

    /help lists the commands. From a pipe, all lines up to the next command, or the end, are one message.
    """
    from codegemma.generate.request import Chat, Request

    request = Request(Chat([]), max_tokens, sampling.sampling())
    loaded = model.load(strict=strict)
    loaded.expect("chat")
    if loaded.preset and "chat" not in loaded.preset.uses:
        note(
            "a base model continues text and answers no questions: to chat, run `codegemma pull 1.1-7b-it` "
            "and pass -m 1.1-7b-it, or any instruction-tuned .gguf; to continue text, `codegemma generate`"
        )
    conversation = Conversation(loaded, system, replace(request, adapter=loaded.adapter_at(adapter)))
    for text in _terminal_input(loaded.title) if sys.stdin.isatty() else _pipe_input():
        if not conversation.handle(text):
            break


class Conversation:
    """The turns so far, and how the next one is answered."""

    def __init__(self, model: Model, system: str, request: Request) -> None:
        """`request` says how each turn is answered; its prompt is replaced by the conversation."""
        self._model, self._system, self._request = model, system, request
        self._turns: list[Message] = []

    def handle(self, text: str) -> bool:
        """Answers a message or carries out a command. Returns False if the user wants to leave."""
        command = COMMAND.fullmatch(text.strip())
        if command is None:
            if unknown := LIKE_A_COMMAND.fullmatch(text.rstrip()):
                remedy = "/help lists the commands; a blank before the / makes it a message"
                print(f"error: no command /{unknown[1]}: {remedy}", file=sys.stderr)
            elif text.strip():
                self._answer(text)
            return True
        name, argument = command.groups()
        if name == "reset":
            self._turns.clear()
        elif name == "system":
            self._system = argument or ""
        elif name == "save":
            self._save(argument)
        elif name == "help":
            print(HELP)
        return name != "exit"

    def _messages(self) -> list[Message]:
        from codegemma.prompts import Message

        return [Message("system", self._system)] * bool(self._system) + self._turns

    def _answer(self, text: str) -> None:
        """Answers a message. An interrupted answer is kept; a message that cannot be answered is not."""
        from codegemma.generate.request import Chat
        from codegemma.native import Cancel
        from codegemma.prompts import Message

        self._turns.append(Message("user", text))
        answer, unit, cancel = "", "", Cancel()
        is_typed = sys.stdin.isatty()
        try:
            completion = self._model.run(replace(self._request, prompt=Chat(self._messages())), cancel)
            ends_answer = interrupt.on_interrupt(cancel.set) if is_typed else nullcontext()
            with ends_answer, closing(interruptible(completion, cancel)) as steps:
                for step in steps:
                    answer += step.text
                    print(step.text, end="", flush=True)
                    if unit := repeated(answer):
                        break
        except KeyboardInterrupt:
            if not is_typed:
                raise
        except ValueError as error:
            self._turns.pop()
            print(f"error: {error}; /reset starts a new conversation", file=sys.stderr)
            return
        print()
        if unit:
            note("stopped, because the answer goes round in a loop")
            answer = answer.removesuffix(unit * (LOOP_REPEATS - 1))
        self._turns.append(Message("assistant", answer))

    def _save(self, file: str | None) -> None:
        if not file:
            print("error: /save needs the name of a file", file=sys.stderr)
            return
        turns = [{"role": message.role, "content": message.text} for message in self._messages()]
        text = json.dumps(turns, indent=1, ensure_ascii=False) + "\n"
        try:
            with atomic_write(Path(file).expanduser(), SAVED_MARK) as out:
                out.write(text.encode())
        except OSError as error:
            print(f"error: {explain(error)}", file=sys.stderr)
        except ValueError as error:  # the file is no saved conversation
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"saved {len(turns)} messages in {file}", file=sys.stderr)


def repeated(text: str) -> str:
    """The unit, such as a line, that a text ends with LOOP_REPEATS copies of; "" if there is none.

    Units without words do not count, since rows of zeros and lines of hyphens are intended.
    """
    for size in range(MIN_LETTERS, min(MAX_UNIT, len(text) // LOOP_REPEATS) + 1):
        unit = text[-size:]
        if text.endswith(unit * LOOP_REPEATS) and len({*filter(str.isalpha, unit)}) >= MIN_LETTERS:
            return unit
    return ""


def _pipe_input() -> Iterator[str]:
    """The messages and commands on stdin: all lines between two commands are one message."""
    lines: list[str] = []
    for line in sys.stdin:
        if COMMAND.fullmatch(line.strip()) or _is_misspelled(line):
            yield "".join(lines)
            yield line
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _is_misspelled(line: str) -> bool:
    """Whether a line is nearly a command. Other lines that begin with / may be text, such as a path."""
    word = LIKE_A_COMMAND.fullmatch(line.rstrip())
    return word is not None and bool(get_close_matches(word[1], COMMANDS))


def _terminal_input(title: str) -> Iterator[str]:
    """The messages and commands typed at a terminal; the arrow keys recall those of earlier sessions."""
    from codegemma.files import cache_dir

    history = cache_dir() / "chat_history"
    with suppress(ImportError):
        import readline

        with suppress(OSError):
            readline.read_history_file(history)
        readline.set_history_length(1000)
    print(f"{title}; /help lists the commands.", file=sys.stderr)
    while True:
        try:
            with interrupt.as_exception():
                text = _typed_message()
            yield text
        except KeyboardInterrupt:
            print()  # Ctrl-C discards the line, as in a shell
        except EOFError:
            print()
            return
        finally:
            with suppress(NameError, OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(history)


def _typed_message() -> str:
    line = input(">>> ")
    if not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")
