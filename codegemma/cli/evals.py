"""The verbs of `codegemma eval`: card, run, compare, list and doctor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from codegemma.cli.output import Progress
from codegemma.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from codegemma.evals.task import EvaluatedModel

LIBRARIES = ("huggingface_hub", "jinja2", "math_verify", "pyarrow")


@dataclass(frozen=True)
class RunOptions:
    """What answers the benchmarks, how, and where the results go."""

    model: str = DEFAULT_MODEL
    endpoint: str | None = None
    adapter: str | None = None
    limit: int | None = None
    samples: int = 1
    temp: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    data: Path | None = None
    out: Path = Path("eval")
    resume: bool = False


def card(run: RunOptions) -> None:
    """Run every benchmark of the model card; those whose data is missing are named and left out."""
    from codegemma.evals.run import CARD
    from codegemma.extras import require

    for library in LIBRARIES:
        require(library, "the benchmarks of the card", "eval")
    _run(CARD, run, skip=True)


def run_benchmarks(benchmarks: list[str], run: RunOptions) -> None:
    """Run benchmarks by name."""
    _run(benchmarks, run, skip=False)


def compare(before: Path, after: Path) -> None:
    """Show the paired difference AFTER - BEFORE, its interval and p-value, and the items gained and lost."""
    from codegemma.evals.report import compare_runs, comparison_text

    for name, comparison in compare_runs(before, after).items():
        print(comparison_text(name, comparison))


def list_benchmarks() -> None:
    """The names of all benchmarks."""
    from codegemma.evals.run import TASKS

    for name, task in TASKS.items():
        print(f"{name:28} {task.title}")


def doctor() -> None:
    """Test the sandbox with planted attacks, and each language with a correct and a wrong program."""
    from codegemma.evals.doctor import languages, self_test
    from codegemma.sandbox import Sandbox, SandboxError

    ready = True
    try:
        with Sandbox() as sandbox:
            for name, passed, message in self_test(sandbox):
                ready &= passed
                print(f"{'ok     ' if passed else 'BROKEN '} {name}" + ("" if passed else f": {message}"))
    except SandboxError as error:
        print(f"BROKEN  sandbox: {error}")
        raise typer.Exit(1) from error
    for key, works, message in languages():
        ready &= works or key != "python"
        print(f"{'ready   ' if works else 'unusable'} {key}: {message}")
    raise typer.Exit(not ready)


def _run(names: Sequence[str], options: RunOptions, skip: bool) -> None:
    """Runs benchmarks and writes the report. `skip` leaves out those whose data is missing."""
    from codegemma.evals import report
    from codegemma.evals.doctor import require_safe
    from codegemma.evals.local import LocalModel
    from codegemma.evals.records import Records
    from codegemma.evals.run import AS_COMPLETE, TASKS, EvalSettings, run
    from codegemma.sandbox import SandboxError, default

    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"no benchmark is called {', '.join(unknown)}: codegemma eval list names them all")
    tasks = [TASKS[name] for name in names]
    settings = EvalSettings(options.limit, options.samples, options.temp, options.top_p, options.seed)
    records = Records(options.data)
    try:
        if any(task.group not in ("language", "maths") for task in tasks):
            require_safe(default())
        model = open_model(options.model, options.endpoint, options.adapter)
        for name, task in zip(names, tasks, strict=True):
            asked = model
            if options.adapter is None and name in AS_COMPLETE and isinstance(model, LocalModel):
                asked = model.completing()
            try:
                with Progress() as bar:
                    run(task, asked, records, options.out, settings, resume=options.resume, progress=bar)
            except LookupError as error:
                if not skip:
                    raise ValueError(str(error)) from error
                print(f"left out {name}: {error}", file=sys.stderr)
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(report.markdown(report.load(options.out)))
    print(f"report: {report.write(options.out)}", file=sys.stderr)


def open_model(model: str, endpoint: str | None, adapter: str | None) -> EvaluatedModel:
    """The local model, or the server at `endpoint` with that model's tokenizer; with an adapter applied."""
    from codegemma import load

    loaded = load(model)
    if endpoint is not None:
        from codegemma.evals.remote import RemoteModel

        return RemoteModel(endpoint, loaded.tokenizer, adapter or "")  # servers list adapters as models
    from codegemma.evals.local import LocalModel

    return LocalModel(loaded, loaded.adapter_at(adapter) if adapter else "none")
