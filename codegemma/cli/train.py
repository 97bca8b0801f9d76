"""`codegemma train` and `codegemma tune`: verbs over this folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="What to train: a preset, a Hub repository or a path.")
]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, metrics.jsonl, loss.svg and the result.")]


def train(
    rows: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of `codegemma data build`, read one after the other; with --chat, JSON-lines files."
        ),
    ],
    model: ModelOption = "gemma-3-270m",
    out: Out = Path("trained"),
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="The sources are chats or instructions (messages, instruction and "
            "output, or NeMo's input and output): learn the answers.",
        ),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all parameters, not an adapter.")] = False,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of a new adapter (default: 32).", min=1)] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Its scale times its rank (default: the rank).")
    ] = None,
    qlora: Annotated[
        bool, typer.Option("--qlora", help="Keep the base in its file's own quantised blocks.")
    ] = False,
    adapter: Annotated[Path | None, typer.Option(help="Go on training this adapter.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate (default: 1e-3 for an adapter, 5e-5 for all).")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 16_384,
    micro_tokens: Annotated[int, typer.Option(help="Tokens computed at once.")] = 2048,
    length: Annotated[int, typer.Option(help="Tokens of a row, for --chat.")] = 2048,
    epochs: Annotated[float, typer.Option(help="How often each folder is read.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising rate.")] = 0.03,
    decay: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="AdamW's, of matrices.")] = 0.0,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Estimate the loss's normaliser from so many tokens, drawn anew each "
            "step (default: all, exactly). For adapters."
        ),
    ] = None,
    z_loss: Annotated[float, typer.Option(help="Weight of the squared log normaliser.")] = 0.0,
    held_out: Annotated[Path | None, typer.Option(help="Rows to measure on; the best is kept.")] = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between measurements.")] = 50,
    patience: Annotated[
        int, typer.Option(help="Measurements without a better one before it stops; 0: never.")
    ] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    remat: Annotated[
        str,
        typer.Option(
            help="What is computed again to save memory: none, products, layer, or auto: layer where "
            "a microbatch would keep more than 3 GB."
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Activations: float32, or bfloat16 on a GPU or TPU.")
    ] = "float32",
    precision: Annotated[
        str,
        typer.Option(
            help="Factors of an adapter's products on a CPU: bfloat16, where it has AVX-512 BF16, or float32."
        ),
    ] = "bfloat16",
    mesh: Annotated[str | None, typer.Option(help="Devices, such as fsdp=8,tensor=4.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0, where several processes train.")
    ] = None,
    process_count: Annotated[
        int | None,
        typer.Option(help="How many processes (default: as many as the cluster's own environment says)."),
    ] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the order of rows and the start of the adapter.", min=0)
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard too.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
) -> None:
    """Train a model on rows: continued pretraining with fill-in-the-middle, or chat."""
    _installed()
    from codegemma.train import job
    from codegemma.train.loop import Settings

    if full and qlora:
        raise ValueError("--full trains all parameters, --qlora an adapter over blocks: pass one of them")
    if lora_rank is not None and (full or adapter):
        raise ValueError(
            "--lora-rank is of a new adapter: leave it out, or " + ("--full" if full else "--adapter")
        )
    if not chat and (file := next((file for file in rows if file.is_file()), None)):
        raise ValueError(
            f"{file} is a file, but rows are folders that `codegemma data build` makes: pass --chat where it holds "
            "dialogues"
        )
    _join(coordinator, process_count, process_id)
    chosen: Any = {"decay": decay, "remat": remat, "dtype": dtype, "precision": precision}
    rate = (5e-5 if full else 1e-3) if learning_rate is None else learning_rate
    settings = Settings(
        rate,
        warmup,
        weight_decay=weight_decay,
        z=z_loss,
        vocabulary=vocabulary,
        micro_tokens=micro_tokens,
        steps=steps,
        evaluate_every=evaluate_every,
        patience=patience,
        save_every=save_every,
        seed=seed,
        **chosen,
    )
    kind: Any = "full" if full else "qlora" if qlora else "lora"
    plan = job.Plan(
        model,
        tuple(map(str, rows)),
        out,
        settings,
        chat=chat,
        kind=kind,
        rank=lora_rank or 32,
        alpha=lora_alpha,
        adapter=adapter,
        batch_tokens=batch_tokens,
        length=length,
        epochs=epochs,
        held_out=held_out,
        mesh=mesh,
        tensorboard=tensorboard,
    )
    made = job.run(plan, resume, follow(job.steps_of(plan)))
    if left := job.left_out(plan):
        typer.echo(
            f"{left:,} dialogues were left out: longer than {length:,} tokens, or with an empty answer",
            err=True,
        )
    typer.echo(f"wrote {made}; loss curve: {out / 'loss.svg'}")


def tune(
    repository: Annotated[Path, typer.Argument(help="A checkout, or any folder of code.")],
    model: ModelOption = "gemma-3-270m",
    minutes: Annotated[float, typer.Option(help="Time for training; measuring comes on top.")] = 30.0,
    out: Annotated[
        Path | None, typer.Option(help="Where the adapter goes (default: NAME-adapter here).")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help="Start from this adapter; auto: the model's own, where it has one; none.")
    ] = "auto",
    lora_rank: Annotated[int, typer.Option(help="Rank of a new adapter.", min=1)] = 16,
    holes: Annotated[int, typer.Option(help="Held-out holes to measure before and after.", min=8)] = 60,
    seed: Annotated[int, typer.Option(help="Decides what is held out, the rows and their order.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Teach a model your code base, and measure the gain on files it never saw."""
    _installed()
    from codegemma.train import tune as tuning

    result = tuning.tune(
        repository, model, minutes, out, adapter, lora_rank, holes, seed, resume, follow, typer.echo
    )
    typer.echo(result.text())


