"""Trains the default model's adapter through the phases of its curriculum; stopped at any moment, it goes on.

    python tools/adapter_train.py [--until PHASE]    # rows by tools/adapter_data.py; runs under ~/.cache/codegemma/adapter/runs

Each phase starts from the adapter of the one before it. The rate stays at its peak until the last phase lets it down.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from codegemma.train import job
from codegemma.train.loop import VOCABULARY, Report, Settings

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "codegemma" / "adapter"
PHASES = ("a1", "a2", "b", "c")
BATCH_TOKENS = {"a1": 7168, "a2": 7168, "b": 16_384, "c": 32_768}  # at least 64 examples a step
RANK = 32
PEAK = 1e-3


def plan(phase: str, cache: Path) -> job.Plan:
    number = PHASES.index(phase)
    last = number == len(PHASES) - 1
    settings = Settings(PEAK, warmup=0.05 if number == 0 else 0.0, decay="cosine" if last else "constant", floor=0.05,
                        vocabulary=VOCABULARY, micro_tokens=1024, save_every=5)
    before = cache / "runs" / PHASES[number - 1] / "adapter" if number else None
    return job.Plan("gemma-3-270m", (str(cache / "rows" / phase),), cache / "runs" / phase, settings, kind="qlora", rank=RANK,
                    adapter=before, batch_tokens=BATCH_TOKENS[phase], name="gemma-3-270m-fim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--until", choices=PHASES, default=PHASES[-1])
    parser.add_argument("--cache", type=Path, default=CACHE)
    chosen = parser.parse_args()

    def tell(report: Report) -> None:
        ends = f" ends {report.ends:.0%}" if report.ends is not None else ""
        print(f"{phase} {report.step}/{report.steps} loss {report.loss:.4f} right {report.right:.1%}{ends} "
              f"{report.tokens / report.seconds:.0f} tokens/s", flush=True)

    for phase in PHASES[:PHASES.index(chosen.until) + 1]:
        rows = chosen.cache / "rows" / phase
        if not (rows / "timing.json").exists():
            sys.exit(f"{rows} is not built: python tools/adapter_data.py rows {phase} --data BENCHMARKS")
        made = plan(phase, chosen.cache)
        steps = job.steps_of(made)
        metrics = made.out / "metrics.jsonl"
        if not metrics.exists() or sum(1 for _ in metrics.open()) < steps:
            job.run(made, metrics.exists(), tell)


if __name__ == "__main__":
    main()
