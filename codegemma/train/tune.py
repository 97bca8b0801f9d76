"""`codegemma tune`: a code base in, an adapter out, with the gain measured on files that training never read.

`tune` is a visible list of steps: hold files out, build rows from the rest, measure, train within the time,
measure again. The law it keeps: no held-out text is in the rows, and both measurements use the same holes.
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
from codegemma.generate.model import Model, load
from codegemma.prompts import Layout
from codegemma.tokenizer import Tokenizer
from codegemma.train import job
from codegemma.train.job import TrainingPlan
from codegemma.train.settings import SAMPLED_VOCABULARY, TrainingSettings

HELD_OUT = 0.1  # share of the files
NEWEST_COMMITS = 20  # whose files are held out too
ROW_TOKENS = 512
WINDOW = (96, 384)  # tokens of an example
BATCH_TOKENS = 4096  # of a step; half of it where an adapter that completes is trained further
MIN_FILES = 4  # to train on
LAYOUT: Layout = "spm"  # of the holes that are measured: how an editor asks while its user types
END_WEIGHT = 2.0  # trained on likelihood alone, greedy completions run on for too long
MAX_CHOOSING_FILES, MEASUREMENTS = 20, 6  # whose loss chooses the best step, and how often it is measured
CHOOSING_EXAMPLES = 32  # of these files, about: measuring a token takes as long as training on it
PROBE_STEPS = 3  # which say how long a step takes; the first one compiles
MAX_PASSES = 8  # over the rows: more would only repeat little code
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
Say = Callable[[str], None]


@dataclass(frozen=True)
class TuneOptions:
    """What to tune on what, and for how long. Raises ValueError on a time that cannot be."""

    repository: Path
    model: str
    minutes: float  # of training; measuring comes on top
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
    """A mean over the holes before and after, and the paired difference with its interval."""

    before: float
    after: float
    difference: Comparison


@dataclass(frozen=True)
class TuneResult:
    """What tuning gave: the adapter's folder, the gains by title, and the numbers of files."""

    adapter: Path
    gains: dict[str, Gain]
    trained: int
    held_out: int

    def text(self) -> str:
        """The result as a table, and how to use it."""
        files = f"{self.trained:,} files taught, {self.held_out:,} held out"
        lines = [f"{files}; holes in {LAYOUT} order, before -> after:"]
        for name, gain in self.gains.items():
            paired = gain.difference
            interval = f"{paired.difference:+.3f} (95 % from {paired.low:+.3f} to {paired.high:+.3f})"
            lines.append(f"{name:22} {gain.before:8.3f} -> {gain.after:8.3f}   {interval}")
        if worse := ", ".join(name for name, gain in self.gains.items() if gain.difference.high < 0):
            lines.append(f"worse than before in {worse}: give it more --minutes, or do not use it")
        lines.append(f"use it: codegemma complete --adapter {self.adapter} ...")
        lines.append(f"in an editor: codegemma lsp --adapter {self.adapter.resolve()}")
        return "\n".join(lines)


def tune(options: TuneOptions, follow: job.Follow, say: Say) -> TuneResult:
    """Trains an adapter on a code base and measures the gain.

    `follow` is called after each step, `say` with each line of progress. Raises ValueError where there is
    too little code, and where the folder is in use.
    """
    out, work = options.folder, options.work
    if out.exists() and not work.exists():
        raise ValueError(f"{out} exists: choose another folder with --out")
    if work.exists() and not options.resume:
        raise ValueError(f"{out} holds an interrupted run: pass --resume to continue it, or another folder")
    engine = load(options.model)
    name = engine.adapter_at(options.adapter)
    start = engine.adapter(name) if name != "none" else None
    orders = job.ORDERS
    if start and engine.fim_orders(name) == {LAYOUT}:
        orders = (LAYOUT,)
    if not (work / "ready").exists():
        prepare(options, engine.tokenizer, orders, say)
    held_out = [Document(*json.loads(line)) for line in (work / "held-out.jsonl").read_text().splitlines()]
    holes = heldout.holes(held_out, engine.tokenizer, options.holes, options.seed)
    if not holes:
        fault = f"{options.repository}: the held-out files have no place for a hole to measure"
        raise ValueError(f"{fault}: it needs more code")
    say(f"measuring on {len(holes)} holes of the files held out")
    before = measure(engine, holes, start)
    means = (f"{title} {sum(values) / len(values):.3f}" for title, values in before.items())
    say(f"before: {', '.join(means)}")
    plan = _train(options, start, orders, follow, say)
    after = measure(engine, holes, load_adapter(plan.result))
    gains = {title: _gain(before[title], after[title]) for title in before}
    result = TuneResult(out, gains, len(json.loads((work / "ready").read_text())), len(held_out))
    _publish(options, plan, result)
    return result


