"""The jobs that the sweep disturbs, each a command line whose result is the same bytes in every run."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tiny import tiny_config, write_tiny_gguf

from sweep.judges import Contents, contents, equal

ROOT = Path(__file__).resolve().parents[2]
CACHE = "home/.cache/codegemma"
MINE = ("work/notes.txt", "work/.notes.part", "work/deep/.x.123.swp", "home/notes.txt", "home/.cache/x.part")
NOBODY = 65534


@dataclass(frozen=True)
class Job:
    """`{input}` and `{case}` in `arguments` stand for the folder of inputs and that of the case, which has
    home/ and work/.

    `results` are patterns below the case's folder, without what `volatile` matches. `writes` is the folder of
    its results. `atomic`: a result is complete or missing. `again` continues an interrupted run; `twin` is
    what a second process does at the same time, where that is another command.
    """

    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    writes: str = "work"
    volatile: tuple[str, ...] = ()
    atomic: bool = True
    again: tuple[str, ...] = ()
    twin: tuple[str, ...] = ()

    def contents(self, case: Path) -> Contents:
        """The results, as far as they are there."""
        found = contents(case, self.results)
        return {path: hash for path, hash in found.items() if not path.endswith(self.volatile)}


_TINY = ("-m", "{input}/tiny.gguf", "-t", "1")
_COMPLETE = ("complete", "{input}/hole.py", "-n", "8")
_CACHED = ("--cache", "{case}/work/cache.bin")
JOBS = (
    Job("convert", ("convert", "{input}/tiny.gguf", "{case}/work/out.gguf", "--quantize", "q4_k_m"),
        ("work/out.gguf",), again=("--overwrite",)),
    Job("data build", ("data", "build", "{input}/code", "--out", "{case}/work/rows", "--length", "256",
                       "--languages", "python", "--licences", "any", "--tokenizer", "{input}/tiny.gguf"),
        ("work/rows/**/*",), volatile=("/timing.json",), atomic=False, again=("--resume",)),
    Job("cache saving", (*_COMPLETE, *_TINY, *_CACHED), ("work/cache.bin",),
        twin=("complete", "{input}/other.py", "-n", "8", *_TINY, *_CACHED)),
    Job("first-run assembly", (*_COMPLETE, "-m", "gemma-3-270m"), (f"{CACHE}/models/**/*",), CACHE,
        volatile=(".verified",)),
    Job("pull from a folder", ("pull", "{input}/model", "--source", "path", "--accept-terms"),
        (f"{CACHE}/models/**/*",), CACHE),
    Job("install of a pack", ("install", "{input}/model.pack"), (f"{CACHE}/models/**/*",), CACHE),
    Job("train", ("train", "{input}/rows", "-m", "{input}/tiny.gguf", "--out", "{case}/work/run",
                  "--steps", "4", "--save-every", "1", "--batch-tokens", "512",
                  "--micro-tokens", "256", "--lora-rank", "2"),
        ("work/run/adapter/adapter_*",), atomic=False, again=("--resume",)),
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its results, answers (of the job and of its twin), and seconds. `first` is when
    something appeared on disk; `used` is the bytes of the case's folder at its end."""

    results: Contents
    answers: tuple[str, str]
    seconds: float
    first: float
    used: int


def make_inputs(folder: Path) -> None:
    """A tiny model as a GGUF, a folder and a pack, code with a hole in it, and rows to train on."""
    config = tiny_config("gemma-mqa", width=256, ffn_width=512, layers=12)
    code = folder / "code" / "project"
    code.mkdir(parents=True)
    write_tiny_gguf(folder / "tiny.gguf", config, "BF16")
    for number in range(8):
        lines = (f"def f{number}_{i}(x):\n    return x * {i * number + 3} + {i}\n\n" for i in range(12))
        (code / f"m{number}.py").write_text("".join(lines))
    for name, number in (("hole.py", 1), ("other.py", 2)):
        text = (code / f"m{number}.py").read_text()[:600]
        (folder / name).write_text(f"{text}\ndef g(x):\n    return <CURSOR>\n")
    made = make_case(folder / "making")
    for arguments in (
        ("convert", "{input}/tiny.gguf", "{input}/model", "--to", "safetensors"),
        ("pull", "{input}/model", "--source", "path", "--accept-terms", "--pack", "{input}/model.pack"),
        (*JOBS[1].arguments[:3], "--out", "{input}/rows", *JOBS[1].arguments[5:]),
    ):
        process = start(arguments, folder, made)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{arguments}: {errors}")


