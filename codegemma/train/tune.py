"""`codegemma tune`: a code base in, an adapter out, with the gain measured on files that training never read.

`tune` lists the steps: hold files out, build rows from the rest, measure, train for the given time, measure
again. The law it keeps: no held-out text is in the rows, and both measurements fill the same holes in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from codegemma.adapters.adapter import Adapter
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.peft import save as save_adapter
from codegemma.data.build import build
from codegemma.data.clean import Quality, check
from codegemma.data.documents import Document
from codegemma.data.draw import Draw
from codegemma.data.pack import Rows
from codegemma.data.recipe import BuildRecipe
from codegemma.data.sources import Source, expand, read
from codegemma.evals import heldout
from codegemma.evals.local import LocalModel
from codegemma.evals.task import Comparison, compare
from codegemma.files import atomic_write, expect_only, sole_writer
from codegemma.generate.model import Model, load
from codegemma.prompts import Layout
from codegemma.tokenizer import Tokenizer
from codegemma.train import job
from codegemma.train.job import TrainingPlan
from codegemma.train.settings import SAMPLED_VOCABULARY, TrainingSettings
from codegemma.train.store import disk_errors_name

HELD_OUT = 0.1  # share of the files that are measured before and after training, and never trained on
NEWEST_COMMITS = 20  # whose files are held out first
ROW_TOKENS = 512
WINDOW = (96, 384)  # tokens of an example
BATCH_TOKENS = 4096  # of a step; half as many where an adapter is trained further
MIN_FILES = 4  # to train on
LAYOUT: Layout = "spm"  # of the measured prompts: the order in which an editor asks while its user types
STOP_WEIGHT = 2.0  # with 1, greedy completions run on for too long
MAX_VALIDATION_FILES = 20  # files for validation: their loss chooses the best step
VALIDATION_EXAMPLES = 32  # of these files, roughly: measuring a token takes as long as training on it
VALIDATIONS = 6  # how often a run measures the loss on the files for validation
PROBE_STEPS = 3  # to find out how long a step takes; the first one compiles
MAX_PASSES = 8  # over the rows; a small code base is not repeated more often
WORK_FILES = ("code", "training", "validation", "held-out.jsonl")  # of the work folder, before training
GIT_LOG = (
    "git -c core.fsmonitor=false -c core.hooksPath=/dev/null log --format= --name-only --no-ext-diff "
    "--relative --no-show-signature -z"
)
GIT_ENVIRONMENT = {  # a repository's own settings must not run anything
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_LAZY_FETCH": "1",
}
MEASURES = {  # title: key of evals.heldout.answers
    "exact match": "exact",
    "edit similarity": "similarity",
    "log p(middle), nats": "logp",
    "stopped by itself": "stopped",
}
MEASURING_SHARE = 0.2  # of the time, for each of the two measurements; holes that take longer are left out
CHUNK = 12  # holes measured together
Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # task, how many are done, of how many


@dataclass(frozen=True)
class TuneOptions:
    """Which model to tune, on which code, and for how long. Raises ValueError on an invalid time."""

    repository: Path
    model: str
    minutes: float  # in all, with both measurements
    out: Path | None = None  # default: NAME-adapter
    adapter: str = "auto"  # to start from: a path, "auto" (the model's own, where it has one) or "none"
    rank: int = 16  # of a new adapter
    holes: int = 60  # to measure on
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1e6:
            raise ValueError(f"--minutes must be finite and above 0, got {self.minutes}")

    @property
    def name(self) -> str:
        """The repository's name."""
        return self.repository.resolve().name

    @property
    def folder(self) -> Path:
        """Where the adapter goes."""
        return self.out or Path(f"{self.name}-adapter")

    @property
    def work(self) -> Path:
        """Rows and checkpoints of an unfinished run."""
        return self.folder / "work"


@dataclass(frozen=True)
class Gain:
    """A measure's mean over the holes before and after training, and the paired difference."""

    before: float
    after: float
    difference: Comparison