def _installed() -> None:
    from codegemma.files import missing

    for module in ("jax", "optax", "orbax.checkpoint", "pyarrow", "pathspec", "tree_sitter"):
        missing(module, "training jobs", "train")


# Of SLURM, Open MPI and JAX itself: how many processes were started together, where a launcher says so.
PROCESSES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")


def _join(coordinator: str | None, count: int | None, number: int | None) -> None:
    """Makes this process one of several, where an option or a launcher says that there are. Raises ValueError where options
    contradict, or nothing says where the others are."""
    import jax

    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ValueError(f"--coordinator must be HOST:PORT of process 0, got {coordinator!r}")
    if number is not None and (count is None or not 0 <= number < count):
        raise ValueError(
            f"--process-id must lie from 0 to below --process-count, got {number} of {count or 'none'}: pass both"
        )
    launched = max(
        (int(text) for name in PROCESSES if (text := os.environ.get(name, "")).isdigit()), default=1
    )
    if coordinator is not None or count is not None or launched > 1:
        try:
            jax.distributed.initialize(coordinator, count, number)
        except ValueError as error:  # no cluster that JAX knows
            raise ValueError(
                f"cannot join {count or launched} processes ({error}): pass --coordinator HOST:PORT, --process-count "
                "and --process-id"
            ) from None


def follow(total: int) -> Any:
    """What shows the reports of a run: a bar with an ETA on a terminal, a line for each step elsewhere."""
    import sys
    import weakref

    from codegemma.train.loop import Report

    def line(report: Report) -> str:
        more = f", held out {report.held_out:.4f}" if report.held_out is not None else ""
        ends = f", ends {report.ends:.0%}" if report.ends is not None else ""
        return (
            f"step {report.step} of {report.steps}: loss {report.loss:.4f}{more}, right {report.right:.1%}{ends}, "
            f"{report.tokens / report.seconds:,.0f} tokens/s, {report.flops / report.seconds / 1e9:,.0f} GFLOP/s"
        )

    if not sys.stderr.isatty():
        return lambda report: typer.echo(line(report), err=True)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("", total=total)
    bar.start()

    def show(report: Report) -> None:
        bar.update(
            task, completed=report.step, total=report.steps, description=line(report).split(": ", 1)[1]
        )

    weakref.finalize(show, bar.stop)  # however the run ends
    return show


VERBS = (train, tune)
