"""What a person at a terminal sees: answers that Ctrl-C stops, a conversation, the table of models."""

from __future__ import annotations

import json
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from codegemma import hub
from codegemma.native import Cancel
from codegemma.prompts import Message

if TYPE_CHECKING:
    from codegemma.generate.engine import Step
    from codegemma.generate.model import Completion, Model
    from codegemma.generate.sampling import Sampling
    from codegemma.hub.catalogue import ModelInfo

HELP = '''\
/reset        forget the conversation
/system TEXT  instructions that go before your first message; without TEXT, none
/save FILE    write the conversation as JSON
/exit         leave (so does Ctrl-D)
"""           opens a message of several lines, and closes it
Ctrl-C        stops an answer'''
COMMAND = re.compile(r"/(reset|system|save|help|exit)(?:\s+(.*))?", re.DOTALL)


def steps_of(ask: Callable[[Cancel], Completion]) -> Generator[Step]:
    """The Steps of a request, made in a thread: Ctrl-C reaches the caller at once, also while native code runs. When
    the iterator is closed, or ends in any way, the work has stopped."""
    cancel = Cancel()
    made: queue.SimpleQueue[Step | Exception | None] = queue.SimpleQueue()
    completion = ask(cancel)

    def work() -> None:
        try:
            for step in completion:
                made.put(step)
            made.put(None)
        except Exception as error:
            made.put(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        while (step := made.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step
    finally:
        cancel.set()
        worker.join()


class Conversation:
    """A chat: `take` answers a message or obeys a command, and says whether to go on."""

    def __init__(
        self, model: Model, system: str, max_tokens: int, sampling: Sampling, adapter: str | None = None
    ) -> None:
        self._model, self._system, self._max_tokens, self._sampling = model, system, max_tokens, sampling
        self._adapter = adapter
        self._turns: list[Message] = []

    def take(self, text: str) -> bool:
        command = COMMAND.fullmatch(text.strip())
        if command is None:
            if text.strip():
                self._answer(text)
            return True
        verb, rest = command.groups()
        if verb == "reset":
            self._turns.clear()
        elif verb == "system":
            self._system = rest or ""
        elif verb == "save":
            self._save(rest)
        elif verb == "help":
            print(HELP)
        return verb != "exit"

    def _messages(self) -> list[Message]:
        return [Message("system", self._system)] * bool(self._system) + self._turns

    def _answer(self, text: str) -> None:
        """An answer that was stopped stays in the conversation as far as it came; one that failed leaves no trace."""
        self._turns.append(Message("user", text))
        said: list[str] = []
        try:
            with closing(
                steps_of(
                    lambda cancel: self._model.chat(
                        self._messages(),
                        max_tokens=self._max_tokens,
                        sampling=self._sampling,
                        cancel=cancel,
                        adapter=self._adapter,
                    )
                )
            ) as steps:
                for step in steps:
                    said.append(step.text)
                    print(step.text, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        except ValueError as error:
            self._turns.pop()
            print(f"error: {error}; /reset starts anew", file=sys.stderr)
            return
        print()
        self._turns.append(Message("assistant", "".join(said)))

    def _save(self, file: str | None) -> None:
        if not file:
            print("error: /save needs the name of a file", file=sys.stderr)
            return
        turns = [{"role": message.role, "content": message.text} for message in self._messages()]
        try:
            Path(file).expanduser().write_text(
                json.dumps(turns, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            print(f"error: {file}: {error.strerror}", file=sys.stderr)


def messages() -> Iterator[str]:
    """What the user says: typed, with history, or from a pipe."""
    return _typed() if sys.stdin.isatty() else _piped()


def _piped() -> Iterator[str]:
    lines: list[str] = []
    for line in sys.stdin:
        if COMMAND.fullmatch(line.strip()):
            yield "".join(lines)
            yield line
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _typed() -> Iterator[str]:
    history = hub.cache_dir() / "chat_history"
    with suppress(ImportError):
        import readline

        with suppress(OSError):
            readline.read_history_file(history)
        readline.set_history_length(1000)
    print("Gemma is listening; /help lists the commands.", file=sys.stderr)
    while True:
        try:
            yield _message()
        except KeyboardInterrupt:
            print()  # gives the line up, as in a shell
        except EOFError:
            print()
            return
        finally:
            with suppress(NameError, OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(history)


def _message() -> str:
    line = input(">>> ")
    if not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")


def models_table(found: Sequence[ModelInfo]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "made for", "size", "licence", box=None, pad_edge=False)
    for one in found:
        size = f"{one.size / 1e9:.2f} GB" if one.size else "-"
        table.add_row(one.preset.name, ", ".join(one.preset.uses), size, one.preset.licence)
    console = Console(highlight=False, markup=False)
    console.print(table)
    print()
    for one in found:
        if one.path or one.packaged:
            print(f"{one.preset.name} is {f'at {_short(one.path)}' if one.path else 'in its package'}")
    console.print(
        "Another member: `codegemma pull NAME` (its licence is to be accepted on huggingface.co first). Any .gguf file "
        "or directory works with -m."
    )


def _short(path: Path) -> str:
    home = os.path.expanduser("~")
    return "~" + str(path)[len(home) :] if str(path).startswith(home + os.sep) else str(path)
