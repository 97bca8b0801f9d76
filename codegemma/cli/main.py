"""The command line: a verb over a function. Modules are imported by the verb that needs them, so that each starts fast.

Users run `codegemma VERB`. Answers go to stdout, everything else to stderr; exit codes: 0, 2 for an error that the
message explains, 130 for Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from codegemma.cli import editor as editor_verbs
from codegemma.cli import train as training
from codegemma.cli.convert import VERBS
from codegemma.serve import run

if TYPE_CHECKING:
    from codegemma.generate.engine import Step
    from codegemma.generate.model import Completion, Model
    from codegemma.generate.sampling import Sampling
    from codegemma.native import Cancel

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="CodeGemma on this machine: completes, generates, chats, and measures itself.",
)

MOUNTED = {
    "data": ("codegemma.cli.data", "data"),
    "eval": ("codegemma.cli.evals", "eval"),
}  # verb: module, extra

Mode = Literal[
    "auto", "psm", "spm", "prefix"
]  # as in completion.py, which takes long to import; a test compares
Trim = Literal["none", "line", "block"]

ModelName = Annotated[
    str | None,
    Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A name (see `codegemma models`), a "
        ".gguf file or a directory; the packaged default model where left out.",
    ),
]
MaxTokens = Annotated[int, Option("-n", "--max-tokens", min=1, help="Tokens to generate at most.")]
Temp = Annotated[float, Option("--temp", "--temperature", help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[int, Option(help="Sample from the K likeliest tokens; 0 is off.")]
TopP = Annotated[float, Option(help="Sample from the likeliest tokens that sum to P; 1 is off.")]
MinP = Annotated[float, Option(help="Leave out tokens below P times the likeliest one; 0 is off.")]
RepeatPenalty = Annotated[
    float, Option(help="Above 1 lowers tokens that occurred; 1 is off, as Gemma wants it.")
]
Seed = Annotated[int, Option(help="Same seed, same text.")]
StopTexts = Annotated[
    list[str] | None,
    Option("--stop", metavar="TEXT", help="A text that ends the answer and is cut off. Repeatable."),
]
Threads = Annotated[
    int | None,
    Option(
        "-t",
        "--threads",
        min=1,
        help="The CPUs that this process may use, where left out.",
        show_default=False,
    ),
]
QuantizeTo = Annotated[
    Literal["q8_0", "q4_0"] | None, Option("--quantize", help="Turn float weights into blocks while loading.")
]
CacheFile = Annotated[
    Path | None,
    Option("--cache", metavar="FILE", help="Load the prompt cache from this file, save it afterwards."),
]
AdapterAt = Annotated[
    str,
    Option(
        "--adapter",
        metavar="PATH",
        help="An adapter to put on: PEFT's folder or NeMo's archive; "
        "none is the base, auto the one that the package has for completion.",
    ),
]
Strict = Annotated[
    bool, Option("--strict", help="An error, not a warning, where the model was not made for this.")
]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


@app.command()
def complete(
    file: Annotated[
        str | None,
        Argument(
            metavar="FILE", help="The file with the hole; stdin where left out or -.", show_default=False
        ),
    ] = None,
    at: Annotated[
        str | None,
        Option(
            "--at",
            metavar="LINE:COL",
            help="The cursor: before the COL-th character of the LINE-th line, both from 1.",
        ),
    ] = None,
    cursor_mark: Annotated[
        str, Option(metavar="TEXT", help="Without --at, the cursor is where this stands.")
    ] = "<CURSOR>",
    prefix_file: Annotated[
        Path | None, Option(metavar="FILE", help="Text before the cursor, instead of FILE.")
    ] = None,
    suffix_file: Annotated[
        Path | None, Option(metavar="FILE", help="Text after the cursor, instead of FILE.")
    ] = None,
    context: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="Another file to draw on. Repeatable, the nearest last."),
    ] = None,
    path: Annotated[
        str | None,
        Option(
            metavar="PATH", help="The path that the model is told; FILE where there is --context, else none."
        ),
    ] = None,
    mode: Annotated[
        Mode, Option(help="Order of the prompt; auto is what the model was trained for.")
    ] = "auto",
    trim: Annotated[Trim, Option(help="Keep all, the rest of the line, or the rest of the block.")] = "none",
    time_budget: Annotated[
        float | None,
        Option(
            metavar="MS", help="Shorten the context so that the first token comes within MS milliseconds."
        ),
    ] = None,
    model: ModelName = None,
    max_tokens: MaxTokens = 128,
    temp: Temp = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = 0,
    stop: StopTexts = None,
    threads: Threads = None,
    quantize: QuantizeTo = None,
    adapter: AdapterAt = "auto",
    cache: CacheFile = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Fill the hole at a cursor."""
    from codegemma.generate.completion import layout_for
    from codegemma.prompts import File

    prefix, suffix = _hole(file, at, cursor_mark, prefix_file, suffix_file)
    sampling = _sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    files = [File(str(one), _read(one)) for one in context or ()]
    path = path or (file if files and file != "-" else None)
    loaded = _load(model, threads, quantize, cache, strict)
    used = loaded.adapter_at(adapter)
    orders = loaded.fim_orders(used)
    if not orders and not strict:
        _note(
            f"{_title(loaded)} was not trained to fill in the middle: "
            + (
                "it continues the prefix, and what repeats the suffix is dropped"
                if mode in ("auto", "prefix")
                else f"expect little of --mode {mode}"
            )
        )
    _answer(
        loaded,
        lambda cancel: loaded.complete(
            prefix,
            suffix,
            path,
            files,
            trim=trim,
            mode=mode,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop or (),
            time_budget=None if time_budget is None else time_budget / 1000,
            cancel=cancel,
            adapter=used,
        ),
        as_json,
        cache,
        {"layout": layout_for(mode, bool(orders), "spm" in orders), "adapter": used},
    )