def _train(
    options: TuneOptions,
    start: Adapter | None,
    orders: tuple[Layout, ...],
    follow: job.Follow,
    say: Say,
) -> TrainingPlan:
    """Trains within the time; Ctrl-C ends it early and keeps the best."""
    until = time.monotonic() + 60 * options.minutes
    limit = f"{options.minutes:g} minutes in all (Ctrl-C ends it early and keeps the best)"
    say(f"finding out how long a step takes; then training, {limit}")
    plan = replace(plan_within(options, until, start), orders=orders)
    metrics = plan.out / "metrics.jsonl"
    try:
        job.run(plan, metrics.exists(), follow, until)
    except KeyboardInterrupt:
        say("stopped early: measuring what there is (--resume goes on after another Ctrl-C)")
        if not plan.result.exists():  # before the first choice: from the last checkpoint, or the start
            job.run(plan, metrics.exists(), until=time.monotonic())
    return plan


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
    shutil.rmtree(work / "final", ignore_errors=True)  # of a run that was killed here
    final = save_adapter(replace(trained, name=out.name, card=card), work / "final")
    for file in [*final.iterdir(), plan.out / "loss.svg", plan.out / "metrics.jsonl"]:
        if file.exists():
            shutil.copyfile(file, out / file.name)
    shutil.rmtree(work)


def hold_out(
    documents: Sequence[Document], repository: Path, seed: int
) -> tuple[list[Document], list[Document]]:
    """(to learn from, held out): the newest commits' files and a random share, at most half in all."""
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
    """Paths that the newest commits changed; none where git is missing or the history is not here."""
    command = [*GIT_LOG.split(), f"-{NEWEST_COMMITS}"]
    environment = {**os.environ, **GIT_ENVIRONMENT}
    try:
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(dict.fromkeys(os.fsdecode(done.stdout).split("\0"))) if done.returncode == 0 else []


