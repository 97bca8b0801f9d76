"""What happens to a job: kill -9, a full disk, a folder of somebody else, a second process at once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sweep.jobs import (
    CACHE,
    MINE,
    NOBODY,
    Job,
    Reference,
    finish,
    first_change,
    make_case,
    names,
    same_answer,
    start,
    untouched,
)
from sweep.judges import complete, contents, equal, error_text, no_leftovers


class Skipped(Exception):
    """This machine cannot do the case; the message says why."""


@dataclass(frozen=True)
class Fault:
    """`run(job, reference, inputs, case, chance)` returns the violations of its law in an empty case."""

    name: str
    law: str
    run: Callable[[Job, Reference, Path, Path, random.Random], list[str]]


def killed(job: Job, reference: Reference, inputs: Path, case: Path, chance: random.Random) -> list[str]:
    """One to three kills, a quarter of them before anything is on disk, then a run to the end."""
    make_case(case)
    violations = []
    for number in range(chance.randint(1, 3)):
        again = job.again if number and (case / job.results[0].split("/**")[0]).exists() else ()
        before = names(case)
        process = start((*job.arguments, *again), inputs, case)
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0, reference.first))
        else:
            first_change(process, case / job.writes, before)
            time.sleep(chance.uniform(0, reference.seconds - reference.first))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if job.atomic:
            violations += complete(reference.results, job.contents(case), "after a kill")
    return violations + finish(job, reference, inputs, case) + no_leftovers(case, MINE) + untouched(case)


def full_disk(job: Job, reference: Reference, inputs: Path, case: Path, chance: random.Random) -> list[str]:
    """Too little room for the job; then enough."""
    share = chance.uniform(0.05, 0.9)
    with small_disk(case, int(reference.used * share)) as (file_bytes, make_room):
        make_case(case)
        process = start(job.arguments, inputs, case, file_bytes=file_bytes)
        answer, errors = process.communicate()
        violations = failed_well(job, reference, case, process.returncode, answer, errors)
        violations += no_leftovers(case, MINE) if job.atomic else []
        make_room()
        return violations + finish(job, reference, inputs, case) + no_leftovers(case, MINE) + untouched(case)


@contextlib.contextmanager
def small_disk(case: Path, room: int) -> Iterator[tuple[int, Callable[[], object]]]:
    """A tmpfs of `room` bytes at `case`, or else the largest size of a file (0: none); and what lifts it."""
    case.mkdir()
    if not can_mount(case):
        yield max(room, 4096), lambda: None
        return
    size = max(room, 128 << 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", case], check=True)
    try:
        yield 0, lambda: subprocess.run(["mount", "-o", "remount,size=4g", case], check=True)
    finally:
        subprocess.run(["umount", "--lazy", case], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs, tried at an empty folder."""
    if not shutil.which("mount"):
        return False
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def failed_well(job: Job, reference: Reference, case: Path, code: int, answer: str, errors: str) -> list[str]:
    """A run that was hindered: it fails with a path and a remedy, or succeeds with the right answer and
    result; what it could not save, it says in a note."""
    if code == 0:
        results, right = job.contents(case), same_answer(job, answer, reference.answers[0])
        wrong = [] if right else [f"exit 0 with the answer {answer[:80]!r}"]
        if results == reference.results:
            return wrong
        return wrong + (
            error_text(errors, case) if "note: " in errors else ["exit 0 without the result or a note"]
        )
    signalled = [f"it ends by signal {-code}"] if code < 0 else []
    partial = complete(reference.results, job.contents(case), "after a failure") if job.atomic else []
    return signalled + error_text(errors, case) + partial


def read_only(job: Job, reference: Reference, inputs: Path, case: Path, chance: random.Random) -> list[str]:
    return _refused(job, reference, inputs, case, chance, foreign=False)


def foreign(job: Job, reference: Reference, inputs: Path, case: Path, chance: random.Random) -> list[str]:
    return _refused(job, reference, inputs, case, chance, foreign=True)