@app.command()
def generate(
    file: Annotated[
        str | None,
        Option(
            "-f",
            "--file",
            metavar="FILE",
            help="The prompt, else stdin; a final newline is dropped, as llama.cpp does.",
        ),
    ] = None,
    prompt: Annotated[str | None, Option("-p", "--prompt", metavar="TEXT", help="The prompt itself.")] = None,
    raw: Annotated[
        bool, Option("--raw", help="Control tokens spelled in the prompt become control tokens.")
    ] = False,
    truncate: Annotated[
        Literal["left"] | None, Option(help="Drop the oldest tokens of too long a prompt.")
    ] = None,
    log_disable: Annotated[bool, Option("--log-disable", help="Accepted: there is no log.")] = False,
    model: ModelName = None,
    max_tokens: MaxTokens = 256,
    temp: Temp = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = 0,
    stop: StopTexts = None,
    threads: Threads = None,
    quantize: QuantizeTo = None,
    adapter: AdapterAt = "none",
    cache: CacheFile = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Echo a prompt and continue it."""
    if file is not None and prompt is not None:
        raise ValueError("-f and -p both name the prompt: pass one of them")
    text = prompt if prompt is not None else _input(file).removesuffix("\n").removesuffix("\r")
    sampling = _sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    loaded = _load(model, threads, quantize, cache, strict)
    used = loaded.adapter_at(adapter)
    _answer(
        loaded,
        lambda cancel: loaded.generate(
            text,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop or (),
            raw=raw,
            cancel=cancel,
            truncate=truncate,
            adapter=used,
        ),
        as_json,
        cache,
        {"adapter": used},
        echo=text,
    )


@app.command()
def chat(
    system: Annotated[
        str, Option(metavar="TEXT", help="Instructions that go before your first message.")
    ] = "",
    model: ModelName = None,
    max_tokens: MaxTokens = 1024,
    temp: Temp = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    quantize: QuantizeTo = None,
    adapter: AdapterAt = "none",
    strict: Strict = False,
) -> None:
    """Talk with an instruction-tuned model.

    /help lists the commands. From a pipe, all lines up to the next command, or the end, are one message.
    """
    from codegemma.cli.terminal import Conversation, messages

    sampling = _sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    loaded = _load(model, threads, quantize, None, strict)
    loaded.expect("chat")
    talk = Conversation(loaded, system, max_tokens, sampling, loaded.adapter_at(adapter))
    for text in messages():
        if not talk.take(text):
            break


@app.command()
def models(as_json: Json = False) -> None:
    """List the family.

    What each member can do, where it is on disk, its size, its licence.
    """
    from codegemma import hub

    found = hub.models()
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": one.preset.name,
                        "title": one.preset.title,
                        "uses": one.preset.uses,
                        "fill_in_the_middle": one.preset.fim,
                        "path": one.path and str(one.path),
                        "bytes": one.size,
                        "packaged": one.packaged,
                        "licence": one.preset.licence,
                        "hub": one.preset.hub,
                    }
                    for one in found
                ],
                indent=1,
            )
        )
        return
    from codegemma.cli.terminal import models_table

    models_table(found)


@app.command()
def bench(
    prompt_tokens: Annotated[int, Option(min=1, help="Tokens of the prompt.")] = 512,
    decode_tokens: Annotated[int, Option(min=1, help="Tokens decoded one by one.")] = 32,
    repeats: Annotated[int, Option(min=1, help="Runs; medians are shown.")] = 3,
    model: ModelName = None,
    threads: Threads = None,
    quantize: QuantizeTo = None,
    adapter: AdapterAt = "none",
    as_json: Json = False,
) -> None:
    """Measure speed, and the share of this machine's limit.

    The limits, memory bandwidth and int8 operations, are measured in the same minutes.
    """
    loaded = _load(model, threads, quantize, None, False)
    used = loaded.adapter_at(adapter)
    found = {
        "model": str(loaded.path),
        "adapter": used,
        **loaded.benchmark(prompt_tokens, decode_tokens, repeats, used),
    }
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{_title(loaded)} ({loaded.path.name}), {found['threads']} threads, {found['simd']}, medians of {repeats}\n"
        f"prefill {found['prefill_tokens_per_second']:8,.1f} tokens/s  {found['prefill_share_of_peak']:5.0%} of "
        f"{found['int8_operations_per_second'] / 1e9:,.0f} GOP/s int8   ({prompt_tokens} tokens; the vocabulary "
        "product for the last one only)\n"
        f"decode  {found['decode_tokens_per_second']:8,.1f} tokens/s  {found['decode_share_of_bandwidth']:5.0%} of "
        f"{found['bandwidth_bytes_per_second'] / 1e9:,.1f} GB/s read   ({decode_tokens} tokens behind them)"
    )


for verb in (*VERBS, *training.VERBS, *run.VERBS, *editor_verbs.VERBS):
    app.command()(verb)

_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def data(context: typer.Context) -> None:
    """Turn repositories into training rows."""
    _mounted("data", context.args)


@app.command("eval", context_settings=_PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Measure a model on the benchmarks of the model card."""
    _mounted("eval", context.args)


def mounted(verb: str) -> typer.Typer:
    """The sub-commands of a verb. Raises ValueError naming the extra that it needs where that is not installed."""
    from importlib import import_module

    module, extra = MOUNTED[verb]
    try:
        found: typer.Typer = import_module(module).app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("codegemma"):
            raise
        raise ValueError(f'codegemma {verb} needs {error.name}: pip install "codegemma[{extra}]"') from error
    found.rich_markup_mode, found.info.context_settings = (
        None,
        app.info.context_settings,
    )  # help in one manner
    return found


def _mounted(verb: str, arguments: list[str]) -> None:
    mounted(verb)(arguments, prog_name=f"codegemma {verb}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The `codegemma` command. Leaves by SystemExit."""
    _notices[:] = []
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _note(str(message))
        try:
            app(arguments, prog_name="codegemma")
        except KeyboardInterrupt:
            sys.exit(130)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            _fail(reason)
        except ValueError as error:
            _fail(str(error))


_notices: list[str] = []  # what stderr has been told, for --json


def _note(text: str) -> None:
    _notices.append(text)
    print(f"note: {text}", file=sys.stderr)


def _fail(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def _load(
    model: str | None, threads: int | None, quantize: str | None, cache: Path | None, strict: bool
) -> Model:
    from codegemma import hub, load

    return load(model or hub.DEFAULT, threads=threads, quantize=quantize, cache=cache, strict=strict)


def _title(model: Model) -> str:
    return model.preset.title if model.preset else model.path.name


def _sampling(
    temp: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, seed: int
) -> Sampling:
    from codegemma.generate.sampling import Sampling

    return Sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)


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
    text, name = _input(file), "stdin" if file in (None, "-") else str(file)
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
    here = lines[line - 1].removesuffix("\r") if line < len(lines) else lines[line - 1]
    if not 1 <= column <= len(here) + 1:
        raise ValueError(
            f"--at {at}: line {line} of {name} has columns 1 to {len(here) + 1} (the last is its end)"
        )
    cursor = sum(len(one) + 1 for one in lines[: line - 1]) + column - 1
    return text[:cursor], text[cursor:]


def split_mark(text: str, mark: str, name: str) -> tuple[str, str]:
    """`text` before and after the one place where `mark` stands."""
    count = text.count(mark) if mark else 0
    if count != 1:
        raise ValueError(
            f"{name} has the cursor mark {mark!r} {count} times, but needs one: pass --at LINE:COL, "
            "or another --cursor-mark"
        )
    prefix, _, suffix = text.partition(mark)
    return prefix, suffix


def _input(file: str | None) -> str:
    if file not in (None, "-"):
        return _read(Path(file))
    if sys.stdin.isatty() and file is None:
        raise ValueError("no text to work on: name a file (see --help), or pipe the text in")
    return _decode(sys.stdin.buffer.read(), "stdin")


def _read(file: Path) -> str:
    return _decode(file.read_bytes(), str(file))


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start:,} is 0x{data[error.start]:02x}): convert it first"
        ) from error


