"""The verbs of `codegemma data`: build, show and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from codegemma.cli.options import Positive
from codegemma.cli.output import Progress
from codegemma.config import DEFAULT_MODEL, DataEngine

if TYPE_CHECKING:
    from codegemma.data.recipe import BuildRecipe
    from codegemma.tokenizer import Tokenizer


@dataclass(frozen=True)
class RecipeOptions:
    """A named recipe, and the fields of data.recipe.BuildRecipe as they are written on a command line.

    A field that is None is the named recipe's.
    """

    recipe: str = "default"
    fim_rate: float | None = None
    spm_rate: float | None = None
    length: int | None = None
    seed: int | None = None
    epoch: int | None = None
    languages: str | None = None
    licences: str | None = None
    mix: str | None = None
    loss: str | None = None
    window: str | None = None
    stride: int | None = None
    suffix_limit: int | None = None
    path_rate: float | None = None
    kinds: str | None = None
    context_rate: float | None = None
    context_tokens: int | None = None
    even_languages: bool | None = None
    hold_out: float | None = None

    def build_recipe(self) -> BuildRecipe:
        """The recipe of these options. Raises ValueError where a value cannot be read or is out of range."""
        from codegemma.data.recipe import named_recipe

        given: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        base = named_recipe(given.pop("recipe"))
        for name, read in _READERS.items():
            if name in given:
                given[name] = read(given[name])
        return replace(base, **given)


def build(
    sources: list[str],
    options: RecipeOptions,
    out: Annotated[Path, Option()],
    tokenizer: str = DEFAULT_MODEL,
    decontaminate: list[Path] | None = None,
    unsafe_rules: Path | None = None,
    engine: DataEngine = "local",
    workers: Positive = 1,
    resume: bool = False,
) -> None:
    """Build training rows from SOURCES."""
    from codegemma.data import build as builds

    recipe = options.build_recipe()
    with Progress() as progress:
        result = builds.build(
            sources,
            out,
            load_tokenizer(tokenizer),
            recipe,
            benchmarks=decontaminate or (),
            unsafe_rules=unsafe_rules,
            engine=engine,
            workers=workers,
            resume=resume,
            progress=progress,
        )
    padding = result.manifests["rows"]["padding"]
    print(
        f"{result.rows:,} rows of {recipe.length:,} tokens ({padding:.1%} padding) from {result.kept:,} of "
        f"{result.documents:,} documents in {result.seconds:,.0f} s: {result.out}"
    )
    reasons: dict[str, int] = {}
    for stage in ("documents", "clean", "order"):
        reasons |= result.manifests[stage]["counts"]
    for reason, count in Counter(reasons).most_common():
        print(f"  {count:9,}  {reason}")
    if not result.rows and not recipe.hold_out:
        raise ValueError(f"{out} has no rows, since no document was kept (the reasons stand above)")
    print(f"look: codegemma data show {out}; codegemma data report {out}")


def show(folder: Path, row: int = 0) -> None:
    """Show a row: its files, and each split in colours with its reason."""
    from codegemma.data import show as shows
    from codegemma.extras import require

    require("pyarrow", "the origins of a row", "data")  # before anything is printed
    shows.show(folder, row)


def report(folder: Path, out: Path | None = None) -> None:
    """Write one HTML page with plots, graph pictures and sample rows."""
    from codegemma.data import report as reports

    print(reports.report(folder, out))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model, a checkpoint, or a tokenizer file. Raises ValueError if it has none."""
    from codegemma import hub
    from codegemma.checkpoints import huggingface_tokenizer, open_checkpoint
    from codegemma.tokenizer import Tokenizer

    path = Path(name).expanduser()
    has_hub_name = path.is_file() and path.name in ("tokenizer.model", "tokenizer.json")
    if has_hub_name and (build := huggingface_tokenizer.builder(path.parent)):  # with its side files
        return build()
    if path.is_file() and path.suffix == ".json":
        return Tokenizer.from_json(path)
    if path.is_file() and path.suffix in (".model", ".spm"):
        return Tokenizer.from_sentencepiece(path.read_bytes())
    tokenizer = open_checkpoint(hub.resolve(name)).tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer: pass a tokenizer.model or tokenizer.json with --tokenizer"
        )
    return tokenizer


def _names(text: str) -> tuple[str, ...]:
    return tuple(sorted(filter(None, text.split(","))))


def _licences(text: str) -> str | tuple[str, ...]:
    return text if text in ("any", "permissive", "auto") else _names(text)


def _mix(text: str) -> tuple[tuple[str, float], ...]:
    return _shares("mix", "code=0.8,text=0.2", text)


def _kinds(text: str) -> tuple[tuple[str, float], ...]:
    return _shares("kinds", "node=0.4,characters=0.6", text)


def _shares(name: str, example: str, text: str) -> tuple[tuple[str, float], ...]:
    """code=0.8,text=0.2 -> pairs, sorted. Raises ValueError on other forms."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return tuple(sorted((key.strip(), float(share)) for key, share in pairs))
    except ValueError:
        raise ValueError(f"{name} must look like {example}, got {text!r}") from None


def _size_range(text: str) -> tuple[int, int] | None:
    """64:160 -> (64, 160), "" -> None. Raises ValueError on other forms."""
    if not text:
        return None
    try:
        smallest, largest = map(int, text.split(":"))
    except ValueError:
        raise ValueError(f"window must look like 64:160, got {text!r}") from None
    return smallest, largest


_READERS: dict[str, Callable[[str], Any]] = {  # of the options that are texts on the command line
    "languages": _names,
    "licences": _licences,
    "mix": _mix,
    "loss": _names,
    "window": _size_range,
    "kinds": _kinds,
}
