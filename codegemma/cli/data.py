"""`codegemma data build | show | report`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Turn repositories into fill-in-the-middle training rows.")


@app.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND=]SOURCE...",
            help="Checkouts, folders of them, tar, zip, wheel, sdist, "
            "Parquet; KIND=PATH for other parts of a mix, such as text=notes.jsonl.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the rows.")],
    tokenizer: Annotated[
        str, typer.Option(help="Model, or tokenizer.model or tokenizer.json.")
    ] = "gemma-3-270m",
    fim_rate: Annotated[
        float, typer.Option(help="Share of code examples that are fill-in-the-middle.")
    ] = 0.8,
    spm_rate: Annotated[float, typer.Option(help="Share of those with the suffix first.")] = 0.5,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 8192,
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    epoch: Annotated[int, typer.Option(help="Other splits of the same documents.")] = 0,
    languages: Annotated[str, typer.Option(help="Languages to keep, by comma (default: all code).")] = "",
    licences: Annotated[
        str,
        typer.Option(
            help="any, permissive, auto (any for checkouts, else permissive), or SPDX ids by comma."
        ),
    ] = "auto",
    mix: Annotated[str, typer.Option(help="Shares of the tokens, such as code=0.8,text=0.2.")] = "",
    loss: Annotated[
        str, typer.Option(help="Parts to learn from, by comma.")
    ] = "middle,prefix,suffix,terminator",
    decontaminate: Annotated[
        list[Path] | None,
        typer.Option(help="Benchmark files (JSON lines); files that hold a problem are dropped."),
    ] = None,
    unsafe_rules: Annotated[
        Path | None, typer.Option(help="Rules of unsafe content in place of our own.")
    ] = None,
    window: Annotated[
        str, typer.Option(help="Tokens of an example, such as 64:160 (default: whole files).")
    ] = "",
    stride: Annotated[int, typer.Option(help="Characters of code for one window.")] = 4000,
    suffix_limit: Annotated[int | None, typer.Option(help="Tokens of a window's suffix, at most.")] = None,
    path_rate: Annotated[float, typer.Option(help="Share of the windows that begin with their path.")] = 1.0,
    hold_out: Annotated[float, typer.Option(help="Share of the repositories kept for evaluation.")] = 0.0,
    engine: Annotated[str, typer.Option(help="local, or ray (RAY_ADDRESS names a cluster).")] = "local",
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted build.")] = False,
) -> None:
    """Build training rows from SOURCES."""
    from codegemma.data.build import build as run
    from codegemma.data.stages import Recipe

    with _told():
        names = tuple(sorted(filter(None, licences.split(","))))
        chosen: Any = licences if licences in ("any", "permissive", "auto") else names
        parts: Any = tuple(sorted(filter(None, loss.split(","))))
        runner: Any = engine
        recipe = Recipe(
            fim_rate,
            spm_rate,
            length,
            seed,
            epoch,
            languages=tuple(sorted(filter(None, languages.split(",")))),
            licences=chosen,
            mix=shares(mix),
            loss=parts,
            window=size_range(window),
            stride=stride,
            suffix_limit=suffix_limit,
            path_rate=path_rate,
            hold_out=hold_out,
        )
        with _progress() as progress:
            done = run(
                sources,
                out,
                load_tokenizer(tokenizer),
                recipe,
                benchmarks=decontaminate or (),
                unsafe_rules=unsafe_rules,
                engine=runner,
                workers=workers,
                resume=resume,
                progress=progress,
            )
    reasons = {
        **done.manifests["documents"]["counts"],
        **done.manifests["clean"]["counts"],
        **done.manifests["order"]["counts"],
    }
    typer.echo(
        f"{done.rows:,} rows of {length:,} tokens ({done.manifests['rows']['padding']:.1%} padding) from "
        f"{done.kept:,} of "
        f"{done.documents:,} documents in {done.seconds:,.0f} s: {done.out}"
    )
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        typer.echo(f"  {count:9,}  {reason}")
    typer.echo(f"look: codegemma data show {out}; codegemma data report {out}")


@app.command()
def show(folder: Path, row: Annotated[int, typer.Option(help="Which row.")] = 0) -> None:
    """Show a row: its files, and each split in colours with its reason."""
    from codegemma.data.show import show as run

    with _told():
        run(folder, row)


@app.command()
def report(
    folder: Path,
    out: Annotated[Path | None, typer.Option(help="Where to write (default: report.html in it).")] = None,
) -> None:
    """Write one HTML page with plots, graph pictures and sample rows."""
    from codegemma.data.report import report as run

    with _told():
        typer.echo(run(folder, out))


def shares(text: str) -> tuple[tuple[str, float], ...]:
    """code=0.8,text=0.2 -> pairs, sorted. Raises ValueError."""
    try:
        return tuple(
            sorted(
                (name.strip(), float(share))
                for name, share in (part.split("=") for part in text.split(",") if part)
            )
        )
    except ValueError:
        raise ValueError(f"mix must look like code=0.8,text=0.2, got {text!r}") from None


def size_range(text: str) -> tuple[int, int] | None:
    """64:160 -> (64, 160), "" -> None. Raises ValueError."""
    try:
        fewest, most = map(int, text.split(":")) if text else (0, 0)
    except ValueError:
        raise ValueError(f"window must look like 64:160, got {text!r}") from None
    return (fewest, most) if text else None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, a checkpoint, or a tokenizer file. Raises ValueError."""
    from codegemma import hub
    from codegemma.checkpoints import open_checkpoint
    from codegemma.tokenizer import Tokenizer

    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".json", ".model", ".spm"):
        return (
            Tokenizer.from_json(path)
            if path.suffix == ".json"
            else Tokenizer.from_sentencepiece(path.read_bytes())
        )
    found = open_checkpoint(hub.resolve(name)).tokenizer
    if found is None:
        raise ValueError(
            f"{name} has no tokenizer: pass a tokenizer.model or tokenizer.json with --tokenizer"
        )
    return found


@contextmanager
def _told() -> Iterator[None]:
    """Bad input ends with one line, not with a traceback."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar with an ETA on a terminal, a line per stage elsewhere."""
    if not sys.stderr.isatty():
        yield (
            lambda stage, done, total: (
                typer.echo(f"{stage}: {done} of {total}", err=True) if done == total else None
            )
        )
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            tasks.setdefault(stage, bar.add_task(stage, total=total) if stage not in tasks else None)
            bar.update(tasks[stage], completed=done)

        yield tell
