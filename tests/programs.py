"""Skips tests whose programs are missing or broken on this machine, with the reason."""

import functools
import shutil
import subprocess

import pytest


@functools.cache
def fault(program: str, *arguments: str) -> str:
    """Why a program cannot be used, or ""."""
    if not shutil.which(program):
        return f"{program} is not installed"
    try:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} is there but does not run: {error}"
    if result.returncode:
        return f"{program} is there but broken: exit code {result.returncode}: {result.stderr.strip()[:200]}"
    return ""


def needs(program: str, *arguments: str) -> pytest.MarkDecorator:
    """Skips a test where a program, run with `arguments` (by default --version), fails."""
    reason = fault(program, *(arguments or ("--version",)))
    return pytest.mark.skipif(bool(reason), reason=reason)
