"""Runs a program that nobody trusts: no network, a read-only system, a private /tmp, limits."""

from codegemma.sandbox.host import Limits, Outcome, Result, Sandbox, SandboxError, default, run, run_python

__all__ = ["Limits", "Outcome", "Result", "Sandbox", "SandboxError", "default", "run", "run_python"]