@dataclass(frozen=True)
class TuneResult:
    """The adapter's folder, the gains by title (MEASURES), and how many files were trained on or held out."""

    adapter: Path
    gains: dict[str, Gain]
    trained: int
    held_out: int

    def text(self) -> str:
        """The result as a table, and how to use it."""
        files = f"trained on {self.trained:,} files, {self.held_out:,} held out"
        lines = [f"{files}; holes in {LAYOUT} order, before -> after:"]
        for name, gain in self.gains.items():
            paired = gain.difference
            interval = f"{paired.difference:+.3f} (95 % from {paired.low:+.3f} to {paired.high:+.3f})"
            lines.append(f"{name:22} {gain.before:8.3f} -> {gain.after:8.3f}   {interval}")
        worse = ", ".join(name for name, gain in self.gains.items() if gain.difference.high < 0)
        if worse:
            lines.append(f"worse than before in {worse}: give it more --minutes, or do not use it")
        elif not any(gain.difference.low > 0 for gain in self.gains.values()):
            lines.append("no gain that these holes can tell from chance: give it more --minutes")
        else:
            lines.append(f"use it: codegemma complete --adapter {self.adapter} ...")
            lines.append(f"in an editor: codegemma lsp --adapter {self.adapter.resolve()}")
        lines.append(f"the adapter is in {self.adapter}")
        return "\n".join(lines)


def tune(
    options: TuneOptions,
    on_step: job.OnStep,
    log: Log,
    progress: Progress = lambda *_: None,
    stop: Event | None = None,
) -> TuneResult:
    """Trains an adapter on a code base and measures the gain.

    `on_step` is called after each step, `log` with each line about the course of the run, `progress` while it
    measures. Once `stop` is set, training ends and the best step so far is measured. Raises ValueError where
    there is too little code, and where the output folder holds anything but an interrupted run to resume.
    """
    started = time.monotonic()
    with sole_writer(options.folder):
        return _tune(options, started, on_step, log, progress, stop or Event())


