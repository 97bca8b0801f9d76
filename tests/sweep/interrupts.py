"""Ctrl-C at random moments: PYTHONPATH=.:tests python -m sweep.interrupts [ROUNDS [VERB ...]], by default
100 rounds of all verbs.

The law: exit code 130 (or 0, where the verb was done before), no traceback, no unfinished file. While Python
itself starts, before it has read our first line, its own traceback is let pass.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tiny import tiny_config, write_tiny_gguf

STARTUP = 0.3  # seconds, of Python itself on a busy machine
TINY = ("-m", "tiny.gguf")
VERBS: dict[str, tuple[list[str], float]] = {  # a command line, and within how many seconds it is interrupted
    "generate": (["generate", "-p", "x = ", "-n", "9999"], 4),
    "complete": (["complete", "hole.py", "--trim", "none", "-n", "9999"], 4),
    "chat": (["chat"], 3),
    "models": (["models"], 0.7),
    "bench": (["bench"], 6),
    "convert": (["convert", "gemma-3-270m", "new.gguf", "--overwrite", "--quantize", "q8_0"], 5),
    "verify": (["verify", "gemma-3-270m", "gemma-3-270m"], 3),
    "inspect": (["inspect", "gemma-3-270m"], 2),
    "export": (["export", "llamacpp", "gemma-3-270m", "exported{n}"], 5),
    "card": (["card", "gemma-3-270m"], 1),
    "pull": (["pull", "2b"], 1),
    "install": (["install", "tiny.gguf"], 1),
    "train": (["train", "rows", *TINY, "--batch-tokens", "512", "--out", "trained{n}"], 20),
    "tune": (["tune", "code", *TINY, "--minutes", "0.5", "--holes", "12", "--out", "tuned{n}"], 30),
    "serve": (["serve", *TINY, "--port", "0"], 4),
    "lsp": (["lsp", *TINY], 3),
    "setup": (["setup", "neovim"], 0.7),
    "stats": (["stats"], 0.7),
    "data build": (["data", "build", "code", "--out", "rows{n}", "--workers", "2"], 8),
    "data show": (["data", "show", "rows"], 1),
    "data report": (["data", "report", "rows"], 4),
    "eval list": (["eval", "list"], 0.7),
    "eval run": (["eval", "run", "boolq", *TINY, "--data", "code"], 2),
    "eval doctor": (["eval", "doctor"], 8),
}


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "codegemma.cli", *arguments]


def interrupt(verb: str, work: Path, number: int) -> tuple[int, str]:
    """The exit code of a verb that got Ctrl-C as a terminal sends it, and what broke the law, or ""."""
    arguments, seconds = VERBS[verb]
    line = [word.replace("{n}", str(number)) for word in arguments]
    process = subprocess.Popen(
        command(line),
        cwd=work,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(STARTUP + random.random() * seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    stdin, process.stdin = process.stdin, None  # stays open meanwhile
    _, errors = process.communicate(timeout=300)
    assert stdin
    stdin.close()
    broken = [word for word in ("Traceback", "leaked", "Exception", "terminate called") if word in errors]
    if broken:
        places = [line.strip() for line in errors.splitlines() if line.startswith('  File "')]
        if places and not any("codegemma/cli/" in place for place in places):  # before our first line
            return process.returncode, ""
        broken += places[-1:]
    broken += [str(path) for path in work.rglob(f".*.{process.pid}-*.part")]
    if process.returncode not in (130, 0, 2):  # 2: bad input, as of `install`
        broken.append(f"exit code {process.returncode}")
    return process.returncode, ", ".join(broken)


def main(rounds: int, verbs: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="interrupts-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        write_tiny_gguf(work / "tiny.gguf", tiny_config("gemma-mqa"))
        (work / "hole.py").write_text("def add(a, b):\n    return <CURSOR>\n")
        (work / "code").mkdir()
        for n in range(40):
            text = "".join(f"def f{n}_{i}(a, b):\n    return a + {i} * b\n\n\n" for i in range(40))
            (work / "code" / f"m{n}.py").write_text(text)
        build = ["data", "build", "code", "--out", "rows", "--length", "256", "--tokenizer", "tiny.gguf"]
        subprocess.run(command(build), cwd=work, check=True, capture_output=True)
        faults = 0
        print("| verb | exit codes | law |\n|---|---|---|")
        for verb in verbs:
            results = [interrupt(verb, work, number) for number in range(rounds)]
            broken = [fault for _, fault in results if fault]
            codes = ", ".join(f"{n} x {code}" for code, n in Counter(code for code, _ in results).items())
            print(f"| {verb} | {codes} | {'; '.join(broken) or 'held'} |", flush=True)
            faults += len(broken)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2:] or list(VERBS)))
