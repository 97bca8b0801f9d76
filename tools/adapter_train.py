"""Trains the default model's adapter through the phases of its curriculum. An interrupted run resumes.

    python tools/adapter_train.py [--until PHASE]            # all phases, or those up to one
    python tools/adapter_train.py --until PHASE --start codegemma/adapters/gemma-3-270m-fim   # one phase

Rows are those of tools/adapter_data.py; runs lie under ~/.cache/codegemma/adapter/runs.

Each phase starts from the adapter of the one before it; runs/final is the last one's, or halfway to it from
its start.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, replace
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
    """A phase of the curriculum; it starts from the adapter of the phase before.

    `tokens` of a step hold some 60 examples or more. A `landed` phase lowers its learning rate to the end, so
    that its adapter is good to use; the next phase warms up again. It starts from a `share` of the former
    adapter's change: at a high learning rate half of the change is noise that does more harm than good. The
    embedding rows of the ids `fresh` are reset. `end_weight`: see TrainingSettings. `halfway`: the mean of
    its start and its result is better than the result, and is what the next phase starts from (docs/log.md).
    """

    tokens: int
    steps: int | None = None  # None: all rows once
    warmup: float = 0.0
    peak: float = 1e-3
    momentum: float = 0.9
    share: float = 1.0
    fresh: tuple[int, ...] = ()
    orders: tuple[Layout, ...] = ("psm", "spm")
    end_weight: float = 1.0
    halfway: bool = False
    landed: bool = False


PHASES = {
    "a1": Phase(7168, 55, warmup=0.55),
    "s": Phase(6144, 120, warmup=0.03, orders=("spm",), landed=True),
    "t": Phase(6144, 130, 0.06, 6e-4, 0.95, 0.5, orders=("spm",), landed=True),
    "p": Phase(5120, 105, 0.05, 1e-3, 0.95, fresh=(69,)),
    "q": Phase(9216, 40, 0.05, 6e-4, 0.95, 0.8, landed=True),
    "r": Phase(9216, 50, 0.05, 6e-4, 0.95, landed=True),
    "u": Phase(8192, 160, 0.05, 6e-4, 0.95, end_weight=2, halfway=True, landed=True),
    "v": Phase(8192, 200, 0.05, 6e-4, 0.95, end_weight=2, landed=True),
    "x": Phase(8192, 240, 0.05, 6e-4, 0.95, end_weight=2, landed=True),
}
ORDER = list(PHASES)


def plan(name: str, cache: Path, start: Path | None = None) -> job.TrainingPlan:
    """What to train in a phase; it starts from `start`, or from the phase before."""
    phase, number = PHASES[name], ORDER.index(name)
    settings = TrainingSettings(
        phase.peak,
        phase.warmup,
        decay="cosine" if phase.landed else "constant",
        floor=0.05,
        betas=(phase.momentum, 0.99),
        vocabulary=SAMPLED_VOCABULARY,
        micro_tokens=2048,
        save_every=5,
        steps=phase.steps,
        end_weight=phase.end_weight,
    )
    before = start or (kept(ORDER[number - 1], cache) if number else None)
    if before and (phase.share != 1 or phase.fresh):
        before = part_of(before, phase, cache / "runs" / f"{name}-start")
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
        orders=phase.orders,
    )


def kept(name: str, cache: Path) -> Path:
    """The folder of the adapter that a finished phase leaves to the next one."""
    return cache / "runs" / name / ("halfway" if PHASES[name].halfway else "adapter")


def part_of(adapter: Path, phase: Phase, out: Path) -> Path:
    """The share of the former adapter that a phase starts from; written once."""
    if not out.exists():
        former = load_adapter(adapter)
        rows = {token: row for token, row in former.rows.items() if token not in phase.fresh}
        save_adapter(replace(former, alpha=former.alpha * phase.share, rows=rows), out)
    return out


def mean(start: Adapter, end: Adapter) -> Adapter:
    """Halfway between two adapters of one shape, with the card of `end`. ValueError if scales differ."""
    if start.scale != end.scale:
        raise ValueError(f"adapters of scale {start.scale} and {end.scale} have no mean: take two of one run")
    a, b, rows = (
        {key: (value + getattr(start, part)[key]) / 2 for key, value in getattr(end, part).items()}
        for part in ("a", "b", "rows")
    )
    return replace(end, a=a, b=b, rows=rows, card={**end.card, "halfway": True})


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

    def show(report: StepReport) -> None:
        ends = f" ends {report.ends:.0%}" if report.ends is not None else ""
        print(
            f"{phase} {report.step}/{report.steps} loss {report.loss:.4f} right {report.right:.1%}{ends} "
            f"{report.tokens / report.seconds:.0f} tokens/s",
            flush=True,
        )

    for phase in [args.until] if args.start else ORDER[: ORDER.index(args.until or ORDER[-1]) + 1]:
        rows = args.cache / "rows" / phase
        if not BuildFolder(rows).index.exists():
            sys.exit(f"{rows} is not built: python tools/adapter_data.py rows {phase} --data BENCHMARKS")
        phase_plan = plan(phase, args.cache, args.start)
        training = job.TrainingJob(phase_plan)
        metrics = phase_plan.out / "metrics.jsonl"
        if not metrics.exists() or sum(1 for _ in metrics.open()) < training.steps:
            training.run(metrics.exists(), show)
        if PHASES[phase].halfway and phase_plan.adapter:
            shutil.rmtree(kept(phase, args.cache), ignore_errors=True)
            save_adapter(
                mean(load_adapter(phase_plan.adapter), load_adapter(phase_plan.result)),
                kept(phase, args.cache),
            )
    final = args.cache / "runs" / "final"
    shutil.rmtree(final, ignore_errors=True)
    save_adapter(load_adapter(kept(phase, args.cache)), final)


if __name__ == "__main__":
    main()
