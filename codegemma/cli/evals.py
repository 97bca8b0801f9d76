"""`codegemma eval`: the verbs over this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from codegemma.evals.task import Model


class _BenchmarksToo(TyperGroup):
    """`eval humaneval mbpp` is `eval run humaneval mbpp`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from codegemma.evals.run import TASKS

        return super().parse_args(ctx, ["run", *args] if args and args[0] in TASKS else args)


app = typer.Typer(
    help="Measure a model on the benchmarks of the model card.", no_args_is_help=True, cls=_BenchmarksToo
)
console = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A preset, a Hub repository or a local model.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        help="URL of an OpenAI-compatible server that answers instead; "
        "--model then names whose tokenizer it has."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Adapter to put on: a path, auto for the one that the package has, or the "
        "name that an --endpoint knows; without it, the base."
    ),
]
Limit = Annotated[
    int | None, typer.Option(help="Score only this many items of each set, always the same ones.")
]
Samples = Annotated[int, typer.Option(help="Answers per item, for pass@k.")]
Temperature = Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus of the sampling.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder with the benchmarks' official files; without it, the Hugging Face Hub."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for samples, scores and the report.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]


@app.command()
def card(
    model: ModelOption = "gemma-3-270m",
    endpoint: Endpoint = None,
    adapter: Adapter = None,
    limit: Limit = None,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    data: DataDir = None,
    out: Out = Path("eval"),
    resume: Resume = False,
) -> None:
    """Run every benchmark of the model card; those that this machine cannot run are named and left out."""
    from codegemma.evals.run import CARD

    _run(
        CARD, model, endpoint, adapter, limit, samples, temperature, top_p, seed, data, out, resume, skip=True
    )


@app.command("run")
def run_named(
    benchmarks: Annotated[list[str], typer.Argument(help="humaneval, infill-single, babelcode-rust ...")],
    model: ModelOption = "gemma-3-270m",
    endpoint: Endpoint = None,
    adapter: Adapter = None,
    limit: Limit = None,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    data: DataDir = None,
    out: Out = Path("eval"),
    resume: Resume = False,
) -> None:
    """Run benchmarks by name."""
    _run(
        benchmarks,
        model,
        endpoint,
        adapter,
        limit,
        samples,
        temperature,
        top_p,
        seed,
        data,
        out,
        resume,
        skip=False,
    )


@app.command("compare")
def compare_folders(
    before: Annotated[Path, typer.Argument(help="Folder of run A.")],
    after: Annotated[Path, typer.Argument(help="Folder of run B.")],
) -> None:
    """Paired difference B - A with its interval and p-value, and the items that changed sides."""
    from codegemma.evals.report import compare_runs, comparison_text

    try:
        for name, found in compare_runs(before, after).items():
            print(comparison_text(name, found))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("list")
def list_benchmarks() -> None:
    """The names of all benchmarks."""
    from codegemma.evals.run import TASKS

    for name, task in TASKS.items():
        print(f"{name:28} {task.title}")


@app.command("doctor")
def check_machine() -> None:
    """Test the sandbox with planted attacks, and each language with programs known right and wrong."""
    from codegemma.evals.doctor import languages, self_test
    from codegemma.sandbox import Sandbox, SandboxError

    ready = True
    try:
        with Sandbox() as sandbox:
            for name, held, said in self_test(sandbox):
                ready &= held
                print(f"{'ok     ' if held else 'BROKEN '} {name}" + ("" if held else f": {said}"))
    except SandboxError as error:
        print(f"BROKEN  sandbox: {error}")
        raise typer.Exit(1) from error
    for key, held, said in languages():
        ready &= held or key != "python"
        print(f"{'ready  ' if held else 'missing'} {key}: {said}")
    raise typer.Exit(not ready)


def _run(
    names: list[str],
    model: str,
    endpoint: str | None,
    adapter: str | None,
    limit: int | None,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
    data: Path | None,
    out: Path,
    resume: bool,
    skip: bool,
) -> None:
    from codegemma.evals.doctor import require
    from codegemma.evals.records import Records
    from codegemma.evals.report import load as finished
    from codegemma.evals.report import markdown, write
    from codegemma.evals.run import TASKS, Settings, run
    from codegemma.sandbox import SandboxError, default

    if unknown := [name for name in names if name not in TASKS]:
        raise typer.BadParameter(
            f"no benchmark is called {', '.join(unknown)}: codegemma eval list names them all"
        )
    try:
        settings = Settings(limit, samples, temperature, top_p, seed)
        records = Records(data)
        if any(TASKS[name].group not in ("language", "maths") for name in names):
            require(default())
        answering = open_model(model, endpoint, adapter)
        for name in names:
            try:
                with _progress(name) as step:
                    run(TASKS[name], answering, records, out, settings, resume=resume, progress=step)
            except LookupError as error:
                if not skip:
                    raise
                console.print(f"[yellow]left out[/] {name}: {error}", highlight=False)
        print(markdown(finished(out)))
        console.print(f"report: {write(out)}")
    except (ValueError, LookupError, SandboxError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


def open_model(model: str, endpoint: str | None, adapter: str | None) -> Model:
    """The local model, or the server at `endpoint` with that model's tokenizer; with an adapter on."""
    from codegemma import load

    loaded = load(model)
    if endpoint is not None:
        from codegemma.evals.remote import Remote

        return Remote(endpoint, loaded.tokenizer, adapter or "")  # a server's adapters are models of its own
    from codegemma.evals.local import Local

    return Local(loaded, loaded.adapter_at(adapter) if adapter else None)


class _progress:
    """A bar with an ETA on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str) -> None:
        self.bar = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.row = self.bar.add_task(name, total=None)

    def __enter__(self) -> _progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        self.bar.update(self.row, completed=done, total=total)
        if not console.is_terminal and (done == total or done % max(total // 10, 1) == 0):
            console.print(f"{name}: {done} of {total}", highlight=False)
