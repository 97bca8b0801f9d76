"""`codegemma tune`: a code base in, an adapter out, with the gain measured on files that training never saw.

`tune` is a visible list: hold files out, build rows from the rest, measure, train within the time, measure again. The law
it keeps: no held-out text is in the rows, and both measurements ask the same holes.
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

from codegemma.adapters import adapter as lora
from codegemma.data.build import build
from codegemma.data.clean import Quality, check
from codegemma.data.documents import Document, Source, expand, read
from codegemma.data.fim import Draw
from codegemma.data.pack import Rows
from codegemma.data.stages import Recipe
from codegemma.evals import heldout
from codegemma.evals.local import Local
from codegemma.evals.task import Comparison, compare
from codegemma.generate.model import Model, load
from codegemma.prompts import Layout
from codegemma.tokenizer import Tokenizer
from codegemma.train import job
from codegemma.train.loop import VOCABULARY, Report, Settings

SHARE = 0.1  # of the files, held out
NEWEST = 20  # commits at most whose files are held out too
LENGTH = 512  # tokens of a row
WINDOW = (96, 384)  # tokens of an example
BATCH_TOKENS = 4096  # of a step; half of it from an adapter that already completes
FEWEST = 4  # files to train on
LAYOUT: Layout = "spm"  # of the holes that are measured: how an editor asks while one types
END_WEIGHT = 2.0  # trained on likelihood alone, greedy completions go on for too long
MOST_CHOOSING, CHOICES = 20, 6  # files whose loss says which step was the best, and how often it is measured
EXAMPLES = 32  # of these files, about: a measurement of a token takes as long as a step's
PROBE = 3  # steps that say how long a step takes, the first of which compiles


@dataclass(frozen=True)
class Figure:
    """A mean over the holes before and after, and the paired difference with its interval."""

    before: float
    after: float
    gain: Comparison


@dataclass(frozen=True)
class Tuned:
    """What tuning gave."""

    adapter: Path
    figures: dict[str, Figure]
    trained: int
    held_out: int

    def text(self) -> str:
        lines = [
            f"{name:22} {f.before:8.3f} -> {f.after:8.3f}   {f.gain.difference:+.3f} (95 % from {f.gain.low:+.3f} to "
            f"{f.gain.high:+.3f})"
            for name, f in self.figures.items()
        ]
        worse = ", ".join(name for name, f in self.figures.items() if f.gain.high < 0)
        if worse:
            lines.append(f"worse than before in {worse}: give it more --minutes, or do not use it")
        return "\n".join(
            [
                f"{self.trained:,} files taught, {self.held_out:,} held out; holes in {LAYOUT} order, before -> "
                "after:",
                *lines,
                f"use it: codegemma complete --adapter {self.adapter} ...",
                f"in an editor: codegemma lsp --adapter {self.adapter.resolve()}",
            ]
        )


def tune(
    repository: Path,
    model: str,
    minutes: float,
    out: Path | None,
    adapter: str,
    rank: int,
    holes: int,
    seed: int,
    resume: bool,
    follow: Callable[[int], Callable[[Report], None]],
    say: Callable[[str], None],
) -> Tuned:
    """Raises ValueError where there is too little code, or the time is none."""
    if not 0 < minutes < 1e6:
        raise ValueError(f"--minutes must be finite and above 0, got {minutes}")
    out = out or Path(f"{repository.resolve().name}-adapter")
    if out.exists() and not (out / "work").exists():
        raise ValueError(f"{out} exists: choose another folder with --out")
    if (out / "work").exists() and not resume:
        raise ValueError(f"{out} holds an interrupted run: pass --resume to go on with it, or another folder")
    work = out / "work"
    engine = load(model)
    chosen = engine.adapter_at(adapter)
    started_from = engine.adapter(chosen) if chosen else None
    orders: tuple[Layout, ...] = (
        ("spm",) if started_from and engine.fim_orders(chosen) == {"spm"} else ("psm", "spm")
    )
    if not (work / "ready").exists():
        _prepare(repository, work, engine.tokenizer, orders, seed, say)
    kept = [_document(line) for line in (work / "held-out.jsonl").read_text().splitlines()]
    found = heldout.holes(kept, engine.tokenizer, holes, seed)
    if not found:
        raise ValueError(
            f"{repository}: the held-out files have no place for a hole to measure: it needs more code"
        )
    say(f"measuring on {len(found)} holes of the files held out")
    before = _measured(engine, found, started_from)
    say(f"before: {_brief(before)}")
    until = time.monotonic() + 60 * minutes
    say(
        f"finding out how long a step takes; then training, {minutes:g} minutes in all (Ctrl-C ends it early and keeps the best)"
    )
    plan = replace(_plan(work, model, until, rank, started_from, seed), orders=orders)
    try:
        job.run(plan, (plan.out / "metrics.jsonl").exists(), follow(job.steps_of(plan)), until)
    except KeyboardInterrupt:
        say("stopped early: measuring what there is (--resume goes on after another Ctrl-C)")
        if not plan.result.exists():  # before the first choice: from the last checkpoint, or the start
            job.run(plan, (plan.out / "metrics.jsonl").exists(), until=time.monotonic())
    trained = lora.load(plan.result)
    after = _measured(engine, found, trained)
    figures = {name: _figure(before[name], after[name]) for name in before}
    result = Tuned(out, figures, len(json.loads((work / "ready").read_text())), len(kept))
    card = {
        **trained.card,
        "name": out.name,
        "repository": repository.resolve().name,
        "measured": {
            name: {"before": f.before, "after": f.after, "gain from": f.gain.low, "gain to": f.gain.high}
            for name, f in figures.items()
        },
    }
    shutil.rmtree(work / "final", ignore_errors=True)  # of a run that died here
    made = lora.save(replace(trained, name=out.name, card=card), work / "final")
    for file in [*made.iterdir(), plan.out / "loss.svg", plan.out / "metrics.jsonl"]:
        if file.exists():
            shutil.copyfile(file, out / file.name)
    shutil.rmtree(work)
    return result


def hold_out(
    documents: Sequence[Document], repository: Path, seed: int
) -> tuple[list[Document], list[Document]]:
    """(to learn from, held out): a hash's share of the files, and those that the newest commits touched, at most half."""
    newest = set(_newest_files(repository))
    ranked = sorted(
        documents, key=lambda one: (one.path not in newest, Draw("held out", seed, one.path).uniform())
    )
    share = max(1, round(SHARE * len(documents)))
    recent = sum(one.path in newest for one in documents)
    count = min(max(share, min(recent, 2 * share)), len(documents) // 2, max(1, len(documents) - FEWEST))
    return ranked[count:], ranked[:count]


def _newest_files(repository: Path) -> list[str]:
    """Paths that the newest commits changed; none where git is missing or the history is not here."""
    quiet = {
        **os.environ,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_LAZY_FETCH": "1",
    }  # nothing that a repository's own settings name is run
    command = [
        "git",
        "-c",
        "core.fsmonitor=false",
        "-c",
        "core.hooksPath=/dev/null",
        "log",
        f"-{NEWEST}",
        "--format=",
        "--name-only",
        "--no-ext-diff",
        "--relative",
        "--no-show-signature",
        "-z",
    ]
    try:
        done = subprocess.run(command, cwd=repository, env=quiet, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(dict.fromkeys(os.fsdecode(done.stdout).split("\0"))) if done.returncode == 0 else []


def _prepare(
    repository: Path,
    work: Path,
    tokenizer: Tokenizer,
    orders: Sequence[Layout],
    seed: int,
    say: Callable[[str], None],
) -> None:
    shutil.rmtree(work, ignore_errors=True)  # which may lie in the repository
    sources = [Source(repository.resolve(), "folder")] if repository.is_dir() else expand(str(repository))
    good = Quality()  # the rows' own, so that what they leave out is not held out; of copies one
    documents = list(
        {
            one.digest: one
            for source in sources
            for one in read(source)
            if isinstance(one, Document) and not check(one, good)[0]
        }.values()
    )
    taught, kept = hold_out(documents, repository, seed)
    if len(taught) < FEWEST:
        raise ValueError(
            f"{repository}: {len(documents)} files of code, but tuning needs at least {FEWEST + 1}: pass a larger one"
        )
    ranked = sorted(taught, key=lambda one: Draw("choose", seed, one.path).uniform())
    choosing = ranked[: min(len(taught) // 20, MOST_CHOOSING)]
    taught = [one for one in taught if one not in choosing]
    say(
        f"{len(taught):,} files to learn from, {len(choosing):,} to choose the best step by, {len(kept):,} held out"
    )
    recipe = Recipe(
        fim_rate=0.9,
        spm_rate=1 / len(orders),
        length=LENGTH,
        seed=seed,
        licences="any",
        loss=("middle", "terminator"),
        window=WINDOW,
        stride=WINDOW[1],
        path_rate=0.5,
    )
    _build(taught, repository, work, "taught", tokenizer, recipe)
    if choosing:
        some = replace(recipe, stride=max(recipe.stride, sum(len(one.text) for one in choosing) // EXAMPLES))
        _build(choosing, repository, work, "choosing", tokenizer, some)
    lines = [json.dumps([one.repository, one.path, one.text, one.language]) + "\n" for one in kept]
    (work / "held-out.jsonl").write_text("".join(lines))
    (work / "ready").write_text(json.dumps([one.path for one in taught]))


def _build(
    files: Sequence[Document], repository: Path, work: Path, name: str, tokenizer: Tokenizer, recipe: Recipe
) -> None:
    folder = work / "code" / name / repository.resolve().name
    for one in files:
        file = folder / one.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(one.text, encoding="utf-8", newline="")
    (folder / "Makefile").touch()  # one project, whatever projects stand inside it
    build([str(folder.resolve())], work / name, tokenizer, recipe)


def _document(line: str) -> Document:
    return Document(*json.loads(line))


def _measured(
    engine: Model, found: Sequence[heldout.Hole], adapter: lora.Adapter | None
) -> dict[str, list[float]]:
    if adapter is not None:
        engine.add_adapter("tuned", adapter)
    model = Local(engine, adapter="tuned" if adapter is not None else None)
    each = heldout.answers(model, found, LAYOUT)
    names = {
        "exact match": "exact",
        "edit similarity": "similarity",
        "log p(middle), nats": "logp",
        "stopped by itself": "stopped",
    }
    return {title: [float(one[key]) for one in each] for title, key in names.items()}


def _figure(before: list[float], after: list[float]) -> Figure:
    numbered = [{str(i): value for i, value in enumerate(values)} for values in (before, after)]
    return Figure(sum(before) / len(before), sum(after) / len(after), compare(*numbered))


def _brief(figures: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in figures.items())


def _plan(work: Path, model: str, until: float, rank: int, start: lora.Adapter | None, seed: int) -> job.Plan:
    """Steps that the time allows, from how long a few take; the schedule ends with them."""
    rows, choosing = Rows(work / "taught"), work / "choosing"
    batch = min(BATCH_TOKENS if start is None else BATCH_TOKENS // 2, len(rows) * LENGTH)
    path = work / "start" if start is not None else None
    if start is not None and not (work / "start").exists():
        lora.save(start, work / "start")
    # Adam's first steps move every weight by the whole rate: an adapter that completes already forgets to stop at 3e-4
    rate, warmup = (1e-3, 0.05) if start is None else (1e-4, 0.25)
    settings = Settings(
        rate,
        warmup,
        end_weight=END_WEIGHT,
        vocabulary=VOCABULARY,
        save_every=10,
        keep=1,
        seed=seed,
        remat="auto",
    )
    plan = job.Plan(
        model,
        (str(work / "taught"),),
        work / "probe",
        replace(settings, steps=PROBE),
        kind="qlora",
        rank=rank,
        adapter=path,
        batch_tokens=batch,
        epochs=100.0,
    )
    few = len(Rows(choosing)) if (choosing / "index.npy").exists() else 0
    stored = work / "steps"
    if not stored.exists():
        seconds: list[float] = []
        shutil.rmtree(plan.out, ignore_errors=True)  # of a probe that was interrupted
        job.run(plan, False, lambda report: seconds.append(report.seconds))
        left = (until - time.monotonic()) / min(seconds) - CHOICES * few * LENGTH / batch  # in steps
        most = 8 * len(rows) * LENGTH // batch  # more passes than that over little code only repeats it
        stored.write_text(str(max(PROBE, min(int(left), max(most, PROBE)))))
    steps = int(stored.read_text())
    return replace(
        plan,
        out=work / "run",
        held_out=choosing if few else None,
        settings=replace(settings, steps=steps, evaluate_every=-(-steps // CHOICES)),
    )