def prepare(options: TuneOptions, tokenizer: Tokenizer, orders: Sequence[Layout], say: Say) -> None:
    """Holds files out and builds rows of the others in `work`. Raises ValueError on too few files."""
    repository, work, seed = options.repository, options.work, options.seed
    shutil.rmtree(work, ignore_errors=True)  # before the repository is read: it may lie inside
    documents = _documents(repository)
    taught, held_out = hold_out(documents, repository, seed)
    if len(taught) < MIN_FILES:
        fault = f"{repository}: {len(documents)} files of code, but tuning needs at least {MIN_FILES + 1}"
        raise ValueError(f"{fault}: pass a larger one")
    taught.sort(key=lambda document: Draw("choose", seed, document.path).uniform())
    count = min(len(taught) // 20, MAX_CHOOSING_FILES)
    choosing, taught = taught[:count], taught[count:]
    counts = f"{len(taught):,} files to learn from, {count:,} to choose the best step by"
    say(f"{counts}, {len(held_out):,} held out")
    recipe = BuildRecipe(
        fim_rate=0.9,
        spm_rate=1 / len(orders),
        length=ROW_TOKENS,
        seed=seed,
        licences="any",
        loss=("middle", "terminator"),
        window=WINDOW,
        stride=WINDOW[1],
        path_rate=0.5,
    )
    _build(taught, options, "taught", tokenizer, recipe)
    if choosing:
        stride = sum(len(document.text) for document in choosing) // CHOOSING_EXAMPLES
        sparse = replace(recipe, stride=max(recipe.stride, stride))
        _build(choosing, options, "choosing", tokenizer, sparse)
    fields = [[each.repository, each.path, each.text, each.language] for each in held_out]
    (work / "held-out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in fields))
    (work / "ready").write_text(json.dumps([document.path for document in taught]))


def _documents(repository: Path) -> list[Document]:
    """Files of code, each content once, without those that the rows would leave out."""
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
        file.write_text(document.text, encoding="utf-8", newline="")
    (folder / "Makefile").touch()  # makes it one project, whatever projects are inside it
    build([str(folder.resolve())], options.work / name, tokenizer, recipe)


def measure(engine: Model, holes: Sequence[heldout.Hole], adapter: Adapter | None) -> dict[str, list[float]]:
    """MEASURES of each hole, with an adapter or the base."""
    if adapter is not None:
        engine.add_adapter("tuned", adapter)
    model = LocalModel(engine, adapter="tuned" if adapter is not None else "none")
    answers = heldout.answers(model, holes, LAYOUT)
    return {title: [float(answer[key]) for answer in answers] for title, key in MEASURES.items()}


def _gain(before: list[float], after: list[float]) -> Gain:
    numbered = [{str(i): value for i, value in enumerate(values)} for values in (before, after)]
    return Gain(sum(before) / len(before), sum(after) / len(after), compare(*numbered))


def plan_within(options: TuneOptions, until: float, start: Adapter | None) -> TrainingPlan:
    """The plan with as many steps as end by `until`, of time.monotonic, from how long a few steps take."""
    work = options.work
    rows, choosing = Rows(work / "taught"), work / "choosing"
    batch_tokens = min(BATCH_TOKENS if start is None else BATCH_TOKENS // 2, len(rows) * ROW_TOKENS)
    if start is not None and not (work / "start").exists():
        save_adapter(start, work / "start")
    # Adam's first steps move every weight by the rate: at 3e-4 a trained adapter forgets to stop
    rate, warmup = (1e-3, 0.05) if start is None else (1e-4, 0.25)
    settings = TrainingSettings(
        rate,
        warmup,
        end_weight=END_WEIGHT,
        vocabulary=SAMPLED_VOCABULARY,
        save_every=10,
        keep=1,
        seed=options.seed,
        remat="auto",
    )
    plan = TrainingPlan(
        options.model,
        (str(work / "taught"),),
        work / "run",
        settings,
        kind="qlora",
        rank=options.rank,
        adapter=work / "start" if start is not None else None,
        batch_tokens=batch_tokens,
        epochs=100.0,
    )
    choosing_rows = len(Rows(choosing)) if (choosing / "index.npy").exists() else 0
    stored = work / "steps"
    if not stored.exists():
        seconds = _probe(replace(plan, out=work / "probe", settings=replace(settings, steps=PROBE_STEPS)))
        measuring = MEASUREMENTS * choosing_rows * ROW_TOKENS / batch_tokens  # in steps
        affordable = int((until - time.monotonic()) / seconds - measuring)
        useful = max(MAX_PASSES * len(rows) * ROW_TOKENS // batch_tokens, PROBE_STEPS)
        stored.write_text(str(max(PROBE_STEPS, min(affordable, useful))))
    steps = int(stored.read_text())
    settings = replace(settings, steps=steps, evaluate_every=-(-steps // MEASUREMENTS))
    return replace(plan, held_out=choosing if choosing_rows else None, settings=settings)


def _probe(plan: TrainingPlan) -> float:
    """Seconds of a step: the fastest of a few."""
    shutil.rmtree(plan.out, ignore_errors=True)  # of a probe that was interrupted
    seconds: list[float] = []
    job.run(plan, False, lambda report: seconds.append(report.seconds))
    return min(seconds)
