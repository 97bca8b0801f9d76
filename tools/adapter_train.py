"""Trains the default model's adapter through the phases of its curriculum; stopped at any moment, it goes on.

    python tools/adapter_train.py [--until PHASE]    # rows by tools/adapter_data.py; runs under ~/.cache/codegemma/adapter/runs
    python tools/adapter_train.py --until PHASE --start codegemma/adapters/gemma-3-270m-fim    # where the runs before are gone

Each phase starts from the adapter of the one before it; runs/final is the last one's, or halfway to it from its start.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_data import CACHE

from codegemma.adapters import adapter as lora
from codegemma.prompts import Layout
from codegemma.train import job
from codegemma.train.loop import VOCABULARY, Report, Settings

RANK = 32


@dataclass(frozen=True)
class Phase:
    """`tokens` of a step: some 60 examples or more. The rate of a phase that is `landed` comes down at its end: its adapter is one
    to use, and the next phase warms up again. `share` of the change that the phase before made is what it starts from: at a
    high rate every weight moves by it, and half of the change is noise that costs more than it brings. The rows of the embedding
    for the ids `fresh` start anew. `end_weight`: see Settings. `halfway`: the mean of what it started from and what it became is
    the better adapter, and what the next one starts from (docs/log.md)."""

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


def plan(name: str, cache: Path, start: Path | None = None) -> job.Plan:
    phase, number = PHASES[name], ORDER.index(name)
    settings = Settings(
        phase.peak,
        phase.warmup,
        decay="cosine" if phase.landed else "constant",
        floor=0.05,
        betas=(phase.momentum, 0.99),
        vocabulary=VOCABULARY,
        micro_tokens=2048,
        save_every=5,
        steps=phase.steps,
        end_weight=phase.end_weight,
    )
    before = start or (kept(ORDER[number - 1], cache) if number else None)
    if before and (phase.share != 1 or phase.fresh):
        before = part_of(before, phase, cache / "runs" / f"{name}-start")
    return job.Plan(
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
    """What a phase that is over leaves to the next one."""
    return cache / "runs" / name / ("halfway" if PHASES[name].halfway else "adapter")


def part_of(adapter: Path, phase: Phase, out: Path) -> Path:
    """What a phase keeps of the adapter before it: written once."""
    if not out.exists():
        whole = lora.load(adapter)
        rows = {token: row for token, row in whole.rows.items() if token not in phase.fresh}
        lora.save(replace(whole, alpha=whole.alpha * phase.share, rows=rows), out)
    return out


def mean(one: lora.Adapter, other: lora.Adapter) -> lora.Adapter:
    """Halfway between two adapters of one shape, with the other's card. Raises ValueError where they differ in scale."""
    if one.scale != other.scale:
        raise ValueError(f"adapters of scale {one.scale} and {other.scale} have no mean: take two of one run")
    a, b, rows = (
        {key: (value + getattr(one, part)[key]) / 2 for key, value in getattr(other, part).items()}
        for part in ("a", "b", "rows")
    )
    return replace(other, a=a, b=b, rows=rows, card={**other.card, "halfway": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--until", choices=PHASES)
    parser.add_argument(
        "--start",
        type=Path,
        help="the adapter that the last phase starts from, in place of the phases before it",
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    chosen = parser.parse_args()
    if chosen.start and not chosen.until:
        parser.error("--start is for one phase: name it with --until")

    def tell(report: Report) -> None:
        ends = f" ends {report.ends:.0%}" if report.ends is not None else ""
        print(
            f"{phase} {report.step}/{report.steps} loss {report.loss:.4f} right {report.right:.1%}{ends} "
            f"{report.tokens / report.seconds:.0f} tokens/s",
            flush=True,
        )

    for phase in [chosen.until] if chosen.start else ORDER[: ORDER.index(chosen.until or ORDER[-1]) + 1]:
        rows = chosen.cache / "rows" / phase
        if not (rows / "index.npy").exists():
            sys.exit(f"{rows} is not built: python tools/adapter_data.py rows {phase} --data BENCHMARKS")
        made = plan(phase, chosen.cache, chosen.start)
        steps = job.steps_of(made)
        metrics = made.out / "metrics.jsonl"
        if not metrics.exists() or sum(1 for _ in metrics.open()) < steps:
            job.run(made, metrics.exists(), tell)
        if PHASES[phase].halfway and made.adapter:
            shutil.rmtree(kept(phase, chosen.cache), ignore_errors=True)
            lora.save(mean(lora.load(made.adapter), lora.load(made.result)), kept(phase, chosen.cache))
    final = chosen.cache / "runs" / "final"
    shutil.rmtree(final, ignore_errors=True)
    lora.save(lora.load(kept(phase, chosen.cache)), final)


if __name__ == "__main__":
    main()