def _refused(
    job: Job, reference: Reference, inputs: Path, case: Path, chance: random.Random, foreign: bool
) -> list[str]:
    """The cache folder of the user, or the folder of the results, cannot be written."""
    make_case(case)
    prefix = as_nobody(inputs) if os.geteuid() == 0 else []
    if foreign and not prefix:
        raise Skipped("a folder of another user needs root")
    folder = case / (CACHE if job.writes == CACHE or chance.random() < 0.5 else "work")
    folder.mkdir(exist_ok=True)
    if prefix:
        for path in (case, *case.glob("**/*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    if foreign:
        os.chown(folder, 0, 0)
    folder.chmod(0o755 if foreign else 0o555)
    before = contents(folder)
    process = start(job.arguments, inputs, case, prefix)
    answer, errors = process.communicate()
    folder.chmod(0o755)
    violations = failed_well(job, reference, case, process.returncode, answer, errors)
    return (
        violations
        + equal(before, contents(folder), "the folder")
        + no_leftovers(case, MINE)
        + untouched(case)
    )


def as_nobody(inputs: Path) -> list[str]:
    """The start of a command that runs as nobody. Where only root reads the interpreter or `inputs`, it
    keeps the capability to read everything, and none to write."""
    if not shutil.which("setpriv"):
        raise Skipped("it needs setpriv, of util-linux")
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if reads(command, inputs):
        return command
    command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    if not reads(command, inputs):
        raise Skipped("nobody cannot read this interpreter")
    return command


def reads(command: list[str], folder: Path) -> bool:
    """Whether a command that runs as nobody starts this interpreter with its libraries and reads `folder`."""
    program = [
        *command,
        sys.executable,
        "-c",
        "import os, sys, numpy, typer; os.listdir(sys.argv[1])",
        str(folder),
    ]
    try:
        return subprocess.run(program, capture_output=True, cwd="/").returncode == 0
    except OSError:
        return False


def two(job: Job, reference: Reference, inputs: Path, case: Path, chance: random.Random) -> list[str]:
    """Two processes at once: each succeeds, or is refused in words; one succeeds, and its result is right."""
    make_case(case)
    pair = [start(job.arguments, inputs, case)]
    time.sleep(chance.choice([0, chance.uniform(0, reference.seconds)]))
    pair.append(start(job.twin or job.arguments, inputs, case))
    ends = [process.communicate() for process in pair]
    expected = [reference.answers[0], reference.answers[1] if job.twin else reference.answers[0]]
    violations, succeeded = [], 0
    for process, (answer, errors), right in zip(pair, ends, expected, strict=True):
        if process.returncode:
            violations += error_text(errors, case)
        else:
            succeeded += 1
            violations += [] if same_answer(job, answer, right) else [f"one of two answers {answer[:80]!r}"]
    if not succeeded:
        violations.append("neither of two succeeds")
    if not job.twin:
        violations += equal(reference.results, job.contents(case), "after two at once")
    elif not job.contents(case):
        violations.append("nothing was saved")
    else:  # of two different commands, whoever was last; a third run reads it
        process = start(job.arguments, inputs, case)
        if process.communicate()[0] != reference.answers[0] or process.returncode:
            violations.append("a third run does not give the answer")
    return violations + no_leftovers(case, MINE) + untouched(case)


FAULTS = (
    Fault(
        "kill -9", "complete or absent; the next run's bytes and answer equal an undisturbed run's", killed
    ),
    Fault(
        "full disk", "path and remedy, or a right answer with a note; with room, the same bytes", full_disk
    ),
    Fault("read-only folder", "path and remedy, or a right answer; nothing written there", read_only),
    Fault("foreign folder", "path and remedy, or a right answer; nothing written there", foreign),
    Fault("two at once", "each right or refused in words, one right; the same bytes", two),
)


def can_mount_below(folder: Path) -> bool:
    """Whether this user may mount a tmpfs in a new folder there."""
    place = folder / "mount"
    place.mkdir()
    try:
        return can_mount(place)
    finally:
        place.rmdir()
