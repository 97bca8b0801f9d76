"""Programs that tests run: skips for those that are missing or broken here, and signals that reach them."""

import functools
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@functools.cache
def fault(program: str, *arguments: str) -> str:
    """Why a program, run with these arguments, cannot be used, or ""."""
    if not shutil.which(program):
        return f"{program} is not installed"
    try:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} is there but does not run: {error}"
    if result.returncode:
        return f"{program} is there but broken: exit code {result.returncode}: {result.stderr.strip()[:200]}"
    return ""


@functools.cache
def compiler_fault(compiler: str, *runner: str) -> str:
    """Why a C++ compiler cannot build a static program, or the runner not run it, or "": a version proves
    nothing, as a driver without a linker or a library prints one too.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "main.cpp"), Path(folder, "main")
        source.write_text("#include <vector>\nint main() { return std::vector<int>(3).size() - 3; }\n")
        return fault(compiler, "-static", str(source), "-o", str(program)) or fault(*runner, str(program))


def needs(program: str, *arguments: str) -> pytest.MarkDecorator:
    """Skips a test where a program, run with `arguments` (by default --version), fails."""
    reason = fault(program, *(arguments or ("--version",)))
    return pytest.mark.skipif(bool(reason), reason=reason)


def needs_compiler(compiler: str, *runner: str) -> pytest.MarkDecorator:
    """Skips a test where a C++ compiler cannot build programs that `runner`, if any, can run."""
    reason = compiler_fault(compiler, *runner)
    return pytest.mark.skipif(bool(reason), reason=reason)


# A sandbox needs user namespaces, which containers and some systems refuse to a bubblewrap that is installed.
NO_SANDBOX = fault("bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "/bin/true")
needs_bwrap = pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX)


@contextmanager
def signals_act(*numbers: int) -> Iterator[None]:
    """Programs started meanwhile die of these signals, which a run under nohup or in the background ignores,
    and with it all that it starts. A `preexec_fn` would fork, which JAX's threads do not bear."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
