"""Runs the sweep and prints its table: make sweep, or PYTHONPATH=.:tests python -m sweep [OPTIONS]."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sweep import clients, storage
from sweep.jobs import JOBS, Job, Reference, make_case, make_inputs, measure

MODELS = {"the tiny model": "{input}/tiny.gguf", "the default model": "gemma-3-270m"}


@dataclass(frozen=True)
class Row:
    """A line of the table. `violations` are sentences; `note`: what was measured, or why it was skipped."""

    case: str
    runs: int
    law: str
    violations: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        result = f"BROKE: {self.violations[0]}" if self.violations else "held" if self.runs else "skipped"
        more = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
        cells = (self.case, str(self.runs), self.law, result + more + (f"; {self.note}" if self.note else ""))
        return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def sweep(runs: int, seconds: float, only: str, seed: int, root: Path) -> Iterator[Row]:
    """The rows of all cases whose name contains `only`; all is done below `root`, an empty folder."""
    root.chmod(0o755)  # for cases that run as another user
    inputs = root / "inputs"
    make_inputs(inputs)
    for job in JOBS:
        faults = [fault for fault in storage.FAULTS if only in f"{fault.name}: {job.name}"]
        if faults:
            reference = measure(job, inputs, make_case(root / f"alone {job.name}"))
            for fault in faults:
                yield disturb(fault, job, reference, inputs, root / "case", runs, seed)
    for name, model in MODELS.items():
        case = f"40 clients, 5 hostile: {name}"
        if only in case:
            home, chance = make_case(root / name), random.Random(f"{seed} {case}")
            violations, note = clients.besiege(model.format(input=inputs), home, seconds, chance)
            yield Row(case, 1, clients.LAW, tuple(violations), f"{seconds:g} s: {note}")


def disturb(
    fault: storage.Fault, job: Job, reference: Reference, inputs: Path, case: Path, runs: int, seed: int
) -> Row:
    """Several runs of a case, each drawn from the seed, its name and the run's number."""
    name, violations = f"{fault.name}: {job.name}", []
    for number in range(runs):
        try:
            found = fault.run(job, reference, inputs, case, random.Random(f"{seed} {name} {number}"))
        except storage.Skipped as reason:
            return Row(name, 0, fault.law, note=str(reason))
        finally:
            shutil.rmtree(case, ignore_errors=True)
        violations += [f"run {number}: {violation}" for violation in found]
    quota = fault.run is storage.full_disk and not storage.can_mount_below(case.parent)
    return Row(name, runs, fault.law, tuple(violations), "by RLIMIT_FSIZE, without a mount" if quota else "")


def main() -> int:
    """Prints the table; the result is 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="make sweep", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="runs of each case of files (default: 10)")
    parser.add_argument("--seconds", type=float, default=300, help="seconds of clients (default: 300)")
    parser.add_argument("--only", default="", metavar="NAME", help="only cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="decides every moment and choice (default: 0)")
    options = parser.parse_args()
    broken = []
    print("| case | runs | law | result |\n|---|---|---|---|", flush=True)
    with contextlib.ExitStack() as stack:
        root = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="sweep-", ignore_cleanup_errors=True))
        )
        for row in sweep(options.runs, options.seconds, options.only, options.seed, root):
            print(row, flush=True)
            broken += [f"{row.case}: {violation}" for violation in row.violations]
    print("".join(f"{line}\n" for line in broken), file=sys.stderr, end="")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
