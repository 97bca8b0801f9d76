"""Turns a verb's function into a command with options; holds the options that several verbs share.

A parameter without a default is an argument. The fields of a parameter that is a dataclass are options too,
after the verb's own: that is how verbs share options, and receive many as one value.
"""

from __future__ import annotations

import inspect
import re
import shutil
import tomllib
from collections import ChainMap
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer
from typer import Argument, Option

from codegemma.config import DEFAULT_MODEL, LoadQuantization

if TYPE_CHECKING:
    from codegemma.generate.model import Model
    from codegemma.generate.sampling import Sampling

HELP = Path(__file__).with_name("help.toml")
FLAGS = {  # of parameters whose flag is not their name
    "model": ("-m", "--model"),
    "threads": ("-t", "--threads"),
    "max_tokens": ("-n", "--max-tokens"),
    "temp": ("--temp", "--temperature"),
    "file": ("-f", "--file"),
    "prompt": ("-p", "--prompt"),
    "as_json": ("--json",),
    "z": ("--z-loss",),
    "alpha": ("--lora-alpha",),
    "even_languages": ("--even-languages/--no-even",),  # on and off, in 40 columns
}
METAVARS: dict[Any, str] = {
    kind: name
    for name, type in (("TEXT", str), ("PATH", Path))
    for kind in (type, type | None, list[type], list[type] | None)  # type: ignore[valid-type]
}
WIDE = 60  # with fewer columns, an option and its text do not share a line
NO_BREAK = "\u2011"  # a hyphen at which no line ends
Positive = Annotated[int, Option(min=1)]
Natural = Annotated[int, Option(min=0)]


class HelpLayout(typer.Context.formatter_class):  # type: ignore[misc, valid-type]
    """Help within the terminal's columns. Lines end only between words, never at a hyphen."""

    def __init__(self, indent: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = min(shutil.get_terminal_size().columns, max_width or 80)
        super().__init__(indent, width or max(columns - 2, 30))

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        """Writes terms and their texts, which begin on lines of their own where there is little room."""
        rows = [(term, text.replace("-", NO_BREAK)) for term, text in rows]
        if self.width < WIDE:
            col_max, rows = col_spacing, [(self._folded(term), text) for term, text in rows]
        super().write_dl(rows, col_max, col_spacing)

    def _folded(self, term: str) -> str:
        """A term with line ends between its alternatives where they do not fit one line."""
        folded, column = "", self.current_indent
        for part in re.findall(r"[^|]+\|?", term):
            if column + len(part) > self.width:
                folded, column = f"{folded}\n{' ' * (self.current_indent + 2)}", self.current_indent + 2
            folded, column = folded + part, column + len(part)
        return folded

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", NO_BREAK))

    def getvalue(self) -> str:
        return super().getvalue().replace(NO_BREAK, "-")


class VerbContext(typer.Context):
    formatter_class = HelpLayout


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how."""

    model: str = DEFAULT_MODEL
    threads: Annotated[int | None, Option(min=1)] = None
    quantize: LoadQuantization | None = None

    def load(self, cache: Path | None = None, strict: bool = False) -> Model:
        """Loads the model. Raises ValueError where `cache` is an existing file that is no prompt cache:
        saving would replace it."""
        from codegemma.generate.cache import expect_cache_file
        from codegemma.generate.model import load

        if cache is not None:
            expect_cache_file(cache)
        return load(self.model, threads=self.threads, quantize=self.quantize, cache=cache, strict=strict)


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose among the likely tokens."""

    temp: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int = 0

    def sampling(self) -> Sampling:
        """The options as a Sampling. Raises ValueError where a value is out of range."""
        from codegemma.generate.sampling import Sampling

        return Sampling(self.temp, self.top_k, self.top_p, self.min_p, self.repeat_penalty, self.seed)


def command(verb: Callable[..., None], path: str) -> Any:
    """The command that calls the function `verb`. `path` is the verb after its group, as in "eval run"."""
    texts = _texts(path)
    groups: dict[str, Any] = {}
    verb_options: list[inspect.Parameter] = []
    shared_options: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        kind = parameter.annotation
        if not is_dataclass(kind):
            verb_options.append(_option(parameter.name, kind, parameter.default, texts))
            continue
        groups[parameter.name] = kind
        hints = get_type_hints(kind, include_extras=True)
        shared_options += [
            _option(field.name, hints[field.name], field.default, texts) for field in fields(kind)
        ]

    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    call.__doc__ = verb.__doc__
    call.__signature__ = inspect.Signature([*verb_options, *shared_options])  # type: ignore[attr-defined]
    call.__annotations__ = {
        parameter.name: parameter.annotation for parameter in (*verb_options, *shared_options)
    }
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    sentence = re.split(r"\.(?:\s|$)", verb.__doc__ or "", maxsplit=1)[0]
    app.command(path.split()[-1], short_help=f"{' '.join(sentence.split())}.")(call)
    verb_command = typer.main.get_command(app)
    verb_command.context_class = VerbContext
    return verb_command


def _texts(path: str) -> ChainMap[str, Any]:
    """The help of a verb's options: from the verb's section, else its group's, else `shared`."""
    table = tomllib.loads(HELP.read_text(encoding="utf-8"))
    sections = [table["shared"]]
    for name in path.split():
        table = table.get(name, {})
        sections.insert(0, table)
    return ChainMap(*sections)


def _option(name: str, kind: Any, default: Any, texts: ChainMap[str, Any]) -> inspect.Parameter:
    """A parameter as Typer reads it. `kind` may be Annotated with an Option or Argument, for its bounds."""
    required = default is inspect.Parameter.empty
    info: Any = Argument() if required else Option()
    if get_origin(kind) is Annotated:
        kind, info = kind.__origin__, copy(kind.__metadata__[0])
    if isinstance(info, type(Option())) and default is not True:  # for True, Typer makes --NAME and --no-NAME
        info.param_decls = FLAGS.get(name, (f"--{name.replace('_', '-')}",))
    info.default = ... if required else default
    text = texts[name]
    metavar = name.upper() if isinstance(info, type(Argument())) else METAVARS.get(kind)
    info.metavar, info.help = text if isinstance(text, list) else (metavar, text)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)
