"""The verbs of `codegemma data`: build, show and report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
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
    """The fields of data.recipe.BuildRecipe, as they are written on a command line."""

    fim_rate: float = 0.8
    spm_rate: float = 0.5
    length: int = 8192
    seed: int = 0
    epoch: int = 0
    languages: str = ""
    licences: str = "auto"
    mix: str = ""
    loss: str = "middle,prefix,suffix,terminator"
    window: str = ""
    stride: int = 4000
    suffix_limit: int | None = None
    path_rate: float = 1.0
    hold_out: float = 0.0

    def recipe(self) -> BuildRecipe:
        """The recipe of these options. Raises ValueError where a value cannot be read or is out of range."""
        from codegemma.data.recipe import BuildRecipe

        values: dict[str, Any] = vars(self) | {
            "languages": _names(self.languages),
            "mix": _shares(self.mix),
            "loss": _names(self.loss),
            "window": _size_range(self.window),
        }
        if self.licences not in ("any", "permissive", "auto"):
            values["licences"] = _names(self.licences)
        return BuildRecipe(**values)


def build(
    sources: list[str],
    recipe: RecipeOptions,
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

    with Progress() as progress:
        result = builds.build(
            sources,
            out,
            load_tokenizer(tokenizer),
            recipe.recipe(),
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


def _shares(text: str) -> tuple[tuple[str, float], ...]:
    """code=0.8,text=0.2 -> pairs, sorted. Raises ValueError on other forms."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return tuple(sorted((name.strip(), float(share)) for name, share in pairs))
    except ValueError:
        raise ValueError(f"mix must look like code=0.8,text=0.2, got {text!r}") from None


def _size_range(text: str) -> tuple[int, int] | None:
    """64:160 -> (64, 160), "" -> None. Raises ValueError on other forms."""
    if not text:
        return None
    try:
        smallest, largest = map(int, text.split(":"))
    except ValueError:
        raise ValueError(f"window must look like 64:160, got {text!r}") from None
    return smallest, largest
