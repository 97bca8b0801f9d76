"""The verbs `train` and `tune`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from codegemma.cli import interrupt
from codegemma.cli.options import Natural, Positive
from codegemma.cli.output import Progress, note
from codegemma.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from codegemma.train.session import StepReport

OnStep = Callable[["StepReport"], None]

# Where SLURM, Open MPI and JAX's own launcher state how many processes they started together.
PROCESS_COUNT_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
LIBRARIES = ("jax", "optax", "orbax.checkpoint", "matplotlib", "pyarrow", "identify", "tree_sitter")


@dataclass(frozen=True)
class SettingsOptions:
    """Fields of train.settings.TrainingSettings."""

    learning_rate: float | None = None
    micro_tokens: int = 2048
    steps: int | None = None
    warmup: float = 0.03
    decay: str = "cosine"
    weight_decay: float = 0.0
    vocabulary: int | None = None
    z: float = 0.0
    horizon: float = 0.0
    beta: float = 0.1
    likelihood: float = 0.0
    evaluate_every: int = 50
    patience: int = 0
    save_every: int = 20
    keep: int = 2
    average: int = 1
    remat: str = "auto"
    dtype: str = "float32"
    precision: str = "bfloat16"
    seed: Natural = 0


@dataclass(frozen=True)
class PlanOptions:
    """Fields of train.job.TrainingPlan."""

    out: Path = Path("trained")
    chat: bool = False
    preferences: bool = False
    alpha: float | None = None
    adapter: Path | None = None
    batch_tokens: int = 16_384
    length: int = 2048
    epochs: float = 1.0
    held_out: Path | None = None
    mesh: str | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class ClusterOptions:
    """How several processes find each other."""

    coordinator: str | None = None
    process_count: int | None = None
    process_id: int | None = None

    def join(self) -> None:
        """Joins the other processes of the run, if an option or a launcher says that there are any.

        Raises ValueError where options contradict each other, or where nothing says how to reach the others.
        """
        import jax

        coordinator, count, number = self.coordinator, self.process_count, self.process_id
        if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise ValueError(f"--coordinator must be HOST:PORT of process 0, got {coordinator!r}")
        if number is not None and (count is None or not 0 <= number < count):
            raise ValueError(
                f"--process-id must lie from 0 to below --process-count, got {number} of {count or 'none'}: "
                "pass both"
            )
        texts = [os.environ.get(name, "") for name in PROCESS_COUNT_VARIABLES]
        launched = max((int(text) for text in texts if text.isdigit()), default=1)
        if coordinator is None and count is None and launched <= 1:
            return
        try:
            jax.distributed.initialize(coordinator, count, number)
        except ValueError as error:  # no cluster that JAX knows
            raise ValueError(
                f"cannot join {count or launched} processes ({error}): pass --coordinator HOST:PORT, "
                "--process-count and --process-id"
            ) from None


def train(
    rows: list[Path],
    plan: PlanOptions,
    settings: SettingsOptions,
    cluster: ClusterOptions,
    model: str = DEFAULT_MODEL,
    full: bool = False,
    layers: bool = False,
    qlora: bool = False,
    lora_rank: Annotated[int | None, Option(min=1)] = None,
    resume: bool = False,
) -> None:
    """Train a model on rows: continued pretraining with fill-in-the-middle, chat, or preferences."""
    _check_libraries()
    from codegemma.train import job
    from codegemma.train.settings import TrainingSettings

    if full + layers + qlora > 1:
        rule = "--full trains all parameters, --layers all but the embedding, --qlora an adapter over blocks"
        raise ValueError(f"{rule}: pass one of them")
    if lora_rank is not None and (full or layers or plan.adapter):
        other = "--full" if full else "--layers" if layers else "--adapter"
        raise ValueError(f"--lora-rank is for a new adapter: leave it out, or {other}")
    if not (plan.chat or plan.preferences) and (
        file := next((file for file in rows if file.is_file()), None)
    ):
        raise ValueError(
            f"{file} is a file, but rows are folders that `codegemma data build` makes: pass --chat where it "
            "holds dialogues, --preferences where it holds pairs of answers"
        )
    cluster.join()
    if settings.learning_rate is None:
        rate = 5e-5 if full or layers else 1e-3
        settings = replace(settings, learning_rate=rate / 20 if plan.preferences else rate)
    # the rate of layers is as low as that of an adapter's rows already
    row_rate = 1.0 if layers else TrainingSettings.row_rate
    training_plan = job.TrainingPlan(
        model,
        tuple(map(str, rows)),
        settings=TrainingSettings(**vars(settings), row_rate=row_rate),
        kind="full" if full else "layers" if layers else "qlora" if qlora else "lora",
        rank=lora_rank or 32,
        **vars(plan),
    )
    training = job.TrainingJob(training_plan)
    note(f"needs {training.memory}")
    with Progress() as progress, _stopped_by_ctrl_c(reporter(progress)) as (on_step, stop):
        result = training.run(resume, on_step, stop=stop)
    if stop.is_set():
        note(f"interrupted; {plan.out} keeps the steps so far, and --resume continues them")
        raise typer.Exit(interrupt.EXIT_CODE)
    for reason, count in training.left_out.most_common():
        note(f"{count:,} {'pairs' if plan.preferences else 'dialogues'} were left out: {reason}")
    print(f"wrote {result}; loss curve: {plan.out / 'loss.svg'}")


def tune(
    repository: Path,
    model: str = DEFAULT_MODEL,
    minutes: float = 30.0,
    out: Path | None = None,
    adapter: str = "auto",
    lora_rank: Positive = 16,
    holes: Annotated[int, Option(min=8)] = 60,
    seed: Natural = 0,
    resume: bool = False,
) -> None:
    """Teach a model your code base, and measure the gain on files it never saw."""
    _check_libraries()
    from codegemma.train import tune as tuning

    options = tuning.TuneOptions(repository, model, minutes, out, adapter, lora_rank, holes, seed, resume)
    with Progress() as progress, _stopped_by_ctrl_c(reporter(progress)) as (on_step, stop):
        result = tuning.tune(options, on_step, print, progress, stop)
    print(result.text())
    if stop.is_set():
        raise typer.Exit(interrupt.EXIT_CODE)


def _check_libraries() -> None:
    """Raises ValueError for a missing library now, not after the hours of work that come before its use."""
    from codegemma.extras import require

    for library in LIBRARIES:
        require(library, "training jobs", "train")


@contextmanager
def _stopped_by_ctrl_c(on_step: OnStep) -> Iterator[tuple[OnStep, Event]]:
    """`on_step` for a run, and an event that Ctrl-C sets to stop it. The process ends at once on a second
    Ctrl-C, and on one before the first step, when nothing can be lost."""
    stop, has_steps = Event(), Event()

    def report(step: StepReport) -> None:
        has_steps.set()
        on_step(step)

    def act() -> None:
        if not has_steps.is_set():
            interrupt.leave("note: interrupted before the first step of this run")
        if stop.is_set():
            interrupt.leave("note: interrupted; --resume continues from the last checkpoint")
        stop.set()
        os.write(2, b"note: stopping; Ctrl-C again leaves at once\n")

    with interrupt.on_interrupt(act):
        yield report, stop


def reporter(progress: Progress) -> OnStep:
    """A function that shows the report of each step of a run."""

    def show(report: StepReport) -> None:
        held_out = f", held out {report.held_out:.4f}" if report.held_out is not None else ""
        stops = f", at stops {report.ends:.0%}" if report.ends is not None else ""
        detail = (
            f"loss {report.loss:.4f}{held_out}, accuracy {report.right:.1%}{stops}, "
            f"{report.tokens / report.seconds:,.0f} tokens/s, "
            f"{report.flops / report.seconds / 1e9:,.0f} GFLOP/s"
        )
        progress("step", report.step, report.steps, detail)

    return show