def _answer(
    model: Model,
    ask: Callable[[Cancel], Completion],
    as_json: bool,
    cache: Path | None,
    about: dict[str, str | None] | None = None,
    echo: str = "",
) -> None:
    """Runs a request and shows it: text as it comes, or one JSON object with its figures."""
    from codegemma.cli.terminal import steps_of

    def show(text: str) -> None:
        if text and not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    started, first = time.perf_counter(), None
    answers: list[Completion] = []

    def asked(cancel: Cancel) -> Completion:
        answers.append(ask(cancel))
        return answers[-1]

    taken: list[Step] = []
    show(echo)
    with closing(steps_of(asked)) as steps:
        for step in steps:
            first = first or time.perf_counter()
            taken.append(step)
            show(step.text)
    ended = time.perf_counter()
    text = "".join(step.text for step in taken)
    if as_json:
        tokens = sum(step.token is not None for step in taken)
        first = first or ended
        print(
            json.dumps(
                {
                    "text": text,
                    "stop": taken[-1].stop if taken else "length",
                    "tokens": tokens,
                    "prompt_tokens": answers[0].prompt_tokens,
                    "cached_tokens": answers[0].cached_tokens,
                    "time_to_first_token_ms": round(1000 * (first - started), 3),
                    "tokens_per_second": round((tokens - 1) / (ended - first), 3) if tokens > 1 else None,
                    "model": str(model.path),
                    **(about or {}),
                    "notice": "; ".join(_notices) or None,
                }
            )
        )
    elif sys.stdout.isatty() and not (echo + text).endswith("\n"):
        print()
    if cache is not None:
        model.engine.cache.save(cache)


if __name__ == "__main__":
    main()
