"""Trains the default model's adapter through the phases of its curriculum. An interrupted run resumes.

    python tools/adapter_train.py [--until PHASE]            # all phases, or those up to one
    python tools/adapter_train.py --until PHASE --start codegemma/adapters/gemma-3-270m-fim   # one phase

Rows are those of tools/adapter_data.py. Runs are written to ~/.cache/codegemma/adapter/runs. Each phase
starts from the result of the phase before it; the result of the last one is copied to runs/final.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapter_data import CACHE

from codegemma.adapters.adapter import Adapter
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.peft import save as save_adapter
from codegemma.data.folder import BuildFolder
from codegemma.prompts import Layout
from codegemma.train import job
from codegemma.train.session import StepReport
from codegemma.train.settings import SAMPLED_VOCABULARY, TrainingSettings

RANK = 32


@dataclass(frozen=True)
class Phase:
    """A phase of the curriculum. It starts from the result of the phase before it.

    A phase with `decay` lowers its learning rate to the end, so that its adapter is good to use; the next
    phase warms up again. At a high learning rate half of an adapter's change is noise that does more harm
    than good: the next phase can start from a `start_scale` of the change. `average`: the result is the mean
    of the phase's start and its end, which is better than the end (docs/log.md).
    """

    tokens: int  # of a step; they hold some 60 examples or more
    steps: int | None = None  # None: all rows once
    warmup: float = 0.0
    peak: float = 1e-3
    momentum: float = 0.9
    start_scale: float = 1.0
    reset: tuple[int, ...] = ()  # ids whose embedding rows start anew
    orders: tuple[Layout, ...] = ("psm", "spm")
    stop_weight: float = 1.0  # see TrainingSettings
    average: bool = False
    decay: bool = False


PHASES = {
    "a1": Phase(7168, 55, warmup=0.55),
    "s": Phase(6144, 120, warmup=0.03, orders=("spm",), decay=True),
    "t": Phase(6144, 130, 0.06, 6e-4, 0.95, 0.5, orders=("spm",), decay=True),
    "p": Phase(5120, 105, 0.05, 1e-3, 0.95, reset=(69,)),
    "q": Phase(9216, 40, 0.05, 6e-4, 0.95, 0.8, decay=True),
    "r": Phase(9216, 50, 0.05, 6e-4, 0.95, decay=True),
    "u": Phase(8192, 160, 0.05, 6e-4, 0.95, stop_weight=2, average=True, decay=True),
    "v": Phase(8192, 200, 0.05, 6e-4, 0.95, stop_weight=2, decay=True),
    "x": Phase(8192, 240, 0.05, 6e-4, 0.95, stop_weight=2, decay=True),
}
ORDER = list(PHASES)


def plan(name: str, cache: Path, start: Path | None = None) -> job.TrainingPlan:
    """What to train in a phase; it starts from `start`, or from the phase before."""
    phase, number = PHASES[name], ORDER.index(name)
    settings = TrainingSettings(
        phase.peak,
        phase.warmup,
        decay="cosine" if phase.decay else "constant",
        floor=0.05,
        betas=(phase.momentum, 0.99),
        vocabulary=SAMPLED_VOCABULARY,
        micro_tokens=2048,
        save_every=5,
        steps=phase.steps,
        stop_weight=phase.stop_weight,
    )
    before = start or (result(ORDER[number - 1], cache) if number else None)
    if before and (phase.start_scale != 1 or phase.reset):
        before = scaled_start(before, phase, cache / "runs" / f"{name}-start")
    return job.TrainingPlan(
        "gemma-3-270m",
        (str(cache / "rows" / name),),
        cache / "runs" / name,
        settings,
        kind="qlora",
        rank=RANK,
        adapter=before,
        batch_tokens=phase.tokens,
        name="gemma-3-270m-fim",
        fim_orders=phase.orders,
    )


def result(name: str, cache: Path) -> Path:
    """The folder of the adapter that is the result of a phase."""
    return cache / "runs" / name / ("halfway" if PHASES[name].average else "adapter")


def scaled_start(adapter: Path, phase: Phase, out: Path) -> Path:
    """Writes the adapter that a phase starts from to `out`, unless it is there, and returns `out`."""
    if not out.exists():
        former = load_adapter(adapter)
        rows = {token: row for token, row in former.rows.items() if token not in phase.reset}
        save_adapter(replace(former, alpha=former.alpha * phase.start_scale, rows=rows), out)
    return out


def mean(start: Adapter, end: Adapter) -> Adapter:
    """The mean of two adapters of one shape, with the card of `end`. Raises ValueError if scales differ."""
    if start.scale != end.scale:
        raise ValueError(f"adapters of scale {start.scale} and {end.scale} have no mean: take two of one run")
    a, b, rows = (
        {key: (value + getattr(start, part)[key]) / 2 for key, value in getattr(end, part).items()}
        for part in ("a", "b", "rows")
    )
    return replace(end, a=a, b=b, rows=rows, card={**end.card, "halfway": True})


def show(phase: str, report: StepReport) -> None:
    """Prints one step of a phase."""
    ends = f" ends {report.ends:.0%}" if report.ends is not None else ""
    print(
        f"{phase} {report.step}/{report.steps} loss {report.loss:.4f} right {report.right:.1%}{ends} "
        f"{report.tokens / report.seconds:.0f} tokens/s",
        flush=True,
    )


def train(phase: str, cache: Path, start: Path | None) -> None:
    """Trains a phase to its end, from where it was interrupted if it was."""
    rows = cache / "rows" / phase
    if not BuildFolder(rows).index.exists():
        sys.exit(f"{rows} is not built: python tools/adapter_data.py rows {phase} --data BENCHMARKS")
    phase_plan = plan(phase, cache, start)
    training = job.TrainingJob(phase_plan)
    metrics = phase_plan.out / "metrics.jsonl"
    if not metrics.exists() or sum(1 for _ in metrics.open()) < training.steps:
        training.run(metrics.exists(), partial(show, phase))
    if PHASES[phase].average and phase_plan.adapter:
        shutil.rmtree(result(phase, cache), ignore_errors=True)
        ends = load_adapter(phase_plan.adapter), load_adapter(phase_plan.result)
        save_adapter(mean(*ends), result(phase, cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--until", choices=PHASES)
    parser.add_argument(
        "--start",
        type=Path,
        help="the adapter that the last phase starts from, in place of the phases before it",
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    if args.start and not args.until:
        parser.error("--start is for one phase: name it with --until")

    phases = [args.until] if args.start else ORDER[: ORDER.index(args.until or ORDER[-1]) + 1]
    for phase in phases:
        train(phase, args.cache, args.start)
    final = args.cache / "runs" / "final"
    shutil.rmtree(final, ignore_errors=True)
    save_adapter(load_adapter(result(phases[-1], args.cache)), final)


if __name__ == "__main__":
    main()
