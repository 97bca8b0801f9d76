"""The verbs `complete` and `generate`, and how an answer is shown while it is generated."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument

from codegemma.cli.options import ModelOptions, Positive, SamplingOptions
from codegemma.cli.output import note, notes, status
from codegemma.config import Mode, Trim
from codegemma.files import decode_text, explain

if TYPE_CHECKING:
    from codegemma.generate.engine import Completion
    from codegemma.generate.model import Model
    from codegemma.generate.request import Request
    from codegemma.generate.running import Step
    from codegemma.native import Cancel


QUIET_SECONDS = 1.0  # how long a prompt is read before its progress is shown


@dataclass(frozen=True)
class AnswerOptions(ModelOptions, SamplingOptions):
    """How to answer one prompt, and how to show the answer."""

    stop: list[str] | None = None
    cache: Path | None = None
    strict: bool = False
    as_json: bool = False


def complete(
    answer: AnswerOptions,
    file: Annotated[str | None, Argument()] = None,
    at: str | None = None,
    cursor_mark: str = "<CURSOR>",
    prefix_file: Path | None = None,
    suffix_file: Path | None = None,
    context: list[Path] | None = None,
    path: str | None = None,
    mode: Mode = "auto",
    trim: Trim = "auto",
    time_budget: float = 3000,
    max_tokens: Positive = 128,
    adapter: str = "auto",
) -> None:
    """Fill the hole at a cursor."""
    from codegemma.generate.request import Infill, Request
    from codegemma.generate.resolve import layout_for
    from codegemma.prompts import File

    prefix, suffix = _hole(file, at, cursor_mark, prefix_file, suffix_file)
    files = [File(str(other), _read(other)) for other in context or ()]
    path = path or (file if files and file != "-" else None)
    seconds = time_budget / 1000 or None
    prompt = Infill(prefix, suffix, path, files, mode, trim)
    request = Request(prompt, max_tokens, answer.sampling(), stop=answer.stop or (), prompt_seconds=seconds)
    model = answer.load(answer.cache, answer.strict)
    request = replace(request, adapter=model.adapter_at(adapter))
    orders = model.fim_orders(request.adapter)
    if not orders and not answer.strict:
        consequence = (
            "it continues the prefix, and what repeats the suffix is dropped"
            if mode in ("auto", "prefix")
            else f"expect little of --mode {mode}"
        )
        note(f"{model.title} was not trained to fill in the middle: {consequence}")
    _answer(model, request, answer, layout=layout_for(mode, orders))


def generate(
    answer: AnswerOptions,
    file: str | None = None,
    prompt: str | None = None,
    raw: bool = False,
    truncate: Literal["left"] | None = None,
    log_disable: bool = False,
    max_tokens: Positive = 256,
    adapter: str = "none",
) -> None:
    """Echo a prompt and continue it."""
    from codegemma.generate.request import Request, TextPrompt

    if file is not None and prompt is not None:
        raise ValueError("-f and -p both name the prompt: pass one of them")
    if prompt is None:
        prompt = _input(file, "-p TEXT, -f FILE").removesuffix("\n").removesuffix("\r")
    text_prompt = TextPrompt(prompt, raw, truncate is not None)
    request = Request(text_prompt, max_tokens, answer.sampling(), stop=answer.stop or ())
    model = answer.load(answer.cache, answer.strict)
    model.expect("generation")
    _answer(model, replace(request, adapter=model.adapter_at(adapter)), answer, echo=prompt)


# -------------------------------------------------------------------------------- text and cursor
def _hole(
    file: str | None, at: str | None, mark: str, prefix_file: Path | None, suffix_file: Path | None
) -> tuple[str, str]:
    """Text before and after the cursor."""
    if prefix_file or suffix_file:
        if file is not None or at is not None:
            raise ValueError(
                "the text comes from FILE or from --prefix-file and --suffix-file: pass one or the other"
            )
        return _read(prefix_file) if prefix_file else "", _read(suffix_file) if suffix_file else ""
    text, name = _input(file, "a FILE, --prefix-file"), "stdin" if file in (None, "-") else str(file)
    return split_at(text, at, name) if at is not None else split_mark(text, mark, name)


def split_at(text: str, at: str, name: str) -> tuple[str, str]:
    """`text` before and after the cursor at "LINE:COL", both from 1, in characters; \\r\\n ends a line."""
    numbers = at.split(":")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(
            f"--at must be LINE:COL, two whole numbers from 1, got {at!r}: the start of a file is 1:1"
        )
    line, column = map(int, numbers)
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise ValueError(f"--at {at}: {name} has lines 1 to {len(lines)}")
    width = len(lines[line - 1].removesuffix("\r") if line < len(lines) else lines[line - 1])
    if not 1 <= column <= width + 1:
        raise ValueError(
            f"--at {at}: line {line} of {name} has columns 1 to {width + 1} (the last is its end)"
        )
    cursor = sum(len(earlier) + 1 for earlier in lines[: line - 1]) + column - 1
    return text[:cursor], text[cursor:]


def split_mark(text: str, mark: str, name: str) -> tuple[str, str]:
    """`text` before and after `mark`, which must occur exactly once."""
    count = text.count(mark) if mark else 0
    if count != 1:
        raise ValueError(
            f"{name} has the cursor mark {mark!r} {count} times, but needs one: pass --at LINE:COL, "
            "or another --cursor-mark"
        )
    prefix, _, suffix = text.partition(mark)
    return prefix, suffix


def _input(file: str | None, options: str) -> str:
    """The text of a file, or of stdin where `file` is None or "-". `options` are for the error message."""
    if file not in (None, "-"):
        return _read(Path(file))
    if sys.stdin is None or (sys.stdin.isatty() and file is None):
        raise ValueError(f"no text to work on: pass {options}, or pipe the text in")
    return decode_text(sys.stdin.buffer.read(), "stdin")


def _read(file: Path) -> str:
    return decode_text(file.read_bytes(), str(file))


# -------------------------------------------------------------------------------- the answer
def interruptible(completion: Completion, cancel: Cancel) -> Generator[Step]:
    """Yields the steps of a completion. A thread computes them: so Ctrl-C acts at once, even in a kernel.

    While a long prompt is read, a terminal shows the progress. Once the iterator has ended or was
    closed, the computation has stopped.
    """
    steps: queue.SimpleQueue[Step | Exception | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for step in completion:
                steps.put(step)
            steps.put(None)
        except Exception as error:
            steps.put(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        step = _first(completion, steps)
        while step is not None:
            if isinstance(step, Exception):
                raise step
            yield step
            step = steps.get()
    finally:
        cancel.set()
        worker.join()


def _first(
    completion: Completion, steps: queue.SimpleQueue[Step | Exception | None]
) -> Step | Exception | None:
    """Waits for the first step, and shows how much of the prompt is read meanwhile."""
    running, started, shown = completion.running, time.monotonic(), ""
    while True:
        try:
            step = steps.get(timeout=0.25)
        except queue.Empty:
            seconds, read = time.monotonic() - started, running.done - running.cached
            if seconds < QUIET_SECONDS:
                continue
            remaining = (running.prompt_length - running.done) * seconds / read if read > 0 else 0
            text = f"reading {running.done:,} of {running.prompt_length:,} tokens"
            text += f", {remaining:,.0f} s left" if remaining else ""
            if text != shown:
                status(text)
                shown = text
        else:
            if shown:
                status("")
            return step


def _answer(
    model: Model,
    request: Request,
    options: AnswerOptions,
    echo: str = "",
    **facts: str,
) -> None:
    """Prints `echo` and the answer as it comes, or one JSON object with its figures and `facts`.

    A note says if text was left out of the prompt.
    """
    from codegemma.native import Cancel

    started, first_step, cancel = time.perf_counter(), 0.0, Cancel()
    completion = model.run(request, cancel)
    if left_out := completion.running.request.left_out:
        tokens = completion.prompt_tokens
        read = f"read the {tokens:,} of {tokens + left_out:,} tokens nearest to the cursor"
        longer = "; --time-budget 0 reads what the model can" if request.prompt_seconds else ""
        note(f"{read}{longer}")

    def show(text: str) -> None:
        if not options.as_json:
            print(text, end="", flush=True)

    with closing(interruptible(completion, cancel)) as steps:
        for step in steps:
            if not first_step:
                first_step = time.perf_counter()
                show(echo)
            show(step.text)
    ended = time.perf_counter()
    if options.as_json:
        tokens = len(completion.ids)
        first_step = first_step or ended
        answer = {
            "text": completion.text,
            "stop": completion.stop or "length",
            "confidence": round(completion.confidence, 4),
            "tokens": tokens,
            "prompt_tokens": completion.prompt_tokens,
            "cached_tokens": completion.cached_tokens,
            "time_to_first_token_ms": round(1000 * (first_step - started), 3),
            "tokens_per_second": round((tokens - 1) / (ended - first_step), 3) if tokens > 1 else None,
            "model": str(model.path),
            **facts,
            "adapter": None if request.adapter == "none" else request.adapter,
            "notice": "; ".join(notes) or None,
        }
        print(json.dumps(answer))
    elif sys.stdout.isatty() and not (echo + completion.text).endswith("\n"):
        print()
    if options.cache is not None:
        try:
            model.engine.cache.save(options.cache)
        except OSError as error:  # the answer is good without it
            note(f"the prompt cache is not saved: {explain(error)}")