def make_case(folder: Path) -> Path:
    """An empty home and work folder, with files of the user's in both."""
    for name in ("home/.cache", "work", "tmp"):
        (folder / name).mkdir(parents=True)
    for name in MINE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return folder


def untouched(case: Path) -> list[str]:
    """The user's own files are as they were."""
    kept = {name: path.read_text() if path.is_file() else "" for name in MINE if (path := case / name)}
    return [f"the user's {name} was touched" for name, text in kept.items() if text != f"mine: {name}"]


def environment(case: Path) -> dict[str, str]:
    """Nothing of the user's: a home and a temporary folder below the case's."""
    paths = {"HOME": str(case / "home"), "TMPDIR": str(case / "tmp"), "PYTHONPATH": str(ROOT)}
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, **paths, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}


def start(
    arguments: Iterable[str], inputs: Path, case: Path, prefix: Iterable[str] = (), file_bytes: int = 0
) -> subprocess.Popen[str]:
    """Starts `codegemma ARGUMENTS` in its own process group; 0 `file_bytes` is no limit of a file's size."""
    command = [argument.format(input=inputs, case=case) for argument in arguments]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "codegemma.cli", *command],
        cwd=case / "work",
        env=environment(case),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit if file_bytes else None,
    )


def first_change(process: subprocess.Popen[str], folder: Path, before: set[str]) -> None:
    """Waits until something new lies below `folder`, or the process has ended."""
    while process.poll() is None and names(folder) <= before:
        time.sleep(0.005)


def names(folder: Path) -> set[str]:
    return {str(path) for path in folder.glob("**/*")}


def finish(job: Job, reference: Reference, inputs: Path, case: Path, resumed: bool = True) -> list[str]:
    """Runs the job to its end: it succeeds, with the answer and the bytes of the uninterrupted run."""
    again = job.again if resumed and names_of_results(job, case) else ()
    process = start((*job.arguments, *again), inputs, case)
    answer, errors = process.communicate()
    if process.returncode:
        return [f"the next run fails: {errors.strip()[-300:]}"]
    wrong = (
        [] if same_answer(job, answer, reference.answers[0]) else [f"the next run answers {answer[:80]!r}"]
    )
    return wrong + equal(reference.results, job.contents(case), "after the next run")


def names_of_results(job: Job, case: Path) -> bool:
    """Whether the folder or file that the job makes is there."""
    return any((case / pattern.split("/**")[0].split("/adapter")[0]).exists() for pattern in job.results)


def same_answer(job: Job, answer: str, expected: str) -> bool:
    """Of the verbs that answer, the text on stdout; the others print paths and times."""
    return job.arguments[0] != "complete" or answer == expected


def measure(job: Job, inputs: Path, case: Path) -> Reference:
    """The uninterrupted run. Raises RuntimeError where it fails, or leaves anything unfinished."""
    before, began = names(case), time.monotonic()
    process = start(job.arguments, inputs, case)
    first_change(process, case / job.writes, before)
    first = time.monotonic() - began
    answer, errors = process.communicate()
    seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"{job.name} fails undisturbed: {errors.strip()[-500:]}")
    used = sum(path.stat().st_blocks * 512 for path in case.glob("**/*") if path.is_file())
    results, other = job.contents(case), ""
    if job.twin:
        twin = start(job.twin, inputs, make_case(case / "twin"))
        other = twin.communicate()[0]
    return Reference(results, (answer, other), seconds, first, used)