def _tune(
    options: TuneOptions, started: float, on_step: job.OnStep, log: Log, progress: Progress, stop: Event
) -> TuneResult:
    seconds = 60 * options.minutes
    out, work = options.folder, options.work
    if any(out.iterdir()) and not work.exists():
        raise ValueError(f"{out} is not empty: choose another folder with --out")
    if (work / "ready").exists() and not options.resume:
        raise ValueError(f"{out} holds an interrupted run: pass --resume to continue it, or another folder")
    engine = load(options.model)
    name = engine.adapter_at(options.adapter)
    start = engine.adapter(name) if name != "none" else None
    fim_orders = job.FIM_ORDERS
    if start and engine.fim_orders(name) == {LAYOUT}:
        fim_orders = (LAYOUT,)
    if not (work / "ready").exists():
        prepare(options, engine.tokenizer, fim_orders, log)
    held_out = [Document(*json.loads(line)) for line in (work / "held-out.jsonl").read_text().splitlines()]
    holes = heldout.holes(held_out, engine.tokenizer, options.holes, options.seed)
    if not holes:
        fault = f"{options.repository}: no hole to measure fits the held-out files"
        raise ValueError(f"{fault}: pass a code base with more code")
    # The holes come kind after kind, a third each: mixed, so that the first few are of all kinds
    third = -(-len(holes) // 3)
    holes = sorted(holes, key=lambda hole: holes.index(hole) % third)
    begun = time.monotonic()
    before = measure(engine, holes, start, progress, seconds * MEASURING_SHARE)
    measuring = time.monotonic() - begun
    holes = holes[: len(next(iter(before.values())))]
    log(f"measured on {len(holes)} holes of the files held out")
    means = (f"{title} {sum(values) / len(values):.3f}" for title, values in before.items())
    log(f"before: {', '.join(means)}")
    until = started + seconds - measuring  # measuring once more takes as long
    limit = f"{options.minutes:g} minutes in all (Ctrl-C ends it early and keeps the best)"
    log(f"finding out how long a step takes; then training, {limit}")
    plan = replace(plan_within(options, until, start), fim_orders=fim_orders)
    _run(plan, until, on_step, log, stop)
    after = measure(engine, holes, load_adapter(plan.result), progress)
    gains = {title: _gain(before[title], after[title]) for title in before}
    result = TuneResult(out, gains, len(json.loads((work / "ready").read_text())), len(held_out))
    _publish(options, plan, result)
    return result


def _run(plan: TrainingPlan, until: float, on_step: job.OnStep, log: Log, stop: Event) -> None:
    """Trains until the time is up; `stop`, or Ctrl-C, ends it early and keeps the best step."""
    metrics = plan.out / "metrics.jsonl"
    try:
        job.run(plan, metrics.exists(), on_step, until, stop)
    except KeyboardInterrupt:
        stop.set()
    if stop.is_set():
        log("stopped early: measuring the result so far (after another Ctrl-C, --resume continues)")
        if not plan.result.exists():  # not even one measurement: one more step writes a result
            job.run(plan, metrics.exists(), until=time.monotonic())


def _publish(options: TuneOptions, plan: TrainingPlan, result: TuneResult) -> None:
    """Writes the adapter with its gains into the output folder, and removes the work folder."""
    out, work, trained = options.folder, options.work, load_adapter(plan.result)
    measured = {
        title: {
            "before": gain.before,
            "after": gain.after,
            "gain from": gain.difference.low,
            "gain to": gain.difference.high,
        }
        for title, gain in result.gains.items()
    }
    card = {**trained.card, "name": out.name, "repository": options.name, "measured": measured}
    shutil.rmtree(work / "final", ignore_errors=True)  # of a run that was killed at this point
    final = save_adapter(replace(trained, name=out.name, card=card), work / "final")
    for file in [*final.iterdir(), plan.out / "loss.svg", plan.out / "metrics.jsonl"]:
        if file.exists():
            with atomic_write(out / file.name) as copy:
                copy.write(file.read_bytes())
    shutil.rmtree(work)


def hold_out(
    documents: Sequence[Document], repository: Path, seed: int
) -> tuple[list[Document], list[Document]]:
    """(files to train on, files held out).

    Held out is a tenth of the files, or up to a fifth where the newest commits changed that many: first those
    that they changed, then others at random. It is at most half, and leaves MIN_FILES where there are more.
    """
    newest = set(newest_files(repository))

    def rank(document: Document) -> tuple[bool, float]:
        return document.path not in newest, Draw("held out", seed, document.path).uniform()

    ranked = sorted(documents, key=rank)
    share = max(1, round(HELD_OUT * len(ranked)))
    recent = sum(document.path in newest for document in ranked)
    wanted = max(share, min(recent, 2 * share))
    count = min(wanted, len(ranked) // 2, max(1, len(ranked) - MIN_FILES))
    return ranked[count:], ranked[:count]


def newest_files(repository: Path) -> list[str]:
    """Paths that the newest commits changed; empty without git or without a history."""
    command = [*GIT_LOG.split(), f"-{NEWEST_COMMITS}"]
    environment = {**os.environ, **GIT_ENVIRONMENT}
    try:
        log = subprocess.run(command, cwd=repository, env=environment, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(dict.fromkeys(os.fsdecode(log.stdout).split("\0"))) if log.returncode == 0 else []


def prepare(options: TuneOptions, tokenizer: Tokenizer, fim_orders: Sequence[Layout], log: Log) -> None:
    """Holds files out and builds rows of the others in `options.work`. Raises ValueError on too few files."""
    repository, work, seed = options.repository, options.work, options.seed
    if work.exists():
        expect_only(work, WORK_FILES, "an interrupted run")
        shutil.rmtree(work)  # before the repository is read: it may lie inside
    documents = _documents(repository)
    training, held_out = hold_out(documents, repository, seed)
    if len(training) < MIN_FILES:
        fault = f"{repository}: {len(documents)} files of code, but tuning needs at least {MIN_FILES + 1}"
        raise ValueError(f"{fault}: pass a larger code base")
    training.sort(key=lambda document: Draw("choose", seed, document.path).uniform())
    count = min(len(training) // 20, MAX_VALIDATION_FILES)
    validation, training = training[:count], training[count:]
    counts = f"{len(training):,} files to learn from, {count:,} to choose the best step by"
    log(f"{counts}, {len(held_out):,} held out")
    recipe = BuildRecipe(
        fim_rate=0.9,
        spm_rate=1 / len(fim_orders),
        length=ROW_TOKENS,
        seed=seed,
        licences="any",
        loss=("middle", "terminator"),
        window=WINDOW,
        stride=WINDOW[1],
        path_rate=0.5,
    )
    _build(training, options, "training", tokenizer, recipe)
    if validation:
        stride = sum(len(document.text) for document in validation) // VALIDATION_EXAMPLES
        sparse = replace(recipe, stride=max(recipe.stride, stride))
        _build(validation, options, "validation", tokenizer, sparse)
    fields = [[doc.repository, doc.path, doc.text, doc.language] for doc in held_out]
    with atomic_write(work / "held-out.jsonl") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in fields)
    with atomic_write(work / "ready") as file:
        file.write(json.dumps([document.path for document in training]).encode())


def _documents(repository: Path) -> list[Document]:
    """The files of code that pass the data's quality checks, without duplicates."""
    quality, documents = Quality(), {}
    sources = [Source(repository.resolve(), "folder")] if repository.is_dir() else expand(str(repository))
    for source in sources:
        for document in read(source):
            if isinstance(document, Document) and not check(document, quality)[0]:
                documents[document.digest] = document
    return list(documents.values())


def _build(
    documents: Sequence[Document], options: TuneOptions, name: str, tokenizer: Tokenizer, recipe: BuildRecipe
) -> None:
    folder = options.work / "code" / name / options.name
    for document in documents:
        file = folder / document.path
        file.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors_name(file):
            file.write_text(document.text, encoding="utf-8", newline="")
    (folder / "Makefile").touch()  # makes it one project, whatever projects are inside it
    build([str(folder.resolve())], options.work / name, tokenizer, recipe)


def measure(
    engine: Model,
    holes: Sequence[heldout.Hole],
    adapter: Adapter | None,
    progress: Progress = lambda *_: None,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """The MEASURES of each hole by title, with an adapter or with the base.

    Once `seconds` have passed, the rest of the holes are left out; at least CHUNK are measured.
    """
    if adapter is not None:
        engine.add_adapter("tuned", adapter)
    model = LocalModel(engine, adapter="tuned" if adapter is not None else "none")
    answers: list[dict[str, Any]] = []
    until = time.monotonic() + seconds
    while len(answers) < len(holes) and (not answers or time.monotonic() < until):
        progress("measuring", len(answers), len(holes))
        answers += heldout.answers(model, holes[len(answers) : len(answers) + CHUNK], LAYOUT)
    progress("measuring", len(answers), len(answers))
    return {title: [float(answer[key]) for answer in answers] for title, key in MEASURES.items()}


def _gain(before: list[float], after: list[float]) -> Gain:
    numbered = [{str(i): value for i, value in enumerate(values)} for values in (before, after)]
    return Gain(sum(before) / len(before), sum(after) / len(after), compare(*numbered))


def plan_within(options: TuneOptions, until: float, start: Adapter | None) -> TrainingPlan:
    """The plan with as many steps as fit before `until`, on the clock of time.monotonic."""
    work = options.work
    tokens, validation = len(Rows(work / "training")) * ROW_TOKENS, work / "validation"
    if start is not None and not (work / "start").exists():
        save_adapter(start, work / "start")
    # Adam's first steps move every weight by the rate: at 3e-4 a trained adapter forgets to stop
    rate, warmup = (1e-3, 0.05) if start is None else (1e-4, 0.25)
    settings = TrainingSettings(
        rate,
        warmup,
        stop_weight=STOP_WEIGHT,
        vocabulary=SAMPLED_VOCABULARY,
        save_every=10,
        keep=1,
        seed=options.seed,
        remat="auto",
    )
    plan = TrainingPlan(
        options.model,
        (str(work / "training"),),
        work / "run",
        settings,
        kind="qlora",
        rank=options.rank,
        adapter=work / "start" if start is not None else None,
        batch_tokens=min(BATCH_TOKENS if start is None else BATCH_TOKENS // 2, tokens),
        epochs=100.0,
    )
    validation_rows = len(Rows(validation)) if (validation / "index.npy").exists() else 0
    steps = _steps_within(until, plan, tokens, validation_rows * ROW_TOKENS)
    settings = replace(settings, steps=steps, evaluate_every=-(-steps // VALIDATIONS))
    # TrainingPlan.held_out gets the validation files, whose loss chooses the best step. The files
    # that `hold_out` sets aside are in neither set.
    return replace(plan, held_out=validation if validation_rows else None, settings=settings)


def _steps_within(until: float, plan: TrainingPlan, tokens: int, validation_tokens: int) -> int:
    """How many steps fit before `until`, if each takes as long as the fastest of PROBE_STEPS.

    The number is stored: a resumed run keeps it.
    """
    stored = plan.out.with_name("steps")
    if not stored.exists():
        settings = replace(plan.settings, steps=PROBE_STEPS)
        probe = replace(plan, out=plan.out.with_name("probe"), settings=settings)
        shutil.rmtree(probe.out, ignore_errors=True)  # of a probe that was interrupted
        seconds: list[float] = []
        job.run(probe, False, lambda report: seconds.append(report.seconds), until)
        measuring = VALIDATIONS * validation_tokens / plan.batch_tokens  # in steps
        affordable = int((until - time.monotonic()) / min(seconds) - measuring)
        useful = max(MAX_PASSES * tokens // plan.batch_tokens, PROBE_STEPS)
        with atomic_write(stored) as file:
            file.write(b"%d" % max(1, min(affordable, useful)))
    return int(stored.read_text())
